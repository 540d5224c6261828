import assert from "node:assert/strict";
import { tf } from "./deps.ts";
import {
  AdamW,
  applyAdamW,
  entropyFromLogits,
  groupAdvantages,
  type LossOptions,
  type LossType,
  policyLoss,
  policyMetrics,
  schedule,
  selectiveLogSoftmax,
  sumSquares,
  Trainer,
  type TrainerOptions,
  type TrainingTrajectory,
  weightedRewards,
} from "./mgpo.ts";
import { loadPolicy } from "./policy/load.ts";
import { hasFused, type Kernels, useKernels } from "./policy/ops.ts";
import type { Completion, GenerateOptions, LogProbOptions, Policy, Sequence } from "./policy/policy.ts";
import { RandomStream } from "./random.ts";
import { installWasmKernels } from "./wasm/register.ts";

type Matrix = number[][];
async function golden<T>(name: string): Promise<{ cases: T[] }> {
  return JSON.parse(await Deno.readTextFile(new URL(`../fixtures/goldens/grpo/${name}.json`, import.meta.url)));
}
const backends = ["wasm", "cpu"] as const;
installWasmKernels();
async function onBackend(name: string, kernels: Kernels = "fused"): Promise<void> {
  useKernels(kernels);
  await tf.setBackend(name);
  await tf.ready();
}
function near(actual: number, expected: number | null, tolerance: number, what: string): void {
  if (expected === null) return assert.ok(Number.isNaN(actual), `${what}: ${actual} is not NaN`);
  assert.ok(Math.abs(actual - expected) <= tolerance, `${what}: ${actual}, expected ${expected} ± ${tolerance}`);
}

// ---------------------------------------------------------------------------------------------------------- advantages

interface AdvantageCase {
  name: string;
  num_generations: number;
  scale_rewards: "group" | "batch" | "none";
  reward_weights: number[];
  rewards_per_func: (number | null)[][];
  rewards: (number | null)[];
  advantages: number[];
  is_std_zero: boolean[];
  f32_vs_f64: number;
}

Deno.test("advantages and combined rewards equal the goldens", async () => {
  const { cases } = await golden<AdvantageCase>("advantages");
  assert.equal(cases.length, 30);
  for (const c of cases) {
    const rewards = weightedRewards(c.rewards_per_func, c.reward_weights);
    rewards.forEach((r, i) => near(r, c.rewards[i], 1e-6, `${c.name}, reward ${i}`));
    const { advantages, zeroStd } = groupAdvantages(rewards, c.num_generations, { scale: c.scale_rewards });
    advantages.forEach((a, i) => near(a, c.advantages[i], 1e-5 + 4 * c.f32_vs_f64, `${c.name}, advantage ${i}`));
    assert.deepEqual(advantages.map((_, i) => zeroStd[Math.floor(i / c.num_generations)]), c.is_std_zero, c.name);
  }
});

