/**
 * Rotary positions, append to the cache, and grouped-query attention of one token a row, in one kernel.
 *
 * ```text
 * q, k ← rotated by position + step;  cache[row, step] ← k, v
 * out[row, h] = Σ_j softmax_j(q_h · k_j / √d) v_j,   j over prompt tokens, generated tokens, and this one
 * ```
 *
 * The prompt's keys and values are read where the prefill left them (packed `[N, Hkv, d]`; a row knows its start and length, and
 * rows may share a prompt); generated ones from the cache `[2, slots, capacity, Hkv, d]`. A workgroup does one query head of one
 * row, with a running maximum over chunks of one position a thread. The heads of a group rotate the new key each for
 * themselves, and the first of them stores it, so no workgroup reads what another writes.
 *
 * Cost: 2·d·length multiply-adds a head; keys and values are read once a query head. On a processor, where a barrier costs more
 * than the sums between two of them, one thread does a head of a row from end to end ({@linkcode loneAttentionKernel}).
 *
 * @module
 */
import { declareBindings, type Kernel, mathFunctions, stepStruct } from "./wgsl.ts";
import { rowStride } from "./linear.ts";

/** Sizes of {@linkcode attentionKernel}. */
export interface AttentionOptions {
  heads: number;
  kvHeads: number;
  headDim: number;
  /** Rows of the cache. */
  slots: number;
  /** Tokens of a row of the cache. */
  capacity: number;
  /** Threads of a workgroup, a power of two; for the lone form, heads of rows in a workgroup. */
  threads: number;
}

const bindings = (vec: string) =>
  [
    ["read", "qkv", `array<${vec}>`],
    ["read", "promptKeys", `array<${vec}>`],
    ["read", "promptValues", `array<${vec}>`],
    ["write", "cache", `array<${vec}>`],
    ["read", "turns", `array<${vec}>`], // [position, cos | sin, d / 2]
    ["read", "rows", "array<Row>"],
    ["write", "out", "array<f32>"],
    ["step", "step", "Step"],
  ] as const;

/** Where things begin that one head of one row reads, in vectors; `line` is the row among the running ones. */
const places = ({ heads, kvHeads, slots, capacity, headDim: d }: AttentionOptions, vectors: number) => /* wgsl */ `
  let row = rows[line];
  let kvHead = head / ${heads / kvHeads}u;
  let base = line * ${(heads + 2 * kvHeads) * vectors}u;
  let qAt = base + head * ${vectors}u;
  let kAt = base + (${heads}u + kvHead) * ${vectors}u;
  let vAt = base + (${heads + kvHeads}u + kvHead) * ${vectors}u;
  let slotAt = row.slot * ${capacity * kvHeads * vectors}u + kvHead * ${vectors}u;
  let valuesAt = ${slots * capacity * kvHeads * vectors}u;
  // The token before the one that this step draws is attending.
  let made = step.step - 1u;
  let angle = (row.position + made) * ${vectors}u;
  let stores = head % ${heads / kvHeads}u == 0u;
  let scale = ${(1 / Math.sqrt(d)).toExponential()};`;

/** How many floats a key is read at a time: half a head must be whole vectors, since halves rotate with each other. */
export function vectorWidth(headDim: number): 1 | 2 | 4 {
  return headDim % 8 === 0 ? 4 : headDim % 4 === 0 ? 2 : 1;
}

/** Reads `count` positions, adding to maximum `m`, sum `l` and the thread's share of the output. */
function visit(keys: string, values: string, first: (j: string) => string, count: string, valueShift: string, o: {
  threads: number;
  vectors: number;
  lanes: number;
  own: number;
}): string {
  const { threads, vectors, lanes, own } = o, groups = threads / lanes;
  const each = (f: (i: number) => string) => Array.from({ length: own }, (_, i) => f(i)).join("\n");
  return /* wgsl */ `
  for (var chunk = 0u; chunk < ${count}; chunk += ${threads}u) {
    let here = min(${threads}u, ${count} - chunk);
    let kAt = ${first(`(chunk + min(t, here - 1u))`)};
    var s = 0.0;
    for (var i = 0u; i < ${vectors}u; i++) { s += inner(qs[i], ${keys}[kAt + i]); }
    s = select(-1.0e30, s * scale, t < here);
    scores[t] = s;
    workgroupBarrier();
    var top = m;
    for (var i = 0u; i < here; i++) { top = max(top, scores[i]); }
    chances[t] = fexp(s - top);
    let shrink = fexp(m - top);
    m = top;
    l *= shrink;
    ${each((i) => `acc${i} *= shrink;`)}
    workgroupBarrier();
    for (var i = t / ${lanes}u; i < here; i += ${groups}u) {
      let p = chances[i];
      let vAt = ${first("(chunk + i)")}${valueShift};
      l += p;
      ${each((i) => `acc${i} += p * ${values}[vAt + min(lane + ${i * lanes}u, ${vectors - 1}u)];`)}
    }
  }`;
}

