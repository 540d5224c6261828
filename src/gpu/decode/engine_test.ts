import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { signs } from "../../data/signs.ts";
import { loadPolicy } from "../../policy/load.ts";
import { useKernels } from "../../policy/ops.ts";
import type { Completion, GenerateOptions, Sequence } from "../../policy/policy.ts";
import type { QwenPolicy } from "../../policy/qwen.ts";
import { DecodeEngine } from "./engine.ts";
import { generateWith, prefill, startWebgpu } from "./testing.ts";
import { tableChunks } from "./weights.ts";

const golden = new URL("../../../fixtures/goldens/models/tiny/", import.meta.url);
const text = "which letter is on the red sign that stands left of the blue one?";

const goldenPolicy = () => loadPolicy(golden, { minPixels: 56 * 56, maxPixels: 84 * 84 });

/** Text prompts of different lengths. */
function textPrompts(policy: QwenPolicy, count: number): Sequence[] {
  const ids = policy.encode(text);
  return Array.from({ length: count }, (_, i) => ({ ids: ids.slice(0, 3 + (7 * i) % (ids.length - 3)), images: [] }));
}

/** Prompts with a picture each, of different lengths. */
async function picturePrompts(policy: QwenPolicy, count: number): Promise<Sequence[]> {
  const world = signs({ split: "heldout" });
  return await Promise.all(Array.from({ length: count }, async (_, i) => {
    const images = [policy.prepareImage(await (await world.get(i)).picture())];
    const content = [{ type: "image" as const }, { type: "text" as const, text: text.slice(0, 10 + 20 * i) }];
    return { ids: policy.encodeChat([{ role: "user", content }], images), images };
  }));
}

/** The policy's own loop over plain operations. */
async function plain(
  policy: QwenPolicy,
  prompts: readonly Sequence[],
  options: GenerateOptions,
): Promise<Completion[]> {
  useKernels("plain");
  try {
    return await policy.generate(prompts, options);
  } finally {
    useKernels("fused");
  }
}

async function withPolicy(use: (policy: QwenPolicy) => Promise<void>): Promise<void> {
  if (!await startWebgpu()) return;
  const policy = await goldenPolicy();
  try {
    await use(policy);
  } finally {
    policy.dispose();
  }
}

Deno.test("greedy tokens are those of the plain path, text and pictures, batch 1 and 3, both layouts", async () => {
  await withPolicy(async (policy) => {
    const options = { maxNewTokens: 20, temperature: 0, stopTokens: [] };
    for (const prompts of [textPrompts(policy, 1), textPrompts(policy, 3), await picturePrompts(policy, 3)]) {
      const want = await plain(policy, prompts, options);
      for (const software of [true, false]) {
        const engine = new DecodeEngine(policy.config, policy.weights, { software });
        const got = await generateWith(engine, policy, prompts, { ...options, checkEvery: 7 });
        engine.dispose();
        assert.deepEqual(got.ids, want.map(({ ids }) => ids));
        assert.deepEqual(got.finish, want.map(({ finish }) => finish));
        got.logprobs.forEach((row, r) => {
          row.forEach((p, i) => assert.ok(Math.abs(p - want[r].logprobs[i]) < 1e-4, `row ${r}, token ${i}`));
        });
      }
    }
  });
});

