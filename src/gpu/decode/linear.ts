/**
 * Linear layers of a decode step, fused with what stands before and after them.
 *
 * ```text
 * out = epilogue(norm(x) · Wᵀ)      x [rows, K], W [N, K] as checkpoints store it
 * ```
 *
 * - `qkv`: RMS norm; three matrices side by side; bias. The norm's factor is a number a row, so it is applied after the
 *   product, and its sum of squares is gathered while the product reads x: no pass of its own.
 * - `residual`: adds to what `out` holds (output projection, down projection).
 * - `swiglu`: RMS norm; two matrices; silu(gate)·up.
 * - `head`: RMS norm; temperature, noise and softmax sums; leaves one `Draw` a part of the vocabulary, no logits.
 * - `logits`: RMS norm; the head where a nucleus needs all logits of a row: written to `[rows, V]`.
 *
 * Cost: rows·N·K multiply-adds; W is read once for each block of up to 64 rows. A thread holds `rowsEach` × `outputsEach` sums;
 * `lanes` threads share the K axis and add up through workgroup memory in a fixed order, so results do not depend on timing.
 *
 * @module
 */
import {
  type BindingKind,
  considerFunction,
  declareBindings,
  drawStruct,
  gumbelFunctions,
  type Kernel,
  mathFunctions,
  stepStruct,
} from "./wgsl.ts";

/** How a workgroup is laid over rows, outputs and the K axis. All are powers of two. */
export interface Tile {
  /** Rows that a thread sums. */
  rowsEach: number;
  /** Groups of rows in a workgroup. */
  rowGroups: number;
  /** Outputs that a thread sums; a multiple of 4 for the head. */
  outputsEach: number;
  /** Groups of outputs in a workgroup. */
  outputGroups: number;
  /** Threads that share the K axis. */
  lanes: number;
}

/** Rows of a workgroup. */
export const tileRows = (t: Tile): number => t.rowsEach * t.rowGroups;
/** Outputs of a workgroup. */
export const tileOutputs = (t: Tile): number => t.outputsEach * t.outputGroups;

const ceilPower = (n: number): number => 2 ** Math.ceil(Math.log2(Math.max(1, n)));

/**
 * The tile for a number of running rows. A software adapter has no use for many threads: its sums stay whole (`lanes` 1). A GPU
 * needs many loads in flight: few rows share K among up to 64 threads, many rows among 8.
 *
 * @param depth K
 */
export function chooseTile(rows: number, depth: number, software: boolean): Tile {
  const rowsEach = Math.min(8, ceilPower(rows)), rowGroups = rows <= 8 ? 1 : Math.min(8, ceilPower(rows / 8));
  if (software) return { rowsEach, rowGroups, outputsEach: 4, outputGroups: 8, lanes: 1 };
  const most = ceilPower(Math.max(1, Math.floor(depth / 8) + 1)) / 2 || 1;
  const lanes = Math.max(1, Math.min(rows <= 8 ? 64 : 8, most));
  const threads = rows <= 8 ? 64 : 256;
  return { rowsEach, rowGroups, outputsEach: 4, outputGroups: Math.max(1, threads / (lanes * rowGroups)), lanes };
}

/** What a linear kernel computes. */
export type LinearKind =
  | { op: "qkv"; sizes: readonly [number, number, number] }
  | { op: "residual"; outputs: number }
  | { op: "swiglu"; outputs: number }
  | {
    op: "head";
    vocab: number;
    first: number;
    outputs: number;
    greedy: boolean;
    parts: number;
    firstPart: number;
    rounds: number;
  }
  | { op: "logits"; vocab: number; first: number; outputs: number; rounds: number };

/** Options of {@linkcode linearKernel}. */
export interface LinearOptions {
  kind: LinearKind;
  /** K: the width of x. Rows of x stand `⌈K/4⌉·4` apart, the gap zero. */
  depth: number;
  /** Added to the mean square; only where there is a norm. */
  eps: number;
  tile: Tile;
}

/** Elements between rows of an activation of that width. */
export const rowStride = (width: number): number => Math.ceil(width / 4) * 4;

interface Segment {
  weights: readonly string[];
  /** Of this segment. */
  outputs: number;
  /** Before this segment. */
  offset: number;
}

function segmentsOf(kind: LinearKind): Segment[] {
  if (kind.op === "qkv") {
    let offset = 0;
    return kind.sizes.map((outputs, i) => {
      const segment = { weights: [["wq", "wk", "wv"][i]], outputs, offset };
      offset += outputs;
      return segment;
    });
  }
  return [{ weights: kind.op === "swiglu" ? ["wg", "wu"] : ["w"], outputs: kind.outputs, offset: 0 }];
}