Deno.test("equal rewards have advantages of exactly 0, and ragged groups are refused", () => {
  const { advantages, zeroStd } = groupAdvantages([0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 6);
  assert.deepEqual(advantages, [0, 0, 0, 0, 0, 0]);
  assert.deepEqual(zeroStd, [true]);
  assert.throws(() => groupAdvantages([1, 0, 1], 2), /3 rewards do not fall into groups of 2/);
});

// ---------------------------------------------------------------------------------------------------------------- loss

interface LossCase {
  name: string;
  config: {
    importance_sampling_level: "token" | "sequence";
    max_completion_length: number;
    num_items_in_batch: number;
    loss_type: LossType;
    eps_low: number;
    eps_high: number;
    beta?: number;
    delta?: number;
    accum?: number;
    steps_per_gen?: number;
  };
  logps: Matrix;
  old_logps: Matrix;
  ref_logps: Matrix;
  advantages: number[];
  completion_mask: Matrix;
  tool_mask: Matrix | null;
  loss: number;
  dloss_dlogps: Matrix;
  metrics: Record<string, number | null>;
}
const lossOptions = ({ config: c }: LossCase): LossOptions => ({
  lossType: c.loss_type,
  clipLow: c.eps_low,
  clipHigh: c.eps_high,
  beta: c.beta,
  delta: c.delta,
  importanceSampling: c.importance_sampling_level,
  maxCompletionLength: c.max_completion_length,
  itemsInBatch: c.num_items_in_batch,
  accumulation: c.accum,
  stepsPerGeneration: c.steps_per_gen,
});
const maskOf = (c: LossCase): Matrix =>
  c.completion_mask.map((r, b) => r.map((m, t) => m * (c.tool_mask?.[b][t] ?? 1)));

/** Loss and gradient of the given rows. */
function lossAndGradient(c: LossCase, options: LossOptions, from = 0, to = c.logps.length) {
  return tf.tidy(() => {
    const f = (logprobs: tf.Tensor) =>
      policyLoss({
        logprobs: logprobs as tf.Tensor2D,
        oldLogprobs: tf.tensor2d(c.old_logps.slice(from, to)),
        refLogprobs: options.beta ? tf.tensor2d(c.ref_logps.slice(from, to)) : undefined,
        advantages: tf.tensor1d(c.advantages.slice(from, to)),
        mask: tf.tensor2d(maskOf(c).slice(from, to)),
      }, options);
    const { value, grad } = tf.valueAndGrad(f)(tf.tensor2d(c.logps.slice(from, to)));
    return { loss: value.dataSync()[0], gradient: grad.arraySync() as Matrix };
  });
}

for (const backend of backends) {
  Deno.test(`losses, gradients and metrics equal the goldens on ${backend}`, async () => {
    await onBackend(backend);
    const { cases } = await golden<LossCase>("losses");
    assert.equal(cases.length, 61);
    for (const c of cases) {
      const what = `${c.name}, ${c.config.loss_type}`, before = tf.memory().numTensors;
      const { loss, gradient } = lossAndGradient(c, lossOptions(c));
      near(loss, c.loss, Math.max(1e-6, 2e-5 * Math.abs(c.loss)), what);
      const largest = Math.max(...c.dloss_dlogps.flat().map(Math.abs));
      gradient.flat().forEach((g, i) => near(g, c.dloss_dlogps.flat()[i], 2e-5 * largest, `${what}, gradient ${i}`));
      assert.equal(tf.memory().numTensors, before, `${what}: leak`);
    }
  });
}

Deno.test("metrics of the objective equal the goldens", async () => {
  for (const c of (await golden<LossCase>("losses")).cases) {
    const mask = maskOf(c), pick = (rows: Matrix, b: number) => rows[b].filter((_, t) => mask[b][t]);
    const rows = c.logps.map((_, b) => ({
      logprobs: pick(c.logps, b),
      old: pick(c.old_logps, b),
      ref: c.config.beta ? pick(c.ref_logps, b) : undefined,
      advantage: c.advantages[b],
    }));
    const found = policyMetrics(rows, lossOptions(c));
    for (const [key, value] of Object.entries(c.metrics)) {
      const name = key.replace(/_mean$/, "") as keyof typeof found;
      near(found[name]!, value, 1e-6 * Math.max(1, Math.abs(value ?? 0)), `${c.name}, ${key}`);
    }
    assert.equal(found.kl === undefined, c.metrics.kl === undefined);
  }
});

Deno.test("a batch in parts has the loss of the whole, for each loss type", async () => {
  await onBackend("wasm");
  for (const c of (await golden<LossCase>("losses")).cases) {
    const tokens = maskOf(c).flat().reduce((a, b) => a + b, 0);
    const options = { ...lossOptions(c), rows: c.logps.length, tokens };
    const whole = lossAndGradient(c, options);
    const parts = [lossAndGradient(c, options, 0, 1), lossAndGradient(c, options, 1)];
    const tolerance = 1e-6 * Math.max(1, Math.abs(c.loss));
    near(parts[0].loss + parts[1].loss, whole.loss, tolerance, `${c.name}, ${c.config.loss_type}`);
    assert.deepEqual(parts.flatMap((p) => p.gradient), whole.gradient, c.name);
  }
});

Deno.test("values off the mask cannot make the loss infinite, and missing inputs are named", async () => {
  await onBackend("wasm");
  tf.tidy(() => {
    const tensors = { oldLogprobs: tf.tensor2d([[-1, -500]]), refLogprobs: tf.tensor2d([[-1, 500]]) };
    const inputs = { ...tensors, advantages: tf.tensor1d([1]), mask: tf.tensor2d([[1, 0]]) };
    const f = (logprobs: tf.Tensor) => policyLoss({ ...inputs, logprobs: logprobs as tf.Tensor2D }, { beta: 0.1 });
    const { value, grad } = tf.valueAndGrad(f)(tf.tensor2d([[-1, 0]]));
    const found = [...value.dataSync(), ...grad.dataSync()];
    [-1, -1, 0].forEach((x, i) => near(found[i], x, 1e-6, `loss, then gradient: ${i}`));
    const logprobs = tf.tensor2d([[-1, 0]]);
    assert.throws(() => policyLoss({ ...inputs, logprobs, refLogprobs: undefined }, { beta: 0.1 }), /no reference/);
    assert.throws(() => policyLoss({ ...inputs, logprobs }, { lossType: "dr_grpo" }), /needs maxCompletionLength/);
    assert.throws(() => policyLoss({ ...inputs, logprobs }, { lossType: "ppo" as LossType }), /lossType must be grpo/);
  });
});

interface LogitCase {
  temperature: number;
  logits: Matrix;
  index: number[];
  logps: number[];
  entropy: number[];
}
for (const backend of backends) {
  Deno.test(`log-probs and entropies equal the goldens on ${backend}`, async () => {
    await onBackend(backend);
    for (const { temperature, logits, index, logps, entropy } of (await golden<LogitCase>("logprobs")).cases) {
      const tolerance = Math.max(...logits.flat().map(Math.abs)) > 200 ? 1e-4 : 1e-5;
      tf.tidy(() => {
        const x = tf.tensor2d(logits);
        const found = selectiveLogSoftmax(x, index, temperature).dataSync();
        logps.forEach((p, i) => near(found[i], p, tolerance, `log-prob ${i} at temperature ${temperature}`));
        const spread = entropyFromLogits(x, temperature).dataSync();
        entropy.forEach((h, i) => near(spread[i], h, tolerance, `entropy ${i} at temperature ${temperature}`));
      });
    }
  });
}

// ----------------------------------------------------------------------------------------------------------- optimizer

Deno.test("schedule: warm-up, hold, decay to the floor", () => {
  const at = (kind: "constant" | "linear" | "cosine", steps: number[]) =>
    steps.map((s) => schedule(kind, s, { warmup: 4, hold: 2, total: 16, minRatio: 0.2 }));
  assert.deepEqual(at("constant", [0, 3, 4, 99]), [0.25, 1, 1, 1]);
  const linear = at("linear", [0, 3, 5, 6, 11, 16, 99]);
  [0.25, 1, 1, 1, 0.6, 0.2, 0.2].forEach((r, i) => near(linear[i], r, 1e-12, `linear ${i}`));
  const cosine = at("cosine", [6, 11, 16]);
  [1, 0.6, 0.2].forEach((r, i) => near(cosine[i], r, 1e-12, `cosine ${i}`));
  assert.throws(() => schedule("cosine", 3), /needs total/);
});

/** AdamW after clipping, in doubles, one number at a time. */
class SlowAdamW {
  #m: number[];
  #v: number[];
  #t = 0;
  constructor(readonly x: number[]) {
    this.#m = x.map(() => 0);
    this.#v = x.map(() => 0);
  }
  step(grad: number[], lr: (i: number) => number, decay: number, maxNorm: number): void {
    this.#t++;
    const norm = Math.hypot(...grad), clip = norm + 1e-6 > maxNorm ? maxNorm / (norm + 1e-6) : 1;
    for (let i = 0; i < grad.length; i++) {
      const g = grad[i] * clip;
      this.#m[i] = 0.9 * this.#m[i] + 0.1 * g;
      this.#v[i] = 0.99 * this.#v[i] + 0.01 * g * g;
      this.x[i] -= lr(i) * decay * this.x[i];
      const mHat = this.#m[i] / (1 - 0.9 ** this.#t), vHat = this.#v[i] / (1 - 0.99 ** this.#t);
      this.x[i] -= lr(i) * mHat / (Math.sqrt(vHat) + 1e-6);
    }
  }
}

/** Three parameters: `a` [2, 3], `b` [2] and `visual.c` [1]. */
function parameters(): Map<string, tf.Variable> {
  const make = (shape: number[], from: number) => {
    const size = shape.reduce((p, n) => p * n, 1);
    return tf.tidy(() => tf.variable(tf.tensor(Array.from({ length: size }, (_, i) => Math.sin(from + i)), shape)));
  };
  return new Map([["a", make([2, 3], 0)], ["b", make([2], 6)], ["visual.c", make([1], 8)]]);
}
function gradients(step: number): { map: Map<string, tf.Tensor>; flat: number[] } {
  const random = new RandomStream(5, "gradient", step), flat = Array.from({ length: 9 }, () => random.normal());
  const slice = (from: number, shape: number[]) =>
    tf.tensor(flat.slice(from, from + shape.reduce((p, n) => p * n, 1)), shape);
  return { map: new Map([["a", slice(0, [2, 3])], ["b", slice(6, [2])], ["visual.c", slice(8, [1])]]), flat };
}
const values = (params: ReadonlyMap<string, tf.Variable>) => [...params.values()].flatMap((p) => [...p.dataSync()]);
const disposeAll = (tensors: ReadonlyMap<string, tf.Tensor>) => tf.dispose([...tensors.values()]);

for (const backend of backends) {
  Deno.test(`AdamW equals a slow version on ${backend}, keeps frozen parameters and leaks nothing`, async () => {
    await onBackend(backend);
    const start = tf.memory().numTensors, params = parameters();
    const slow = new SlowAdamW(values(params).slice(0, 8)), frozen = values(params)[8];
    const optimizer = new AdamW(params, {
      betas: [0.9, 0.99],
      eps: 1e-6,
      weightDecay: 0.1,
      maxGradNorm: 2,
      learningRateScale: (name) => name === "b" ? 0.5 : 1,
      freeze: (name) => name.startsWith("visual."),
    });
    assert.deepEqual([...optimizer.trained.keys()], ["a", "b"]);
    const held = tf.memory().numTensors;
    for (let step = 0; step < 6; step++) {
      const { map, flat } = gradients(step), trained = flat.slice(0, 8);
      const { gradNorm, skipped } = await optimizer.step(map, 0.05);
      near(gradNorm, Math.hypot(...trained), 1e-5, "norm without the frozen part");
      assert.equal(skipped, false);
      slow.step(trained, (i) => i < 6 ? 0.05 : 0.025, 0.1, 2);
      values(params).slice(0, 8).forEach((x, i) => near(x, slow.x[i], 2e-6, `step ${step}, number ${i}`));
      disposeAll(map);
      assert.equal(tf.memory().numTensors, held);
    }
    assert.equal(values(params)[8], frozen);
    optimizer.dispose();
    disposeAll(params);
    assert.equal(tf.memory().numTensors, start);
  });
}

Deno.test("AdamW skips and counts a step whose gradient is not finite", async () => {
  await onBackend("wasm");
  const params = parameters(), optimizer = new AdamW(params), before = values(params);
  const { map } = gradients(0), bad = tf.tensor1d([NaN, 1]);
  const result = await optimizer.step(new Map([...map, ["b", bad]]), 0.1);
  assert.equal(result.skipped, true);
  assert.deepEqual([optimizer.steps, optimizer.skipped], [0, 1]);
  assert.deepEqual(values(params), before);
  await assert.rejects(optimizer.step(new Map(), 0.1), /no gradient/);
  assert.throws(() => new AdamW(params, { freeze: () => true }), /every parameter is frozen/);
  optimizer.dispose();
  disposeAll(params);
  disposeAll(map);
  bad.dispose();
});

Deno.test("AdamW goes on from a saved state bit for bit, and refuses a foreign one", async () => {
  await onBackend("wasm");
  const run = async (saveAt?: number) => {
    const params = parameters();
    let optimizer = new AdamW(params);
    for (let step = 0; step < 6; step++) {
      const { map } = gradients(step);
      await optimizer.step(map, 0.05);
      disposeAll(map);
      if (step !== saveAt) continue;
      const state = await optimizer.state();
      optimizer.dispose();
      optimizer = new AdamW(params);
      optimizer.load(state);
    }
    const state = await optimizer.state(), result = values(params);
    const narrow = new AdamW(params, { freeze: (name) => name === "b" });
    assert.throws(() => narrow.load(state), /optimizer state m\.b: expected 0 numbers, found 2/);
    state.delete("v.a");
    assert.throws(() => optimizer.load(state), /optimizer state v\.a: expected 6 numbers, found 0/);
    narrow.dispose();
    optimizer.dispose();
    disposeAll(params);
    return result;
  };
  assert.deepEqual(await run(2), await run());
});

// ------------------------------------------------------------------------------------------------------------- trainer

/**
 * A real, if minute, language model for unit tests: a bigram table, ln p(b | a) = log-softmax of row a, plus a bias that plays
 * the vision tower (it takes part only with `trainVision`). It sees no images and has no chat template.
 */
class Bigram implements Policy {
  readonly name = "bigram";
  readonly stopTokens = [0];
  readonly parameters: Map<string, tf.Variable>;
  /** Forward passes so far. */
  passes = 0;
  constructor(readonly vocab = 6, spread = 0.5, readonly suppressTokens: readonly number[] = []) {
    const random = new RandomStream(3, "bigram");
    const table = Float32Array.from({ length: vocab * vocab }, () => spread * random.normal());
    const variable = (x: () => tf.Tensor) => tf.tidy(() => tf.variable(x()));
    this.parameters = new Map([
      ["model.table", variable(() => tf.tensor2d(table, [vocab, vocab]))],
      ["visual.bias", variable(() => tf.zeros([vocab]))],
    ]);
  }
  #logits(ids: readonly number[], withBias: boolean): tf.Tensor2D {
    const rows = tf.oneHot(tf.tensor1d([...ids], "int32"), this.vocab).toFloat() as tf.Tensor2D;
    const logits = tf.matMul(rows, this.parameters.get("model.table") as unknown as tf.Tensor2D) as tf.Tensor2D;
    return withBias ? tf.add(logits, this.parameters.get("visual.bias")!) : logits;
  }
  logProbs(sequences: readonly Sequence[], masks: readonly (readonly number[])[], options: LogProbOptions = {}) {
    this.passes++;
    const width = Math.max(...masks.map((mask) => mask.filter((m) => m).length));
    const [logprobs, entropy] = tf.tidy(() => {
      const rows = sequences.map(({ ids }, b) => {
        const at = ids.map((_, t) => t).filter((t) => masks[b][t]);
        if (at.length === 0) return [tf.zeros([width]), tf.zeros([width])];
        const logits = this.#logits(at.map((t) => ids[t - 1]), options.trainVision ?? false);
        const chosen = selectiveLogSoftmax(logits, at.map((t) => ids[t]), options.temperature);
        return [chosen, entropyFromLogits(logits, options.temperature)].map((x) => tf.pad(x, [[0, width - at.length]]));
      });
      return [0, 1].map((k) => tf.stack(rows.map((row) => row[k])) as tf.Tensor2D);
    });
    return { logprobs, entropy };
  }
  generate(sequences: readonly Sequence[], options: GenerateOptions): Promise<Completion[]> {
    const table = tf.tidy(() => tf.logSoftmax(this.parameters.get("model.table")!).arraySync() as Matrix);
    return Promise.resolve(sequences.map(({ ids: prompt }, b) => {
      const random = new RandomStream(options.seed ?? 0, "sample", ...(options.keys?.[b] ?? [0, b, 0]));
      const done: Completion = { ids: [], logprobs: [], finish: "length" };
      for (let last = prompt.at(-1)!; done.ids.length < options.maxNewTokens && done.finish === "length";) {
        let left = random.uniform(), id = 0;
        while (id < this.vocab - 1 && (left -= Math.exp(table[last][id])) >= 0) id++;
        done.ids.push(id);
        done.logprobs.push(table[last][id]);
        if (this.stopTokens.includes(id)) done.finish = "stop";
        last = id;
      }
      return done;
    }));
  }
  prepareImage(): never {
    throw new Error("a bigram sees no images");
  }
  encodeChat = this.prepareImage;
  encodeContinuation = this.prepareImage;
  encode = (text: string) => [...text].map(Number);
  decode = (ids: readonly number[]) => ids.join("");
  dispose(): void {
    disposeAll(this.parameters);
  }
}

