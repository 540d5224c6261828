import assert from "node:assert/strict";
import { signs } from "../data/signs.ts";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { PassPlans } from "../gpu/pass_plans.ts";
import { loadPolicy } from "../policy/load.ts";
import { type ConversationSize, planMemory, type PlanSettings } from "../policy/memory_plan.ts";
import type { QwenConfig } from "../policy/config.ts";
import type { TrainOptions } from "../settings.ts";
import { train } from "../train.ts";
import { InputError } from "./errors.ts";
import { checkMemory, memoryThere, refuseTooLarge } from "./memory_check.ts";
import { Progress } from "./progress.ts";
import { runTraining } from "./training_run.ts";

const hasAdapter = await chooseBackend("webgpu", { onLost: () => {} }).then(() => true, () => false);

/** Measures two steps in a fresh backend, so that what other tests took does not count. */
async function measured(backend: "wasm" | "webgpu", options: TrainOptions): Promise<number> {
  const { factory } = tf.engine().registryFactory[backend];
  tf.removeBackend(backend);
  tf.registerBackend(backend, factory);
  await chooseBackend(backend, { onLost: () => {} });
  // As on a GPU, whose passes take more.
  const plans = PassPlans.of(tf.backend());
  if (plans) Object.assign(plans, { sharesSizes: true, after: 0 });
  const policy = await loadPolicy();
  let peak = 0;
  for await (const record of train(policy, signs(), { ...options, steps: 2, evalEvery: 0 })) {
    peak = Math.max(peak, record["memory/peak_bytes"]);
  }
  policy.dispose();
  return peak;
}

const settings: TrainOptions[] = [
  { prompts: 4, groupSize: 4 },
  { prompts: 4, groupSize: 4, trainVision: true },
  { method: "sft", prompts: 24, tokensPerPass: 400 },
];

for (const backend of ["wasm", "webgpu"] as const) {
  for (const train of settings) {
    Deno.test({
      name: `the estimate of the tiny policy on ${backend} is above the measured peak, and within 3 times: ` +
        JSON.stringify(train),
      ignore: backend === "webgpu" && !hasAdapter,
      fn: async () => {
        const peak = await measured(backend, train), dataset = signs();
        const plan = await checkMemory({ policy: "tiny", pixels: {}, dataset, train, isEvaluated: false, backend });
        const ratio = plan!.totalBytes / peak;
        assert.ok(ratio >= 1 && ratio <= 3, `${ratio} of ${peak} bytes`);
      },
    });
  }
}

Deno.test("the estimate counts on the largest pictures of the budget, whatever the first samples show", async () => {
  await chooseBackend("wasm", { onLost: () => {} });
  const world = signs(), pixels = { minPixels: 56 * 56, maxPixels: 224 * 224 };
  const small = (count: number) => ({
    ...world,
    get: async (index: number) => {
      const sample = await world.get(index);
      return { ...sample, picture: async () => (await sample.picture()).crop([0, 0, 40 * (count + 1), 56]) };
    },
  });
  const totals = [];
  for (const dataset of [world, small(1), small(2)]) {
    const train = { prompts: 2, groupSize: 2 };
    totals.push((await checkMemory({ policy: "tiny", pixels, dataset, train, isEvaluated: false, backend: "wasm" }))!);
  }
  assert.deepEqual(totals[1], totals[0]);
  assert.deepEqual(totals[2], totals[0]);
});

/** The sizes of Qwen2.5-VL-3B. */
const large = {
  text: {
    ...{
      vocabSize: 151936,
      hiddenSize: 2048,
      intermediateSize: 11008,
      layers: 36,
      heads: 16,
      kvHeads: 2,
      headDim: 128,
    },
    ...{ rmsNormEps: 1e-6, ropeTheta: 1e6, mropeSection: [16, 24, 24], tied: true },
  },
  vision: {
    ...{ depth: 32, hiddenSize: 1280, intermediateSize: 3420, heads: 16, headDim: 80, inChannels: 3, patchSize: 14 },
    ...{ spatialMergeSize: 2, temporalPatchSize: 2, windowSize: 112, fullAttentionBlocks: [7, 15, 23, 31] },
    ...{ outHiddenSize: 2048, normEps: 1e-6, ropeTheta: 10000 },
  },
  tokens: { image: 151655, video: 151656, visionStart: 151652, visionEnd: 151653, eos: [151645] },
  generation: { suppressTokens: [] },
} as const satisfies QwenConfig;
const size: ConversationSize = { promptTokens: 600, turnTokens: 400, imageTokens: 256 };
const run: PlanSettings = {
  ...{
    method: "mgpo",
    turns: 2,
    prompts: 2,
    groupSize: 4,
    maxNewTokens: [256, 512],
    minibatches: 1,
    tokensPerPass: 2048,
  },
  ...{ gradientCheckpointing: true, trainVision: false, lossOn: "all", reference: false, evalBatch: 8, nucleus: false },
  ...{ backend: "wasm", kernels: "fused" },
};