/** How many tiles of outputs a workgroup does, one after the other. */
const roundsOf = (kind: LinearKind): number => "rounds" in kind ? kind.rounds : 1;

/** Workgroups along the outputs. */
export function outputWorkgroups(kind: LinearKind, tile: Tile): number {
  const width = tileOutputs(tile) * roundsOf(kind);
  return segmentsOf(kind).reduce((sum, { outputs }) => sum + Math.ceil(outputs / width), 0);
}

const times = <T>(n: number, f: (i: number) => T): T[] => Array.from({ length: n }, (_, i) => f(i));

/** The loop over K of one segment, adding to the sums `a<weight>_<row>_<output>` and `ss<row>`. */
function productLoop({ weights, outputs }: Segment, { depth, tile, kind }: LinearOptions): string {
  const norm = kind.op !== "residual", quads = rowStride(depth) / 4, whole = depth % 4 === 0;
  const load = (w: string, n: number) =>
    whole ? `${w}[p${n} + k]` : `vec4f(${times(4, (c) => `${w}[p${n} + k * 4u + ${c}u]`).join(", ")})`;
  const rows = times(tile.rowsEach, (m) => m), outs = times(tile.outputsEach, (n) => n);
  return [
    ...outs.map((n) => `let p${n} = min(local + ${n}u, ${outputs - 1}u) * ${whole ? quads : depth}u;`),
    `for (var k = lane; k < ${quads}u; k += ${tile.lanes}u) {`,
    ...rows.map((m) => `var x${m} = x[(row0 + ${m}u) * ${quads}u + k];`),
    ...(norm ? rows.map((m) => `ss${m} += dot(x${m}, x${m});`) : []),
    ...(norm ? ["let nw = norm[k];", ...rows.map((m) => `x${m} *= nw;`)] : []),
    ...outs.flatMap((n) =>
      weights.flatMap((w, i) => [
        `let w${i}_${n} = ${load(w, n)};`,
        ...rows.map((m) => `a${i}_${m}_${n} += dot(x${m}, w${i}_${n});`),
      ])
    ),
    "}",
  ].join("\n");
}

/** Adds the lanes' sums up: afterwards `v<weight>_<i>_<output>` are the results of row `lane + i·lanes`, if it is below rowsEach. */
function joinLanes(sums: readonly string[], { rowsEach: rows, lanes }: Tile): string {
  const own = Math.ceil(rows / lanes);
  // `sums` holds names with # in the place of the row.
  return sums.map((name) => {
    const to = (i: number) => `let v${name.replace("#", String(i))} = `;
    if (lanes === 1) return times(rows, (m) => `${to(m)}${name.replace("#", String(m))};`).join("\n");
    return [
      ...times(rows, (m) => `part[t * ${rows}u + ${m}u] = ${name.replace("#", String(m))};`),
      "workgroupBarrier();",
      ...times(own, (i) => `${to(i)}lanesum(t - lane, min(lane + ${i * lanes}u, ${rows - 1}u));`),
      "workgroupBarrier();",
    ].join("\n");
  }).join("\n");
}

function epilogue(o: LinearOptions): string {
  const { kind, depth, tile, eps } = o, own = Math.ceil(tile.rowsEach / tile.lanes);
  const factor = (i: number) => `let f${i} = 1.0 / sqrt(vss${i} / ${depth}.0 + ${eps.toExponential()});`;
  const rows = times(own, (i) => {
    const store = (n: number): string => {
      const at = (stride: number) => `out[row * ${stride}u + offset + local + ${n}u]`;
      switch (kind.op) {
        case "qkv":
          return `${
            at(kind.sizes[0] + kind.sizes[1] + kind.sizes[2])
          } = va0_${i}_${n} * f${i} + bias[offset + local + ${n}u];`;
        case "residual":
          return `${at(rowStride(kind.outputs))} += va0_${i}_${n};`;
        case "swiglu":
          return `let g${n} = va0_${i}_${n} * f${i}; ` +
            `${at(rowStride(kind.outputs))} = g${n} / (1.0 + fexp(-g${n})) * (va1_${i}_${n} * f${i});`;
        case "logits":
          return `out[row * ${kind.vocab}u + ${kind.first}u + local + ${n}u] = va0_${i}_${n} * f${i};`;
        default:
          return "";
      }
    };
    const body = kind.op === "head"
      ? times(tile.outputsEach / 4, (q) => {
        const four = times(4, (c) => `va0_${i}_${q * 4 + c} * f${i}`).join(", ");
        return `if (local + ${q * 4}u < ${kind.outputs}u) { ` +
          `draw${i} = consider(draw${i}, rows[row], ${kind.first}u + local + ${q * 4}u, vec4f(${four})); }`;
      }).join("\n")
      : times(tile.outputsEach, (n) => `if (local + ${n}u < outputs) { ${store(n)} }`).join("\n");
    return [
      `if (lane + ${i * tile.lanes}u < ${tile.rowsEach}u) {`,
      `let row = row0 + lane + ${i * tile.lanes}u;`,
      ...(kind.op === "residual" ? [] : [factor(i)]),
      body,
      "}",
    ].join("\n");
  });
  return rows.join("\n");
}

