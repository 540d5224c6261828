import assert from "node:assert/strict";
import { signs } from "../data/signs.ts";
import { tf } from "../deps.ts";
import { Trainer, type TrainerOptions, type TrainingTrajectory } from "../mgpo.ts";
import { loadPolicy } from "../policy/load.ts";
import { useKernels } from "../policy/ops.ts";
import type { PassGradients } from "../policy/pass.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { rollout } from "../rollout.ts";
import { flushTensors, webgpuBackend } from "./decode/memory.ts";
import { gpuTest } from "./kernels/testing.ts";
import { DeviceMemoryUse } from "./memory.ts";
import { DispatchReplay } from "./replay.ts";
import { PassPlans, type PlannedPass } from "./pass_plans.ts";

/** The plans of the current backend, empty and with shared sizes for a test, and as they were afterwards. */
async function withPlans(f: (plans: PassPlans) => Promise<void>): Promise<void> {
  const dispatches = DispatchReplay.of(tf.backend())!, { enabled: finds } = dispatches;
  const plans = PassPlans.of(tf.backend())!, { enabled, most, mostBytes, after, sharesSizes } = plans;
  try {
    plans.forget();
    Object.assign(plans, { enabled: true, sharesSizes: true, after: 1 });
    Object.assign(plans.counts, { plain: 0, recorded: 0, replayed: 0 });
    await f(plans);
  } finally {
    Object.assign(plans, { enabled, most, mostBytes, after, sharesSizes });
    dispatches.enabled = finds;
    plans.forget();
  }
}

/** Conversations about two samples of the world, other ones for each seed. */
async function batchOf(seed: number, groupSize = 5): Promise<TrainingTrajectory[]> {
  const policy = await loadPolicy(), world = signs({ split: "heldout" });
  const samples = await Promise.all([2 * seed, 2 * seed + 1].map((k) => world.get(k)));
  const hints = { ...world.hints, maxNewTokens: [14, 8] };
  const { trajectories } = await rollout(policy, samples, { ...hints, groupSize, seed });
  policy.dispose();
  return trajectories;
}

/** Everything that came out of training: what each pass gave, and the weights in the end. */
interface Trained {
  reports: Float32Array[];
  grads: Map<string, Float32Array>[];
  metrics: unknown[];
  weights: Float32Array[];
}

/** Trains a fresh policy on one batch after the other. */
async function trained(batches: readonly TrainingTrajectory[][], options: TrainerOptions = {}): Promise<Trained> {
  const policy = await loadPolicy(), trainer = new Trainer(policy, { learningRate: 1e-3, ...options });
  const out: Trained = { reports: [], grads: [], metrics: [], weights: [] }, reads: Promise<unknown>[] = [];
  observe(policy, ({ report, grads }) => {
    const at = out.reports.length;
    out.reports.push(new Float32Array(0));
    out.grads.push(new Map());
    // The trainer disposes of its own.
    const copies = [report, ...grads.values()].map((x) => tf.clone(x)), names = [...grads.keys()];
    reads.push(
      Promise.all(copies.map((x) => x.data<"float32">())).then(([values, ...rest]) => {
        out.reports[at] = values.slice();
        names.forEach((name, i) => out.grads[at].set(name, rest[i].slice()));
        tf.dispose(copies);
      }),
    );
  });
  for (const [step, batch] of batches.entries()) {
    out.metrics.push(await trainer.update(batch, batch.map((_, i) => (i + step) % 2)));
    await Promise.all(reads);
    policy.releaseFeatures();
  }
  out.weights = await Promise.all([...policy.parameters.values()].map((x) => x.data<"float32">()));
  trainer.dispose();
  policy.dispose();
  return out;
}

/** Calls back with what each pass gives. */
function observe(policy: QwenPolicy, seen: (result: PassGradients) => void): void {
  const gradients = policy.gradients.bind(policy);
  policy.gradients = (request) => {
    const result = gradients(request);
    seen(result);
    return result;
  };
}

