/**
 * WGSL that the decode kernels share: exponential and logarithm of stated accuracy (built-in ones may be off by 1e-5 on some
 * adapters, which is the whole tolerance of a log-prob), the counter-based generator, and the record of a draw.
 *
 * @module
 */

/** What a kernel's binding is: read or written storage, or the uniform record of the current step. */
export type BindingKind = "read" | "write" | "step";

/** A compute kernel as text, with its bindings in order and the entry point `main`. */
export interface Kernel {
  /** Names the pipeline; equal keys mean equal text. */
  key: string;
  source: string;
  bindings: readonly BindingKind[];
}

/** Bytes of a `Step` record; records stand {@linkcode STEP_STRIDE} apart to be bound at a dynamic offset. */
export const STEP_BYTES = 32;
/** Distance of step records in their buffer: the largest alignment that WebGPU may ask of a dynamic offset by default. */
export const STEP_STRIDE = 256;
/** Unsigned words that describe a running row, see {@linkcode stepStruct}. */
export const ROW_WORDS = 8;

/** The uniform record of a step and the record of a running row. */
export const stepStruct = /* wgsl */ `
struct Step {
  step: u32,      // index of the token that this step draws
  slots: u32,     // rows of the output: the batch as it began
  seed0: u32,     // key of the generator
  seed1: u32,
  scale: f32,     // 1 / temperature
  share: f32,     // where there is a nucleus: the share of the mass that leads to its floor
  fromTop: u32,   // 1: counted from the highest logit; 0: from the lowest
}
struct Row {
  slot: u32,      // row of the batch as it began
  start: u32,     // first prompt token in the packed keys and values
  length: u32,    // prompt tokens
  position: u32,  // rotary position of the first generated token
  key0: u32,      // names the row's draws
  key1: u32,
  key2: u32,
  running: u32,  // of the first row alone: how many rows run
}
`;

/**
 * `fexp` (relative error below 2e-7 on [−87, 88], clamped outside) and `fln` (for normal numbers, absolute error below 1e-7
 * times the larger of 1 and the result).
 */
export const mathFunctions = /* wgsl */ `
fn fexp(x0: f32) -> f32 {
  let x = clamp(x0, -87.0, 88.0);
  let n = floor(x * 1.4426950408889634 + 0.5);
  let r = (x - n * 0.693145751953125) - n * 1.4286068203094172e-6;
  let p = 1.0 + r * (1.0 + r * (0.5 + r * (0.16666667 + r * (0.041666668 + r * (0.008333334 + r * 0.0013888889)))));
  return p * bitcast<f32>(u32(i32(n) + 127) << 23u);
}
fn lnSeries(s: f32) -> f32 { // 2·atanh(s), |s| ≤ 0.18
  let q = s * s;
  return 2.0 * s * (1.0 + q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * 0.11111111))));
}
fn fln(x: f32) -> f32 {
  let bits = bitcast<u32>(x);
  var e = i32(bits >> 23u) - 127;
  var m = bitcast<f32>((bits & 0x7fffffu) | 0x3f800000u);
  if (m > 1.4142135) { m = m * 0.5; e = e + 1; }
  return f32(e) * 0.69314718 + lnSeries((m - 1.0) / (m + 1.0));
}
`;

/**
 * Philox4x32-10 and the Gumbel noise of its words, `−ln(−ln((word + ½) / 2³²))`. The product of two words is put together from
 * halves, since WGSL has no 64-bit integers; near 1 the inner logarithm is taken of the exact distance from 1.
 */
export const gumbelFunctions = /* wgsl */ `
fn mulHigh(a: u32, b: u32) -> u32 {
  let al = a & 0xffffu; let ah = a >> 16u; let bl = b & 0xffffu; let bh = b >> 16u;
  let mid = ah * bl + ((al * bl) >> 16u);
  let mid2 = al * bh + (mid & 0xffffu);
  return ah * bh + (mid >> 16u) + (mid2 >> 16u);
}
fn philox(key0: u32, key1: u32, c0: u32, c1: u32, c2: u32, c3: u32) -> vec4u {
  var k0 = key0; var k1 = key1;
  var c = vec4u(c0, c1, c2, c3);
  for (var round = 0; round < 10; round++) {
    let h0 = mulHigh(c.x, 0xd2511f53u);
    let h1 = mulHigh(c.z, 0xcd9e8d57u);
    c = vec4u(h1 ^ c.y ^ k0, c.z * 0xcd9e8d57u, h0 ^ c.w ^ k1, c.x * 0xd2511f53u);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return c;
}
fn gumbel(word: u32) -> f32 {
  let rest = (f32(~word) + 0.5) * 2.3283064365386963e-10; // 1 − u
  var e: f32;
  if (rest < 0.29) { e = lnSeries(rest / (2.0 - rest)); } else { e = -fln((f32(word) + 0.5) * 2.3283064365386963e-10); }
  return -fln(e);
}
`;

