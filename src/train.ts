/**
 * The training loop: sample → rollout → reward → update, as an async generator of step records.
 *
 * | method | turns | what carries loss                                     | reward                       |
 * | ------ | ----- | ----------------------------------------------------- | ---------------------------- |
 * | `mgpo` | 2     | what the model wrote in both turns                    | is the final answer right    |
 * | `grpo` | 1     | what the model wrote                                  | the same                     |
 * | `sft`  | 1     | the right answer in its box, given (cross-entropy)    | none                         |
 * | `sft`  | 2     | the same, and the true box in the turn before         | none                         |
 *
 * A step depends on the settings, its number, the weights and the optimizer's state, and on nothing else: no clock, no order
 * of earlier draws. So a run goes on bit for bit from {@linkcode Training.state} and the weights.
 *
 * @module
 */
import type { Dataset, Sample } from "./data/dataset.ts";
import { tf } from "./deps.ts";
import { evaluate, type EvaluateParts, type Evaluation, evaluationMetrics } from "./evaluate.ts";
import { checkDevice, machineError } from "./gpu/device_errors.ts";
import { memoryUse, restartMemoryPeak } from "./gpu/memory.ts";
import { groupAdvantages, Trainer, type TrainerOptions, type TrainerState } from "./mgpo.ts";
import type { Policy, Sequence } from "./policy/policy.ts";
import { binaryReward, combineRewards, type RewardPart, type RewardValue } from "./reward.ts";
import { demonstrate, isOver, type PromptTemplate, resolveTemplate, rollout, summarize } from "./rollout.ts";
import type { RolloutBatch, RolloutOptions, Trajectory } from "./rollout.ts";
import { InputError } from "./run/errors.ts";
import type { StepRecord } from "./run/metrics.ts";
import { resolveOptions } from "./run/options.ts";
import { readSamples, stepPositions, yieldToEvents } from "./samples.ts";
import { maxNewTokensFor, splitByTable, type TrainOptions, trainTable, withHints } from "./settings.ts";

/** Settings of a run with every default worked out. Open may stay `delta` (no bound), `evalTurns` (as trained) and rollouts' own. */
export type TrainSettings =
  & Required<Omit<TrainOptions, "delta" | "evalTurns" | "minBoxSide" | "minCropSide" | "squareCrop">>
  & Pick<TrainOptions, "delta" | "evalTurns" | "minBoxSide" | "minCropSide" | "squareCrop">;

/** What a run takes beside its settings: things that aren't plain values. */
export interface TrainParts {
  /** What evaluations ask; without it there are none. @default {none} */
  heldOut?: Dataset;
  /** Rewards by name, added up by weight. @default {`binaryReward` alone} */
  rewards?: Readonly<Record<string, RewardPart>>;
  /** Frozen policy for the KL; needed if `beta` is not 0. Not owned. @default {none} */
  reference?: Policy;
  /** Wording that replaces parts of the default template. @default {{}} */
  template?: Partial<PromptTemplate>;
  /** Where to go on; the policy must hold the weights of that moment. @default {the beginning} */
  state?: TrainingState;
  /** Called within a step, often. */
  onProgress?: (progress: StepProgress) => void;
  /** Called after the rollouts of a step; of an sft step without trajectories. */
  onRollouts?: (rollouts: StepRollouts) => void | Promise<void>;
  /** Called after each evaluation within a step, in the order of `evalTurns`. */
  onEvaluation?: (step: number, evaluation: Evaluation) => void | Promise<void>;
  /** Called for each batch of items that the first evaluation of a step asks, as `onBatch` of `evaluate`. */
  onEvaluationBatch?: EvaluateParts["onBatch"];
}

/** Where a step is. */
export interface StepProgress {
  /** The step being made, from 1. */
  step: number;
  /** `rollout`: conversations are sampled; `update`: weights change; `eval`: the held-out data is asked. */
  phase: "rollout" | "update" | "eval";
  /** What is being done, in a few words. */
  detail: string;
}