function bindingList({ kind, depth }: LinearOptions): (readonly [BindingKind, string, string])[] {
  const quads = "array<vec4f>", floats = "array<f32>", weight = depth % 4 === 0 ? quads : floats;
  const x = ["read", "x", quads] as const, norm = ["read", "norm", quads] as const;
  const read = (name: string) => ["read", name, weight] as const;
  switch (kind.op) {
    case "qkv":
      return [x, norm, ["read", "bias", floats], read("wq"), read("wk"), read("wv"), ["write", "out", floats]];
    case "residual":
      return [x, read("w"), ["write", "out", floats]];
    case "swiglu":
      return [x, norm, read("wg"), read("wu"), ["write", "out", floats]];
    case "logits":
      return [x, norm, read("w"), ["write", "out", floats]];
    case "head":
      return [
        x,
        norm,
        read("w"),
        ["read", "suppressed", "array<u32>"],
        ["read", "rows", "array<Row>"],
        ["write", "out", "array<Draw>"],
        ["step", "step", "Step"],
      ];
  }
}

/** The kernel's text. Dispatch: x = {@linkcode outputWorkgroups}, y = blocks of {@linkcode tileRows} rows. */
export function linearKernel(o: LinearOptions): Kernel {
  const { kind, tile } = o, { rowsEach, lanes, outputGroups, rowGroups, outputsEach } = tile;
  const threads = lanes * outputGroups * rowGroups, segments = segmentsOf(kind), list = bindingList(o);
  const head = kind.op === "head", rounds = roundsOf(kind), width = tileOutputs(tile) * rounds;
  const sums = segments[0].weights.flatMap((_, i) => times(outputsEach, (n) => `a${i}_#_${n}`));
  const all = head || kind.op !== "residual" ? [...sums, "ss#"] : sums;
  let before = 0;
  const loops = segments.map((segment, i) => {
    const count = Math.ceil(segment.outputs / width), from = before;
    before += count;
    const test = i === segments.length - 1 ? "" : `if (group.x < ${before}u) `;
    return `${
      i ? "else " : ""
    }${test}{ local = (group.x - ${from}u) * ${width}u + first; offset = ${segment.offset}u; ` +
      `outputs = ${segment.outputs}u;\n${productLoop(segment, o)}\n}`;
  });
  const own = times(Math.ceil(rowsEach / lanes), (i) => i);
  const source = /* wgsl */ `
${head ? stepStruct : ""}
${mathFunctions}
${head ? drawStruct + (kind.greedy ? "" : gumbelFunctions) : ""}
${declareBindings(list)}
${head ? `const vocab = ${kind.vocab}u;\n${considerFunction(kind.greedy)}` : ""}
${
    lanes > 1
      ? `var<workgroup> part: array<f32, ${threads * rowsEach}>;
fn lanesum(first: u32, row: u32) -> f32 {
  var sum = 0.0;
  for (var j = 0u; j < ${lanes}u; j++) { sum += part[(first + j) * ${rowsEach}u + row]; }
  return sum;
}`
      : ""
  }
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) t: u32) {
  let lane = t % ${lanes}u;
  let outputGroup = (t / ${lanes}u) % ${outputGroups}u;
  let row0 = group.y * ${tileRows(tile)}u + t / ${lanes * outputGroups}u * ${rowsEach}u;
  ${head ? own.map((i) => `var draw${i} = emptyDraw();`).join("\n") : ""}
  for (var round = 0u; round < ${rounds}u; round++) {
    let first = round * ${tileOutputs(tile)}u + outputGroup * ${outputsEach}u;
    var local = 0u; var offset = 0u; var outputs = 0u;
    ${all.flatMap((name) => times(rowsEach, (m) => `var ${name.replace("#", String(m))} = 0.0;`)).join("\n")}
    ${loops.join("\n")}
    ${joinLanes(all, tile)}
    ${epilogue(o)}
  }
  ${
    head
      ? own.map((i) =>
        `if (lane + ${i * lanes}u < ${rowsEach}u) { out[(row0 + lane + ${
          i * lanes
        }u) * ${kind.parts}u + ${kind.firstPart}u ` +
        `+ group.x * ${outputGroups}u + outputGroup] = draw${i}; }`
      ).join("\n")
      : ""
  }
}
`;
  return { key: `linear ${JSON.stringify(o)}`, source, bindings: list.map(([kind]) => kind) };
}
