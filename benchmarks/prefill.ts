/**
 * How many tokens a second does the model take in, beside plain tfjs operations on the same backend? `prefill`: 64 different
 * prompts with a picture each, up to the first sampled token. `logprobs`: the forward pass over 64 two-turn conversations, as an
 * update begins with. Both with the pictures' features at hand: the tower is a phase of its own (`step/…/tower`).
 *
 * @module
 */
import { tf } from "../src/deps.ts";
import { signs } from "../src/data/signs.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { type Kernels, useKernels } from "../src/policy/ops.ts";
import type { Sequence } from "../src/policy/policy.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { defaultTemplate, renderTurn, rollout } from "../src/rollout.ts";
import { alternate, type Benchmark, median, type Row } from "./benchmark.ts";

const BATCH = 64, PROMPTS = 8, ROUNDS = 5;

async function prefillWork(policy: QwenPolicy) {
  const world = signs({ split: "heldout" }), prompts: Sequence[] = [];
  for (let i = 0; i < BATCH; i++) {
    const sample = await world.get(i), images = [policy.prepareImage(await sample.picture())];
    prompts.push({ ids: policy.encodeChat([renderTurn(defaultTemplate.ground, sample.question, "")], images), images });
  }
  const run = async () => void await policy.generate(prompts, { maxNewTokens: 1, stopTokens: [] });
  return { tokens: prompts.reduce((sum, { ids }) => sum + ids.length, 0), run };
}

async function logProbsWork(policy: QwenPolicy) {
  const world = signs(), samples = await Promise.all(Array.from({ length: PROMPTS }, (_, i) => world.get(i)));
  const options = { ...world.hints, groupSize: BATCH / PROMPTS, maxNewTokens: [14, 8] };
  const { trajectories } = await rollout(policy, samples, options);
  const masks = trajectories.map(({ assistantMask }) => assistantMask);
  const run = async () => {
    const { logprobs, entropy } = policy.logProbs(trajectories, masks);
    await Promise.all([logprobs.data(), entropy.data()]);
    tf.dispose([logprobs, entropy]);
  };
  return { tokens: trajectories.reduce((sum, { ids }) => sum + ids.length, 0), run };
}

async function rate(name: string, backend: string, work: { tokens: number; run(): Promise<void> }): Promise<Row> {
  const by = (kernels: Kernels) => async () => {
    useKernels(kernels);
    await work.run();
  };
  await by("plain")();
  await by("fused")();
  const { first, second } = await alternate(ROUNDS, by("fused"), by("plain"));
  useKernels("fused");
  const fused = median(first), plain = median(second);
  const peer = `plain tfjs on ${backend}`;
  return {
    name: `${name}/${backend}`,
    value: work.tokens / fused,
    unit: "tokens/s",
    ratio: plain / fused,
    peer,
    n: ROUNDS,
  };
}

/** Rows `prefill/<backend>` and `logprobs/<backend>`. */
export const prefill: Benchmark = {
  names: ["prefill/webgpu", "logprobs/webgpu", "prefill/wasm", "logprobs/wasm"],
  async run(backend): Promise<Row[]> {
    const policy = await loadPolicy();
    try {
      return [
        await rate("prefill", backend, await prefillWork(policy)),
        await rate("logprobs", backend, await logProbsWork(policy)),
      ];
    } finally {
      policy.dispose();
    }
  },
};