/** Two-turn dialogues: prompt, reply, two user tokens, reply. */
async function dialogues(
  policy: Policy,
  prompts: number,
  groupSize: number,
  step: number,
): Promise<TrainingTrajectory[]> {
  const all: TrainingTrajectory[] = [];
  for (let prompt = 0; prompt < prompts; prompt++) {
    for (let g = 0; g < groupSize; g++) {
      const ids = [1, prompt % 5 + 1], mask = [0, 0], logprobs = [0, 0];
      for (let turn = 0; turn < 2; turn++) {
        const keys = [[step, prompt * groupSize + g, turn] as const];
        const [reply] = await policy.generate([{ ids, images: [] }], { maxNewTokens: 5, keys });
        ids.push(...reply.ids);
        logprobs.push(...reply.logprobs);
        mask.push(...reply.ids.map(() => 1));
        if (turn === 1) continue;
        ids.push(2, 3);
        logprobs.push(0, 0);
        mask.push(0, 0);
      }
      all.push({ prompt, ids, assistantMask: mask, logprobs, images: [] });
    }
  }
  return all;
}
/** 1 if the model wrote a 4 in its last turn, else 0. */
const wroteFour = (t: TrainingTrajectory) => Number(t.ids.slice(t.assistantMask.lastIndexOf(0)).includes(4));

