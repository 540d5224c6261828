/**
 * MGPO's optimizer: from scored dialogues to changed weights. For a dialogue i of a group of G over one prompt, with reward
 * rᵢ, advantage Aᵢ, and every token t that the model itself wrote in any of its turns:
 *
 * ```text
 * Aᵢ   = (rᵢ − mean r) / (std r + ε)        scale "group"; "none" is the paper's eq. 2, rᵢ − mean r; std has divisor G − 1
 * ρᵢₜ  = exp(ln π(t) − ln π_old(t))
 * Lᵢₜ  = −min(ρᵢₜ·Aᵢ, clip(ρᵢₜ, 1 − ε_low, 1 + ε_high)·Aᵢ) + β·(e^d − d − 1),   d = ln π_ref(t) − ln π(t)
 * loss = Σᵢₜ wᵢ·Lᵢₜ                         the loss type is the choice of wᵢ
 * ```
 *
 * | loss type | also called                          | wᵢ                                            |
 * | --------- | ------------------------------------ | --------------------------------------------- |
 * | `grpo`    | sequence mean                        | 1 / (tokens of i · rows)                      |
 * | `bnpo`    | token mean of the mini-batch         | 1 / tokens of the mini-batch                  |
 * | `dapo`    | token mean of the batch (default)    | mini-batches / tokens of the whole batch      |
 * | `dr_grpo` | sequence sum over a constant         | 1 / (rows · maxCompletionLength)              |
 *
 * Departures from plain GRPO:
 * 1. A sample is a dialogue of several turns: what the model wrote carries loss in all turns; system, user, template and
 *    image tokens (the crop's too) carry none. `lossOn` has the controls of the ablation: `last` trains on the last turn alone; `every`
 *    on every text token, prompts included, as if the restriction were left out. Tokens that were not sampled have no recorded
 *    ln π_old: theirs is the policy's own before the first optimizer step of the batch (ρ = 1 there), one forward pass more.
 * 2. Token mean over the batch instead of the mean of sequence means, so that a long turn is not discounted.
 * 3. No KL term and no reference unless asked for (the paper's run: `beta: 0.01`).
 * 4. The vision tower is frozen unless `trainVision`.
 * 5. π_old is what was recorded while sampling, not a recomputation; the two are compared (`rollout/logprob_diff_max`).
 * 6. Dialogues with advantage 0 never enter the model when there is no KL: they have no gradient, and they still count in wᵢ,
 *    so the result is the same. An update where nothing is left makes no optimizer step (momentum does not move the weights).
 * 7. How the rows are packed into forward passes (`tokensPerPass`) does not change the loss, whatever its type.
 * 8. A gradient that is not finite skips the step and is counted.
 *
 * The defaults are the recipe that the embedded miniature learns by. The paper's run: `learningRate: 1e-6, beta: 0.01,
 * minibatches: 4`, and `scale: "none"` by its equation, `scale: "group"` by its code.
 *
 * @module
 */
import { tf } from "./deps.ts";
import { hasFused, run } from "./policy/ops.ts";
import { differentiate, type HostArrays, type PassGradients, type PassLoss } from "./policy/pass.ts";
import type { ImageInput, Policy, Sequence } from "./policy/policy.ts";
import type { Scalar, Tensor, Tensor1D, Tensor2D, Variable } from "./tensors.ts";

// ---------------------------------------------------------------------------------------------------------- advantages

/**
 * One reward a row from the scores of several reward functions. A score that is NaN or null means that the function did not
 * apply and is left out; a row where none applied is NaN: unscorable.
 *
 * @param scores `[rows][functions]`
 * @param weights One for each function. @default {1 for each}
 */