function assertSame(a: Trained, b: Trained): void {
  assert.deepEqual(a.reports, b.reports);
  assert.deepEqual(a.grads, b.grads);
  assert.deepEqual(a.metrics, b.metrics);
  assert.deepEqual(a.weights, b.weights);
}

gpuTest("passes from a recording are the passes themselves, bit for bit, over batches of equal sizes", async () => {
  await withPlans(async (plans) => {
    const given = await Promise.all([0, 1, 2].map((seed) => batchOf(seed)));
    const batches = [...given, ...given.toReversed()];
    plans.enabled = false;
    const plain = await trained(batches);
    assert.deepEqual(plans.counts, { plain: 6, recorded: 0, replayed: 0 });
    plans.enabled = true;
    const replayed = await trained(batches);
    assert.deepEqual(plans.refusals, []);
    assert.deepEqual(plans.counts, { plain: 7, recorded: 1, replayed: 4 });
    assert.ok(plain.grads.every((grads) => grads.size > 30));
    assertSame(replayed, plain);
    // What went into the last four passes was not that of the recorded one.
    for (const later of replayed.reports.slice(2)) assert.notDeepEqual(later, replayed.reports[1]);
    const norms = plain.metrics.map((m) => (m as { grad_norm: number }).grad_norm);
    assert.equal(new Set(norms).size, norms.length);
  });
});

gpuTest("objectives, accumulated passes and a reference come out the same from recordings", async () => {
  await withPlans(async (plans) => {
    const batches = [...await Promise.all([0, 1].map((seed) => batchOf(seed))), await batchOf(0)];
    const reference = await loadPolicy();
    const cases: TrainerOptions[] = [
      { lossType: "grpo", importanceSampling: "sequence", tokensPerPass: 160 },
      { lossType: "bnpo", lossOn: "last", minibatches: 2, iterations: 2 },
      { lossType: "dr_grpo", maxCompletionLength: 22, lossOn: "every", delta: 1.5, temperature: 0.8 },
    ];
    for (const options of cases) {
      plans.enabled = false;
      const plain = await trained(batches, options);
      plans.enabled = true;
      const { replayed } = plans.counts;
      assertSame(await trained(batches, options), plain);
      assert.ok(plans.counts.replayed > replayed, `${JSON.stringify(options)} ${JSON.stringify(plans.counts)}`);
    }
    const withReference = async (enabled: boolean) => {
      plans.enabled = enabled;
      const policy = await loadPolicy(), trainer = new Trainer(policy, { beta: 0.1, learningRate: 1e-3 }, reference);
      const metrics = [];
      for (const batch of [...batches, batches[1]]) {
        metrics.push(await trainer.update(batch, batch.map((_, i) => i % 2)));
      }
      trainer.dispose();
      policy.dispose();
      return metrics;
    };
    assert.deepEqual(await withReference(true), await withReference(false));
    assert.deepEqual(plans.refusals, []);
    reference.dispose();
  });
});

gpuTest("examples are trained on from recordings as without", async () => {
  await withPlans(async (plans) => {
    const batches = await Promise.all([0, 1].map((seed) => batchOf(seed)));
    const tune = async (enabled: boolean) => {
      plans.enabled = enabled;
      const policy = await loadPolicy(), trainer = new Trainer(policy, { learningRate: 1e-3 }), log = [];
      for (const batch of [...batches, ...batches]) {
        const examples = batch.map(({ ids, images, assistantMask: mask }) => ({ sequence: { ids, images }, mask }));
        log.push(await trainer.supervised(examples));
      }
      trainer.dispose();
      policy.dispose();
      return log;
    };
    assert.deepEqual(await tune(true), await tune(false));
    assert.equal(plans.counts.replayed, 2);
  });
});

