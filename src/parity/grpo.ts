/**
 * Group `grpo`: advantages, losses and log-probs of given numbers.
 *
 * @module
 */
import { tf } from "../deps.ts";
import {
  type AdvantageScale,
  entropyFromLogits,
  groupAdvantages,
  type LossOptions,
  type LossType,
  policyLoss,
  policyMetrics,
  selectiveLogSoftmax,
  type TokenRow,
  weightedRewards,
} from "../mgpo.ts";
import { logProbEntropy } from "../policy/ops.ts";
import { take } from "./forward.ts";
import type { Golden } from "./golden.ts";
import type { Check, Report } from "./report.ts";
import { tolerances } from "./tolerances.ts";

interface AdvantageCase {
  name: string;
  num_generations: number;
  scale_rewards: AdvantageScale;
  reward_weights: number[];
  rewards_per_func: (number | null)[][];
  rewards: (number | null)[];
  advantages: number[];
  is_std_zero: boolean[];
  f32_vs_f64: number;
}
/** A loss configuration as the golden files write it. */
export interface LossConfig {
  loss_type: LossType;
  eps_low: number;
  eps_high: number;
  beta?: number;
  delta?: number | null;
  importance_sampling_level?: "token" | "sequence";
  max_completion_length?: number;
  num_items_in_batch?: number;
  accum?: number;
  steps_per_gen?: number;
}
interface LossCase {
  name: string;
  config: LossConfig;
  logps: number[][];
  old_logps: number[][];
  ref_logps: number[][] | null;
  advantages: number[];
  completion_mask: number[][];
  tool_mask: number[][] | null;
  loss: number;
  dloss_dlogps: number[][];
  metrics: Metrics;
}
/** Metrics as logged: null is NaN. */
export type Metrics = Record<string, number | null>;
interface LogProbCase {
  temperature: number;
  logits: number[][];
  index: number[];
  logps: number[];
  entropy: number[];
}

/** Runs the group. */
export async function checkGrpo(golden: Golden, report: Report): Promise<void> {
  await report.attempt("advantages.json", () => checkAdvantages(golden, report));
  await report.attempt("losses.json", () => checkLosses(golden, report));
  await report.attempt("logprobs.json", () => checkLogProbs(golden, report));
}

async function checkAdvantages(golden: Golden, report: Report): Promise<void> {
  const { cases } = await golden.json<{ cases: AdvantageCase[] }>("grpo/advantages.json");
  for (const scale of new Set(cases.map((c) => c.scale_rewards))) {
    const own = cases.filter((c) => c.scale_rewards === scale);
    await report.check(`advantages, scale ${scale} (${own.length} cases)`, (check) => {
      for (const c of own) {
        const tolerance = tolerances.advantages + 4 * c.f32_vs_f64;
        const rewards = weightedRewards(c.rewards_per_func, c.reward_weights);
        check.close(rewards, c.rewards, tolerance, `${c.name}: rewards`);
        const { advantages, zeroStd } = groupAdvantages(rewards, c.num_generations, { scale });
        check.close(advantages, c.advantages, tolerance, c.name);
        check.equal(rewards.map((_, i) => zeroStd[Math.floor(i / c.num_generations)]), c.is_std_zero, c.name);
      }
    });
  }
}

/** A golden loss configuration in the words of {@linkcode policyLoss}. */
export function lossOptions(config: LossConfig): LossOptions {
  return {
    lossType: config.loss_type,
    clipLow: config.eps_low,
    clipHigh: config.eps_high,
    beta: config.beta,
    delta: config.delta ?? undefined,
    importanceSampling: config.importance_sampling_level,
    maxCompletionLength: config.max_completion_length,
    itemsInBatch: config.num_items_in_batch,
    accumulation: config.accum,
    stepsPerGeneration: config.steps_per_gen,
  };
}

/** Logged names → ours: means carry `_mean` in the logs of clip ratios. */
export function compareMetrics(check: Check, actual: object, expected: Metrics, where: string, model: boolean): void {
  const values = new Map<string, unknown>(Object.entries(actual));
  for (const [name, value] of Object.entries(expected)) {
    const own = values.get(name) ?? values.get(name.replace(/_mean$/, ""));
    if (typeof own !== "number") throw new RangeError(`${where}: there is no metric ${name}`);
    const scored = model && (name === "entropy" || name === "kl");
    const tolerance = scored ? tolerances.entropy : tolerances.shares * Math.max(1, Math.abs(value ?? 0));
    check.number(own, value, tolerance, `${where}: ${name}`);
  }
}

