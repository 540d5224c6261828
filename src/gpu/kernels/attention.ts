/**
 * Attention within packed segments of unequal length, without ever holding an L × L matrix.
 *
 * `MgpoAttention`: q [N, H, d], k and v [M, Hkv, d], cuSeqlens int32 [S + 1] (0 = c₀ ≤ c₁ ≤ … = N) for the queries, cuSeqlensK
 * int32 [S + 1] (to M) for the keys, as cuSeqlens where absent; attributes `causal`, `scale`. Segment s has Lq queries and
 * Lk ≥ Lq keys (≥ 1 if not causal). Its query i and key j, both counted in the segment, meet iff not causal or
 * j ≤ i + Lk − Lq. Head h reads key head ⌊h·Hkv/H⌋. Outputs:
 *
 * - out [N, H, d] = Σ_j p_ij v_j with p_i = softmax_j(scale · q_i·k_j),
 * - lse [N, H] = ln Σ_j exp(scale · q_i·k_j), which the gradient needs.
 *
 * 32 queries meet 32 keys at a time under a running maximum (see `attention_tiles.ts`). Tiles of queries are cut from the packed
 * tokens and find their segments on the device, so nothing depends on the lengths but the work: a tile that spans several
 * segments walks over all their keys. Cost: 4·P·d operations and P exponentials per head and segment, where P pairs meet:
 * Lq·Lk, less Lq²/2 if causal. Adapters that compute on the processor run the shaders of `attention_direct.ts` (attribute `software`
 * overrules what the adapter says).
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { directAttention, directGrid, fitsDirect } from "./attention_direct.ts";
import {
  attentionShape,
  declarations,
  declareSums,
  loadColumns,
  loadRows,
  meet,
  piecesOf,
  place,
  range,
  ranges,
  reader,
  scoreProduct,
  segmentStarts,
  storeSums,
  sumsOf,
  THREADS,
  tileGrid,
  uniforms,
  weighted,
} from "./attention_tiles.ts";
import type { Kernel, KernelCall, Shader } from "./runtime.ts";

/** The kernel. */
export const attention: readonly Kernel[] = [{ name: "MgpoAttention", run: attend }];

function attentionShader(d: number, causal: boolean): Shader {
  const pieces = piecesOf(d), single = pieces.length === 1;
  const scores = pieces.map((piece) =>
    `workgroupBarrier();
  ${single ? "" : loadRows("q", "head", piece)}
  ${loadColumns("k", "keyHead", piece, d)}
  workgroupBarrier();
  ${scoreProduct("s", piece, d)}`
  );
  const products = pieces.map((piece) =>
    `workgroupBarrier();
  ${loadColumns("v", "keyHead", piece, d)}
  workgroupBarrier();
  ${weighted("o", piece, d)}`
  );
  const sums = pieces.flatMap((piece) => sumsOf("o", piece));
  return {
    storage: [
      ...["q", "k", "v"].map((name) => ({ name, type: "f32" } as const)),
      { name: "cu", type: "i32" },
      { name: "result", type: "f32", write: true },
      { name: "lse", type: "f32", write: true },
    ],
    uniforms,
    threads: THREADS,
    code: `${declarations(d)}
var<workgroup> lanesOf: array<vec4<f32>, 64>;
${reader("q", "heads", d)}
${reader("k", "keyHeads", d)}
${reader("v", "keyHeads", d)}`,
    main: `${place("heads")}
let head = wg.y;
let keyHead = head / (u.heads / u.keyHeads);
${ranges(causal, "keys")}
var top = vec4<f32>(-1e30);
var total = vec4<f32>();
${declareSums("o", pieces)}
${single ? loadRows("q", "head", pieces[0]) : ""}
for (var at = begin; at < end; at += 32u) {
  let count = min(32u, end - at);
  ${range(4).map((j) => `var s${j} = vec4<f32>();`).join(" ")}
  ${scores.join("\n  ")}
  ${meet}
  ${range(4).map((j) => `s${j} = select(vec4<f32>(-1e30), s${j} * u.scale, ok${j});`).join("\n  ")}
  lanesOf[ty * 8u + tx] = max(max(s0, s1), max(s2, s3));
  workgroupBarrier();
  var most = top;
  for (var i = 0u; i < 8u; i++) { most = max(most, lanesOf[ty * 8u + i]); }
  let shrink = exp(top - most);
  top = most;
  total *= shrink;
  ${sums.map((sum) => `${sum} *= shrink;`).join("\n  ")}
  ${
      range(4).map((j) =>
        `let p${j} = select(vec4<f32>(), exp(s${j} - most), ok${j});
  total += p${j};
  weights[(tx + ${8 * j}u) * 8u + ty] = p${j};`
      ).join("\n  ")
    }
  ${products.join("\n  ")}
}
workgroupBarrier();
lanesOf[ty * 8u + tx] = total;
workgroupBarrier();
var whole = vec4<f32>();
for (var i = 0u; i < 8u; i++) { whole += lanesOf[ty * 8u + i]; }
${storeSums("o", "result", "heads", "head", pieces, d, (sum) => `${sum} / whole`)}
if (tx == 0u) {
  let l = top + log(whole);
  ${
      range(4).map((c) => `if (mine + ${c}u < u.tokens) { lse[(mine + ${c}u) * u.heads + head] = l.${"xyzw"[c]}; }`)
        .join("\n  ")
    }
}`,
  };
}

function attend(call: KernelCall): tf.TensorInfo[] {
  const shape = attentionShape(call), { tokens, heads, d } = shape;
  const [causal, scale] = [call.flag("causal"), call.number("scale")];
  const [q, k, v] = ["q", "k", "v"].map((name) => call.input(name));
  const out = call.output(q.shape), lse = call.output([tokens, heads]);
  if (tokens * heads * d === 0) return [out, lse];
  const { cu, keyStarts } = segmentStarts(call), values = { ...shape, keyStarts, scale };
  const direct = fitsDirect(d) && call.flag("software", call.software);
  const make = () => direct ? directAttention(d, causal) : attentionShader(d, causal);
  const grid = direct ? directGrid(tokens, heads) : tileGrid(tokens, heads);
  call.dispatch(`${call.name} ${d} ${causal} ${direct}`, make, [q, k, v, cu, out, lse], values, grid);
  return [out, lse];
}
