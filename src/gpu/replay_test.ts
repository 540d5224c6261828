import assert from "node:assert/strict";
import { signs } from "../data/signs.ts";
import { tf } from "../deps.ts";
import { Trainer, type TrainingTrajectory, type UpdateMetrics } from "../mgpo.ts";
import { loadPolicy } from "../policy/load.ts";
import { rollout } from "../rollout.ts";
import { gpuTest } from "./kernels/testing.ts";
import { PassPlans } from "./pass_plans.ts";
import { DispatchReplay } from "./replay.ts";

/** The replay of the current backend, switched on for a test and as it was afterwards; recordings of whole passes are off. */
async function withReplay(f: (replay: DispatchReplay) => Promise<void>): Promise<void> {
  const replay = DispatchReplay.of(tf.backend())!, { enabled, most } = replay;
  const plans = PassPlans.of(tf.backend())!, { enabled: records } = plans;
  try {
    replay.enabled = true;
    plans.enabled = false;
    await f(replay);
  } finally {
    Object.assign(replay, { enabled, most });
    plans.enabled = records;
    replay.forget();
  }
}

/** The share of bind groups, and of uniform buffers, that were found while `f` ran. */
async function foundDuring(
  replay: DispatchReplay,
  f: () => Promise<void>,
): Promise<[groups: number, uniforms: number]> {
  const before = { ...replay.counts };
  await f();
  const grew = (key: keyof typeof before) => replay.counts[key] - before[key];
  const share = (found: number, made: number) => found / (found + made);
  return [
    share(grew("groupsFound"), grew("groupsMade")),
    share(grew("uniformsFound"), grew("uniformsMade")),
  ];
}

/** Conversations about two samples of the world, another two for each number. */
async function batches(count: number): Promise<TrainingTrajectory[][]> {
  const policy = await loadPolicy(), world = signs({ split: "heldout" }), out: TrainingTrajectory[][] = [];
  for (let i = 0; i < count; i++) {
    const samples = await Promise.all([2 * i, 2 * i + 1].map((k) => world.get(k)));
    const { trajectories } = await rollout(policy, samples, {
      ...world.hints,
      groupSize: 3,
      maxNewTokens: [14, 8],
      seed: i,
    });
    out.push(trajectories);
  }
  policy.dispose();
  return out;
}

gpuTest("updates with replayed dispatches are those without, bit for bit, while data and shapes change", async () => {
  await withReplay(async (replay) => {
    const given = await batches(2);
    // The second repeats the shapes of the first with other tokens, advantages and recorded log-probs.
    const other = given[0].map((t) => ({
      ...t,
      ids: t.ids.map((id, i) => t.assistantMask[i] ? (id * 7 + 3) % 200 : id),
      logprobs: t.logprobs.map((p) => p * 0.9),
    }));
    const data = [given[0], other, given[1], given[0]];
    const train = async (enabled: boolean) => {
      replay.enabled = enabled;
      const policy = await loadPolicy(), trainer = new Trainer(policy, { learningRate: 1e-3, minibatches: 2 });
      const log: UpdateMetrics[] = [];
      for (const [step, batch] of data.entries()) {
        log.push(await trainer.update(batch, batch.map((_, i) => (i + step) % 3)));
        policy.releaseFeatures();
      }
      const weights = await Promise.all([...policy.parameters.values()].map((x) => x.data<"float32">()));
      const { tensors } = await trainer.state();
      trainer.dispose();
      policy.dispose();
      return { log, weights, moments: [...tensors.values()] };
    };
    const plain = await train(false), replayed = await train(true);
    assert.ok(plain.log.every(({ grad_norm }) => grad_norm > 0));
    assert.deepEqual(replayed.log, plain.log);
    replayed.weights.forEach((values, i) => assert.deepEqual(values, plain.weights[i], `parameter ${i}`));
    replayed.moments.forEach((values, i) => assert.deepEqual(values, plain.moments[i], `moment ${i}`));
  });
});

gpuTest("a repeated update makes next to nothing again, and neither tensors nor device memory grow", async () => {
  await withReplay(async (replay) => {
    const [batch] = await batches(1), policy = await loadPolicy(), trainer = new Trainer(policy);
    const memory: [tensors: number, bytes: number][] = [];
    let shares = [0, 0];
    for (let step = 0; step < 5; step++) {
      shares = await foundDuring(
        replay,
        async () => void await trainer.update(batch, batch.map((_, i) => (i + step) % 2)),
      );
      const { numTensors, numBytesAllocatedInGPU } = tf.memory() as tf.MemoryInfo & { numBytesAllocatedInGPU: number };
      memory.push([numTensors, numBytesAllocatedInGPU]);
    }
    // The rates of AdamW are others in each step.
    assert.ok(shares.every((share) => share > 0.97), `found ${shares.map((share) => share.toFixed(3))}`);
    assert.equal(memory[4][0], memory[2][0]);
    // The bound of the pool may let some go.
    assert.ok(memory[4][1] <= memory[2][1], `${memory[4][1]} bytes after ${memory[2][1]}`);
    trainer.dispose();
    policy.dispose();
  });
});

gpuTest("plain operations get their uniforms and inputs, however few dispatches are remembered", async () => {
  await withReplay(async (replay) => {
    const compute = async (round: number): Promise<number[]> => {
      const y = tf.tidy(() => {
        const x = tf.tensor2d(Float32Array.from({ length: 60 }, (_, i) => Math.sin(i + round)), [12, 5]);
        const [a, b] = [tf.slice(x, [round, 0], [4, 5]), tf.clipByValue(x, -0.1 * round, 0.5)];
        return tf.concat1d(
          [tf.pad(a, [[1, round], [0, 2]], round), tf.softmax(b), tf.tile(a, [1, 3])].map((t) => t.flatten()),
        );
      });
      const values = [...await y.data()];
      y.dispose();
      return values;
    };
    replay.enabled = false;
    const expected: number[][] = [];
    for (let round = 0; round < 6; round++) expected.push(await compute(round));
    for (const most of [1, 7, 1 << 13]) {
      Object.assign(replay, { enabled: true, most });
      replay.forget();
      for (let round = 0; round < 12; round++) {
        assert.deepEqual(await compute(round % 6), expected[round % 6], `most ${most}, round ${round}`);
        assert.ok(replay.size <= 2 * most);
      }
    }
  });
});

gpuTest("a backend that is built otherwise is left alone", () => {
  assert.equal(DispatchReplay.of({}), undefined);
  assert.equal(DispatchReplay.of(tf.backend()), DispatchReplay.of(tf.backend()));
});
