/**
 * Gradient of `attention.ts`, recomputing the probabilities tile by tile.
 *
 * `MgpoAttentionGrad`: q, k, v, out, lse, cuSeqlens, cuSeqlensK as there, dout [N, H, d]; attributes `causal`, `scale` →
 * dq [N, H, d], dk and dv [M, Hkv, d]. With p_ij = exp(scale · q_i·k_j − lse_i) for pairs that meet, else 0:
 *
 * - dv_j = Σ_i p_ij · dout_i
 * - ds_ij = scale · p_ij · (dout_i·v_j − dout_i·out_i)
 * - dq_i = Σ_j ds_ij · k_j, dk_j = Σ_i ds_ij · q_i, summed over the query heads that share a key head.
 *
 * Three dispatches: lse and dout_i·out_i side by side; dq, by tiles of queries; dk and dv, by tiles of keys, which walk over the query heads
 * themselves. Each output element is summed by one thread in a fixed order. Cost: 14·P·d operations and 2·P exponentials per head and
 * segment, where P pairs meet: Lq·Lk, less Lq²/2 if causal. The last two have another form, as in `attention.ts`, for adapters that
 * compute on the processor.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { directGrid, directKeyGrad, directQueryGrad, fitsDirect } from "./attention_direct.ts";
import {
  attentionShape,
  declarations,
  declareSums,
  loadColumns,
  loadRows,
  meet,
  type Piece,
  piecesOf,
  place,
  range,
  ranges,
  reader,
  scoreProduct,
  segmentStarts,
  storeSums,
  THREADS,
  tileGrid,
  uniforms,
  weighted,
} from "./attention_tiles.ts";
import { element, elements, ELEMENTWISE } from "./lanes.ts";
import type { Kernel, KernelCall, Shader } from "./runtime.ts";

/** The kernel. */
export const attentionGrad: readonly Kernel[] = [{ name: "MgpoAttentionGrad", run: differentiate }];