/** A trainer on a fresh bigram after some updates; the caller disposes both. */
async function trained(options: TrainerOptions, updates: number, resumeAt = -1) {
  const policy = new Bigram();
  let trainer = new Trainer(policy, options);
  const log = [];
  for (let step = 0; step < updates; step++) {
    const batch = await dialogues(policy, 4, 6, step);
    log.push(await trainer.update(batch, batch.map(wroteFour)));
    if (step !== resumeAt) continue;
    const state = await trainer.state();
    trainer.dispose();
    trainer = new Trainer(policy, options);
    trainer.load(state);
  }
  const weights = values(policy.parameters);
  trainer.dispose();
  policy.dispose();
  return { log, weights };
}

Deno.test("update: rewards rise, the vision tower stays, every tensor is released", async () => {
  await onBackend("wasm");
  const start = tf.memory().numTensors, policy = new Bigram(), trainer = new Trainer(policy, { learningRate: 0.05 });
  const counts: number[] = [], rewards: number[] = [];
  for (let step = 0; step < 30; step++) {
    const batch = await dialogues(policy, 6, 8, step);
    const metrics = await trainer.update(batch, batch.map(wroteFour));
    rewards.push(metrics["reward/mean"]);
    counts.push(tf.memory().numTensors);
    assert.ok(metrics["rollout/logprob_diff_max"] < 1e-5, `log-probs differ by ${metrics["rollout/logprob_diff_max"]}`);
    assert.deepEqual([metrics["clip_ratio/region"], metrics.skipped_steps, metrics.learning_rate], [0, 0, 0.05]);
    assert.ok(metrics.grad_norm > 0 && metrics.entropy > 0 && metrics.entropy < Math.log(6));
    assert.equal(metrics.tokens, batch.reduce((n, t) => n + t.assistantMask.reduce((a, b) => a + b, 0), 0));
  }
  const late = rewards.slice(-5).reduce((a, b) => a + b) / 5;
  assert.ok(rewards[0] < 0.5 && late > 0.75, `reward ${rewards[0]} → ${late}`);
  assert.deepEqual([...policy.parameters.get("visual.bias")!.dataSync()], [0, 0, 0, 0, 0, 0]);
  assert.ok(counts.every((count) => count === counts[0]), `tensors ${counts}`);
  trainer.dispose();
  policy.dispose();
  assert.equal(tf.memory().numTensors, start);
});