export function weightedRewards(
  scores: readonly (readonly (number | null)[])[],
  weights?: readonly number[],
): number[] {
  return scores.map((row) => {
    const parts = known(row.map((score, k) => score === null ? NaN : score * (weights?.[k] ?? 1)));
    return parts.length > 0 ? sum(parts) : NaN;
  });
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
const mean = (values: readonly number[]): number => sum(values) / values.length;
const known = (values: readonly number[]): number[] => values.filter((v) => !Number.isNaN(v));

/** Mean and standard deviation (divisor n − 1) of what is not NaN; the std of a single value is 0, of one left over NaN. */
function moments(values: readonly number[]): [mean: number, std: number] {
  const some = known(values);
  if (values.length === 1) return [values[0], 0];
  // Equal rewards must give advantages of exactly 0; a rounded mean of them need not be equal to them.
  const centre = some.length > 0 && some.every((v) => v === some[0]) ? some[0] : mean(some);
  const squares = sum(some.map((v) => (v - centre) ** 2));
  return [centre, some.length > 1 ? Math.sqrt(squares / (some.length - 1)) : NaN];
}

/** What a centred reward is divided by: its group's std, the whole batch's, or nothing (the paper's eq. 2). */
export type AdvantageScale = "group" | "batch" | "none";

/** Result of {@linkcode groupAdvantages}. */
export interface Advantages {
  /** One a row; 0 where the reward is NaN or a std is undefined. */
  advantages: number[];
  /** One a group: whether the std in use (`none`: the group's) is 0. */
  zeroStd: boolean[];
  /** One a group: the standard deviation of its rewards (divisor n − 1). */
  stds: number[];
}

/**
 * Group-relative advantages.
 *
 * @param rewards Group after group; NaN is unscorable: left out of mean and std, advantage 0.
 * @param groupSize Rows of a group, at least 1; divides the number of rewards.
 * @param options.scale See {@linkcode AdvantageScale}. @default {"group"}
 * @param options.eps Added to the standard deviation. @default {1e-4}
 * @throws {RangeError} if the rewards do not fall into groups.
 */
export function groupAdvantages(
  rewards: readonly number[],
  groupSize: number,
  { scale = "group", eps = 1e-4 }: { scale?: AdvantageScale; eps?: number } = {},
): Advantages {
  if (!Number.isInteger(groupSize) || groupSize < 1 || rewards.length % groupSize !== 0) {
    throw new RangeError(`${rewards.length} rewards do not fall into groups of ${groupSize}`);
  }
  const result: Advantages = { advantages: [], zeroStd: [], stds: [] };
  const [, wholeStd] = moments(rewards);
  for (let start = 0; start < rewards.length; start += groupSize) {
    const group = rewards.slice(start, start + groupSize);
    const [centre, std] = moments(group);
    const spread = scale === "batch" ? wholeStd : std;
    // NaN || 0 is 0.
    result.advantages.push(...group.map((r) => (r - centre) / (scale === "none" ? 1 : spread + eps) || 0));
    result.zeroStd.push(spread <= 1e-8);
    result.stds.push(std);
  }
  return result;
}

// ---------------------------------------------------------------------------------------------------------------- loss

/** How token losses become one number; see the table at the top. */
export type LossType = "grpo" | "bnpo" | "dapo" | "dr_grpo";

/** The objective. */
export interface ObjectiveOptions {
  /** See the table at the top. @default {"dapo"} */
  lossType?: LossType;
  /** ε_low: ratios below 1 − ε_low earn nothing further. @default {0.2} */
  clipLow?: number;
  /** ε_high: ratios above 1 + ε_high earn nothing further. @default {0.2} */
  clipHigh?: number;
  /** Upper bound of a ratio also where the advantage is negative (two-sided clipping), above 1 + ε_high. @default {none} */
  delta?: number;
  /** β, the weight of the KL to the reference (estimator k3). @default {0} */
  beta?: number;
  /** Whether a ratio belongs to a token, or to a sequence (geometric mean over its tokens, GSPO). @default {"token"} */
  importanceSampling?: "token" | "sequence";
  /** The constant of `dr_grpo`: the most tokens that a row may have; needed there. */
  maxCompletionLength?: number;
}

/** The objective, and what of a larger batch the given rows are. */
export interface LossOptions extends ObjectiveOptions {
  /** Rows of the mini-batch, where those given are a part of it. @default {B} */
  rows?: number;
  /** Tokens of the mini-batch (for `bnpo`). @default {Σ mask} */
  tokens?: number | Scalar;
  /** Tokens of the whole batch (for `dapo`). @default {Σ mask} */
  itemsInBatch?: number | Scalar;
  /** Mini-batches whose gradients are added before a step: the loss is divided by it. @default {1} */
  accumulation?: number;
  /** Mini-batches in the whole batch (for `dapo`). @default {1} */
  stepsPerGeneration?: number;
}

/** Tensors of {@linkcode policyLoss}. What lies off the mask must be finite and has no effect. */
export interface LossInputs {
  /** `[B, T]`, differentiable: ln π. */
  logprobs: Tensor2D;
  /** `[B, T]`: ln π_old. */
  oldLogprobs: Tensor2D;
  /** `[B, T]`: ln π_ref; needed if β is not 0. */
  refLogprobs?: Tensor2D;
  /** `[B]`: one for all tokens of a row. */
  advantages: Tensor1D;
  /** `[B, T]`: 1 where a token carries loss, else 0. */
  mask: Tensor2D;
}

/**
 * The clipped objective (equations and loss types at the top).
 *
 * @returns A scalar, differentiable with respect to `logprobs`; the caller owns it.
 * @throws {RangeError} if β has no reference, or `dr_grpo` no `maxCompletionLength`.
 */
export function policyLoss(inputs: LossInputs, options: LossOptions = {}): Scalar {
  const { clipLow = 0.2, clipHigh = 0.2, delta, beta = 0, importanceSampling = "token" } = options;
  const { logprobs, oldLogprobs, refLogprobs, mask } = inputs;
  if (beta !== 0 && !refLogprobs) throw new RangeError(`beta is ${beta}, but there are no reference log-probs`);
  return tf.tidy(() => {
    const advantages = tf.expandDims(inputs.advantages, 1); // [B, 1]
    const lengths = tf.maximum(tf.sum(mask, 1, true), 1); // [B, 1]
    // Masked before exp: a huge difference on padding must not become inf · 0.
    let logRatio = tf.mul(tf.sub(logprobs, oldLogprobs), mask);
    if (importanceSampling === "sequence") logRatio = tf.div(tf.sum(logRatio, 1, true), lengths); // [B, 1]
    const ratio = tf.exp(logRatio);
    const clipped = tf.clipByValue(ratio, 1 - clipLow, 1 + clipHigh);
    const bounded = delta === undefined ? ratio : tf.minimum(ratio, delta);
    let loss = tf.neg(tf.minimum(tf.mul(bounded, advantages), tf.mul(clipped, advantages)));
    if (beta !== 0 && refLogprobs) {
      const d = tf.mul(tf.sub(refLogprobs, logprobs), mask);
      loss = tf.add(loss, tf.mul(beta, tf.sub(tf.sub(tf.exp(d), d), 1)));
    }
    return aggregate(tf.mul(loss, mask), mask, lengths, options);
  });
}

/** Σ wᵢ·Lᵢₜ for each loss type. */
function aggregate(masked: tf.Tensor, mask: tf.Tensor2D, lengths: tf.Tensor, options: LossOptions): tf.Scalar {
  const { lossType = "dapo", accumulation = 1, stepsPerGeneration = 1, rows = mask.shape[0] } = options;
  const tokens = (given?: number | Scalar) =>
    given === undefined
      ? tf.maximum(tf.sum(mask), 1)
      : typeof given === "number"
      ? tf.scalar(Math.max(given, 1))
      : given;
  switch (lossType) {
    case "grpo":
      return tf.div(tf.sum(tf.div(masked, lengths)), rows * accumulation);
    case "bnpo":
      return tf.div(tf.sum(masked), tf.mul(tokens(options.tokens), accumulation));
    case "dapo":
      return tf.div(tf.sum(masked), tf.mul(tokens(options.itemsInBatch), accumulation / stepsPerGeneration));
    case "dr_grpo":
      if (!options.maxCompletionLength) throw new RangeError('lossType "dr_grpo" needs maxCompletionLength (tokens)');
      return tf.div(tf.sum(masked), rows * options.maxCompletionLength * accumulation);
    default:
      throw new RangeError(`lossType must be grpo, bnpo, dapo or dr_grpo, got ${JSON.stringify(lossType)}`);
  }
}

/** What was measured of one dialogue: an entry for each token that carries loss. */
export interface TokenRow {
  logprobs: ArrayLike<number>;
  old: ArrayLike<number>;
  ref?: ArrayLike<number>;
  entropy?: ArrayLike<number>;
  advantage: number;
  /** 1 where `old` was recorded while sampling, else 0. @default {all 1} */
  sampled?: ArrayLike<number>;
}

/** Metrics of the objective. Clip fractions, 0..1, are over tokens (`sequence` sampling: over rows). */
export interface PolicyMetrics {
  /** Fraction clipped below: the advantage is negative and the ratio under 1 − ε_low. */
  "clip_ratio/low": number;
  /** Fraction clipped above: the advantage is positive and the ratio over 1 + ε_high. */
  "clip_ratio/high": number;
  /** Fraction clipped on either side: `low` + `high`. */
  "clip_ratio/region": number;
  /** Smallest `low` of a single row among rows that have tokens; NaN without one. */
  "clip_ratio/low_min": number;
  /** Largest `high` of a single row among rows that have tokens; NaN without one. */
  "clip_ratio/high_max": number;
  /** Mean k3 estimate per token; present if every row has `ref`. */
  kl?: number;
  /** Mean entropy per token in nats; NaN without `entropy`. */
  entropy: number;
}

/** Metrics of the objective, in plain numbers so that any number of forward passes can be read back at once. */
export function policyMetrics(rows: readonly TokenRow[], options: ObjectiveOptions = {}): PolicyMetrics {
  const { clipLow = 0.2, clipHigh = 0.2, delta = Infinity, importanceSampling } = options;
  let units = 0, tokens = 0, low = 0, high = 0, kl = 0, entropy = 0;
  const lowShares: number[] = [], highShares: number[] = [];
  for (const { logprobs, old, ref, entropy: entropies, advantage } of rows) {
    const logRatios = Array.from(logprobs, (p, t) => p - old[t]), n = logRatios.length;
    const ratios = (importanceSampling === "sequence" ? [sum(logRatios) / Math.max(n, 1)] : logRatios)
      .map((l) => Math.min(Math.exp(l), delta));
    const below = advantage < 0 ? ratios.filter((r) => r < 1 - clipLow).length : 0;
    const above = advantage > 0 ? ratios.filter((r) => r > 1 + clipHigh).length : 0;
    if (ratios.length > 0) {
      lowShares.push(below / ratios.length);
      highShares.push(above / ratios.length);
    }
    [low, high, units, tokens] = [low + below, high + above, units + ratios.length, tokens + n];
    for (let t = 0; t < n; t++) {
      entropy += entropies?.[t] ?? NaN;
      if (ref) kl += Math.exp(ref[t] - logprobs[t]) - (ref[t] - logprobs[t]) - 1;
    }
  }
  return {
    "clip_ratio/low": low / Math.max(units, 1),
    "clip_ratio/high": high / Math.max(units, 1),
    "clip_ratio/region": (low + high) / Math.max(units, 1),
    "clip_ratio/low_min": lowShares.length ? Math.min(...lowShares) : NaN,
    "clip_ratio/high_max": highShares.length ? Math.max(...highShares) : NaN,
    ...(rows.length > 0 && rows.every((row) => row.ref) ? { kl: kl / Math.max(tokens, 1) } : {}),
    entropy: tokens > 0 ? entropy / tokens : NaN,
  };
}

/**
 * ln softmax(logits / temperature) of one id a row. The one-hot product replaces gather, whose gradient the wasm backend lacks.
 *
 * @param logits `[N, V]`, finite
 * @param ids N token ids
 * @returns `[N]`, differentiable
 */
export function selectiveLogSoftmax(logits: tf.Tensor2D, ids: readonly number[], temperature = 1): tf.Tensor1D {
  return tf.tidy(() => {
    const chosen = tf.oneHot(tf.tensor1d(ids as number[], "int32"), logits.shape[1]);
    return tf.sum(tf.mul(tf.logSoftmax(tf.div(logits, temperature)), chosen), 1);
  });
}

/** Entropy in nats of softmax(logits / temperature), `[N, V]` → `[N]`, differentiable. */
export function entropyFromLogits(logits: tf.Tensor2D, temperature = 1): tf.Tensor1D {
  return tf.tidy(() => {
    const logp = tf.logSoftmax(tf.div(logits, temperature));
    return tf.neg(tf.sum(tf.mul(tf.exp(logp), logp), 1));
  });
}

// ----------------------------------------------------------------------------------------------------------- optimizer

/** Shape of a learning rate over a run. */
export interface ScheduleOptions {
  /** Steps of linear rise; the first has 1/warmup of the full rate. @default {0} */
  warmup?: number;
  /** Steps at the full rate after the warm-up, before it decays. @default {0} */
  hold?: number;
  /** Steps of the whole run; needed unless constant. */
  total?: number;
  /** The floor that the decay ends at, as a share of the full rate, 0..1. @default {0} */
  minRatio?: number;
}

/**
 * The share of the full learning rate at a step.
 *
 * @param step Steps made before, from 0.
 * @returns 0..1; after `total` steps the floor.
 * @throws {RangeError} if a decay has no `total`.
 */
export function schedule(kind: "constant" | "linear" | "cosine", step: number, options: ScheduleOptions = {}): number {
  const { warmup = 0, hold = 0, total, minRatio = 0 } = options;
  if (step < warmup) return (step + 1) / warmup;
  if (kind === "constant") return 1;
  if (kind !== "linear" && kind !== "cosine") {
    throw new RangeError(`schedule must be constant, linear or cosine, got ${JSON.stringify(kind)}`);
  }
  if (!(total !== undefined && total > 0)) throw new RangeError(`schedule "${kind}" needs total steps, got ${total}`);
  const done = Math.min(1, Math.max(0, step - warmup - hold) / Math.max(1, total - warmup - hold));
  const share = kind === "linear" ? 1 - done : 0.5 * (1 + Math.cos(Math.PI * done));
  return minRatio + (1 - minRatio) * share;
}

/** Options of {@linkcode AdamW}. */
export interface AdamWOptions {
  /** Decay rates of the two moments. @default {[0.9, 0.95]} */
  betas?: readonly [number, number];
  /** Added to the root of the second moment. @default {1e-8} */
  eps?: number;
  /** Decoupled decay of every trained parameter. @default {0} */
  weightDecay?: number;
  /** Global norm that gradients are scaled down to; Infinity for none. @default {1} */
  maxGradNorm?: number;
  /** Factor on the learning rate by parameter name. @default {1 for all} */
  learningRateScale?: (name: string) => number;
  /** Parameters that are never changed; they hold no state. @default {none} */
  freeze?: (name: string) => boolean;
}

const adamWDefaults: Required<AdamWOptions> = {
  ...{ betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0, maxGradNorm: 1 },
  ...{ learningRateScale: () => 1, freeze: () => false },
};

/** The defaults, overridden by the options that are given and not undefined. */
function settled<T extends object>(defaults: T, given: Partial<T>): T {
  return { ...defaults, ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)) };
}

