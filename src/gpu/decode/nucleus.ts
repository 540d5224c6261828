/**
 * Where the nucleus of a row ends, without a sort.
 *
 * ```text
 * floor[row] = the smallest logit x with Σ p(y) < topP over logits y > x,   p = softmax(logit / temperature)
 * ```
 *
 * over ids that are not suppressed, as `sampler.ts` defines it. The floor is found digit by digit, four bits at a time, in the
 * order-preserving integer image of float32: a pass sums the mass of each of the 16 next digits among the logits that begin
 * like the floor, then walks along the digits from one end until the sum reaches its share. It starts from the highest logit
 * where topP < ½, else from the lowest, until more than 1 − topP lies behind it: the smaller share is the better known one in
 * float32. Where rounding keeps the sum from reaching it, the last digit that has logits is taken.
 *
 * A workgroup does a row; a thread adds to 16 sums of its own in workgroup memory, and these are added up in order of threads,
 * so a floor does not depend on timing. Shapes: logits `[D, V]`, of which a row takes line `lines[row]`; floors `[rows]`.
 *
 * Cost: 9·rows·V reads (one pass for the maximum, one for each of 8 digits) and about as many exponentials as there are logits
 * that share the floor's leading digits; 64 bytes of workgroup memory a thread.
 *
 * @module
 */
import { declareBindings, type Kernel, mathFunctions, stepStruct } from "./wgsl.ts";

const DIGIT_BITS = 4, DIGITS = 2 ** DIGIT_BITS, LEVELS = 32 / DIGIT_BITS;

/** How much of the mass {@linkcode nucleusKernel} looks for, and from which end of the logits: words of the step record. */
export function nucleusShare(topP: number): { share: number; fromTop: boolean } {
  return topP < 0.5 ? { share: topP, fromTop: true } : { share: 1 - topP, fromTop: false };
}

/** A loop over a row's ids that may be drawn, four at a time, `x` their logit. */
const eachLogit = (threads: number, body: string) => /* wgsl */ `
  for (var v = t * 4u; v < vocab; v += ${threads * 4}u) {
    let hidden = (suppressed[v >> 5u] >> (v & 31u)) & 15u;
    let four = vec4f(logits[at + v], logits[at + v + 1u], logits[at + v + 2u], logits[at + v + 3u]);
    for (var i = 0u; i < 4u; i++) {
      if (((hidden >> i) & 1u) == 0u && v + i < vocab) { let x = four[i]; ${body} }
    }
  }`;

/**
 * The floors of rows. Dispatch: x = rows.
 *
 * @param vocab V
 * @param threads Threads of a workgroup, at most 256.
 */
export function nucleusKernel(vocab: number, threads: number): Kernel {
  const list = [
    ["read", "logits", "array<f32>"],
    ["read", "lines", "array<u32>"],
    ["read", "suppressed", "array<u32>"],
    ["write", "floors", "array<f32>"],
    ["step", "step", "Step"],
  ] as const;
  const source = /* wgsl */ `
${stepStruct}
${mathFunctions}
${declareBindings(list)}
const vocab = ${vocab}u;
// [digit, thread]; once they are added up, a digit's mass is that of its first thread.
var<workgroup> sums: array<f32, ${DIGITS * threads}>;
// Integers in the order of the floats.
fn keyOf(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}
fn logitOf(key: u32) -> f32 { return bitcast<f32>(select(~key, key & 0x7fffffffu, (key >> 31u) == 1u)); }
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) t: u32) {
  let at = lines[group.x] * vocab;
  var top = -3.4e38;
  ${eachLogit(threads, "top = max(top, x);")}
  sums[t] = top;
  workgroupBarrier();
  for (var j = 0u; j < ${threads}u; j++) { top = max(top, sums[j]); }
  workgroupBarrier();
  let fromTop = step.fromTop == 1u;
  var prefix = 0u; // the floor's digits so far
  var known = 0u;  // ones at their bits
  var beyond = 0.0; // mass of the logits beyond those with this prefix, on the side where the walk begins
  var goal = 0.0;
  for (var level = 0u; level < ${LEVELS}u; level++) {
    let shift = ${32 - DIGIT_BITS}u - level * ${DIGIT_BITS}u;
    for (var digit = 0u; digit < ${DIGITS}u; digit++) { sums[digit * ${threads}u + t] = 0.0; }
    ${
    eachLogit(
      threads,
      /* wgsl */ `
        let key = keyOf(x);
        if (((key ^ prefix) & known) == 0u) {
          sums[((key >> shift) & ${DIGITS - 1}u) * ${threads}u + t] += fexp((x - top) * step.scale);
        }`,
    )
  }
    workgroupBarrier();
    for (var digit = t; digit < ${DIGITS}u; digit += ${threads}u) {
      var sum = 0.0;
      for (var j = 0u; j < ${threads}u; j++) { sum += sums[digit * ${threads}u + j]; }
      sums[digit * ${threads}u] = sum;
    }
    workgroupBarrier();
    if (level == 0u) {
      var whole = 0.0;
      for (var digit = 0u; digit < ${DIGITS}u; digit++) { whole += sums[digit * ${threads}u]; }
      goal = step.share * whole;
    }
    var digit = 0u;
    var reached = beyond;
    var goesOn = true;
    for (var i = 0u; i < ${DIGITS}u; i++) {
      let next = select(i, ${DIGITS - 1}u - i, fromTop);
      let mass = sums[next * ${threads}u];
      if (goesOn && mass > 0.0) { // fexp is above 0 everywhere: no mass, no logit
        digit = next;
        beyond = reached;
        reached += mass;
        goesOn = select(reached <= goal, reached < goal, fromTop);
      }
    }
    prefix |= digit << shift;
    known |= ${DIGITS - 1}u << shift;
    workgroupBarrier();
  }
  if (t == 0u) { floors[group.x] = logitOf(prefix); }
}
`;
  return { key: `nucleus ${vocab} ${threads}`, source, bindings: list.map(([kind]) => kind) };
}