/** The rollouts of a step as they were scored. */
export interface StepRollouts {
  /** The step they belong to, from 1. */
  step: number;
  /** The step's samples; a trajectory's `prompt` is a position here. */
  samples: readonly Sample[];
  /** Sample by sample, `groupSize` of each that could be read. */
  trajectories: readonly Trajectory[];
  /** One for each trajectory. */
  rewards: readonly RewardValue[];
  /** Samples that could not be read or prepared, with the reason. */
  skipped: RolloutBatch["skipped"];
}

/** What must be kept beside the weights to go on with a run. */
export interface TrainingState {
  /** Steps done. */
  step: number;
  /** Tokens of all steps so far. */
  tokens: number;
  /** Samples skipped so far. */
  skipped: number;
  /** The optimizer's moments and counters. */
  trainer: TrainerState;
}

/**
 * Checks settings and works out the defaults that depend on the method, the data and the policy.
 *
 * @throws {InputError} naming the option that is unknown or impossible.
 */
export function settleTraining(
  policy: Pick<Policy, "maxNewTokens">,
  dataset: Pick<Dataset, "hints">,
  options: TrainOptions,
): TrainSettings {
  const settings = withHints(resolveOptions(trainTable, { ...options }), dataset.hints);
  const { method, turns = method === "mgpo" ? 2 : 1 } = settings;
  return {
    ...settings,
    turns,
    learningRate: settings.learningRate ?? (method === "grpo" ? 1e-4 : 3e-4),
    maxNewTokens: maxNewTokensFor(policy, settings.maxNewTokens),
  };
}

/**
 * Trains a policy in place.
 *
 * @param policy Not owned; its weights change.
 * @param dataset What is trained on.
 * @throws {InputError} naming an option that is unknown or impossible; if nothing in the data can be read.
 * @example
 * ```ts
 * import { signs } from "./data/signs.ts";
 * import { chooseBackend } from "./gpu/backend.ts";
 * import { loadPolicy } from "./policy/load.ts";
 * import { train } from "./train.ts";
 *
 * await chooseBackend("wasm");
 * const policy = await loadPolicy(), heldOut = signs({ split: "heldout" });
 * const options = { steps: 1, prompts: 2, groupSize: 4, heldOut, evalEvery: 1, evalItems: 4 };
 * for await (const step of train(policy, signs(), options)) {
 *   console.log(step.step, step["reward/mean"], step["grounding/valid_ratio"], step["eval/accuracy"]);
 * }
 * policy.dispose();
 * ```
 */
export async function* train(
  policy: Policy,
  dataset: Dataset,
  options: TrainOptions & TrainParts = {},
): AsyncGenerator<StepRecord, void, void> {
  const [known, rest] = splitByTable(trainTable, options);
  const stray = Object.keys(rest).find((key) => !partNames.includes(key as keyof TrainParts));
  if (stray) resolveOptions(trainTable, { [stray]: undefined });
  const training = new Training(policy, dataset, known, rest);
  try {
    while (training.step < training.settings.steps) yield await training.next();
  } finally {
    training.dispose();
  }
}

const partNames: (keyof TrainParts)[] = [
  ...["heldOut", "rewards", "reference", "template", "state", "onProgress", "onRollouts", "onEvaluation"] as const,
  "onEvaluationBatch",
];

/** A run step by step, for those who write checkpoints; {@linkcode train} is the loop around it. */
export class Training {
  /** Every setting, defaults worked out. */
  readonly settings: TrainSettings;
  readonly #policy: Policy;
  readonly #dataset: Dataset;
  readonly #parts: TrainParts;
  readonly #trainer: Trainer;
  readonly #score: (sample: Sample, trajectory: Trajectory) => RewardValue;
  #step = 0;
  #tokens = 0;
  #skipped = 0;