/** A parameter with its two moments. */
export type AdamWSlot = Record<"param" | "m" | "v", tf.Variable>;
/** One step's numbers: `correction1` and `correction2` are 1 − βᵗ, gradients are multiplied by `clipScale`. */
export type AdamWStep = Record<
  "lr" | "beta1" | "beta2" | "eps" | "weightDecay" | "correction1" | "correction2" | "clipScale",
  number
>;

/**
 * Changes a parameter and its moments by one step, by the fused kernel where the backend has it.
 *
 * @param fused Forces one of the two ways. @default {as the backend has it}
 */
export function applyAdamW(slot: AdamWSlot, grad: tf.Tensor, step: AdamWStep, fused = hasFused("MgpoAdamW")): void {
  const { param, m, v } = slot;
  if (fused) {
    // Weights get new storage first: tfjs-wasm packs the right operand of matMul once and finds it again by storage, so a
    // change in place would go unnoticed there.
    if (tf.getBackend() === "wasm") tf.tidy(() => param.assign(tf.add(param, 0)));
    return tf.dispose(run("MgpoAdamW", { param, m, v, grad }, { ...step }));
  }
  const { lr, beta1, beta2, eps, weightDecay, correction1, correction2, clipScale } = step;
  tf.tidy(() => {
    const g = tf.mul(grad, clipScale);
    m.assign(tf.add(tf.mul(m, beta1), tf.mul(g, 1 - beta1)));
    v.assign(tf.add(tf.mul(v, beta2), tf.mul(tf.square(g), 1 - beta2)));
    const root = tf.add(tf.div(tf.sqrt(v), Math.sqrt(correction2)), eps);
    const kept = weightDecay === 0 ? param : tf.mul(param, 1 - lr * weightDecay);
    param.assign(tf.sub(kept, tf.mul(tf.div(m, root), lr / correction1)));
  });
}