/** The kernel's text. Dispatch: x = heads, y = running rows. */
export function attentionKernel(o: AttentionOptions): Kernel {
  const { heads, kvHeads, headDim: d, threads } = o;
  const width = vectorWidth(d), vec = width === 1 ? "f32" : `vec${width}f`, vectors = d / width, half = vectors / 2;
  const lanes = Math.min(threads, 2 ** Math.ceil(Math.log2(vectors))), groups = threads / lanes;
  const own = Math.ceil(vectors / lanes), stride = kvHeads * vectors;
  const each = (f: (i: number) => string) => Array.from({ length: own }, (_, i) => f(i)).join("\n  ");
  const list = bindings(vec);
  const shape = { threads, vectors, lanes, own };
  const source = /* wgsl */ `
${stepStruct}
${mathFunctions}
${declareBindings(list)}
fn inner(a: ${vec}, b: ${vec}) -> f32 { return ${width === 1 ? "a * b" : "dot(a, b)"}; }
var<workgroup> qs: array<${vec}, ${vectors}>;
var<workgroup> ks: array<${vec}, ${vectors}>;
var<workgroup> scores: array<f32, ${threads}>;
var<workgroup> chances: array<f32, ${threads}>;
var<workgroup> shares: array<${vec}, ${threads * own}>;
var<workgroup> sums: array<f32, ${groups}>;
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) id: vec3u, @builtin(local_invocation_index) t: u32) {
  let head = id.x;
  let line = id.y;
  ${places(o, vectors)}
  for (var i = t; i < ${half}u; i += ${threads}u) {
    let c = turns[angle + i];
    let s = turns[angle + ${half}u + i];
    let q0 = qkv[qAt + i]; let q1 = qkv[qAt + ${half}u + i];
    let k0 = qkv[kAt + i]; let k1 = qkv[kAt + ${half}u + i];
    qs[i] = q0 * c - q1 * s;
    qs[${half}u + i] = q1 * c + q0 * s;
    ks[i] = k0 * c - k1 * s;
    ks[${half}u + i] = k1 * c + k0 * s;
  }
  workgroupBarrier();
  if (stores) {
    for (var i = t; i < ${vectors}u; i += ${threads}u) {
      cache[slotAt + made * ${stride}u + i] = ks[i];
      cache[valuesAt + slotAt + made * ${stride}u + i] = qkv[vAt + i];
    }
  }
  let lane = t % ${lanes}u;
  var own = 0.0;
  for (var i = 0u; i < ${vectors}u; i++) { own += inner(qs[i], ks[i]); }
  var m = own * scale;
  let begins = select(0.0, 1.0, t < ${lanes}u);
  var l = begins;
  ${each((i) => `var acc${i} = begins * qkv[vAt + min(lane + ${i * lanes}u, ${vectors - 1}u)];`)}
  ${
    visit(
      "promptKeys",
      "promptValues",
      (j) => `(row.start + ${j}) * ${stride}u + kvHead * ${vectors}u`,
      "row.length",
      "",
      shape,
    )
  }
  ${visit("cache", "cache", (j) => `slotAt + ${j} * ${stride}u`, "made", " + valuesAt", shape)}
  ${each((i) => `shares[t * ${own}u + ${i}u] = acc${i};`)}
  if (lane == 0u) { sums[t / ${lanes}u] = l; }
  workgroupBarrier();
  if (t < ${lanes}u) {
    var total = 0.0;
    for (var g = 0u; g < ${groups}u; g++) { total += sums[g]; }
    ${
    each((i) => `
    var y${i} = shares[t * ${own}u + ${i}u];
    for (var g = 1u; g < ${groups}u; g++) { y${i} += shares[(g * ${lanes}u + t) * ${own}u + ${i}u]; }
    y${i} = y${i} / total;
    if (t + ${i * lanes}u < ${vectors}u) {
      let at = id.y * ${rowStride(heads * d)}u + head * ${d}u + (t + ${i * lanes}u) * ${width}u;
      ${
      width === 1
        ? `out[at] = y${i};`
        : Array.from({ length: width }, (_, c) => `out[at + ${c}u] = y${i}.${"xyzw"[c]};`).join(" ")
    }
    }`)
  }
  }
}
`;
  return { key: `attention ${JSON.stringify(o)}`, source, bindings: list.map(([kind]) => kind) };
}