Deno.test("update: forward passes of any size give the same weights, for each loss type", async () => {
  await onBackend("wasm");
  for (const lossType of ["dapo", "grpo", "bnpo", "dr_grpo"] as const) {
    const options: TrainerOptions = { lossType, learningRate: 0.02, maxCompletionLength: 10, maxGradNorm: Infinity };
    const one = await trained(options, 3), many = await trained({ ...options, tokensPerPass: 1 }, 3);
    one.weights.forEach((w, i) => near(many.weights[i], w, 1e-5, `${lossType}, weight ${i}`));
    near(many.log[0].policy_loss, one.log[0].policy_loss, 1e-6, lossType);
    near(many.log[0].grad_norm, one.log[0].grad_norm, 1e-5, lossType);
  }
});

Deno.test("update: leaving out what has advantage 0 changes nothing", async () => {
  await onBackend("wasm");
  const weights: number[][] = [];
  for (const beta of [0, 1e-30]) { // a KL too weak to matter sends every row through the model
    const policy = new Bigram(), reference = new Bigram();
    const trainer = new Trainer(policy, { beta, learningRate: 0.02, tokensPerPass: 1 }, reference);
    const batch = await dialogues(policy, 4, 6, 0);
    const metrics = await trainer.update(batch, batch.map((t) => t.prompt === 1 || t.prompt === 2 ? 1 : wroteFour(t)));
    assert.equal(policy.passes, beta === 0 ? 12 : 24);
    assert.equal(metrics.frac_reward_zero_std, 0.5);
    near(metrics.kl!, 0, 1e-6, "KL to an equal reference");
    weights.push(values(policy.parameters));
    trainer.dispose();
    policy.dispose();
    reference.dispose();
  }
  weights[0].forEach((w, i) => near(weights[1][i], w, 1e-6, `weight ${i}`));
});