Deno.test("a run of 3 billion parameters is refused on wasm, with the sizes that decide it and what to do", () => {
  const plan = planMemory(large, size, run);
  assert.throws(() => refuseTooLarge(plan, memoryThere("wasm")), (error: Error) => {
    assert.ok(error instanceof InputError);
    assert.match(
      error.message,
      /^the run does not fit: it may take \d+\.\d GiB, but WebAssembly can have allows 4\.0 GiB/,
    );
    assert.match(error.message, /GiB weights \(3\.75 G parameters\): take a smaller --policy/);
    assert.match(error.message, /GiB two moments of AdamW \(3\.09 G trained parameters\)/);
    assert.ok(!error.message.includes("\n"));
    const sizes = [...error.message.matchAll(/(?:first: |; )(\d+\.\d) GiB [a-z]+/g)].map(([, n]) => Number(n));
    assert.deepEqual(sizes.slice(0, 4), sizes.slice(0, 4).toSorted((a, b) => b - a));
    return true;
  });
  // Four numbers a parameter are the least: 48 GiB and some.
  assert.ok(plan.totalBytes > 45 * 2 ** 30);
});

Deno.test("each option that a refusal names makes its part smaller", () => {
  const total = (changed: Partial<PlanSettings>, sizes = size) =>
    planMemory(large, sizes, { ...run, ...changed }).totalBytes;
  const whole = total({});
  assert.ok(total({ gradientCheckpointing: false }) > whole);
  assert.ok(total({ tokensPerPass: 8192, gradientCheckpointing: false }) > total({ gradientCheckpointing: false }));
  assert.ok(total({ backend: "webgpu", nucleus: true }) > total({ backend: "webgpu" }));
  assert.ok(total({ prompts: 16, evalBatch: 0 }) > total({ prompts: 1, evalBatch: 0 }));
  assert.ok(total({ reference: true }) > whole && total({ trainVision: true }) > whole);
  assert.ok(total({}, { promptTokens: 4600, turnTokens: 4400, imageTokens: 4096 }) > whole);
});

Deno.test("buffers that a GPU cannot make, or that no kernel can take in windows, are named", () => {
  const plan = planMemory(large, size, { ...run, backend: "webgpu" }), GIB = 2 ** 30;
  refuseTooLarge(plan, {});
  // The embedding of 1.2 GiB is taken in windows, so a small binding does not matter, a small buffer does.
  refuseTooLarge(plan, { buffer: 2 * GIB, binding: GIB / 8 });
  assert.throws(
    () => refuseTooLarge(plan, { buffer: GIB, binding: GIB / 8 }),
    /largest buffer is 1\.0 GiB.* needed are: 1\.2 GiB weight model\.embed_tokens\.weight: take a smaller --policy/,
  );
  const wide = { ...large, text: { ...large.text, kvHeads: 16 } };
  const many = planMemory(wide, size, { ...run, backend: "webgpu", prompts: 64, groupSize: 8, maxNewTokens: [512] });
  assert.throws(
    () => refuseTooLarge(many, { buffer: 2 * GIB, binding: GIB / 8 }),
    /a kernel sees 128 MiB at once, but needed are: 256 MiB keys and values that 32 rows add to a layer: lower --prompts/,
  );
});

Deno.test("deno task train refuses what is above --memory-limit, and leaves no run folder behind", async () => {
  const folder = `${await Deno.makeTempDir()}/run`;
  const args = ["--backend", "wasm", "--run", folder, "--memory-limit", "0.1", "--steps", "1"];
  await assert.rejects(
    runTraining(args, new Progress({ isTerminal: false, write: () => {} })),
    (error: Error) =>
      error instanceof InputError &&
      /^the run does not fit: it may take \d+ MiB, but --memory-limit 0\.1 allows 102 MiB\. Largest/.test(
        error.message,
      ),
  );
  await assert.rejects(Deno.stat(folder), Deno.errors.NotFound);
});
