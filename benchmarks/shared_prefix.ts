/**
 * What does it save to compute common beginnings once? `update`: the update on 64 two-turn, two-picture conversations, eight of a
 * prompt, beside the same with each conversation on its own; `tokens`: those that went through the decoder for it. `rollout`:
 * the conversations themselves, the second turn extending the keys and values of the first, beside a second turn that starts
 * again. All on the same kernels.
 *
 * @module
 */
import { signs } from "../src/data/signs.ts";
import type { Sample } from "../src/data/dataset.ts";
import { Trainer } from "../src/mgpo.ts";
import { loadPolicy } from "../src/policy/load.ts";
import type { Policy } from "../src/policy/policy.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { rollout, type RolloutOptions, type Trajectory } from "../src/rollout.ts";
import { alternate, type Benchmark, median, type Row } from "./benchmark.ts";

const PROMPTS = 8, GROUP = 8, ROUNDS = 5;

/** Counts the tokens that go through the decoder before decoding, those of a bucket's padding included. */
function countTokens(policy: QwenPolicy): { take(): number } {
  const { hidden } = policy;
  let tokens = 0;
  policy.hidden = (...args) => {
    tokens += args[0].ids.length;
    return hidden.apply(policy, args);
  };
  return { take: () => [tokens, tokens = 0][0] };
}

async function updateRows(backend: string, policy: QwenPolicy, trajectories: readonly Trajectory[]): Promise<Row[]> {
  const { gradients } = policy, counter = countTokens(policy);
  // Alternating rewards: no group is left out for want of an advantage.
  const rewards = trajectories.map((_, i) => i % 2), trainer = new Trainer(policy, { learningRate: 1e-6 });
  const step = (sharePrefix: boolean) => async () => {
    policy.gradients = (request) =>
      gradients.call(policy, { ...request, options: { ...request.options, sharePrefix } });
    await trainer.update(trajectories, rewards);
  };
  await step(true)();
  const shared = counter.take();
  await step(false)();
  const whole = counter.take();
  const { first, second } = await alternate(ROUNDS, step(true), step(false));
  policy.gradients = gradients;
  trainer.dispose();
  const peer = "each conversation on its own";
  return [
    {
      name: `shared_prefix/${backend}/update`,
      value: median(first),
      unit: "s",
      ratio: median(second) / median(first),
      peer,
      n: ROUNDS,
    },
    { name: `shared_prefix/${backend}/tokens`, value: shared, unit: "tokens", ratio: whole / shared, peer, n: 1 },
  ];
}

async function rolloutRow(
  backend: string,
  policy: Policy,
  samples: readonly Sample[],
  options: RolloutOptions,
): Promise<Row> {
  const { createPrefixCache } = policy;
  const play = (cached: boolean) => async () => {
    policy.createPrefixCache = cached ? createPrefixCache : undefined;
    await rollout(policy, samples, options);
  };
  await play(true)();
  await play(false)();
  const { first, second } = await alternate(ROUNDS, play(true), play(false));
  policy.createPrefixCache = createPrefixCache;
  return {
    name: `shared_prefix/${backend}/rollout`,
    value: median(first),
    unit: "s",
    ratio: median(second) / median(first),
    peer: "a second turn that starts again",
    n: ROUNDS,
  };
}

/** Rows `shared_prefix/<backend>/update`, `…/tokens` and `…/rollout`. */
export const sharedPrefix: Benchmark = {
  names: ["webgpu", "wasm"].flatMap((backend) =>
    ["update", "tokens", "rollout"].map((what) => `shared_prefix/${backend}/${what}`)
  ),
  async run(backend): Promise<Row[]> {
    const policy = await loadPolicy(), world = signs();
    try {
      const samples = await Promise.all(Array.from({ length: PROMPTS }, (_, i) => world.get(i)));
      const options = { ...world.hints, groupSize: GROUP, maxNewTokens: [14, 8] };
      const { trajectories } = await rollout(policy, samples, options);
      return [...await updateRows(backend, policy, trajectories), await rolloutRow(backend, policy, samples, options)];
    } finally {
      policy.dispose();
    }
  },
};