Deno.test("update: without any advantage there is no step; an unscorable dialogue carries none", async () => {
  await onBackend("wasm");
  const policy = new Bigram(), trainer = new Trainer(policy), before = values(policy.parameters);
  const batch = await dialogues(policy, 2, 3, 0);
  const metrics = await trainer.update(batch, [1, 1, 1, 0, NaN, 0]);
  assert.deepEqual([policy.passes, metrics.grad_norm, metrics.policy_loss, metrics.frac_reward_zero_std], [0, 0, 0, 1]);
  near(metrics["reward/mean"], 0.6, 1e-12, "mean of the scorable");
  assert.deepEqual(values(policy.parameters), before);
  trainer.dispose();
  policy.dispose();
});

Deno.test("update: KL pulls back to the reference, mini-batches and iterations make their steps", async () => {
  await onBackend("wasm");
  const distance = async (beta: number) => {
    const policy = new Bigram(), reference = new Bigram(), start = values(policy.parameters);
    const options: TrainerOptions = { beta, learningRate: 0.02, minibatches: 2, iterations: 3 };
    const trainer = new Trainer(policy, options, reference);
    let last;
    for (let step = 0; step < 4; step++) {
      const batch = await dialogues(policy, 4, 6, step);
      last = await trainer.update(batch, batch.map(wroteFour));
    }
    assert.equal((await trainer.state()).tensors.get("step")![0], 4 * 2 * 3);
    assert.ok(last!.kl! > 0);
    const moved = Math.hypot(...values(policy.parameters).map((w, i) => w - start[i]));
    trainer.dispose();
    policy.dispose();
    reference.dispose();
    return moved;
  };
  const free = await distance(0), held = await distance(5);
  assert.ok(held < 0.7 * free, `moved ${held} with KL, ${free} without`);
});

Deno.test("update: lossOn last trains on the last turn only", async () => {
  await onBackend("wasm");
  const policy = new Bigram(), options = { learningRate: 0.02 };
  const batch = await dialogues(policy, 4, 6, 0), rewards = batch.map(wroteFour);
  const byHand = batch.map((t) => {
    const from = t.assistantMask.lastIndexOf(0);
    return { ...t, assistantMask: t.assistantMask.map((m, i) => i > from ? m : 0) };
  });
  const after = [];
  for (const [lossOn, given] of [["last", batch], ["all", byHand], ["all", batch]] as const) {
    const fresh = new Bigram(), trainer = new Trainer(fresh, { ...options, lossOn });
    await trainer.update(given, rewards);
    after.push(values(fresh.parameters));
    trainer.dispose();
    fresh.dispose();
  }
  assert.deepEqual(after[0], after[1]);
  assert.notDeepEqual(after[0], after[2]);
  policy.dispose();
});