/** Σ x² of a tensor. @param fused Forces one of the two ways. @default {as the backend has it} */
export function sumSquares(x: tf.Tensor, fused = hasFused("MgpoSumSquares")): tf.Scalar {
  if (fused) return run("MgpoSumSquares", { x }) as tf.Scalar;
  // Last axis first: one running float32 sum over a large tensor would lose digits.
  return tf.tidy(() => tf.sum(tf.sum(tf.square(x), -1)));
}

/** Parameters that take their steps together, with their moments one after the other, each from its offset. */
interface Arena {
  readonly params: ReadonlyMap<string, tf.Variable>;
  readonly offsets: readonly number[];
  /** `[total]`; a parameter that stands alone has moments of its own shape. */
  readonly m: tf.Variable;
  /** As `m`. */
  readonly v: tf.Variable;
}

/** Offsets in an arena are multiples of this: what a workgroup of the fused kernel does belongs to one parameter. */
const ARENA_STEP = 256;
/** A parameter of more numbers stands alone: its own dispatch costs less than copying it into an arena and back. */
const ARENA_MEMBER = 1 << 18;
/** The most numbers of an arena (16 MiB): less than any device can bind. */
const ARENA_SIZE = 1 << 22;

/** Cuts parameters into arenas, or, where no kernel steps several at once, into arenas of one each. */
function arenasOf(params: ReadonlyMap<string, tf.Variable>): Arena[] {
  const together = hasFused("MgpoAdamWAll") && hasFused("MgpoFlatten"), members: Map<string, tf.Variable>[] = [];
  let open = new Map<string, tf.Variable>(), room = 0;
  for (const [name, param] of params) {
    const size = arenaSize(param.size);
    if (!together || size > ARENA_MEMBER) {
      members.push(new Map([[name, param]]));
      continue;
    }
    if (size > room) {
      members.push(open = new Map());
      room = ARENA_SIZE;
    }
    open.set(name, param);
    room -= size;
  }
  return members.map(arenaOf);
}
const arenaSize = (size: number): number => Math.ceil(size / ARENA_STEP) * ARENA_STEP;

/** An arena with moments of zeros. */
function arenaOf(params: ReadonlyMap<string, tf.Variable>): Arena {
  const offsets = [0];
  for (const { size } of params.values()) offsets.push(offsets.at(-1)! + arenaSize(size));
  const total = offsets.pop()!, [first] = params.values();
  const zeros = () => tf.tidy(() => tf.variable(tf.zeros(params.size === 1 ? first.shape : [total]), false));
  return { params, offsets, m: zeros(), v: zeros() };
}

/** Moves an arena of several into arenas of one each, for when its kernel is switched off. */
function separated({ params, offsets, m, v }: Arena): Arena[] {
  const arenas = Array.from(params, ([name, param], i) => {
    const cut = (x: tf.Variable) =>
      tf.tidy(() => tf.variable(tf.reshape(tf.slice(x, offsets[i], param.size), param.shape), false));
    return { params: new Map([[name, param]]), offsets: [0], m: cut(m), v: cut(v) };
  });
  tf.dispose([m, v]);
  return arenas;
}

/** An arena's share of a step: its parameters that have a gradient, and the gradients as its kernel takes them. */
interface ArenaGradients {
  readonly arena: Arena;
  readonly names: readonly string[];
  readonly offsets: readonly number[];
  /** The gradient of the only parameter, else `[total]`, which is then owned. */
  readonly grad: tf.Tensor;
}

function arenaGradients(arena: Arena, grads: ReadonlyMap<string, tf.Tensor>): ArenaGradients | undefined {
  const { params, m } = arena, all = [...params.keys()], names = all.filter((name) => grads.has(name));
  if (names.length === 0) return undefined;
  const offsets = arena.offsets.filter((_, i) => grads.has(all[i]));
  if (params.size === 1) return { arena, names, offsets, grad: grads.get(names[0])! };
  const given = Object.fromEntries(names.map((name, i) => [`x${i}`, grads.get(name)!]));
  return { arena, names, offsets, grad: run("MgpoFlatten", given, { offsets, size: m.size }) as tf.Tensor };
}

/** One step of an arena; `lrs` has a learning rate for each name. */
function stepArena({ arena, names, offsets, grad }: ArenaGradients, step: Omit<AdamWStep, "lr">, lrs: number[]): void {
  const { params, m, v } = arena, used = names.map((name) => params.get(name)!);
  if (params.size === 1) return applyAdamW({ param: used[0], m, v }, grad, { ...step, lr: lrs[0] });
  const given = Object.fromEntries(used.map((param, i) => [`param${i}`, param]));
  tf.dispose(run("MgpoAdamWAll", { ...given, m, v, grad }, { ...step, lr: lrs, offsets: [...offsets] }));
}

