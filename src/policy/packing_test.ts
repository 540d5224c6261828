import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { segmentsOf, useKernels } from "./ops.ts";
import { bucketed, bucketedSizes, commonLength, packSequences, packShared, padded, sharedSizes } from "./packing.ts";
import type { ImageInput, LogProbOptions, Sequence } from "./policy.ts";
import type { QwenPolicy } from "./qwen.ts";
import { continued, goldenPolicy, noise, question, words } from "./testing.ts";

const adapter = await navigator.gpu?.requestAdapter();
if (!adapter) console.log("no WebGPU adapter on this machine: sharing beginnings is tested on wasm alone");

interface Batch {
  sequences: Sequence[];
  masks: number[][];
}

/** Opens a turn that shows an image. */
function shows(policy: QwenPolicy, image: ImageInput): number[] {
  const { ids } = question(policy, "", [image]), { image: token } = policy.config.tokens;
  return ids.slice(ids.indexOf(token) - 1, ids.lastIndexOf(token) + 2);
}

/**
 * Three groups: of four with a picture before the branching and one after it (two rows with the same first reply and the same
 * crop, one of them with a masked reply in what they share), of one, and of three equal rows.
 */
function dialogues(policy: QwenPolicy): Batch {
  const [far, near, other] = [noise(1, 150, 90), noise(2, 60, 120), noise(3, 90, 60)].map((p) =>
    policy.prepareImage(p)
  );
  const sequences: Sequence[] = [], masks: number[][] = [];
  const add = (opening: Sequence, turns: readonly { reply: number[]; crop?: ImageInput }[]) => {
    let row = opening;
    const mask = opening.ids.map(() => 0);
    for (const { reply, crop } of turns) {
      const asked = crop ? [...shows(policy, crop), ...words(policy, 9, 5)] : [];
      row = continued(row, [...reply, ...asked], crop ? [crop] : []);
      mask.push(...reply.map(() => 1), ...asked.map(() => 0));
    }
    sequences.push(row);
    masks.push(mask);
  };
  const say = (seed: number, count: number) => words(policy, seed, count);
  const first = question(policy, "Which letter is on the red sign that stands left of the blue one?", [far]);
  const same = { reply: say(20, 11), crop: near };
  add(first, [{ reply: say(21, 7), crop: other }, { reply: say(22, 4) }]);
  add(first, [same, { reply: say(23, 6) }]);
  add(first, [same, { reply: say(24, 3) }]);
  add(first, [{ reply: [...say(20, 5), ...say(25, 4)], crop: near }, { reply: say(26, 5) }]);
  add(question(policy, "What is it?", [other]), [{ reply: say(27, 9) }]);
  const third = question(policy, "And in these two, what is there to be seen?", [near, far]);
  for (let i = 0; i < 3; i++) add(third, [{ reply: say(28, 8) }]);
  return { sequences, masks };
}

/** Log-probs, entropies and the gradients of a sum of both with unequal weights, read back. */
async function scored(policy: QwenPolicy, { sequences, masks }: Batch, options: LogProbOptions) {
  const kept: tf.Tensor[] = [];
  const { value, grads } = tf.variableGrads(() => {
    const { logprobs, entropy } = policy.logProbs(sequences, masks, options);
    kept.push(tf.keep(logprobs.clone()), tf.keep(entropy.clone()));
    const weights = tf.tensor2d(
      Float32Array.from({ length: logprobs.size }, (_, i) => Math.sin(1 + i)),
      logprobs.shape,
    );
    return tf.add(tf.sum(tf.mul(logprobs, weights)), tf.mul(0.3, tf.sum(tf.mul(entropy, weights)))) as tf.Scalar;
  }, [...policy.parameters].filter(([n]) => options.trainVision || !n.startsWith("visual.")).map(([, v]) => v));
  const out = {
    logprobs: await kept[0].data(),
    entropy: await kept[1].data(),
    grads: new Map<string, Float32Array>(),
  };
  for (const [name, variable] of policy.parameters) {
    const grad = grads[variable.name];
    if (grad) out.grads.set(name, await grad.data() as Float32Array);
  }
  tf.dispose([kept, value, grads]);
  return out;
}

const apart = (a: ArrayLike<number>, b: ArrayLike<number>): number => {
  assert.equal(a.length, b.length);
  let most = 0;
  for (let i = 0; i < a.length; i++) most = Math.max(most, Math.abs(a[i] - b[i]));
  return most;
};
const largest = (a: ArrayLike<number>): number => apart(a, new Float32Array(a.length));

