/**
 * How long does one update take on 64 two-turn, two-picture conversations as they were sampled, beside plain tfjs operations
 * on the same backend? The tower rests, as in training.
 *
 * @module
 */
import { signs } from "../src/data/signs.ts";
import { Trainer } from "../src/mgpo.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { type Kernels, useKernels } from "../src/policy/ops.ts";
import { rollout } from "../src/rollout.ts";
import { alternate, type Benchmark, median } from "./benchmark.ts";

const PROMPTS = 8, GROUP = 8, ROUNDS = 5;

export const update: Benchmark = {
  names: ["update/webgpu", "update/wasm"],
  async run(backend) {
    const policy = await loadPolicy(), world = signs();
    const samples = await Promise.all(Array.from({ length: PROMPTS }, (_, i) => world.get(i)));
    const { trajectories } = await rollout(policy, samples, {
      ...world.hints,
      groupSize: GROUP,
      maxNewTokens: [14, 8],
    });
    // Alternating rewards: no group is left out for want of an advantage.
    const rewards = trajectories.map((_, i) => i % 2);
    const trainer = new Trainer(policy, { learningRate: 1e-6 });
    const step = async (kernels: Kernels) => {
      useKernels(kernels);
      await trainer.update(trajectories, rewards);
    };
    await step("plain");
    await step("fused");
    const { first, second } = await alternate(ROUNDS, () => step("fused"), () => step("plain"));
    useKernels("fused");
    trainer.dispose();
    policy.dispose();
    const fused = median(first), plain = median(second);
    return [{
      name: `update/${backend}`,
      value: fused,
      unit: "s",
      ratio: plain / fused,
      peer: `plain tfjs on ${backend}`,
      n: ROUNDS,
    }];
  },
};
