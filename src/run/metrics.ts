/**
 * `metrics.jsonl`: one flat JSON object a line, a line a step, steps 1, 2, 3, … without a gap.
 *
 * @module
 */
import { InputError } from "./errors.ts";

/**
 * What one training step measured. The names are those researchers know; which of them are there depends on the method and
 * the data.
 *
 * - `reward/mean`: over all trajectories of the step; `reward/std`: mean of the groups' standard deviations; `reward/<name>`: a
 *   part of a reward that has several. `frac_reward_zero_std`: groups with equal rewards, which teach nothing.
 * - `grounding/*`, `crop/area_ratio`, `completions/*`: see `summarize` in rollout.ts.
 * - `policy_loss` (for sft the cross-entropy), `kl`, `entropy`, `clip_ratio/*`, `advantage/*`, `grad_norm`, `learning_rate`,
 *   `skipped_steps`: see `UpdateMetrics` in mgpo.ts. `completions/tokens`: tokens that carry loss.
 * - `rollout/logprob_diff_max`: the largest difference between the log-prob of a token as sampled and as recomputed.
 * - `samples_skipped`: samples of this step that could not be read.
 * - `num_tokens`: tokens of all steps so far. `tokens_per_s`: of this step.
 * - `timing_s/rollout`, `timing_s/update`, `timing_s/eval`, `timing_s/total`: seconds.
 * - `memory/numTensors`, `memory/numBytes`: tensors alive after the step; equal step to step.
 * - `memory/peak_bytes`: the most that the step took of the device's memory, all buffers counted; on wasm the linear memory's size.
 *   `memory/pool_bytes`: of that, free and kept for later tensors when the step ended (WebGPU).
 * - `eval/*`: on evaluation steps, over the held-out samples.
 */
export interface StepRecord {
  /** Counts from 1. */
  step: number;
  /** The other metrics by the names above; those that are not finite or do not apply are left out. */
  [name: string]: number;
}

/**
 * Whether a metric depends on the clock, or on what the process did before: the only ones in which a resumed run may differ from an
 * uninterrupted one.
 */
export function isTiming(name: string): boolean {
  return name.startsWith("timing_s/") || name === "tokens_per_s" || name === "memory/peak_bytes" ||
    name === "memory/pool_bytes";
}

/** A record as a line of `metrics.jsonl`. Numbers that JSON has no word for become null. */
export function metricsLine(record: StepRecord): string {
  return JSON.stringify(record) + "\n";
}

/**
 * Reads the text of a `metrics.jsonl` up to a step and forgets the rest: what was done after the last checkpoint is done again,
 * and the last line may be half written.
 *
 * @param text The file.
 * @param steps How many steps to keep, 0 or more.
 * @param where Names the file in errors.
 * @throws {InputError} if it has fewer lines, or they aren't the steps 1 to `steps` in order.
 */
export function keepSteps(text: string, steps: number, where: string): StepRecord[] {
  const lines = text.split("\n").slice(0, steps);
  return Array.from({ length: steps }, (_, i) => {
    const record = parseLine(lines[i] ?? "");
    if (record?.step !== i + 1) {
      throw new InputError(
        `${where}:${i + 1}: step ${i + 1} should stand here, but the checkpoint is of step ${steps}; ` +
          "the file was changed, so start a new run",
      );
    }
    return record;
  });
}

function parseLine(line: string): StepRecord | undefined {
  try {
    return JSON.parse(line);
  } catch {
    return undefined;
  }
}