gpuTest(
  "other sizes get their own recording; neither tensors nor device memory grow while passes repeat",
  async () => {
    await withPlans(async (plans) => {
      const policy = await loadPolicy(), trainer = new Trainer(policy, { learningRate: 1e-3 });
      // It would remember the rates of each step of AdamW.
      DispatchReplay.of(tf.backend())!.enabled = false;
      const use = DeviceMemoryUse.of(tf.backend())!, small = await batchOf(0), large = await batchOf(1, 8);
      const before = use.bytes - use.poolBytes;
      const update = (batch: TrainingTrajectory[], step: number) =>
        trainer.update(batch, batch.map((_, i) => (i + step) % 2));
      for (let step = 0; step < 3; step++) await update(small, step);
      assert.deepEqual([plans.size, plans.counts.replayed], [1, 1]);
      for (let step = 0; step < 3; step++) await update(large, step);
      assert.deepEqual(plans.counts, { plain: 2, recorded: 2, replayed: 2 });
      // The smaller one could not lend its buffers and went; recorded again, it uses those of the larger.
      assert.equal(plans.size, 1);
      const alone = plans.bytes;
      await update(small, 0);
      assert.equal(plans.size, 2);
      assert.ok(plans.bytes < 1.3 * alone, `${plans.bytes} of ${alone} bytes`);
      const state = () => {
        // What waits for the next submission goes.
        flushTensors(webgpuBackend()!);
        return [tf.memory().numTensors, use.bytes - use.poolBytes, plans.bytes];
      };
      await update(small, 0);
      const [tensors, bytes, held] = state();
      assert.ok(held > 1 << 20 && bytes >= before + held);
      for (let step = 0; step < 10; step++) {
        await update(step % 2 ? small : large, step);
        assert.deepEqual(state(), [tensors, bytes, held]);
      }
      trainer.dispose();
      assert.deepEqual([plans.size, plans.bytes], [0, 0]);
      assert.ok(state()[1] <= bytes - held);
      policy.dispose();
    });
  },
);

gpuTest(
  "recordings go with their policy, with weights that are exchanged, and where they are too many or too large",
  async () => {
    await withPlans(async (plans) => {
      const batch = await batchOf(0), other = await batchOf(0, 8);
      const policy = await loadPolicy(), trainer = new Trainer(policy, { learningRate: 1e-3 });
      const update = (given = batch) => trainer.update(given, given.map((_, i) => i % 2));
      for (let step = 0; step < 3; step++) await update();
      assert.deepEqual(plans.counts, { plain: 1, recorded: 1, replayed: 1 });
      const weight = policy.parameters.get("model.norm.weight")!;
      tf.tidy(() => weight.assign(tf.mul(weight, 1.5)));
      const { policy_loss: own } = await update();
      assert.deepEqual(plans.counts, { plain: 1, recorded: 2, replayed: 1 });
      tf.tidy(() => weight.assign(tf.mul(weight, 1)));
      plans.enabled = false;
      const { policy_loss: plain } = await update();
      assert.notEqual(own, plain);
      Object.assign(plans, { enabled: true, most: 1 });
      for (let step = 0; step < 2; step++) await update(other);
      assert.equal(plans.size, 1);
      Object.assign(plans, { most: 16, mostBytes: 1 << 10 });
      for (let step = 0; step < 3; step++) await update();
      assert.ok(plans.size <= 1);
      policy.dispose();
      assert.deepEqual([plans.size, plans.bytes], [0, 0]);
      trainer.dispose();
    });
  },
);

gpuTest("a tower that is trained, checkpointing and plain operations take the tape", async () => {
  await withPlans(async (plans) => {
    const batch = (await batchOf(0, 2)).slice(0, 2);
    for (const options of [{ trainVision: true }, { gradientCheckpointing: true }]) await trained([batch], options);
    useKernels("plain");
    try {
      await trained([batch]);
    } finally {
      useKernels("fused");
    }
    assert.deepEqual(plans.counts, { plain: 0, recorded: 0, replayed: 0 });
  });
});