Deno.test("64 sampled rows that stop early: the plain path's tokens, and log-probs of policy.logProbs (1e-4)", async () => {
  await withPolicy(async (policy) => {
    const prompts = textPrompts(policy, 64);
    const stopTokens = Array.from({ length: 40 }, (_, i) => 12 * i); // a twelfth of the vocabulary: rows end soon
    const keys = prompts.map((_, i) => [5, 100 + i, 1] as const);
    const options = { maxNewTokens: 24, temperature: 0.9, seed: 11, stopTokens, keys, suppressTokens: [7, 496, 497] };
    const seen: [number, number][] = [], engine = new DecodeEngine(policy.config, policy.weights);
    const onToken = (tokens: number, running: number) => seen.push([tokens, running]);
    const got = await generateWith(engine, policy, prompts, { ...options, checkEvery: 4, onToken });
    engine.dispose();
    const counts: [number, number][] = [];
    const want = await plain(policy, prompts, { ...options, onToken: (t, r) => counts.push([t, r]) });
    const same = want.filter(({ ids }, r) => ids.join() === got.ids[r].join()).length;
    assert.ok(same >= 62, `${same} of 64 rows are equal`);
    if (same === 64) assert.deepEqual(seen, counts);
    assert.ok(got.finish.includes("stop"));
    got.ids.forEach((ids, r) => {
      const stops = ids.findIndex((id) => stopTokens.includes(id));
      assert.equal(got.finish[r], stops >= 0 ? "stop" : "length");
      assert.equal(ids.length, stops >= 0 ? stops + 1 : 24);
    });
    const sequences = prompts.map(({ ids, images }, r) => ({ ids: [...ids, ...got.ids[r]], images }));
    const masks = prompts.map(({ ids }, r) => [...ids.map(() => 0), ...got.ids[r].map(() => 1)]);
    const { logprobs, entropy } = policy.logProbs(sequences, masks, {
      temperature: 0.9,
      suppressTokens: [7, 496, 497],
    });
    const values = await logprobs.data(), width = logprobs.shape[1];
    tf.dispose([logprobs, entropy]);
    got.logprobs.forEach((row, r) => {
      row.forEach((p, i) => assert.ok(Math.abs(p - values[r * width + i]) < 1e-4, `row ${r}, token ${i}: ${p}`));
    });
  });
});

Deno.test("a table beyond the binding limit is split by rows, with the same result", async () => {
  assert.deepEqual(tableChunks(151_936, 3584, 134_217_728).reduce((n, { rows }) => n + rows, 0), 151_936);
  for (const { first, rows } of tableChunks(151_936, 3584, 134_217_728)) {
    assert.ok(first * 3584 * 4 % 256 === 0 && rows * 3584 * 4 <= 134_217_728);
  }
  await withPolicy(async (policy) => {
    const prompts = textPrompts(policy, 3), options = { maxNewTokens: 12, seed: 2, stopTokens: [] };
    const whole = new DecodeEngine(policy.config, policy.weights);
    const split = new DecodeEngine(policy.config, policy.weights, { tableBytes: 40_000 });
    const got = await generateWith(split, policy, prompts, options);
    assert.deepEqual(got, await generateWith(whole, policy, prompts, options));
    const stopTokens = [got.ids[1][4]];
    const early = { ...options, stopTokens, checkEvery: 3 };
    const compacted = await generateWith(split, policy, prompts, early);
    compacted.ids.forEach((ids, r) => assert.deepEqual(ids, got.ids[r].slice(0, ids.length)));
    assert.equal(compacted.ids[1].length, got.ids[1].indexOf(stopTokens[0]) + 1);
    whole.dispose();
    split.dispose();
  });
});

/** The policy's own loop, that draws each token on the host. */
async function onHost(policy: QwenPolicy, prompts: readonly Sequence[], options: GenerateOptions) {
  return (await policy.generateWithLogits(prompts, options)).completions;
}

Deno.test("topP 0.9: the host loop's tokens and log-probs (1e-4), whole and split tables, no look between", async () => {
  await withPolicy(async (policy) => {
    const engines = [undefined, 40_000].map((tableBytes) =>
      new DecodeEngine(policy.config, policy.weights, { tableBytes })
    );
    for (const prompts of [textPrompts(policy, 3), await picturePrompts(policy, 1)]) {
      const options = {
        maxNewTokens: 20,
        temperature: 0.8,
        topP: 0.9,
        seed: 5,
        stopTokens: [],
        suppressTokens: [7, 496],
      };
      const want = await onHost(policy, prompts, options);
      for (const engine of engines) {
        const got = await generateWith(engine, policy, prompts, { ...options, checkEvery: 64 });
        assert.deepEqual(got.ids, want.map(({ ids }) => ids));
        assert.deepEqual(got.finish, want.map(({ finish }) => finish));
        got.logprobs.forEach((row, r) => {
          row.forEach((p, i) => assert.ok(Math.abs(p - want[r].logprobs[i]) < 1e-4, `row ${r}, token ${i}`));
        });
      }
    }
    const prompts = textPrompts(policy, 3), options = { maxNewTokens: 12, seed: 2, stopTokens: [] };
    const greedy = await generateWith(engines[0], policy, prompts, { ...options, temperature: 0 });
    const least = await generateWith(engines[0], policy, prompts, { ...options, topP: 1e-6 });
    assert.deepEqual(least.ids, greedy.ids);
    // One plan serves every topP: none leaves its nucleus to the next.
    const all = await generateWith(engines[1], policy, prompts, options);
    assert.deepEqual(await generateWith(engines[0], policy, prompts, options), all);
    engines.forEach((engine) => engine.dispose());
  });
});