Deno.test("update: lossOn every trains on prompts too, from the policy's own log-probs there", async () => {
  await onBackend("wasm");
  const image = 3, learningRate = 0.02;
  const policy = new Bigram(6, 0.5, [image]);
  const batch = await dialogues(policy, 4, 6, 0), rewards = batch.map(wroteFour);
  const batches = batch.map((t) => ({ ...t, logprobs: t.logprobs.map((p, i) => t.assistantMask[i] ? p + 0.01 : 0) }));
  const trainer = new Trainer(policy, { learningRate, lossOn: "every" });
  // By hand: a Bigram's log-probs from its table; loss Σ −ρ·A over all tokens but the first and the image's, as a token mean.
  const table = policy.parameters.get("model.table")! as unknown as tf.Variable;
  const { advantages } = groupAdvantages(rewards, 6);
  const carries = batches.map((t) => t.ids.map((id, i) => i > 0 && id !== image));
  const tokens = carries.flat().filter(Boolean).length;
  const { value, grads } = tf.variableGrads(() => {
    const terms = batches.flatMap((t, b) => {
      const at = t.ids.flatMap((_, i) => carries[b][i] ? [i] : []);
      const rows = tf.oneHot(tf.tensor1d(at.map((i) => t.ids[i - 1]), "int32"), 6).toFloat();
      const logits = tf.matMul(rows as tf.Tensor2D, table as unknown as tf.Tensor2D) as tf.Tensor2D;
      const now = selectiveLogSoftmax(logits, at.map((i) => t.ids[i]));
      const own = now.dataSync();
      const old = tf.tensor1d(at.map((i, k) => t.assistantMask[i] ? t.logprobs[i] : own[k]));
      return [tf.mul(tf.sum(tf.exp(tf.sub(now, old))), -advantages[b])];
    });
    return tf.div(tf.addN(terms), tokens) as tf.Scalar;
  }, [table]);
  const gradient = Object.values(grads)[0].flatten().arraySync() as number[];
  const before = table.flatten().arraySync() as number[];
  const start = tf.memory().numTensors;
  const metrics = await trainer.update(batches, rewards);
  assert.equal(tf.memory().numTensors, start, "tensors leak");
  assert.equal(metrics.tokens, tokens);
  near(metrics.policy_loss, value.dataSync()[0], 1e-6, "loss");
  near(metrics.grad_norm, Math.hypot(...gradient), 1e-6, "gradient's norm");
  near(metrics["rollout/logprob_diff_max"], 0.01, 1e-5, "difference of sampled tokens");
  // AdamW's first step goes against the sign of each gradient.
  (table.flatten().arraySync() as number[]).forEach((w, i) => {
    if (Math.abs(gradient[i]) > 1e-5) near(w - before[i], -learningRate * Math.sign(gradient[i]), 1e-4, `weight ${i}`);
  });
  trainer.dispose();
  policy.dispose();
});

Deno.test("a resumed run equals an uninterrupted one bit for bit, schedule included", async () => {
  await onBackend("wasm");
  const options: TrainerOptions = {
    learningRate: 0.05,
    schedule: { kind: "cosine", warmup: 2, total: 6 },
    iterations: 2,
  };
  const whole = await trained(options, 6), resumed = await trained(options, 6, 2);
  assert.deepEqual(resumed, whole);
  assert.deepEqual(whole.log.slice(0, 3).map((m) => m.learning_rate), [0.025, 0.05, 0.05]);
});

Deno.test("supervised: the loss is the mean cross-entropy and falls; trainVision reaches the tower", async () => {
  await onBackend("wasm");
  const policy = new Bigram(), trainer = new Trainer(policy, { learningRate: 0.1, trainVision: true });
  const examples = [[1, 2, 4, 0], [1, 3, 4, 4, 0]].map((ids) => ({
    sequence: { ids, images: [] },
    mask: ids.map((_, t) => Number(t >= 2)),
  }));
  const table = policy.parameters.get("model.table")!.arraySync() as Matrix;
  const logp = (a: number, b: number) => table[a][b] - Math.log(table[a].reduce((s, x) => s + Math.exp(x), 0));
  const byHand = -(logp(2, 4) + logp(4, 0) + logp(3, 4) + logp(4, 4) + logp(4, 0)) / 5;
  const losses: number[] = [];
  for (let step = 0; step < 5; step++) losses.push((await trainer.supervised(examples)).loss);
  near(losses[0], byHand, 1e-6, "first loss");
  losses.slice(1).forEach((loss, i) => assert.ok(loss < losses[i], `loss ${losses}`));
  assert.ok(values(policy.parameters).slice(-6).some((w) => w !== 0));
  await assert.rejects(trainer.supervised([{ ...examples[0], mask: [0, 0, 0, 0] }]), /no token/);
  trainer.dispose();
  policy.dispose();
});

Deno.test("trainer: impossible options and batches are refused by name", async () => {
  await onBackend("wasm");
  const policy = new Bigram();
  const refused: [TrainerOptions, RegExp][] = [
    [{ lr: 1 } as TrainerOptions, /unknown trainer option lr/],
    [{ iterations: 1.5 }, /iterations must be an integer of at least 1, got 1.5/],
    [{ temperature: 0 }, /temperature must be above 0/],
    [{ beta: 0.1 }, /beta 0.1 needs a reference policy/],
    [{ freeze: () => true }, /every parameter is frozen/],
  ];
  for (const [options, message] of refused) assert.throws(() => new Trainer(policy, options), message);
  const trainer = new Trainer(policy), batch = await dialogues(policy, 2, 2, 0);
  await assert.rejects(trainer.update(batch, [1]), /4 trajectories, but 1 rewards/);
  const mixed = [batch[0], batch[2], batch[1], batch[3]];
  await assert.rejects(trainer.update(mixed, [1, 0, 1, 0]), /prompt after prompt/);
  await assert.rejects(trainer.update(batch.slice(1), [1, 0, 1]), /equally many/);
  trainer.dispose();
  policy.dispose();
});

