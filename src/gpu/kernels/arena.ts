/**
 * Many small tensors at once: they are copied into one arena (`copyBufferToBuffer`, some 20 times cheaper to record than a
 * dispatch), where one dispatch serves all of them.
 *
 * - `MgpoFlatten`: x0, x1, … (any shapes) → [size], each from its offset on, zeros between them. No dispatch.
 * - `MgpoAdamWAll`: one step of AdamW on param0, param1, … (any shapes), **in place**. m, v and grad are arenas [size] in which the
 *   moments and gradients of each parameter lie from its offset on; m and v are overwritten, what belongs to none of the parameters
 *   stays. Output: a scalar without meaning. One dispatch.
 *
 * Attributes: offsets, one for each tensor, multiples of 256, increasing, with room for the tensor before the next; for
 * `MgpoFlatten` size; for `MgpoAdamWAll` lr, one for each parameter, and the others of `MgpoAdamW`, whose formula and order of
 * operations hold, so that the results are the same bit for bit.
 *
 * An arena larger than a shader can bind takes a dispatch for each run of parameters that fits.
 *
 * Cost: 4 reads and 3 writes per element, and a read and a write for each copy (gradients in; parameters in and out).
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { update } from "./adamw.ts";
import { ELEMENTWISE, fold, group } from "./lanes.ts";
import type { Kernel, KernelCall, Shader } from "./runtime.ts";

/** Both kernels. */
export const arena: readonly Kernel[] = [
  { name: "MgpoFlatten", run: flatten },
  { name: "MgpoAdamWAll", run: step },
];

/** Elements of a workgroup, four to a thread; no workgroup has those of two tensors. */
const SHARE = 4 * ELEMENTWISE;

const shares = ({ shape }: tf.TensorInfo): number => Math.ceil(tf.util.sizeFromShape(shape) / SHARE);

/** The tensors `name`0, `name`1, … and their offsets in an arena of `size` elements. */
function members(call: KernelCall, name: string, size: number) {
  const offsets = call.numbers("offsets"), tensors = offsets.map((_, i) => call.input(`${name}${i}`));
  tensors.forEach(({ shape }, i) => {
    const [from, end] = [offsets[i], offsets[i] + tf.util.sizeFromShape(shape)];
    if (from >= 0 && from % SHARE === 0 && end <= (offsets[i + 1] ?? size)) return;
    throw call.error(`${name}${i} [${shape.join(", ")}] does not fit at offsets[${i}] = ${from} of ${size}`);
  });
  return { tensors, offsets };
}

function flatten(call: KernelCall): tf.TensorInfo {
  const size = call.number("size"), { tensors, offsets } = members(call, "x", size);
  const whole = call.output([size]);
  if (size > 0) call.gather(tensors, whole, offsets, true);
  return whole;
}

/** Numbers of a row of the table that tells workgroups which parameter is theirs. */
const ROW = 4;

function shader(): Shader {
  const type = "vec4<f32>";
  return {
    storage: [
      ...["param", "m", "v"].map((name) => ({ name, type, write: true } as const)),
      { name: "grad", type },
      { name: "table", type: "i32" },
    ],
    uniforms: {
      ...{ parts: "u32", shares: "u32", clip: "f32", beta1: "f32", rest1: "f32", beta2: "f32", rest2: "f32" },
      ...{ denominator: "f32", eps: "f32" },
    },
    threads: ELEMENTWISE,
    // The last row that begins at or before this workgroup.
    main: `${group}
if (group >= u.shares) { return; }
var low = 0u;
var high = u.parts;
while (high - low > 1u) {
  let middle = (low + high) / 2u;
  if (u32(table[${ROW}u * middle]) <= group) { low = middle; } else { high = middle; }
}
let row = ${ROW}u * low;
let i = (u32(table[row + 1u]) + group - u32(table[row])) * ${ELEMENTWISE}u + lane;
let decay = bitcast<f32>(table[row + 2u]);
let rate = bitcast<f32>(table[row + 3u]);
${update("decay", "rate")}`,
  };
}

function step(call: KernelCall): tf.TensorInfo {
  const m = call.input("m", [null]), [v, grad] = ["v", "grad"].map((name) => call.input(name, m.shape));
  const { tensors, offsets } = members(call, "param", m.shape[0]), lr = call.numbers("lr");
  const [beta1, beta2, eps, clip] = ["beta1", "beta2", "eps", "clipScale"].map((name) => call.number(name));
  const [weightDecay, correction1] = [call.number("weightDecay"), call.number("correction1")];
  const done = call.zeros([]);
  const parts = tensors.map((tensor, i): Part => {
    return {
      at: offsets[i] / SHARE,
      shares: shares(tensor),
      decay: 1 - lr[i] * weightDecay,
      rate: lr[i] / correction1,
    };
  }).filter(({ shares }) => shares > 0);
  if (parts.length === 0) return done;
  const whole = call.temporary(m.shape);
  call.gather(tensors, whole, offsets);
  for (const moment of [m, v]) call.overwrite(moment);
  const moments = { beta1, rest1: 1 - beta1, beta2, rest2: 1 - beta2, eps };
  const denominator = 1 / Math.sqrt(call.number("correction2"));
  for (const run of runsOf(parts, Math.floor(call.bindable / (4 * SHARE)))) {
    const [first] = run, last = run.at(-1)!, total = run.reduce((sum, { shares }) => sum + shares, 0);
    const [offset, size] = [SHARE * first.at, SHARE * (last.at + last.shares - first.at)];
    const windows = [whole, m, v, grad].map((tensor) => ({ tensor, offset, size }));
    const uniforms = { parts: run.length, shares: total, clip, denominator, ...moments };
    call.dispatch(call.name, shader, [...windows, call.upload(tableOf(run))], uniforms, fold(total));
  }
  call.scatter(whole, offsets, tensors);
  return done;
}

/** A parameter in an arena; `at` and `shares` count workgroups. */
interface Part {
  readonly at: number;
  readonly shares: number;
  readonly decay: number;
  readonly rate: number;
}

/** Cuts parts into runs that lie within `most` shares; one run where an arena can be bound whole. */
function runsOf(parts: readonly Part[], most: number): Part[][] {
  const runs: Part[][] = [];
  for (const part of parts) {
    const run = runs.at(-1);
    if (run && part.at + part.shares - run[0].at <= most) run.push(part);
    else runs.push([part]);
  }
  return runs;
}

/** For each part the first workgroup of its own, where it begins in the window, its decay and its rate. */
function tableOf(run: readonly Part[]): Int32Array {
  const table = new Int32Array(ROW * run.length), floats = new Float32Array(table.buffer);
  let group = 0;
  run.forEach(({ at, shares, decay, rate }, i) => {
    table.set([group, at - run[0].at], ROW * i);
    floats.set([decay, rate], ROW * i + 2);
    group += shares;
  });
  return table;
}