async function checkLosses(golden: Golden, report: Report): Promise<void> {
  const { cases, defaults } = await golden.json<{ cases: LossCase[]; defaults?: Partial<LossConfig> }>(
    "grpo/losses.json",
  );
  for (const type of new Set(cases.map((c) => c.config.loss_type))) {
    const own = cases.filter((c) => c.config.loss_type === type);
    const results: { c: LossCase; loss: number; grad: Float32Array; options: LossOptions }[] = [];
    await report.attempt(`losses, ${type}`, async () => {
      for (const c of own) {
        const options = lossOptions({ ...defaults, ...c.config });
        results.push({ c, options, ...await lossAndGradient(c, options) });
      }
      const label = `${type} (${own.length} cases)`;
      await report.check(`losses, ${label}: loss`, (check) => {
        const { relative, absolute } = tolerances.givenLoss;
        for (const { c, loss } of results) {
          check.number(loss, c.loss, Math.max(relative * Math.abs(c.loss), absolute), c.name);
        }
      });
      await report.check(`losses, ${label}: dloss_dlogps`, (check) => {
        for (const { c, grad } of results) {
          const expected = c.dloss_dlogps.flat();
          check.close(grad, expected, tolerances.givenLoss.relative * largest(expected), c.name);
        }
      });
      await report.check(`losses, ${label}: metrics`, (check) => {
        for (const { c, options } of results) {
          compareMetrics(check, policyMetrics(tokenRows(c), options), c.metrics, c.name, false);
        }
      });
    });
  }
}

function largest(values: readonly number[]): number {
  return values.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
}

const lossMask = ({ completion_mask, tool_mask }: LossCase): number[][] =>
  completion_mask.map((row, b) => row.map((m, t) => m * (tool_mask?.[b][t] ?? 1)));

async function lossAndGradient(c: LossCase, options: LossOptions): Promise<{ loss: number; grad: Float32Array }> {
  const { value, grad } = tf.tidy(() => {
    const inputs = {
      oldLogprobs: tf.tensor2d(c.old_logps),
      refLogprobs: c.ref_logps ? tf.tensor2d(c.ref_logps) : undefined,
      advantages: tf.tensor1d(c.advantages),
      mask: tf.tensor2d(lossMask(c), undefined, "float32"),
    };
    const loss = (x: tf.Tensor) => policyLoss({ logprobs: x as tf.Tensor2D, ...inputs }, options);
    return tf.valueAndGrad(loss)(tf.tensor2d(c.logps));
  });
  const [loss, gradient] = await Promise.all([take(value), take(grad)]);
  return { loss: loss[0], grad: gradient };
}

function tokenRows(c: LossCase): TokenRow[] {
  const mask = lossMask(c);
  const pick = (row: readonly number[], b: number) => row.filter((_, t) => mask[b][t]);
  return c.logps.map((row, b) => ({
    logprobs: pick(row, b),
    old: pick(c.old_logps[b], b),
    ref: c.ref_logps ? pick(c.ref_logps[b], b) : undefined,
    advantage: c.advantages[b],
  }));
}

async function checkLogProbs(golden: Golden, report: Report): Promise<void> {
  const { cases } = await golden.json<{ cases: LogProbCase[] }>("grpo/logprobs.json");
  const toleranceOf = (logits: number[][], row: number) =>
    largest(logits[row]) >= 200 ? tolerances.wideLogits : tolerances.givenLogits;
  type Scores = (logits: tf.Tensor2D, index: number[], temperature: number) => tf.Tensor[];
  const ways: Record<string, Scores> = {
    "of given logits": (logits, index, temperature) => [
      selectiveLogSoftmax(logits, index, temperature),
      entropyFromLogits(logits, temperature),
    ],
    "of given logits, the policy's own operation": (logits, index, temperature) => {
      const [logprobs, entropy] = tf.unstack(logProbEntropy(logits, index, null, temperature), 0);
      return [logprobs, entropy];
    },
  };
  for (const [name, scores] of Object.entries(ways)) {
    await report.check(`log-probs and entropies ${name}`, async (check) => {
      for (const [i, { logits, index, temperature, logps, entropy }] of cases.entries()) {
        const out = tf.tidy(() => scores(tf.tensor2d(logits), index, temperature));
        const [p, h] = await Promise.all(out.map(take));
        logps.forEach((expected, row) => {
          const tolerance = toleranceOf(logits, row), where = `case ${i}, row ${row}`;
          check.number(p[row], expected, tolerance, `${where}: log-prob`);
          check.number(h[row], entropy[row], tolerance, `${where}: entropy`);
        });
      }
    });
  }
}