/**
 * The same, each thread a head of a row from end to end; nothing is shared, nothing waits. Dispatch:
 * x = ⌈running rows · heads / threads⌉.
 */
export function loneAttentionKernel(o: AttentionOptions): Kernel {
  const { heads, kvHeads, headDim: d, threads } = o;
  const width = vectorWidth(d), vec = width === 1 ? "f32" : `vec${width}f`, vectors = d / width, half = vectors / 2;
  const stride = kvHeads * vectors, list = bindings(vec);
  const each = (n: number, f: (i: number) => string) => Array.from({ length: n }, (_, i) => f(i)).join("\n  ");
  const product = (keys: (i: number) => string) =>
    Array.from({ length: vectors }, (_, i) => `inner(q${i}, ${keys(i)})`).join(" + ");
  const visitAlone = (keys: string, values: string, first: string, count: string, shift: string) => /* wgsl */ `
  for (var j = 0u; j < ${count}; j++) {
    let at = ${first} + j * ${stride}u;
    let s = (${product((i) => `${keys}[at + ${i}u]`)}) * scale;
    let top = max(m, s);
    let shrink = fexp(m - top);
    let p = fexp(s - top);
    m = top;
    l = l * shrink + p;
    ${each(vectors, (i) => `acc${i} = acc${i} * shrink + p * ${values}[at${shift} + ${i}u];`)}
  }`;
  const source = /* wgsl */ `
${stepStruct}
${mathFunctions}
${declareBindings(list)}
fn inner(a: ${vec}, b: ${vec}) -> f32 { return ${width === 1 ? "a * b" : "dot(a, b)"}; }
@compute @workgroup_size(${threads})
fn main(@builtin(global_invocation_id) id: vec3u) {
  let line = min(id.x / ${heads}u, rows[0].running - 1u);
  let head = id.x % ${heads}u;
  ${places(o, vectors)}
  ${
    each(half, (i) => `
  let c${i} = turns[angle + ${i}u];
  let s${i} = turns[angle + ${half + i}u];
  let q${i} = qkv[qAt + ${i}u] * c${i} - qkv[qAt + ${half + i}u] * s${i};
  let q${half + i} = qkv[qAt + ${half + i}u] * c${i} + qkv[qAt + ${i}u] * s${i};
  let k${i} = qkv[kAt + ${i}u] * c${i} - qkv[kAt + ${half + i}u] * s${i};
  let k${half + i} = qkv[kAt + ${half + i}u] * c${i} + qkv[kAt + ${i}u] * s${i};`)
  }
  ${each(vectors, (i) => `var acc${i} = qkv[vAt + ${i}u];`)}
  if (stores) {
    let at = slotAt + made * ${stride}u;
    ${each(vectors, (i) => `cache[at + ${i}u] = k${i}; cache[valuesAt + at + ${i}u] = acc${i};`)}
  }
  var m = (${product((i) => `k${i}`)}) * scale;
  var l = 1.0;
  ${visitAlone("promptKeys", "promptValues", `row.start * ${stride}u + kvHead * ${vectors}u`, "row.length", "")}
  ${visitAlone("cache", "cache", "slotAt", "made", " + valuesAt")}
  let at = line * ${rowStride(heads * d)}u + head * ${d}u;
  ${
    each(vectors, (i) =>
      Array.from({ length: width }, (_, c) => {
        return `out[at + ${i * width + c}u] = acc${i}${width === 1 ? "" : `.${"xyzw"[c]}`} / l;`;
      }).join(" "))
  }
}
`;
  return { key: `lone attention ${JSON.stringify(o)}`, source, bindings: list.map(([kind]) => kind) };
}