/**
 * AdamW with decoupled weight decay and clipping by global norm, as `torch.optim.AdamW` after `clip_grad_norm_` (which divides
 * by norm + 1e-6). One step count serves all parameters; one without gradient in a step is left as it is. Where the backend has a
 * kernel for it, small parameters step together.
 */
export class AdamW {
  #arenas: Arena[];
  readonly #options: Required<AdamWOptions>;
  /** Steps made. */
  steps = 0;
  /** Steps skipped because the gradient's norm was not finite. */
  skipped = 0;

  /**
   * Allocates two moments of zeros for each parameter that is not frozen.
   *
   * @param params By name; not owned, and changed by {@linkcode step}.
   * @throws {RangeError} if every parameter is frozen.
   */
  constructor(params: ReadonlyMap<string, Variable>, options: AdamWOptions = {}) {
    this.#options = settled(adamWDefaults, options);
    const trained = new Map([...params].filter(([name]) => !this.#options.freeze(name)));
    if (trained.size === 0) throw new RangeError("nothing to train: every parameter is frozen");
    this.#arenas = arenasOf(trained);
  }

  /** The parameters that are trained, by name. */
  get trained(): ReadonlyMap<string, Variable> {
    return new Map(this.#arenas.flatMap(({ params }) => [...params]));
  }

  /**
   * One step. Reads one number back from the device.
   *
   * @param grads By parameter name; not owned. Names that are not trained are ignored.
   * @param lr Learning rate before `learningRateScale`.
   * @returns The global norm before clipping, and whether the step was skipped because that is not finite.
   */
  async step(grads: ReadonlyMap<string, Tensor>, lr: number): Promise<{ gradNorm: number; skipped: boolean }> {
    if (!hasFused("MgpoAdamWAll") && this.#arenas.some(({ params }) => params.size > 1)) {
      this.#arenas = this.#arenas.flatMap((arena) => arena.params.size > 1 ? separated(arena) : arena);
    }
    const parts = this.#arenas.flatMap((arena) => arenaGradients(arena, grads) ?? []);
    if (parts.length === 0) throw new RangeError("no gradient for any trained parameter");
    try {
      return await this.#step(parts, lr);
    } finally {
      for (const { arena, grad } of parts) if (arena.params.size > 1) grad.dispose();
    }
  }

  async #step(parts: readonly ArenaGradients[], lr: number): Promise<{ gradNorm: number; skipped: boolean }> {
    // Not addN: its WebGPU program binds all inputs at once, more than a shader stage may have.
    const squares = tf.tidy(() => {
      const each = parts.map(({ grad }) => sumSquares(grad));
      return each.length === 1 ? each[0] : tf.sum(tf.concat1d(each.map((x) => tf.reshape(x, [1]))));
    });
    const gradNorm = Math.sqrt((await squares.data())[0]);
    squares.dispose();
    if (!Number.isFinite(gradNorm)) {
      this.skipped++;
      return { gradNorm, skipped: true };
    }
    const { betas: [beta1, beta2], eps, weightDecay, maxGradNorm, learningRateScale } = this.#options;
    this.steps++;
    const correction1 = 1 - beta1 ** this.steps, correction2 = 1 - beta2 ** this.steps;
    const clipScale = Math.min(1, maxGradNorm / (gradNorm + 1e-6));
    const common = { beta1, beta2, eps, weightDecay, correction1, correction2, clipScale };
    for (const part of parts) stepArena(part, common, part.names.map((name) => lr * learningRateScale(name)));
    return { gradNorm, skipped: false };
  }

  /** Copies of `m.<name>`, `v.<name>` and `step` (steps made, steps skipped). */
  async state(): Promise<Map<string, Float32Array>> {
    const state = new Map([["step", Float32Array.of(this.steps, this.skipped)]]);
    for (const { params, offsets, m, v } of this.#arenas) {
      const [first, second] = await Promise.all([m.data<"float32">(), v.data<"float32">()]);
      for (const [i, [name, { size }]] of [...params].entries()) {
        state.set(`m.${name}`, first.slice(offsets[i], offsets[i] + size));
        state.set(`v.${name}`, second.slice(offsets[i], offsets[i] + size));
      }
    }
    return state;
  }

  /**
   * Restores what {@linkcode state} returned; the steps that follow are then the same bit for bit.
   *
   * @throws {RangeError} if an entry is missing, of another length, or of no trained parameter. Nothing is changed then.
   */
  load(state: ReadonlyMap<string, Float32Array>): void {
    const expected = new Map<string, number>([["step", 2]]);
    for (const [name, { size }] of this.trained) expected.set(`m.${name}`, size).set(`v.${name}`, size);
    for (const name of new Set([...expected.keys(), ...state.keys()])) {
      const [want, found] = [expected.get(name) ?? 0, state.get(name)?.length ?? 0];
      if (want === found) continue;
      throw new RangeError(
        `optimizer state ${name}: expected ${want} numbers, found ${found}; same policy, same frozen part?`,
      );
    }
    [this.steps, this.skipped] = state.get("step")!;
    for (const { params, offsets, m, v } of this.#arenas) {
      for (const [kind, moment] of [["m", m], ["v", v]] as const) {
        const values = new Float32Array(moment.size);
        [...params.keys()].forEach((name, i) => values.set(state.get(`${kind}.${name}`)!, offsets[i]));
        tf.tidy(() => moment.assign(tf.tensor(values, moment.shape)));
      }
    }
  }

  /** Releases the moments. */
  dispose(): void {
    for (const { m, v } of this.#arenas) tf.dispose([m, v]);
    this.#arenas = [];
  }
}

// ------------------------------------------------------------------------------------------------------------- trainer

/** What the trainer needs of a dialogue; a rollout's `Trajectory` is one. Arrays have an entry a token. */
export interface TrainingTrajectory {
  /** Which prompt of the batch it answers; dialogues of one prompt stand together. */
  readonly prompt: number;
  /** The ids as sampled, images expanded. */
  readonly ids: readonly number[];
  /** 1 where the model wrote the token. */
  readonly assistantMask: readonly number[];
  /** ln π_old as recorded, 0 off the mask. */
  readonly logprobs: readonly number[];
  /** The images that the image tokens in `ids` stand for, in order. */
  readonly images: readonly ImageInput[];
}

/** Options of {@linkcode Trainer}. The defaults are the recipe that the embedded miniature learns by. */
export interface TrainerOptions extends ObjectiveOptions, AdamWOptions {
  /** Full learning rate. @default {3e-4} */
  learningRate?: number;
  /** Its shape over the updates; `total` counts updates. @default {`{ kind: "constant" }`} */
  schedule?: ScheduleOptions & { kind: "constant" | "linear" | "cosine" };
  /** See {@linkcode groupAdvantages}; the paper's equation is "none". @default {"group"} */
  scale?: AdvantageScale;
  /** What carries loss: what the model wrote in all turns, in the last one, or every text token. @default {"all"} */
  lossOn?: "all" | "last" | "every";
  /** Temperature that the dialogues were sampled at, above 0. @default {1} */
  temperature?: number;
  /** Whether the vision tower (`visual.*`) is trained too. @default {false} */
  trainVision?: boolean;
  /** Passes over each batch. @default {1} */
  iterations?: number;
  /** Optimizer steps in a pass; the batch is cut between prompts. @default {1} */
  minibatches?: number;
  /** The most tokens of one forward pass; bounds memory, not the result. @default {8192} */
  tokensPerPass?: number;
  /**
   * Whether the backward pass computes each decoder block again instead of keeping its inside: the same result in less memory, for
   * one more forward pass. @default {false}
   */
  gradientCheckpointing?: boolean;
}

const trainerDefaults = {
  ...{ learningRate: 3e-4, schedule: { kind: "constant" }, scale: "group", lossOn: "all", temperature: 1 },
  ...{ trainVision: false, iterations: 1, minibatches: 1, tokensPerPass: 8192, gradientCheckpointing: false },
  ...{ lossType: "dapo", clipLow: 0.2, clipHigh: 0.2, beta: 0, importanceSampling: "token" },
} as const satisfies TrainerOptions;
type SettledOptions = TrainerOptions & Required<Pick<TrainerOptions, keyof typeof trainerDefaults>>;
const optionNames = [...Object.keys(trainerDefaults), ...Object.keys(adamWDefaults), "delta", "maxCompletionLength"];

/** Metrics of an optimizer's work; means over the optimizer steps of the call. */
export interface StepMetrics {
  /** Global norm before clipping; 0 without a step, NaN or Infinity if a step was skipped for it. */
  grad_norm: number;
  /** What the schedule gave for this update, before `learningRateScale`. */
  learning_rate: number;
  /** Tokens that carry loss, rows without gradient included. */
  tokens: number;
  /** Steps skipped since the start of the run because a gradient was not finite. */
  skipped_steps: number;
  /** Mean over the tokens that went through the model, in nats; NaN if none did. */
  entropy: number;
}
/** Metrics of {@linkcode Trainer.update}. */
export interface UpdateMetrics extends StepMetrics, PolicyMetrics {
  /** Mean of {@linkcode policyLoss} over the optimizer steps, the KL term included; 0 without a step. */
  policy_loss: number;
  /** Largest |recomputed − recorded| log-prob before the first optimizer step; NaN if nothing went through the model. */
  "rollout/logprob_diff_max": number;
  /** Mean of the rewards that are not NaN. */
  "reward/mean": number;
  /** Mean over the groups of the std within the group. */
  "reward/std": number;
  /** Fraction of groups, 0..1, whose rewards are all equal: nothing is learned from them. */
  frac_reward_zero_std: number;
  /** Mean |advantage| over all dialogues, those without effect included. */
  "advantage/abs_mean": number;
  /** The most negative advantage of a dialogue. */
  "advantage/min": number;
  /** The largest advantage of a dialogue. */
  "advantage/max": number;
}

/** What a run must keep, beside the weights, to go on as if it had not stopped. */
export interface TrainerState {
  /** The optimizer's moments and counters, as {@linkcode AdamW.state} names them. */
  tensors: Map<string, Float32Array>;
  /** Updates made (RL and supervised together). */
  updates: number;
}

/** A dialogue on its way through the optimizer. */
interface Row {
  sequence: Sequence;
  mask: readonly number[];
  /** Number of ones in the mask. */
  tokens: number;
  old: readonly number[];
  /** 1 where `old` was recorded while sampling. */
  sampled: readonly number[];
  ref?: readonly number[];
  advantage: number;
}
/** Of {@linkcode LossOptions}, what a part is of. */
interface LossCounts extends Pick<LossOptions, "rows" | "stepsPerGeneration"> {
  tokens?: number;
  itemsInBatch?: number;
}
type LossOf = (rows: readonly Row[]) => PassLoss;
interface PassResult {
  loss: number;
  rows: TokenRow[];
}

/** The mask with nothing but its last run of ones: the last assistant turn. */
function lastTurn(mask: readonly number[]): number[] {
  const end = mask.lastIndexOf(1);
  const start = mask.lastIndexOf(0, end);
  return mask.map((m, t) => t > start && t <= end ? m : 0);
}

/** Neighbouring rows (they share pictures) up to so many tokens; a longer row stands alone. */
function packRows(rows: readonly Row[], budget: number): Row[][] {
  const passes: Row[][] = [];
  let room = 0;
  for (const row of rows) {
    room -= row.sequence.ids.length;
    if (room >= 0) passes.at(-1)!.push(row);
    else {
      passes.push([row]);
      room = budget - row.sequence.ids.length;
    }
  }
  return passes;
}

/** `[height, width]`, padded with 0 on the right and below. */
function padded(rows: readonly ArrayLike<number>[], height: number, width: number): Float32Array {
  const data = new Float32Array(height * width);
  rows.forEach((row, b) => data.set(row, b * width));
  return data;
}

/** 1 for each token that carries loss, padded. */
const lossMask = (rows: readonly Row[], height: number, width: number): Float32Array =>
  padded(rows.map((row) => new Array(row.tokens).fill(1)), height, width);

/** Trains a policy: by rewards with `update`, by examples with `supervised`. Both share the optimizer and its schedule. */
export class Trainer {
  readonly #policy: Policy;
  readonly #reference?: Policy;
  readonly #options: SettledOptions;
  readonly #optimizer: AdamW;
  #updates = 0;

  /**
   * Checks the options and allocates the optimizer's state.
   *
   * @param policy Changed in place; not owned.
   * @param reference Frozen policy for the KL; needed if `beta` is not 0. With β = 0 it is only measured.
   * @throws {RangeError} if an option is unknown or impossible, or nothing is left to train.
   */
  constructor(policy: Policy, options: TrainerOptions = {}, reference?: Policy) {
    const unknown = Object.keys(options).find((name) => !optionNames.includes(name));
    if (unknown) throw new RangeError(`unknown trainer option ${unknown}; known are ${optionNames.join(", ")}`);
    const all = settled<SettledOptions>(trainerDefaults, options);
    for (const name of ["iterations", "minibatches", "tokensPerPass", "learningRate", "temperature"] as const) {
      const whole = name !== "learningRate" && name !== "temperature";
      if (all[name] > 0 && (!whole || Number.isInteger(all[name]))) continue;
      throw new RangeError(`${name} must be ${whole ? "an integer of at least 1" : "above 0"}, got ${all[name]}`);
    }
    if (all.beta !== 0 && !reference) throw new RangeError(`beta ${all.beta} needs a reference policy`);
    this.#policy = policy;
    this.#reference = reference;
    this.#options = all;
    const freeze = all.freeze ?? ((name: string) => !all.trainVision && name.startsWith("visual."));
    const { betas, eps, weightDecay, maxGradNorm, learningRateScale } = all;
    this.#optimizer = new AdamW(policy.parameters, { betas, eps, weightDecay, maxGradNorm, learningRateScale, freeze });
  }

  /**
   * One update from a batch of dialogues.
   *
   * @param trajectories Prompt after prompt, equally many of each.
   * @param rewards One for each; NaN is unscorable.
   * @throws {RangeError} if lengths differ or the dialogues do not stand in groups.
   */
  async update(trajectories: readonly TrainingTrajectory[], rewards: readonly number[]): Promise<UpdateMetrics> {
    const { beta, scale, iterations, minibatches } = this.#options;
    const groupSize = groupSizeOf(trajectories, rewards);
    const { advantages, zeroStd, stds } = groupAdvantages(rewards, groupSize, { scale });
    const rows = trajectories.map((t, i) => this.#row(t, advantages[i]));
    const useful = (row: Row) => row.tokens > 0 && (beta !== 0 || row.advantage !== 0);
    if (this.#reference) await this.#score(this.#reference, rows.filter(useful), (row, ref) => row.ref = ref);
    const unrecorded = rows.filter((row) => useful(row) && row.sampled.includes(0));
    await this.#score(this.#policy, unrecorded, (row, own) => {
      row.old = row.old.map((old, t) => row.sampled[t] ? old : own[t]);
    });

    const size = Math.ceil(zeroStd.length / minibatches) * groupSize;
    const steps = Math.ceil(rows.length / size);
    const itemsInBatch = sum(rows.map((row) => row.tokens));
    const lr = this.#learningRate();
    const losses: number[] = [], norms: number[] = [], seen: TokenRow[] = [];
    let difference = NaN;
    for (let k = 0; k < iterations * steps; k++) {
      const part = rows.slice((k % steps) * size, (k % steps + 1) * size);
      const active = part.filter(useful);
      if (active.length === 0) continue;
      const tokens = sum(part.map((row) => row.tokens));
      const whole = { rows: part.length, tokens, itemsInBatch, stepsPerGeneration: steps };
      const result = await this.#step(active, (pass) => this.#policyLoss(pass, whole), lr);
      if (norms.length === 0) difference = largestDifference(result.rows);
      losses.push(result.loss);
      norms.push(result.gradNorm);
      seen.push(...result.rows);
    }
    this.#updates++;
    const used = policyMetrics(seen, this.#options);
    return {
      policy_loss: losses.length ? mean(losses) : 0,
      ...used,
      "rollout/logprob_diff_max": difference,
      ...this.#stepMetrics(norms, lr, itemsInBatch),
      "reward/mean": mean(known(rewards)),
      "reward/std": mean(known(stds)),
      frac_reward_zero_std: zeroStd.filter((zero) => zero).length / zeroStd.length,
      "advantage/abs_mean": mean(advantages.map(Math.abs)),
      "advantage/min": Math.min(...advantages),
      "advantage/max": Math.max(...advantages),
    };
  }

  /**
   * One step of supervised fine-tuning: the mean cross-entropy over the masked tokens of all examples, at temperature 1.
   *
   * @param examples `mask` has an entry a token: 1 where it carries loss, never at 0.
   */
  async supervised(
    examples: readonly { sequence: Sequence; mask: readonly number[] }[],
  ): Promise<StepMetrics & { loss: number }> {
    const rows = examples.map(({ sequence, mask }): Row => {
      return { sequence, mask, tokens: sum(mask), old: [], sampled: [], advantage: 0 };
    });
    const tokens = sum(rows.map((row) => row.tokens));
    if (tokens === 0) throw new RangeError("supervised: no token of any example carries loss");
    const lr = this.#learningRate();
    const crossEntropy = (pass: readonly Row[]): PassLoss => ({
      name: "cross-entropy",
      arrays: (height, width) => ({ mask: lossMask(pass, height, width), divisor: Float32Array.of(-tokens) }),
      of: ({ logprobs }, { mask, divisor }) =>
        tf.div(tf.sum(tf.mul(logprobs, tf.tensor2d(mask, logprobs.shape))), tf.tensor(divisor, [])),
    });
    const result = await this.#step(rows.filter((row) => row.tokens > 0), crossEntropy, lr, 1);
    this.#updates++;
    const { entropy } = policyMetrics(result.rows);
    return { loss: result.loss, entropy, ...this.#stepMetrics([result.gradNorm], lr, tokens) };
  }

  /** Everything but the weights. */
  async state(): Promise<TrainerState> {
    return { tensors: await this.#optimizer.state(), updates: this.#updates };
  }

  /** Restores what {@linkcode state} returned. @throws {RangeError} if it belongs to another policy; nothing is changed then. */
  load({ tensors, updates }: TrainerState): void {
    this.#optimizer.load(tensors);
    this.#updates = updates;
  }

  /** Releases the optimizer's state; the policies stay. */
  dispose(): void {
    this.#policy.releasePasses?.();
    this.#optimizer.dispose();
  }

  #learningRate(): number {
    const { learningRate, schedule: { kind, ...shape } } = this.#options;
    return learningRate * schedule(kind, this.#updates, shape);
  }

  #row({ ids, images, assistantMask, logprobs }: TrainingTrajectory, advantage: number): Row {
    const { lossOn } = this.#options;
    const mask = lossOn === "last" ? lastTurn(assistantMask) : lossOn === "every" ? this.#textMask(ids) : assistantMask;
    const [old, sampled] = [logprobs, assistantMask].map((values) => values.filter((_, t) => mask[t] === 1));
    return { sequence: { ids, images }, mask, tokens: old.length, old, sampled, advantage };
  }

  /** 1 for every token that the policy could have written; it gives a suppressed one (an image's) no probability. */
  #textMask(ids: readonly number[]): number[] {
    const never = new Set(this.#policy.suppressTokens);
    return ids.map((id, t) => Number(t > 0 && !never.has(id)));
  }

  /** {@linkcode policyLoss} of rows that are a part of a larger batch. */
  #policyLoss(rows: readonly Row[], { tokens = 0, itemsInBatch = 0, ...whole }: LossCounts): PassLoss {
    const options = { ...this.#options, ...whole }, hasReference = this.#reference !== undefined;
    const { lossType, clipLow, clipHigh, delta, beta, importanceSampling, maxCompletionLength } = options;
    const objective = [lossType, clipLow, clipHigh, delta, beta, importanceSampling, maxCompletionLength];
    return {
      name: JSON.stringify(["policy", ...objective, whole, hasReference]),
      arrays: (height, width): HostArrays => ({
        old: padded(rows.map((row) => row.old), height, width),
        advantages: padded(rows.map((row) => [row.advantage]), height, 1),
        mask: lossMask(rows, height, width),
        ...(hasReference ? { ref: padded(rows.map((row) => row.ref ?? []), height, width) } : {}),
        ...{ tokens: Float32Array.of(Math.max(tokens, 1)), itemsInBatch: Float32Array.of(Math.max(itemsInBatch, 1)) },
      }),
      of: ({ logprobs }, arrays) => {
        const matrix = (values: Float32Array | Int32Array) => tf.tensor2d(values, logprobs.shape);
        const count = (values: Float32Array | Int32Array) => tf.tensor(values, []) as tf.Scalar;
        const inputs: LossInputs = {
          ...{ logprobs, oldLogprobs: matrix(arrays.old), mask: matrix(arrays.mask) },
          advantages: tf.tensor1d(arrays.advantages),
        };
        if (hasReference) inputs.refLogprobs = matrix(arrays.ref);
        const counts = { tokens: count(arrays.tokens), itemsInBatch: count(arrays.itemsInBatch) };
        return policyLoss(inputs, { ...options, ...counts });
      },
    };
  }

  #stepMetrics(norms: readonly number[], lr: number, tokens: number): Omit<StepMetrics, "entropy"> {
    const skipped_steps = this.#optimizer.skipped;
    return { grad_norm: norms.length ? mean(norms) : 0, learning_rate: lr, tokens, skipped_steps };
  }

  /** Forward and backward over the rows in as many passes as the budget asks for, then one optimizer step. */
  async #step(rows: readonly Row[], lossOf: LossOf, lr: number, temperature = this.#options.temperature) {
    const grads = new Map<string, tf.Tensor>();
    const reads: Promise<PassResult>[] = [];
    try {
      for (const pass of packRows(rows, this.#options.tokensPerPass)) {
        reads.push(readPass(this.#backward(pass, lossOf(pass), temperature, grads), pass));
      }
      // The norm and what the passes measured come back in one wait.
      const [{ gradNorm }, ...results] = await Promise.all([this.#optimizer.step(grads, lr), ...reads]);
      return { gradNorm, loss: sum(results.map((r) => r.loss)), rows: results.flatMap((r) => r.rows) };
    } finally {
      tf.dispose([...grads.values()]);
    }
  }

  /** Adds the gradients of one pass to `grads`; returns the rest of what it gave. */
  #backward(rows: readonly Row[], loss: PassLoss, temperature: number, grads: Map<string, tf.Tensor>): PassGradients {
    const { trainVision, gradientCheckpointing } = this.#options, policy = this.#policy;
    const sequences = rows.map((row) => row.sequence), masks = rows.map((row) => row.mask);
    const options = { temperature, trainVision, gradientCheckpointing };
    const request = { sequences, masks, options, loss, variables: this.#optimizer.trained };
    const passed = policy.gradients?.(request) ??
      differentiate(() => policy.logProbs(sequences, masks, options), request);
    for (const [name, grad] of passed.grads) {
      const before = grads.get(name);
      grads.set(name, before ? tf.add(before, grad) : grad);
      if (before) tf.dispose([before, grad]);
    }
    return passed;
  }

  /** The log-probs that a policy gives the tokens of each row, without gradient. */
  async #score(policy: Policy, rows: readonly Row[], use: (row: Row, logprobs: number[]) => void): Promise<void> {
    for (const pass of packRows(rows, this.#options.tokensPerPass)) {
      const sequences = pass.map((row) => row.sequence), masks = pass.map((row) => row.mask);
      const out = policy.logProbs(sequences, masks, { temperature: this.#options.temperature });
      const width = out.logprobs.shape[1], data = await out.logprobs.data();
      tf.dispose([out.logprobs, out.entropy]);
      pass.forEach((row, b) => use(row, [...data.subarray(b * width, b * width + row.tokens)]));
    }
  }
}

/** Rows to a prompt, checked. */
function groupSizeOf(trajectories: readonly TrainingTrajectory[], rewards: readonly number[]): number {
  const n = trajectories.length, prompts = new Set(trajectories.map((t) => t.prompt)).size, size = n / prompts;
  if (n === 0 || n !== rewards.length) throw new RangeError(`update: ${n} trajectories, but ${rewards.length} rewards`);
  if (!Number.isInteger(size) || trajectories.some((t, i) => t.prompt !== trajectories[i - i % size].prompt)) {
    throw new RangeError(
      `update: trajectories must stand prompt after prompt, equally many of each (${n} of ${prompts})`,
    );
  }
  return size;
}

/** Reads back what a pass reports, and releases it. */
async function readPass({ report, width }: PassGradients, rows: readonly Row[]): Promise<PassResult> {
  const data = await report.data();
  report.dispose();
  const half = (data.length - 1) / 2;
  return {
    loss: data[0],
    rows: rows.map(({ tokens, old, sampled, ref, advantage }, b) => {
      const at = 1 + b * width;
      const logprobs = data.subarray(at, at + tokens), entropy = data.subarray(at + half, at + half + tokens);
      return { logprobs, entropy, old, sampled, ref, advantage };
    }),
  };
}

/** Largest |recomputed − recorded| log-prob of a sampled token. */
function largestDifference(rows: readonly TokenRow[]): number {
  const differences = rows.flatMap(({ logprobs, old, sampled }) =>
    Array.from(logprobs, (p, t) => sampled?.[t] === 0 ? 0 : Math.abs(p - old[t]))
  );
  return differences.reduce((a, b) => Math.max(a, b), 0);
}