  /** Parameters and errors are those of {@linkcode train}. */
  constructor(policy: Policy, dataset: Dataset, options: TrainOptions = {}, parts: TrainParts = {}) {
    this.settings = settleTraining(policy, dataset, options);
    this.#policy = policy;
    this.#dataset = dataset;
    this.#parts = parts;
    if (this.settings.beta !== 0 && !parts.reference) {
      throw new InputError(`beta = ${this.settings.beta}: the KL needs the base policy as reference`);
    }
    resolveTemplate(parts.template);
    this.#score = combineRewards(parts.rewards ?? { binary: { reward: binaryReward, weight: 1 } });
    this.#trainer = new Trainer(policy, trainerOptions(this.settings), parts.reference);
    if (parts.state) this.load(parts.state);
  }

  /** Steps done. */
  get step(): number {
    return this.#step;
  }

  /** What must be kept, beside the weights, to go on from here. */
  async state(): Promise<TrainingState> {
    return { step: this.#step, tokens: this.#tokens, skipped: this.#skipped, trainer: await this.#trainer.state() };
  }

  /**
   * Goes on from a state; the policy must hold the weights of that moment.
   *
   * @throws {RangeError} if the state belongs to another policy or other settings.
   */
  load(state: TrainingState): void {
    this.#trainer.load(state.trainer);
    this.#step = state.step;
    this.#tokens = state.tokens;
    this.#skipped = state.skipped;
  }

  /**
   * Evaluates the policy on the held-out data as evaluation steps do.
   *
   * @returns One for each of `evalTurns`; none without held-out data.
   */
  async evaluate(): Promise<Evaluation[]> {
    const { turns, evalTurns = [turns] } = this.settings, all: Evaluation[] = [];
    for (const [i, asked] of evalTurns.entries()) {
      const evaluation = await this.#evaluate(asked, i === 0 ? this.#parts.onEvaluationBatch : undefined);
      if (evaluation) all.push(evaluation);
    }
    return all;
  }

  async #evaluate(turns: number, onBatch: EvaluateParts["onBatch"]): Promise<Evaluation | undefined> {
    const { heldOut, template } = this.#parts;
    if (!heldOut) return undefined;
    const { form, maxNewTokens, topP, minBoxSide, maxAspect, minCropSide, squareCrop, ...rest } = this.settings;
    return await evaluate(this.#policy, heldOut, {
      ...{ turns, form, maxNewTokens, topP, minBoxSide, maxAspect, minCropSide, squareCrop, template },
      temperature: rest.evalTemperature,
      items: rest.evalItems,
      batchSize: rest.evalBatch,
      onProgress: (done, items) => this.#report("eval", `${done}/${items} items`),
      onBatch,
    });
  }

  /**
   * Does one step. If it throws, the weights may have changed; go on from an earlier state.
   *
   * @throws {InputError} if the machine gives up: the device was lost or reported an error, or memory is full. Never a record then.
   */
  async next(): Promise<StepRecord> {
    restartMemoryPeak();
    try {
      const record = await this.#next();
      await checkDevice();
      return record;
    } catch (error) {
      throw await machineError(error);
    }
  }

  async #next(): Promise<StepRecord> {
    const { method, seed, prompts, evalEvery } = this.settings;
    const step = ++this.#step, started = performance.now();
    const samples = await readSamples(this.#dataset, stepPositions(this.#dataset.size, seed, step, prompts));
    const work = method === "sft" ? await this.#supervisedStep(samples) : await this.#rewardStep(samples);
    this.#refuseUnreadable(work.skipped);
    this.#tokens += work.tokens;
    // The next step has other pictures.
    this.#policy.releaseFeatures?.();
    this.#parts.reference?.releaseFeatures?.();
    const worked = performance.now();
    let evaluated: Record<string, number> = {};
    if (evalEvery > 0 && step % evalEvery === 0) {
      for (const [i, evaluation] of (await this.evaluate()).entries()) {
        evaluated = { ...evaluated, ...evaluationMetrics(evaluation, i === 0 ? "" : `/${evaluation.turns}_turns`) };
        await this.#parts.onEvaluation?.(step, evaluation);
      }
      if (this.#parts.heldOut) evaluated["timing_s/eval"] = (performance.now() - worked) / 1000;
    }
    await yieldToEvents();
    const { numTensors, numBytes } = tf.memory();
    return {
      step,
      ...onlyFinite({
        ...work.metrics,
        samples_skipped: work.skipped.length,
        num_tokens: this.#tokens,
        tokens_per_s: work.tokens / ((worked - started) / 1000),
        ...evaluated,
        "memory/numTensors": numTensors,
        "memory/numBytes": numBytes,
        ...memoryMetrics(),
        "timing_s/total": (performance.now() - started) / 1000,
      }),
    };
  }

  /** Releases the optimizer's state; the policies stay. */
  dispose(): void {
    this.#trainer.dispose();
  }

  /** Rollouts, rewards, and an update by them. */
  async #rewardStep(samples: readonly Sample[]): Promise<StepWork> {
    const { overTurnMasking, groupSize } = this.settings, started = performance.now();
    const { trajectories, skipped } = await rollout(this.#policy, samples, this.#rolloutOptions());
    const sampled = performance.now();
    const rewards = trajectories.map((t) => this.#score(samples[t.prompt], t));
    await this.#parts.onRollouts?.({ step: this.#step, samples, trajectories, rewards, skipped });
    if (trajectories.length === 0) return { metrics: {}, tokens: 0, skipped };
    this.#report("update", `${trajectories.length} conversations`);
    const before = performance.now();
    const totals = rewards.map((reward) => reward.total);
    const used = overTurnMasking ? totals.map((total, i) => isOver(trajectories[i]) ? NaN : total) : totals;
    const update = await this.#trainer.update(trajectories, used);
    const seconds = {
      "timing_s/rollout": (sampled - started) / 1000,
      "timing_s/update": (performance.now() - before) / 1000,
    };
    const { num_tokens, ...rolled } = summarize(trajectories);
    const { tokens, ...updated } = update;
    const logged = overTurnMasking ? rewardMoments(totals, groupSize) : {};
    const rewarded = { ...logged, ...partMeans(rewards) };
    const metrics = { ...updated, ...rewarded, ...rolled, "completions/tokens": tokens, ...seconds };
    return { metrics, tokens: num_tokens, skipped };
  }

  #rolloutOptions(): RolloutOptions {
    const { turns, form, groupSize, maxNewTokens, temperature, topP, seed, ...rest } = this.settings;
    const { minBoxSide, maxAspect, minCropSide, squareCrop } = rest;
    return {
      ...{ turns, form, groupSize, maxNewTokens, temperature, topP, seed, step: this.#step },
      ...{ minBoxSide, maxAspect, minCropSide, squareCrop, template: this.#parts.template },
      onProgress: ({ turn, tokens, running }) =>
        this.#report("rollout", `turn ${turn}/${turns}, token ${tokens}, ${running} running`),
    };
  }

  /** Cross-entropy on the replies of demonstrations. */
  async #supervisedStep(samples: readonly Sample[]): Promise<StepWork> {
    const examples: Example[] = [], skipped: RolloutBatch["skipped"] = [];
    for (const [prompt, sample] of samples.entries()) {
      try {
        const demonstration = sample.demonstration ?? { answer: `\\boxed{${shortAnswer(sample)}}` };
        const sequence = await demonstrate(this.#policy, sample, demonstration, this.#rolloutOptions());
        examples.push({ sequence, mask: sequence.assistantMask });
      } catch (error) {
        skipped.push({ sampleId: sample.id, prompt, error: error instanceof Error ? error.message : String(error) });
      }
    }
    await this.#parts.onRollouts?.({ step: this.#step, samples, trajectories: [], rewards: [], skipped });
    if (examples.length === 0) return { metrics: {}, tokens: 0, skipped };
    this.#report("update", `${examples.length} examples`);
    const before = performance.now();
    const { loss, tokens, ...update } = await this.#trainer.supervised(examples);
    const metrics = {
      policy_loss: loss,
      ...update,
      "completions/tokens": tokens,
      "timing_s/update": (performance.now() - before) / 1000,
    };
    return { metrics, tokens: examples.reduce((sum, example) => sum + example.sequence.ids.length, 0), skipped };
  }

  #report(phase: StepProgress["phase"], detail: string): void {
    this.#parts.onProgress?.({ step: this.#step, phase, detail });
  }

  /** A bad row is skipped; data of which nothing at all was readable for three steps is a mistake. */
  #refuseUnreadable(skipped: RolloutBatch["skipped"]): void {
    this.#skipped += skipped.length;
    if (this.#step >= 3 && this.#skipped >= this.#step * this.settings.prompts) {
      throw new InputError(
        `${this.#dataset.name}: not one of ${this.#skipped} samples could be read; the last: ${skipped.at(-1)?.error}`,
      );
    }
  }
}