/** Marks a draw over logits that are not finite. */
export const NOT_FINITE = 0xfffffffe;
/** Marks a draw that has seen no id. */
export const NO_ID = 0xffffffff;

/**
 * A running draw over part of the vocabulary: the best id by score (logit / temperature + noise) and the softmax's maximum and
 * sum. Equal scores go to the smaller id.
 */
export const drawStruct = /* wgsl */ `
struct Draw { score: f32, id: u32, logit: f32, top: f32, sum: f32 }
fn emptyDraw() -> Draw { return Draw(-3.0e38, ${NO_ID}u, 0.0, -1.0e30, 0.0); }
fn joinDraws(a: Draw, b: Draw) -> Draw {
  var out = a;
  if (b.id < ${NOT_FINITE}u && (a.id == ${NO_ID}u || b.score > a.score || (b.score == a.score && b.id < a.id))) {
    out.score = b.score; out.id = b.id; out.logit = b.logit;
  }
  if (a.id == ${NOT_FINITE}u || b.id == ${NOT_FINITE}u) { out.id = ${NOT_FINITE}u; }
  out.top = max(a.top, b.top);
  out.sum = a.sum * fexp(a.top - out.top) + b.sum * fexp(b.top - out.top);
  return out;
}
`;

/**
 * `consider`: takes four logits at ids v … v+3 (v a multiple of 4) into a draw. Needs bindings named `suppressed` (one bit an
 * id) and `step`, and a `vocab` constant.
 *
 * @param greedy Leaves the noise out.
 * @param nucleus Takes one more argument, `lowest`: smaller logits are not drawn; they count in the softmax all the same.
 */
export function considerFunction(greedy: boolean, nucleus = false): string {
  const better = `score > out.score || out.id == ${NO_ID}u`;
  const isTaken = (logit: string) => nucleus ? `${logit} >= lowest && (${better})` : better;
  const one = (c: string, i: number) => /* wgsl */ `
  if ((hidden & ${1 << i}u) == 0u && v + ${i}u < vocab) {
    let score = z.${c}${greedy ? "" : ` + gumbel(noise.${c})`};
    if ((bitcast<u32>(logits.${c}) & 0x7f800000u) == 0x7f800000u) { bad = true; }
    if (${isTaken(`logits.${c}`)}) { out.score = score; out.id = v + ${i}u; out.logit = logits.${c}; }
  } else { z.${c} = -1.0e30; }`;
  return /* wgsl */ `
fn consider(before: Draw, row: Row, v: u32, logits: vec4f${nucleus ? ", lowest: f32" : ""}) -> Draw {
  var out = before;
  let hidden = (suppressed[v >> 5u] >> (v & 31u)) & 15u;
  var z = logits * step.scale;
  ${
    greedy
      ? ""
      : "let noise = philox(step.seed0, step.seed1, v >> 2u, row.key0, row.key1, (row.key2 << 20u) | step.step);"
  }
  var bad = false;${["x", "y", "z", "w"].map(one).join("")}
  let top = max(out.top, max(max(z.x, z.y), max(z.z, z.w)));
  if (top > -1.0e30) {
    out.sum = out.sum * fexp(out.top - top);
    if (z.x > -1.0e30) { out.sum += fexp(z.x - top); }
    if (z.y > -1.0e30) { out.sum += fexp(z.y - top); }
    if (z.z > -1.0e30) { out.sum += fexp(z.z - top); }
    if (z.w > -1.0e30) { out.sum += fexp(z.w - top); }
    out.top = top;
  }
  if (bad || before.id == ${NOT_FINITE}u) { out.id = ${NOT_FINITE}u; }
  return out;
}
`;
}

/** Declares the bindings of a kernel, in order, in group 0. */
export function declareBindings(list: readonly (readonly [BindingKind, string, string])[]): string {
  const space = { read: "<storage, read>", write: "<storage, read_write>", step: "<uniform>" };
  return list.map(([kind, name, type], i) => `@group(0) @binding(${i}) var${space[kind]} ${name}: ${type};`).join("\n");
}