/** pair [N, H, 2]: lse and dout·out of each query. */
function pairShader(d: number): Shader {
  return {
    storage: [
      ...["result", "dout", "lse"].map((name) => ({ name, type: "f32" } as const)),
      { name: "pair", type: "f32", write: true },
    ],
    uniforms: { size: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
var sum = 0.0;
for (var x = i * ${d}u; x < (i + 1u) * ${d}u; x++) { sum += dout[x] * result[x]; }
pair[2u * i] = lse[i];
pair[2u * i + 1u] = sum;`,
  };
}

const tensorNames = ["q", "k", "v", "dout", "pair"].map((name) => ({ name, type: "f32" } as const));

const code = (d: number): string =>
  [
    declarations(d),
    reader("q", "heads", d),
    reader("k", "keyHeads", d),
    reader("v", "keyHeads", d),
    reader("dout", "heads", d),
  ].join("\n");

/** Adds rows·columns of two tensors to a score tile, piece by piece. */
function product(sum: string, rows: [string, string], columns: [string, string], pieces: readonly Piece[], d: number) {
  return pieces.map((piece) =>
    `workgroupBarrier();
  ${loadRows(...rows, piece)}
  ${loadColumns(...columns, piece, d)}
  workgroupBarrier();
  ${scoreProduct(sum, piece, d)}`
  ).join("\n  ");
}

/** Adds weights·columns to a result, piece by piece. */
function applied(sum: string, columns: [string, string], pieces: readonly Piece[], d: number): string {
  return pieces.map((piece) =>
    `workgroupBarrier();
  ${loadColumns(...columns, piece, d)}
  workgroupBarrier();
  ${weighted(sum, piece, d)}`
  ).join("\n  ");
}

const zeroTiles = range(4).map((j) => `var s${j} = vec4<f32>(); var t${j} = vec4<f32>();`).join("\n  ");
const setWeights = (value: (j: number) => string): string =>
  range(4).map((j) => `weights[(tx + ${8 * j}u) * 8u + ty] = ${value(j)};`).join("\n  ");

function queryShader(d: number, causal: boolean): Shader {
  const pieces = piecesOf(d);
  const pick = (offset: number) =>
    `vec4<f32>(${
      range(4).map((c) => `pair[2u * (min(mine + ${c}u, u.tokens - 1u) * u.heads + head) + ${offset}u]`).join(", ")
    })`;
  return {
    storage: [...tensorNames, { name: "cu", type: "i32" }, { name: "dq", type: "f32", write: true }],
    uniforms,
    threads: THREADS,
    code: code(d),
    main: `${place("heads")}
let head = wg.y;
let keyHead = head / (u.heads / u.keyHeads);
${ranges(causal, "keys")}
let shift = ${pick(0)};
let mean = ${pick(1)};
${declareSums("o", pieces)}
for (var at = begin; at < end; at += 32u) {
  let count = min(32u, end - at);
  ${zeroTiles}
  ${product("s", ["q", "head"], ["k", "keyHead"], pieces, d)}
  ${product("t", ["dout", "head"], ["v", "keyHead"], pieces, d)}
  ${meet}
  ${setWeights((j) => `select(vec4<f32>(), u.scale * exp(s${j} * u.scale - shift) * (t${j} - mean), ok${j})`)}
  ${applied("o", ["k", "keyHead"], pieces, d)}
}
${storeSums("o", "dq", "heads", "head", pieces, d)}`,
  };
}

function keyShader(d: number, causal: boolean): Shader {
  const pieces = piecesOf(d);
  const both = range(4).map((j) =>
    `let query${j} = 2u * (min(column${j}, u.tokens - 1u) * u.heads + head);
  let p${j} = select(vec4<f32>(), exp(s${j} * u.scale - pair[query${j}]), ok${j});`
  ).join("\n  ");
  return {
    storage: [
      ...tensorNames,
      { name: "cu", type: "i32" },
      ...["dk", "dv"].map((name) => ({ name, type: "f32", write: true } as const)),
    ],
    uniforms,
    threads: THREADS,
    code: code(d),
    main: `${place("keyHeads")}
let keyHead = wg.y;
let group = u.heads / u.keyHeads;
${ranges(causal, "queries")}
${declareSums("a", pieces)}
${declareSums("b", pieces)}
for (var head = keyHead * group; head < (keyHead + 1u) * group; head++) {
for (var at = begin; at < end; at += 32u) {
  let count = min(32u, end - at);
  ${zeroTiles}
  ${product("s", ["k", "keyHead"], ["q", "head"], pieces, d)}
  ${product("t", ["v", "keyHead"], ["dout", "head"], pieces, d)}
  ${meet}
  ${both}
  ${setWeights((j) => `p${j}`)}
  ${applied("b", ["dout", "head"], pieces, d)}
  workgroupBarrier();
  ${setWeights((j) => `u.scale * p${j} * (t${j} - pair[query${j} + 1u])`)}
  ${applied("a", ["q", "head"], pieces, d)}
}
}
${storeSums("a", "dk", "keyHeads", "keyHead", pieces, d)}
${storeSums("b", "dv", "keyHeads", "keyHead", pieces, d)}`,
  };
}

function differentiate(call: KernelCall): tf.TensorInfo[] {
  const shape = attentionShape(call), { tokens, keyTokens, heads, keyHeads, d } = shape;
  const [q, k, v] = ["q", "k", "v"].map((name) => call.input(name));
  const out = call.input("out", q.shape), lse = call.input("lse", [tokens, heads]), dout = call.input("dout", q.shape);
  const [causal, scale] = [call.flag("causal"), call.number("scale")];
  if (tokens * heads * d === 0) return [q, k, v].map((tensor) => call.zeros(tensor.shape));
  const [dq, dk, dv] = [q, k, v].map((tensor) => call.output(tensor.shape));
  const pair = call.temporary([tokens, heads, 2]), size = tokens * heads;
  call.dispatch(`${call.name} pair ${d}`, () => pairShader(d), [out, dout, lse, pair], { size }, elements(size));
  const { cu, keyStarts } = segmentStarts(call);
  const given = [q, k, v, dout, pair, cu], values = { ...shape, keyStarts, scale };
  const direct = fitsDirect(d) && call.flag("software", call.software), grid = direct ? directGrid : tileGrid;
  const [byQuery, byKey] = direct ? [directQueryGrad, directKeyGrad] : [queryShader, keyShader];
  const key = `${d} ${causal} ${direct}`;
  call.dispatch(`${call.name} q ${key}`, () => byQuery(d, causal), [...given, dq], values, grid(tokens, heads));
  call.dispatch(`${call.name} k ${key}`, () => byKey(d, causal), [...given, dk, dv], values, grid(keyTokens, keyHeads));
  return [dq, dk, dv];
}
