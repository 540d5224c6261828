/**
 * How much faster do all processor cores decode and update than one, on the WebAssembly backend? Results are the same bits (tests hold
 * them equal), so only time is measured: decoding 25 tokens for 64 prompts with a picture each, prefill included, and one update on
 * the conversations of 8 prompts × 8 as they were sampled. A machine that is busy with something else shows less.
 *
 * @module
 */
import { signs } from "../src/data/signs.ts";
import { chooseBackend } from "../src/gpu/backend.ts";
import { Trainer } from "../src/mgpo.ts";
import { loadPolicy } from "../src/policy/load.ts";
import type { Sequence } from "../src/policy/policy.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { defaultTemplate, renderTurn, rollout } from "../src/rollout.ts";
import { type Benchmark, median, type Row } from "./benchmark.ts";

const BATCH = 64, TOKENS = 25, PROMPTS = 8, GROUP = 8, ROUNDS = 7;

/** Times the work with one thread and with all in turns; starting the threads is not in it. */
async function compare(
  name: string,
  unit: string,
  amount: number | undefined,
  work: () => Promise<unknown>,
): Promise<Row> {
  const all = navigator.hardwareConcurrency, seconds = new Map<number, number[]>();
  // The first round warms up.
  for (let round = 0; round <= ROUNDS; round++) {
    for (const asked of [1, all]) {
      const { threads } = await chooseBackend("wasm", { threads: asked });
      if (threads !== asked) throw new Error(`${asked} threads were asked for, there are ${threads}`);
      // Threads that are new have yet to find out whether they pay on a busy machine.
      await work();
      const start = performance.now();
      await work();
      if (round > 0) seconds.set(asked, [...seconds.get(asked) ?? [], (performance.now() - start) / 1000]);
    }
  }
  const [one, many] = [1, all].map((threads) => median(seconds.get(threads)!));
  return {
    ...{ name, unit, value: amount === undefined ? many : amount / many },
    ...{ ratio: one / many, peer: `1 thread; this: ${all}`, n: ROUNDS },
  };
}

async function decoding(policy: QwenPolicy): Promise<Row> {
  const world = signs({ split: "heldout" }), prompts: Sequence[] = [];
  for (let i = 0; i < BATCH; i++) {
    const sample = await world.get(i), images = [policy.prepareImage(await sample.picture())];
    const messages = [renderTurn(defaultTemplate.ground, sample.question, "")];
    prompts.push({ ids: policy.encodeChat(messages, images), images });
  }
  const generate = () => policy.generate(prompts, { maxNewTokens: TOKENS, stopTokens: [] });
  return await compare("threads/wasm/decode", "tokens/s", BATCH * TOKENS, generate);
}

async function updating(policy: QwenPolicy): Promise<Row> {
  const world = signs(), samples = await Promise.all(Array.from({ length: PROMPTS }, (_, i) => world.get(i)));
  const { trajectories } = await rollout(policy, samples, {
    ...{ ...world.hints, groupSize: GROUP, maxNewTokens: [14, 8] },
  });
  const trainer = new Trainer(policy, { learningRate: 1e-6 });
  // Alternating rewards: no group is left out for want of an advantage.
  const rewards = trajectories.map((_, i) => i % 2);
  try {
    return await compare("threads/wasm/update", "s", undefined, () => trainer.update(trajectories, rewards));
  } finally {
    trainer.dispose();
  }
}

export const threads: Benchmark = {
  names: ["threads/wasm/decode", "threads/wasm/update"],
  async run() {
    const policy = await loadPolicy();
    try {
      return [await decoding(policy), await updating(policy)];
    } finally {
      policy.dispose();
    }
  },
};