/** What a step did, before evaluation. */
interface StepWork {
  metrics: Record<string, number>;
  /** Tokens that went through the model. */
  tokens: number;
  skipped: RolloutBatch["skipped"];
}

/** A sequence to imitate: 1 in the mask where it carries loss. */
interface Example {
  sequence: Sequence;
  mask: number[];
}

/** Settings in the optimizer's terms. */
function trainerOptions(settings: TrainSettings): TrainerOptions {
  const { schedule, warmup, minLearningRateRatio, steps, advantageScale, beta1, beta2, epsilon, ...rest } = settings;
  const { turns, maxNewTokens, learningRate, lossType, clipLow, clipHigh, delta, beta, importanceSampling } = rest;
  const { lossOn, temperature, trainVision, iterations, minibatches, tokensPerPass, weightDecay, maxGradNorm } = rest;
  const { gradientCheckpointing } = rest;
  const limits = Array.from({ length: turns }, (_, turn) => maxNewTokens[Math.min(turn, maxNewTokens.length - 1)]);
  return {
    ...{ learningRate, lossType, clipLow, clipHigh, delta, beta, importanceSampling, lossOn, temperature },
    ...{ trainVision, iterations, minibatches, tokensPerPass, gradientCheckpointing, weightDecay, maxGradNorm },
    schedule: { kind: schedule, warmup, total: steps, minRatio: minLearningRateRatio },
    scale: advantageScale,
    betas: [beta1, beta2],
    eps: epsilon,
    maxCompletionLength: limits.reduce((sum, limit) => sum + limit, 0),
  };
}