/** Values within 1e-5; each gradient within 1e-4 of the largest value of its tensor, or of 1e-2. */
async function compare(policy: QwenPolicy, batch: Batch, options: LogProbOptions = {}): Promise<void> {
  const want = await scored(policy, batch, { ...options, sharePrefix: false });
  const got = await scored(policy, batch, { ...options, sharePrefix: true });
  assert.ok(apart(got.logprobs, want.logprobs) < 1e-5, `log-probs differ by ${apart(got.logprobs, want.logprobs)}`);
  assert.ok(apart(got.entropy, want.entropy) < 1e-5, `entropies differ by ${apart(got.entropy, want.entropy)}`);
  assert.deepEqual([...got.grads.keys()], [...want.grads.keys()]);
  for (const [name, grad] of want.grads) {
    const difference = apart(got.grads.get(name)!, grad), scale = Math.max(largest(grad), 1e-2);
    assert.ok(difference < 1e-4 * scale, `${name}: ${difference} of ${scale}`);
  }
}

for (const [backend, kernels] of [["wasm", "fused"], ["wasm", "plain"], ["webgpu", "fused"]] as const) {
  Deno.test({
    name: `shared beginnings give the log-probs, entropies and gradients of whole sequences (${backend}, ${kernels})`,
    ignore: backend === "webgpu" && !adapter,
    fn: async () => {
      await chooseBackend(backend);
      useKernels(kernels);
      const policy = await goldenPolicy();
      try {
        const batch = dialogues(policy), { config } = policy;
        const { packed } = packShared(config, batch.sequences);
        const total = batch.sequences.reduce((sum, { ids }) => sum + ids.length, 0);
        assert.ok(packed.keys && packed.ids.length < 0.6 * total, `${packed.ids.length} of ${total} tokens`);
        await compare(policy, batch, { temperature: 0.8, trainVision: kernels === "fused" });
        const some = (rows: readonly number[]) => ({
          sequences: rows.map((r) => batch.sequences[r]),
          masks: rows.map((r) => batch.masks[r]),
        });
        // Two equal rows alone; rows with nothing in common.
        await compare(policy, some([5, 6]));
        const bare = { ids: words(policy, 30, 40), images: [] }, apart = [batch.sequences[4], bare];
        assert.equal(packShared(config, apart).packed.keys, undefined);
        await compare(policy, { sequences: apart, masks: [batch.masks[4], bare.ids.map((_, t) => t > 3 ? 1 : 0)] });
        // A masked token where a row branches off, one in the middle of what is shared, one row that ends where others go on.
        const ids = batch.sequences[4].ids, cut = { ids: ids.slice(0, -4), images: batch.sequences[4].images };
        const sequences = [batch.sequences[4], cut, { ...cut, ids: [...cut.ids, 5, 6] }];
        await compare(policy, { sequences, masks: sequences.map(({ ids }) => ids.map((_, t) => t > 30 ? 1 : 0)) });
      } finally {
        useKernels("fused");
        policy.dispose();
      }
    },
  });
}

Deno.test("what sequences have in common ends before an image that differs or is not there whole", async () => {
  await chooseBackend("wasm");
  const policy = await goldenPolicy(), { config } = policy;
  const [a, b] = [policy.prepareImage(noise(1, 90, 60)), policy.prepareImage(noise(2, 90, 60))];
  const one = question(policy, "What?", [a]),
    two = question(policy, "What?", [b]),
    first = one.ids.indexOf(config.tokens.image);
  assert.equal(commonLength(one, one, config), one.ids.length);
  assert.equal(one.ids.join(), two.ids.join());
  assert.equal(commonLength(one, two, config), first);
  assert.equal(commonLength(one, { ids: one.ids.slice(0, first + 2), images: [a] }, config), first);
  assert.equal(commonLength(one, question(policy, "Why?", [a]), config) > first + 5, true);
  assert.equal(commonLength(question(policy, "x", [a, b]), question(policy, "x", [a, a]), config) > first + 5, true);
  policy.dispose();
});

Deno.test("a layout names each token's row and position, whether beginnings are shared or not", async () => {
  await chooseBackend("wasm");
  const policy = await goldenPolicy(),
    { sequences } = dialogues(policy),
    plain = packSequences(policy.config, sequences);
  for (const share of [true, false]) {
    const { packed, rows } = packShared(policy.config, sequences, share);
    const positions = [0, 1, 2].map((axis) => packed.index.flatMap((index) => [...index.positions[axis]]));
    sequences.forEach(({ ids }, b) => {
      assert.deepEqual([...rows[b]].map((row) => packed.ids[row]), ids);
      for (const axis of [0, 1, 2]) {
        assert.deepEqual([...rows[b]].map((row) => positions[axis][row]), [...plain.index[b].positions[axis]]);
      }
    });
    assert.deepEqual(packed.images.map(({ key }) => key).sort(), plain.images.map(({ key }) => key).sort());
  }
  policy.dispose();
});

Deno.test("sizes go up to at most eight buckets an octave, an eighth or 15 more", () => {
  const sizes = new Set<number>();
  for (let n = 1; n <= 4096; n++) {
    const size = bucketed(n);
    assert.ok(size >= n && size - n <= Math.max(15, n / 8), `${n} → ${size}`);
    assert.equal(bucketed(size), size);
    if (n > 2048) sizes.add(size);
  }
  assert.equal(sizes.size, 8);
});