// ------------------------------------------------------------------------------------------------ with a Qwen2.5-VL

const loadTiny = () => loadPolicy(new URL("../fixtures/goldens/models/tiny/", import.meta.url));
/** Two sequences of words; the second half of each carries loss. */
const words = [9, 14].map((length, b) => {
  const random = new RandomStream(11, "words", b), ids = Array.from({ length }, () => random.int(400));
  return { sequence: { ids, images: [] }, mask: ids.map((_, t) => Number(t >= length / 2)) };
});

for (const kernels of ["plain", "fused"] as const) {
  Deno.test(`supervised on a Qwen2.5-VL: the loss falls, and passes of any size agree (${kernels})`, async () => {
    await onBackend("wasm", kernels);
    const run = async (tokensPerPass: number) => {
      const policy = await loadTiny();
      // A large eps keeps AdamW from magnifying rounding where a gradient is all but 0.
      const trainer = new Trainer(policy, { tokensPerPass, learningRate: 1e-3, eps: 1e-3 });
      const log = [], counts: number[] = [];
      for (let step = 0; step < 5; step++) {
        log.push(await trainer.supervised(words));
        counts.push(tf.memory().numTensors);
      }
      assert.ok(counts.every((count) => count === counts[0]), `tensors ${counts}`);
      const weights = values(policy.parameters);
      trainer.dispose();
      policy.dispose();
      return { log, weights };
    };
    const one = await run(8192), many = await run(1);
    one.log.slice(1).forEach(({ loss }, i) => assert.ok(loss < one.log[i].loss, `step ${i + 2}: ${loss}`));
    one.log.forEach((m, i) => {
      near(many.log[i].loss, m.loss, 1e-5, `loss of step ${i + 1}`);
      near(many.log[i].grad_norm / m.grad_norm, 1, 1e-5, `norm of step ${i + 1}`);
    });
    one.weights.forEach((w, i) => near(many.weights[i], w, 1e-5, `weight ${i}`));
  });
}

for (const kernels of ["plain", "fused"] as const) {
  Deno.test(`update on a Qwen2.5-VL: recorded log-probs hold, and a resumed run is the same bit for bit (${kernels})`, async () => {
    await onBackend("wasm", kernels);
    const run = async (resume: boolean) => {
      const policy = await loadTiny(), options: TrainerOptions = { learningRate: 1e-3 };
      let trainer = new Trainer(policy, options);
      const log = [];
      for (let step = 0; step < 3; step++) {
        const prompts = [0, 0, 0, 1, 1, 1].map((prompt) => ({ prompt, ids: words[prompt].sequence.ids }));
        const keys = prompts.map((_, row) => [step, row, 0] as const);
        const replies = await policy.generate(prompts.map(({ ids }) => ({ ids, images: [] })), {
          maxNewTokens: 6,
          keys,
        });
        const batch = replies.map((reply, i): TrainingTrajectory => {
          const { prompt, ids } = prompts[i], zeros = ids.map(() => 0);
          const assistantMask = [...zeros, ...reply.ids.map(() => 1)];
          return {
            prompt,
            ids: [...ids, ...reply.ids],
            assistantMask,
            logprobs: [...zeros, ...reply.logprobs],
            images: [],
          };
        });
        log.push(await trainer.update(batch, batch.map((t) => t.ids.at(-1)! % 7)));
        assert.ok(log[step]["rollout/logprob_diff_max"] < 1e-4, `differs by ${log[step]["rollout/logprob_diff_max"]}`);
        if (!resume || step !== 1) continue;
        const state = await trainer.state();
        trainer.dispose();
        trainer = new Trainer(policy, options);
        trainer.load(state);
      }
      const weights = values(policy.parameters);
      trainer.dispose();
      policy.dispose();
      return { log, weights };
    };
    const whole = await run(false), resumed = await run(true);
    assert.deepEqual(resumed.log, whole.log);
    assert.deepEqual(resumed.weights, whole.weights);
  });
}

Deno.test("the fused AdamW and sum of squares agree with the plain ones", async () => {
  await onBackend("wasm");
  assert.ok(hasFused("MgpoAdamW") && hasFused("MgpoSumSquares"));

  const step = { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1 };
  const results = [true, false].map((fused) =>
    tf.tidy(() => {
      const wave = (scale: number) => tf.tensor1d(Float32Array.from({ length: 1003 }, (_, i) => scale * Math.sin(i)));
      const slot = { param: tf.variable(wave(1)), m: tf.variable(wave(0.1)), v: tf.variable(wave(0.1).square()) };
      const squares = sumSquares(wave(3), fused).dataSync()[0];
      applyAdamW(slot, wave(2), { ...step, correction1: 0.19, correction2: 0.0975, clipScale: 0.7 }, fused);
      const out = [slot.param, slot.m, slot.v].flatMap((x) => [...x.dataSync()]);
      tf.dispose([slot.param, slot.m, slot.v]);
      return [squares / 1e3, ...out];
    })
  );
  results[0].forEach((x, i) => near(x, results[1][i], 1e-6, `number ${i}`));
});