/** The answer as the question wants it: the letter of a lettered choice, else the answer itself. */
export function shortAnswer({ choices, choiceStyle = "lettered", answer }: Sample): string {
  if (!choices?.length || choiceStyle === "listed") return answer;
  const index = choices.indexOf(answer);
  if (index < 0) throw new InputError(`the answer ${JSON.stringify(answer)} is not among the choices`);
  return String.fromCharCode(65 + index);
}

/** The rewards of all conversations, those too that the update leaves out. */
function rewardMoments(totals: readonly number[], groupSize: number): Record<string, number> {
  const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;
  return { "reward/mean": mean(totals), "reward/std": mean(groupAdvantages(totals, groupSize).stds) };
}

/** Mean of each part of a reward that has several. */
function partMeans(rewards: readonly RewardValue[]): Record<string, number> {
  const names = Object.keys(rewards[0].parts);
  if (names.length < 2) return {};
  const mean = (name: string) => rewards.reduce((sum, { parts }) => sum + parts[name], 0) / rewards.length;
  return Object.fromEntries(names.map((name) => [`reward/${name}`, mean(name)]));
}

/** What the machine's memory held at most during the step, and what is kept free for later tensors. */
function memoryMetrics(): Record<string, number> {
  const use = memoryUse();
  if (!use) return {};
  const { peakBytes, poolBytes = NaN } = use;
  return { "memory/peak_bytes": peakBytes, "memory/pool_bytes": poolBytes };
}

/** Without what wasn't measured; JSON has no word for it. */
function onlyFinite(metrics: Record<string, number>): Record<string, number> {
  return Object.fromEntries(Object.entries(metrics).filter(([, value]) => Number.isFinite(value)));
}