Deno.test("shared sizes hold what is asked for, and are few", async () => {
  await chooseBackend("wasm");
  const policy = await goldenPolicy(), { config } = policy, [first] = dialogues(policy).sequences;
  const { packed } = packShared(config, [first]), seen = new Set<string>();
  const grown = (tokens: number, keys: number) => ({
    ...{ ...packed, ids: new Int32Array(tokens), lengths: new Array(Math.ceil(tokens / 40)).fill(40) },
    keys: { lengths: [], rows: new Int32Array(keys), cached: 0 },
  });
  for (let tokens = 300; tokens < 4096; tokens += 97) {
    const counts = { chosen: Math.ceil(0.3 * tokens), rows: Math.ceil(tokens / 45), width: 18 };
    const keys = Math.floor(1.8 * tokens), sizes = sharedSizes(grown(tokens, keys), config, counts);
    assert.ok(sizes.tokens > tokens && sizes.tokens <= Math.max(256, 2 * tokens));
    assert.ok(sizes.keys! >= keys + sizes.tokens - tokens && sizes.pieces > tokens / 40);
    for (const name of ["chosen", "rows", "width"] as const) assert.ok(sizes[name] >= counts[name]);
    seen.add(JSON.stringify(sizes));
  }
  assert.equal(seen.size, 4);
  // Far more keys than usual still fit.
  assert.equal(sharedSizes(grown(300, 3000), config, { chosen: 9, rows: 3, width: 100 }).keys, 4096);
  policy.dispose();
});

Deno.test("padding changes no real token's hidden state, and fills everything up to bucket sizes", async () => {
  for (const backend of adapter ? ["wasm", "webgpu"] as const : ["wasm"] as const) {
    await chooseBackend(backend);
    const policy = await goldenPolicy(), { config } = policy;
    for (const share of [true, false]) {
      const { packed } = packShared(config, dialogues(policy).sequences, share);
      const read = async (p: typeof packed) => {
        const hidden = tf.tidy(() => policy.hidden(p)), data = await hidden.data();
        hidden.dispose();
        return data;
      };
      const want = await read(packed), counts = { chosen: 20, rows: 4, width: 7 };
      for (const sizesOf of [undefined, bucketedSizes, sharedSizes]) {
        const sizes = sizesOf?.(packed, config, counts), more = padded(packed, config, sizes);
        if (sizes) {
          const features = more.featureRow.reduce((most, row) => Math.max(most, row), -1) + 1;
          assert.deepEqual(
            [more.ids.length, more.keys?.rows.length, more.lengths.length, features + (more.spareFeatures ?? 0)],
            [sizes.tokens, sizes.keys, sizes.pieces, sizes.features],
          );
          assert.ok(sizes.chosen >= counts.chosen && sizes.rows >= counts.rows && sizes.width >= counts.width);
        } else {
          for (const size of [more.ids.length, more.keys?.rows.length ?? 16]) assert.equal(bucketed(size), size);
          // Plain attention lays all pieces out as long as the longest.
          assert.equal(Math.max(...more.lengths), Math.max(...packed.lengths));
        }
        assert.equal(segmentsOf(more.lengths).cu.at(-1), more.ids.length);
        if (more.keys) assert.equal(segmentsOf(more.keys.lengths).cu.at(-1), more.keys.rows.length);
        const got = await read(more);
        assert.ok(got.length > want.length && apart(got.subarray(0, want.length), want) < 1e-5);
        assert.ok(got.every(Number.isFinite));
      }
    }
    policy.dispose();
  }
});

Deno.test({
  name: "on WebGPU, updates of slightly different lengths need no further device memory",
  ignore: !adapter,
  fn: async () => {
    await chooseBackend("webgpu");
    const policy = await goldenPolicy(), first = question(policy, "What is it?"), allocated: number[] = [];
    const batch = (more: number): Batch => {
      const opening = continued(first, words(policy, 1, more));
      const sequences = [0, 1, 2, 3].map((i) => continued(opening, words(policy, 5 + i, 12)));
      return { sequences, masks: sequences.map(({ ids }) => ids.map((_, t) => t >= opening.ids.length ? 1 : 0)) };
    };
    const buckets = (more: number) => {
      const { ids, keys } = padded(packShared(policy.config, batch(more).sequences).packed, policy.config);
      return `${ids.length} tokens, ${keys!.rows.length} keys`;
    };
    let from = 20;
    while (buckets(from) !== buckets(from + 3)) from++;
    for (const more of [0, 0, 3, 1, 2]) {
      await scored(policy, batch(from + more), {});
      allocated.push((tf.memory() as tf.MemoryInfo & { numBytesAllocatedInGPU: number }).numBytesAllocatedInGPU);
    }
    assert.deepEqual(new Set(allocated.slice(2)), new Set([allocated[1]]));
    policy.dispose();
  },
});