Deno.test("topP 0.9 with 70 rows that stop early: two windows of logits, compacted; the host's tokens", async () => {
  await withPolicy(async (policy) => {
    const prompts = textPrompts(policy, 70), stopTokens = Array.from({ length: 40 }, (_, i) => 12 * i);
    const keys = prompts.map((_, i) => [5, 100 + i, 1] as const);
    const options = { maxNewTokens: 24, temperature: 0.9, topP: 0.9, seed: 11, stopTokens, keys };
    const seen: [number, number][] = [], counts: [number, number][] = [];
    const engine = new DecodeEngine(policy.config, policy.weights);
    const onToken = (tokens: number, running: number) => seen.push([tokens, running]);
    const got = await generateWith(engine, policy, prompts, { ...options, checkEvery: 4, onToken });
    const want = await onHost(policy, prompts, { ...options, onToken: (t, r) => counts.push([t, r]) });
    engine.dispose();
    const same = want.filter(({ ids }, r) => ids.join() === got.ids[r].join());
    assert.ok(same.length >= 68, `${same.length} of 70 rows are equal`);
    if (same.length === 70) assert.deepEqual(seen, counts);
    assert.ok(counts.some(([, running]) => running > 0 && running < 64) && seen.at(-1)![1] < 70);
    want.forEach(({ ids, logprobs, finish }, r) => {
      if (ids.join() !== got.ids[r].join()) return;
      assert.equal(got.finish[r], finish);
      logprobs.forEach((p, i) => assert.ok(Math.abs(p - got.logprobs[r][i]) < 1e-4, `row ${r}, token ${i}`));
    });
  });
});

Deno.test("rows may share a prompt, and a row's tokens do not depend on its place in the batch", async () => {
  await withPolicy(async (policy) => {
    const engine = new DecodeEngine(policy.config, policy.weights), [prompt] = textPrompts(policy, 1);
    const keys = [0, 1, 2, 3, 4].map((i) => [1, i, 0] as const), options = { maxNewTokens: 10, stopTokens: [] };
    const apart = await generateWith(engine, policy, keys.map(() => prompt), { ...options, keys });
    const { release, k, v, firstLogits, lengths, nextPosition } = prefill(policy, [prompt]);
    const together = await engine.generate({
      k,
      v,
      firstLogits,
      logitsRows: keys.map(() => 0),
      starts: keys.map(() => 0),
      lengths: keys.map(() => lengths[0]),
      nextPosition: keys.map(() => nextPosition[0]),
      keys,
      seed: 0,
      temperature: 1,
      suppressed: new Uint8Array(policy.config.text.vocabSize).fill(1, 496, 498),
      stop: new Set(),
      maxNewTokens: 10,
    });
    assert.deepEqual(together.ids, apart.ids);
    const alone = await generateWith(engine, policy, [prompt], { ...options, keys: [keys[3]] });
    assert.deepEqual(alone.ids[0], apart.ids[3]);
    release();
    engine.dispose();
  });
});

Deno.test("device memory stays bounded over calls, and is given back", async () => {
  await withPolicy(async (policy) => {
    const engine = new DecodeEngine(policy.config, policy.weights);
    const round = async () => {
      for (
        const [count, maxNewTokens, topP] of [[3, 5, 1], [1, 40, 0.9], [6, 9, 0.5], [4, 30, 1], [2, 1, 0.8], [2, 3, 1]]
      ) {
        await generateWith(engine, policy, textPrompts(policy, count), { maxNewTokens, topP, stopTokens: [] });
      }
    };
    await round();
    const { bytes, buffers } = engine, { numTensors } = tf.memory();
    for (let i = 0; i < 2; i++) await round();
    assert.deepEqual([engine.bytes, engine.buffers, tf.memory().numTensors], [bytes, buffers, numTensors]);
    engine.dispose();
    assert.deepEqual([engine.bytes, engine.buffers], [0, 0]);
    await assert.rejects(generateWith(engine, policy, textPrompts(policy, 1), { maxNewTokens: 1 }), /disposed/);
  });
});

