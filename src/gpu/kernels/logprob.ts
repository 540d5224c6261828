/**
 * Log-probability of one token per row, with the entropy of the row's distribution.
 *
 * With z = (logits + suppress) / temperature, p = softmax(z), t = target:
 *
 * - `MgpoLogSoftmaxGather`: logits [N, V], target int32 [N], optional suppress [V] (0, or −1e30 for tokens that cannot be drawn);
 *   attribute `temperature` > 0 → logprob [N] = z_t − lse, entropy [N] = −Σ p ln p in nats, lse [N] = ln Σ e^z.
 *   Target −1 gives logprob 0.
 * - `MgpoLogSoftmaxGatherGrad`: logits, target, suppress, lse, entropy, dlogprob [N], dentropy [N] → dlogits [N, V]:
 *   dlogits_j = (dlogprob · (δ_jt − p_j) − dentropy · p_j · (ln p_j + entropy)) / temperature (no δ and no p for target −1).
 *
 * A bad target is a RangeError where the host still has the targets, and a log-probability of NaN otherwise. Lanes share a
 * row (4 to 256 by the vocabulary). Cost: one exponential per logit; the forward pass reads the logits twice.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { element, elements, ELEMENTWISE, fold, rowReductions, type RowSplit, rowStart, splitRows } from "./lanes.ts";
import { type Binding, type Kernel, type KernelCall, rowsOf, type Shader } from "./runtime.ts";

/** Both kernels. */
export const logprob: readonly Kernel[] = [
  { name: "MgpoLogSoftmaxGather", run: forward },
  { name: "MgpoLogSoftmaxGatherGrad", run: backward },
];

/** `score`: z of a token. −1e30 stands for −∞, so that a product with p = 0 is 0; comparing (not max) lets a NaN through. */
const score = (masked: boolean) =>
  `fn score(row: u32, token: u32) -> f32 {
  let z = (logits[row * u.vocabulary + token]${masked ? " + suppress[token]" : ""}) * u.inverse;
  return select(z, -1e30, z < -1e30);
}`;

const sources = (masked: boolean): Binding[] => [
  { name: "logits", type: "f32" },
  { name: "chosen", type: "i32" },
  ...(masked ? [{ name: "suppress", type: "f32" } as const] : []),
];

function forwardShader(split: RowSplit, masked: boolean): Shader {
  const each = (body: string) =>
    `if (live) { for (var j = at; j < u.vocabulary; j += ${split.lanes}u) { let z = score(row, j); ${body} } }`;
  return {
    storage: [
      ...sources(masked),
      ...["logprob", "entropy", "lse"].map((name) => ({ name, type: "f32", write: true } as const)),
    ],
    uniforms: { rows: "u32", vocabulary: "u32", before: "u32", inverse: "f32", nan: "f32" },
    threads: split.threads,
    code: `${rowReductions(split)}\n${score(masked)}`,
    main: `${rowStart(split)}
var own = -1e30;
${each("own = max(own, z);")}
let top = laneMax(lane, own);
var weight = 0.0;
var moment = 0.0;
${each("let e = exp(z - top); weight += e; moment += e * (z - top);")}
let total = laneSum(lane, weight);
let mean = laneSum(lane, moment) / total;
if (!live || at != 0u) { return; }
let size = log(total);
let n = u.before + row;
entropy[n] = size - mean;
lse[n] = top + size;
let t = chosen[n];
if (t == -1) { logprob[n] = 0.0; }
else if (t < 0 || u32(t) >= u.vocabulary) { logprob[n] = u.nan; }
else { logprob[n] = score(row, u32(t)) - top - size; }`,
  };
}

function backwardShader(masked: boolean): Shader {
  return {
    storage: [
      ...sources(masked),
      ...["lse", "entropy", "dlogprob", "dentropy"].map((name) => ({ name, type: "f32" } as const)),
      { name: "dlogits", type: "f32", write: true },
    ],
    uniforms: { size: "u32", vocabulary: "u32", before: "u32", inverse: "f32" },
    threads: ELEMENTWISE,
    code: score(masked),
    main: `${element}
let row = i / u.vocabulary;
let token = i % u.vocabulary;
let n = u.before + row;
let z = score(row, token) - lse[n];
let t = chosen[n];
let slope = select(0.0, dlogprob[n], t >= 0);
let own = select(0.0, slope, t == i32(token));
dlogits[i] = u.inverse * (own - exp(z) * (slope + dentropy[n] * (z + entropy[n])));`,
  };
}

interface Given {
  readonly rows: number;
  readonly vocabulary: number;
  readonly inverse: number;
  readonly masked: boolean;
  readonly logits: tf.TensorInfo;
  /** Target and suppress, the latter where there is one. */
  readonly vectors: readonly tf.TensorInfo[];
}

function given(call: KernelCall): Given {
  const logits = call.input("logits", [null, null]);
  const [rows, vocabulary] = logits.shape;
  const temperature = call.number("temperature");
  if (temperature <= 0) throw call.error(`attribute temperature must be above 0, is ${temperature}`);
  const target = call.input("target", [rows], "int32"), tokens = call.hostValues(target);
  for (let i = 0; tokens !== undefined && i < rows; i++) {
    if (tokens[i] >= -1 && tokens[i] < vocabulary) continue;
    throw call.error(`target[${i}] is ${tokens[i]}, must be −1 or a token below ${vocabulary}`);
  }
  const suppress = call.optional("suppress", [vocabulary]);
  const vectors = suppress ? [target, suppress] : [target];
  return { rows, vocabulary, inverse: 1 / temperature, masked: suppress !== undefined, logits, vectors };
}

function forward(call: KernelCall): tf.TensorInfo[] {
  const { rows, vocabulary, inverse, masked, logits, vectors } = given(call);
  const outputs = [0, 1, 2].map(() => call.output([rows]));
  if (rows === 0) return outputs;
  if (vocabulary === 0) throw call.error("the vocabulary is empty");
  const split = splitRows(vocabulary), make = () => forwardShader(split, masked);
  for (const run of call.windows(rows, [vocabulary])) {
    const uniforms = { rows: run.count, vocabulary, before: run.first, inverse, nan: NaN };
    const tensors = [rowsOf(logits, run, vocabulary), ...vectors, ...outputs];
    const grid = fold(Math.ceil(run.count / split.rows));
    call.dispatch(`${call.name} ${split.lanes} ${masked}`, make, tensors, uniforms, grid);
  }
  return outputs;
}

function backward(call: KernelCall): tf.TensorInfo {
  const { rows, vocabulary, inverse, masked, logits, vectors } = given(call);
  const all = [...vectors, ...["lse", "entropy", "dlogprob", "dentropy"].map((name) => call.input(name, [rows]))];
  const dlogits = call.output([rows, vocabulary]);
  if (rows * vocabulary === 0) return dlogits;
  for (const run of call.windows(rows, [vocabulary])) {
    const size = run.count * vocabulary, uniforms = { size, vocabulary, before: run.first, inverse };
    const tensors = [rowsOf(logits, run, vocabulary), ...all, rowsOf(dlogits, run, vocabulary)];
    call.dispatch(`${call.name} ${masked}`, () => backwardShader(masked), tensors, uniforms, elements(size));
  }
  return dlogits;
}
