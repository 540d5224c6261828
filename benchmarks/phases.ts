/**
 * Where does the time of an MGPO step go (64 rollouts of two turns, then the update), and what of it do plain tfjs operations on the
 * same backend take? The phases are parts of one recorded step, each done again alone:
 *
 * - `pictures`: drawing the scenes, cutting out the crops, resizing, cutting into patches. On the host, the same for both.
 * - `tower`: features of the step's different pictures, those of the first turn in one batch, the crops in another.
 * - `prefill`: both turns up to their first token, features at hand.
 * - `decode`: all further tokens, as long as the replies were.
 * - `update`: gradients, clipping, AdamW; the tower rests.
 * - `whole`: the step as training makes it. What is more than the parts' sum is text, boxes and rewards.
 *
 * @module
 */
import { tf } from "../src/deps.ts";
import { signs } from "../src/data/signs.ts";
import type { Sample } from "../src/data/dataset.ts";
import { Trainer } from "../src/mgpo.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { type Kernels, useKernels } from "../src/policy/ops.ts";
import type { ImageInput, Sequence } from "../src/policy/policy.ts";
import { type QwenPolicy, withoutGradient } from "../src/policy/qwen.ts";
import { rollout, type Trajectory } from "../src/rollout.ts";
import { type Benchmark, median, type Row } from "./benchmark.ts";
import { onRealGpu } from "./roof.ts";

const PROMPTS = 8, GROUP = 8, MAX_NEW_TOKENS = [14, 8], ROUNDS = 3;
const phaseNames = ["pictures", "tower", "prefill", "decode", "update", "whole"] as const;
type Phase = typeof phaseNames[number];

async function seconds(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await work();
  return (performance.now() - start) / 1000;
}

/** A recorded step that can be made again, whole or by its parts. */
class Step {
  readonly #policy: QwenPolicy;
  readonly #samples: readonly Sample[];
  readonly #options: Parameters<typeof rollout>[2];
  readonly #trainer: Trainer;
  #trajectories: Trajectory[] = [];

  constructor(policy: QwenPolicy, samples: readonly Sample[], hints: Parameters<typeof rollout>[2]) {
    this.#policy = policy;
    this.#samples = samples;
    this.#options = { ...hints, groupSize: GROUP, maxNewTokens: MAX_NEW_TOKENS };
    // A rate so small that the replies stay the same from round to round.
    this.#trainer = new Trainer(policy, { learningRate: 1e-9 });
  }

  async whole(): Promise<void> {
    this.#policy.releaseFeatures();
    const { trajectories } = await rollout(this.#policy, this.#samples, this.#options);
    this.#trajectories = trajectories;
    await this.update();
  }

  async update(): Promise<void> {
    // Alternating rewards: no group is left out for want of an advantage.
    await this.#trainer.update(this.#trajectories, this.#trajectories.map((_, i) => i % 2));
  }

  async pictures(): Promise<void> {
    for (const [i, sample] of this.#samples.entries()) {
      const picture = await sample.picture(), crops = new Set<string>();
      this.#policy.prepareImage(picture);
      for (const { prompt, turns: [{ crop }] } of this.#trajectories) {
        if (prompt !== i || !crop || crops.has(crop.join())) continue;
        crops.add(crop.join());
        this.#policy.prepareImage(picture.crop(crop));
      }
    }
  }

  async tower(): Promise<void> {
    const seen = new Set<string>();
    for (const turn of [0, 1]) {
      const images: ImageInput[] = [];
      for (const { images: shown } of this.#trajectories) {
        if (seen.has(shown[turn].key)) continue;
        seen.add(shown[turn].key);
        images.push(shown[turn]);
      }
      if (images.length === 0) continue;
      const features = withoutGradient(() => this.#policy.imageFeatures(images).embeds);
      // One number back: enough to know that the work is done.
      const last = tf.tidy(() => tf.slice(features, [0, 0], [1, 1]));
      await last.data();
      tf.dispose([features, last]);
    }
  }

  /** One turn's replies of all rows, drawn as the rollout drew them, or their first tokens only. */
  async reply(turn: 0 | 1, tokens = MAX_NEW_TOKENS[turn]): Promise<void> {
    const prompts = this.#trajectories.map(({ ids, images, assistantMask, turns }): Sequence => ({
      ids: ids.slice(0, turn === 0 ? assistantMask.indexOf(1) : ids.length - turns[1].ids.length),
      images: images.slice(0, turn + 1),
    }));
    const keys = this.#trajectories.map(({ prompt, rollout }) => [0, prompt * GROUP + rollout, turn] as const);
    await this.#policy.generate(prompts, { maxNewTokens: tokens, keys });
  }

  async timed(): Promise<Record<Phase, number>> {
    const whole = await seconds(() => this.whole());
    // The whole step has left the features in the cache.
    let prefill = 0, decode = 0;
    for (const turn of [0, 1] as const) {
      const first = await seconds(() => this.reply(turn, 1)), all = await seconds(() => this.reply(turn));
      prefill += first;
      decode += all - first;
    }
    return {
      ...{ whole, prefill, decode },
      update: await seconds(() => this.update()),
      pictures: await seconds(() => this.pictures()),
      tower: await seconds(() => this.tower()),
    };
  }

  dispose(): void {
    this.#trainer.dispose();
  }
}

/** Rows `step/<backend>/<phase>`. */
export const phases: Benchmark = {
  names: ["webgpu", "wasm"].flatMap((backend) => phaseNames.map((phase) => `step/${backend}/${phase}`)),
  async run(backend, log): Promise<Row[]> {
    const policy = await loadPolicy(), world = signs();
    const samples = await Promise.all(Array.from({ length: PROMPTS }, (_, i) => world.get(i)));
    const step = new Step(policy, samples, world.hints);
    const times: Record<Kernels, Record<Phase, number>[]> = { fused: [], plain: [] };
    try {
      for (let round = 0; round <= ROUNDS; round++) {
        for (const kernels of ["fused", "plain"] as const) {
          // Plain operations take most of a minute for a step on a software adapter: one timing is enough to see by how much.
          if (kernels === "plain" && round > 1 && backend === "webgpu" && !onRealGpu()) continue;
          useKernels(kernels);
          const seen = await step.timed();
          // The first round compiles and fills pools.
          if (round > 0) times[kernels].push(seen);
        }
      }
    } finally {
      useKernels("fused");
      step.dispose();
      policy.dispose();
    }
    const middle = (kernels: Kernels, phase: Phase) => median(times[kernels].map((t) => t[phase]));
    const parts = phaseNames.filter((phase) => phase !== "whole").reduce((sum, p) => sum + middle("fused", p), 0);
    log(`step/${backend}: the phases add up to ${(100 * parts / middle("fused", "whole")).toFixed(0)} % of the whole`);
    return phaseNames.map((phase) => {
      const value = middle("fused", phase),
        row: Row = { name: `step/${backend}/${phase}`, value, unit: "s", n: ROUNDS };
      return phase === "pictures"
        ? row
        : { ...row, ratio: middle("plain", phase) / value, peer: `plain tfjs on ${backend}` };
    });
  },
};