/** Does a small pass four times, with other data each time; gives what came out. */
async function small(
  plans: PassPlans,
  compute: (x: Float32Array, index: Int32Array, stacked: tf.Tensor2D) => tf.Tensor,
): Promise<number[][]> {
  const out: number[][] = [], owner = {};
  for (let round = 0; round < 4; round++) {
    const x = Float32Array.from({ length: 6 }, (_, i) => 10 * round + i), index = Int32Array.of(round % 3, 2, -1);
    const parts = [0, 1].map((i) => tf.fill([1 + i, 2], round + i));
    const pass: PlannedPass = {
      signature: "small",
      isWorthwhile: true,
      arrays: { x, index },
      stacked: { parts, shape: [4, 2] },
      constants: [],
      compute: (stacked) => new Map([["y", tf.tidy(() => compute(x, index, stacked!))]]),
    };
    const y = plans.run(owner, pass).get("y")!;
    out.push([...await y.data()]);
    tf.dispose([y, parts]);
  }
  plans.forget(owner);
  return out;
}

gpuTest("what a recording could not bring up to date is refused, with right results all the same", async () => {
  await withPlans(async (plans) => {
    const gather = (x: tf.Tensor, index: tf.Tensor) =>
      tf.engine().runKernel("MgpoGatherRows", { x, index }) as tf.Tensor;
    const matrix = (x: Float32Array) => tf.tensor2d(x, [3, 2]);
    const kept: tf.Tensor[] = [], foreign = tf.tensor1d([5, 6]);
    const compute = {
      named: (x: Float32Array, index: Int32Array, stacked: tf.Tensor2D) =>
        tf.concat([gather(matrix(x), tf.tensor1d(index, "int32")), tf.mul(stacked, 2)], 0),
      unnamed: (x: Float32Array, index: Int32Array) => gather(matrix(x), tf.tensor1d([...index], "int32")),
      foreign: (x: Float32Array) => tf.mul(matrix(x), foreign),
      kept: (x: Float32Array) => {
        const y = tf.mul(matrix(x), 2);
        kept.push(tf.keep(tf.add(y, 1)));
        return y;
      },
    };
    for (const [name, f] of Object.entries(compute)) {
      Object.assign(plans.counts, { plain: 0, recorded: 0, replayed: 0 });
      plans.enabled = false;
      const expected = await small(plans, f);
      plans.enabled = true;
      assert.deepEqual(await small(plans, f), expected, name);
      const { recorded, replayed } = plans.counts;
      assert.deepEqual([recorded, replayed], name === "named" ? [1, 2] : [1, 0], name);
    }
    // Tensors of a refused recording live on.
    assert.deepEqual([...await kept[5].data()], [21, 23, 25, 27, 29, 31]);
    tf.dispose([...kept, foreign]);
    assert.throws(() =>
      plans.run({}, {
        ...{ signature: "", isWorthwhile: true, arrays: {}, constants: [] },
        compute: () => tf.tidy(() => gather(tf.zeros([2, 2]), tf.tensor1d([7], "int32"))) as never,
      }), /index/);
    const { numTensors } = tf.memory();
    plans.after = 0;
    assert.throws(() =>
      plans.run({}, {
        ...{ signature: "", isWorthwhile: true, arrays: {}, constants: [] },
        compute: () => tf.tidy(() => gather(tf.add(tf.zeros([2, 2]), 1), tf.tensor1d([7], "int32"))) as never,
      }), /index/);
    assert.equal(tf.memory().numTensors, numTensors);
    assert.equal(plans.bytes, 0);
  });
});

gpuTest("a backend that is built otherwise has no plans", () => {
  assert.equal(PassPlans.of({}), undefined);
  assert.equal(PassPlans.of(tf.backend()), PassPlans.of(tf.backend()));
});