Deno.test("assigned weights are used from the next call on", async () => {
  await withPolicy(async (policy) => {
    const engine = new DecodeEngine(policy.config, policy.weights), prompts = textPrompts(policy, 2);
    const options = { maxNewTokens: 8, temperature: 0, stopTokens: [] };
    const before = await generateWith(engine, policy, prompts, options);
    for (const [name, variable] of policy.parameters) {
      if (!name.startsWith("model.layers") && name !== "model.norm.weight") continue;
      const changed = tf.tidy(() => tf.mul(variable, name.includes("proj") ? 1.5 : 0.8));
      variable.assign(changed);
      changed.dispose();
    }
    const after = await generateWith(engine, policy, prompts, options), want = await plain(policy, prompts, options);
    assert.notDeepEqual(after.ids, before.ids);
    assert.deepEqual(after.ids, want.map(({ ids }) => ids));
    engine.dispose();
  });
});

Deno.test("bad input is refused in one line", async () => {
  await withPolicy(async (policy) => {
    const engine = new DecodeEngine(policy.config, policy.weights), prompts = textPrompts(policy, 2);
    const { release, ...prompt } = prefill(policy, prompts);
    const input = {
      ...prompt,
      keys: [[0, 0, 0], [0, 1, 0]] as [number, number, number][],
      seed: 0,
      temperature: 1,
      suppressed: new Uint8Array(policy.config.text.vocabSize),
      stop: new Set<number>(),
      maxNewTokens: 4,
    };
    const { bytes } = engine, poisoned = tf.tidy(() => tf.mul(prompt.firstLogits, 1e38).mul(1e38) as tf.Tensor2D);
    for (
      const [change, pattern] of [
        [{ lengths: [1] }, /as many/],
        [{ lengths: [3, 300] }, /row 1 has 300 tokens/],
        [{ k: prompt.k.slice(1) }, /3 layers/],
        [{ maxNewTokens: 0 }, /positive integer/],
        [{ maxNewTokens: 2 ** 24 }, /step records would take .* MiB/],
        [{ temperature: -1 }, /temperature/],
        [{ topP: 0 }, /topP must be in \(0, 1\], got 0/],
        [{ topP: 1.5 }, /topP must be in \(0, 1\], got 1.5/],
        [{ suppressed: new Uint8Array(3) }, /512 flags/],
        [{ logitsRows: [0, 2] }, /line 2 of 2 first logits/],
        [{ logitsRows: [0] }, /first logits of 2 rows/],
        [{ firstLogits: poisoned }, /token 0 of sequence \[0,0,0\]: the logits are not finite/],
        [{ firstLogits: poisoned, topP: 0.9 }, /token 0 of sequence \[0,0,0\]: the logits are not finite/],
      ] as const
    ) {
      await assert.rejects(engine.generate({ ...input, ...change }), (error: Error) => {
        assert.ok(error instanceof RangeError);
        assert.match(error.message, pattern);
        return !error.message.includes("\n");
      });
    }
    assert.ok(engine.bytes < bytes + 2 ** 20);
    assert.equal((await engine.generate(input)).ids[0].length, 4);
    release();
    poisoned.dispose();
    engine.dispose();
  });
});

Deno.test("a model that the adapter cannot bind, or another backend, is refused with the reason", async () => {
  await withPolicy(async ({ config, weights }) => {
    assert.equal(DecodeEngine.supports(config), true);
    const huge = { ...config, text: { ...config.text, hiddenSize: 2 ** 17, intermediateSize: 2 ** 18 } };
    assert.match(DecodeEngine.unsupported(huge) ?? "", /a weight matrix takes \d+ bytes/);
    const wordy = { ...config, text: { ...config.text, vocabSize: 2 ** 40 } };
    assert.equal(DecodeEngine.supports(wordy), true);
    assert.match(DecodeEngine.unsupported(wordy, true) ?? "", /the logits of a nucleus \(topP < 1\) take \d+ bytes/);
    assert.throws(() => new DecodeEngine(huge, weights), /cannot be used: a weight matrix/);
    await tf.setBackend("cpu");
    assert.equal(DecodeEngine.unsupported(config), "the backend is not WebGPU");
    await tf.setBackend("webgpu");
  });
});
