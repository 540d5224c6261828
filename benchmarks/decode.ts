/**
 * How many tokens a second does generation decode, at a batch of 64 prompts with a picture each, beside plain tfjs operations
 * on the same backend? Prefill is subtracted: a run of one token is timed too.
 *
 * @module
 */
import { signs } from "../src/data/signs.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { type Kernels, useKernels } from "../src/policy/ops.ts";
import type { Sequence } from "../src/policy/policy.ts";
import { defaultTemplate, renderTurn } from "../src/rollout.ts";
import { alternate, type Benchmark, median } from "./benchmark.ts";

const BATCH = 64, TOKENS = 25, ROUNDS = 5;

export const decode: Benchmark = {
  names: ["decode/webgpu/b64", "decode/wasm/b64"],
  async run(backend) {
    const policy = await loadPolicy(), world = signs({ split: "heldout" });
    const prompts: Sequence[] = [];
    for (let i = 0; i < BATCH; i++) {
      const sample = await world.get(i), images = [policy.prepareImage(await sample.picture())];
      const messages = [renderTurn(defaultTemplate.ground, sample.question, "")];
      prompts.push({ ids: policy.encodeChat(messages, images), images });
    }
    const generate = (kernels: Kernels, maxNewTokens: number) => {
      useKernels(kernels);
      return policy.generate(prompts, { maxNewTokens, stopTokens: [] });
    };
    await generate("plain", 2);
    await generate("fused", 2);
    const one = await alternate(ROUNDS, () => generate("fused", 1), () => generate("plain", 1));
    const many = await alternate(ROUNDS, () => generate("fused", TOKENS), () => generate("plain", TOKENS));
    const rate = (key: "first" | "second") => BATCH * (TOKENS - 1) / (median(many[key]) - median(one[key]));
    useKernels("fused");
    policy.dispose();
    const fused = rate("first"), plain = rate("second");
    return [{
      name: `decode/${backend}/b64`,
      value: fused,
      unit: "tokens/s",
      ratio: fused / plain,
      peer: `plain tfjs on ${backend}`,
      n: ROUNDS,
    }];
  },
};
