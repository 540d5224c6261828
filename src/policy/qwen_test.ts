import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { RandomStream } from "../random.ts";
import { loadPolicy } from "./load.ts";
import { useKernels } from "./ops.ts";
import { Picture } from "./picture.ts";
import type { Sequence } from "./policy.ts";
import type { QwenPolicy } from "./qwen.ts";

await chooseBackend("wasm");
const golden = new URL("../../fixtures/goldens/models/tiny/", import.meta.url);
const open = () => loadPolicy(golden, { maxPixels: 20000 });

function picture(seed: number, width: number, height: number): Picture {
  const random = new RandomStream(seed, "qwen_test");
  return Picture.fromRgb(Uint8Array.from({ length: width * height * 3 }, () => random.int(256)), width, height);
}

/** Conversations of unequal length with no, one and two pictures. */
function conversations(policy: QwenPolicy): Sequence[] {
  const [a, b] = [policy.prepareImage(picture(1, 150, 90)), policy.prepareImage(picture(2, 60, 120))];
  const ask = (text: string, images: typeof a[]) => ({
    ids: policy.encodeChat(
      [{ role: "user", content: [...images.map(() => ({ type: "image" }) as const), { type: "text", text }] }],
      images,
    ),
    images,
  });
  return [ask("How many windows are there?", []), ask("What is it?", [a]), ask("And in these two, what?", [b, a])];
}

Deno.test("a row's reply depends neither on its batch nor on the kernels", async () => {
  const policy = await open(), [none, one, two] = conversations(policy);
  // Rows with the same prompt, as in a group: they are prefilled once.
  const rows = [one, none, one, two, two, one];
  for (const temperature of [0, 1]) {
    const options = { maxNewTokens: 12, temperature, seed: 5, stopTokens: [] };
    const keys = rows.map((_, i) => [3, i, 0] as const);
    const together = await policy.generate(rows, { ...options, keys });
    for (const [i, row] of rows.entries()) {
      const [alone] = await policy.generate([row], { ...options, keys: [keys[i]] });
      assert.deepEqual(alone.ids, together[i].ids);
      useKernels("plain");
      const [plain] = await policy.generate([row], { ...options, keys: [keys[i]] });
      useKernels("fused");
      assert.deepEqual(plain.ids, together[i].ids);
      plain.logprobs.forEach((p, t) => assert.ok(Math.abs(p - together[i].logprobs[t]) < 1e-4));
    }
  }
  policy.dispose();
});

Deno.test("recorded log-probs are those that the trainer recomputes, at any temperature", async () => {
  const policy = await open(), rows = conversations(policy);
  for (const temperature of [1, 0.7]) {
    const completions = await policy.generate(rows, { maxNewTokens: 9, temperature, seed: 1 });
    const whole = rows.map((row, i) => ({ ids: [...row.ids, ...completions[i].ids], images: row.images }));
    const masks = whole.map(({ ids }, i) => ids.map((_, t) => t >= rows[i].ids.length ? 1 : 0));
    const { logprobs, entropy } = policy.logProbs(whole, masks, { temperature });
    const values = logprobs.dataSync(), width = logprobs.shape[1];
    completions.forEach((c, i) =>
      c.logprobs.forEach((p, t) => assert.ok(Math.abs(p - values[i * width + t]) < 1e-4, `row ${i} token ${t}`))
    );
    tf.dispose([logprobs, entropy]);
  }
  policy.dispose();
});

Deno.test("a stop token ends a row, the others go on; suppressed ids are never said", async () => {
  const policy = await open(), rows = conversations(policy);
  const free = await policy.generate(rows, { maxNewTokens: 8, temperature: 0, stopTokens: [] });
  const stop = free[1].ids[2];
  const stopped = await policy.generate(rows, { maxNewTokens: 8, temperature: 0, stopTokens: [stop] });
  stopped.forEach((completion, i) => {
    const end = free[i].ids.indexOf(stop);
    assert.deepEqual(completion.ids, end < 0 ? free[i].ids : free[i].ids.slice(0, end + 1));
    assert.equal(completion.finish, end < 0 ? "length" : "stop");
  });
  const silent = [...new Set(free.flatMap((c) => c.ids))];
  const other = await policy.generate(rows, { maxNewTokens: 8, seed: 2, stopTokens: [], suppressTokens: silent });
  for (const id of other.flatMap((c) => c.ids)) assert.ok(!silent.includes(id));
  policy.dispose();
});

Deno.test("tensors don't accumulate over generation and log-probs, on either kind of kernels", async () => {
  const policy = await open(), rows = conversations(policy);
  for (const kernels of ["plain", "fused"] as const) {
    useKernels(kernels);
    const counts: number[] = [];
    for (let i = 0; i < 4; i++) {
      await policy.generate(rows, { maxNewTokens: 4, seed: i });
      const { grads, value } = tf.variableGrads(() => {
        const { logprobs } = policy.logProbs(rows, rows.map(({ ids }) => ids.map((_, t) => t > 2 ? 1 : 0)));
        return tf.sum(logprobs) as tf.Scalar;
      }, [...policy.parameters].filter(([n]) => n.startsWith("model.")).map(([, v]) => v));
      tf.dispose([grads, value]);
      policy.releaseFeatures();
      counts.push(tf.memory().numTensors);
    }
    assert.equal(new Set(counts.slice(1)).size, 1, `tensors after each round: ${counts}`);
  }
  useKernels("fused");
  policy.dispose();
});

Deno.test("disposing a policy releases every tensor", async () => {
  const before = tf.memory().numTensors, policy = await open();
  await policy.generate(conversations(policy), { maxNewTokens: 2 });
  policy.dispose();
  assert.equal(tf.memory().numTensors, before);
});

Deno.test("a saved policy loads with the same weights", async () => {
  const policy = await open(), folder = await Deno.makeTempDir();
  try {
    await policy.save(`${folder}/copy`);
    const seen: string[] = [];
    const copy = await loadPolicy(`${folder}/copy`, { onProgress: (done, total) => seen.push(`${done}/${total}`) });
    assert.equal(seen.at(-1), `${policy.parameters.size}/${policy.parameters.size}`);
    assert.deepEqual([...copy.parameters.keys()].sort(), [...policy.parameters.keys()].sort());
    for (const [name, variable] of policy.parameters) {
      assert.deepEqual(copy.parameters.get(name)!.dataSync(), variable.dataSync(), name);
    }
    copy.dispose();
  } finally {
    policy.dispose();
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("impossible requests are refused with what is wrong", async () => {
  const policy = await open(), [row, withImage] = conversations(policy);
  const refuse = async (options: Parameters<typeof policy.generate>[1], message: RegExp) =>
    await assert.rejects(policy.generate([row], options), message);
  await refuse({ maxNewTokens: 0 }, /maxNewTokens/);
  await refuse({ maxNewTokens: 1, temperature: -1 }, /temperature/);
  await refuse({ maxNewTokens: 1, topP: 0 }, /topP/);
  assert.throws(() => policy.pack([{ ids: withImage.ids, images: [] }]), /only 0 image/);
  assert.throws(() => policy.pack([{ ids: row.ids, images: withImage.images }]), /shows 0 image/);
  assert.throws(
    () => policy.pack([{ ids: withImage.ids.slice(0, -6 - 40), images: withImage.images }]),
    /image tokens|image\(s\)/,
  );
  assert.throws(() => policy.logProbs([row], [[1, ...row.ids.slice(1).map(() => 0)]]), /predecessor/);
  assert.throws(() => policy.logProbs([row], [row.ids.map(() => 0)]), /no token/);
  const long = `${row.ids.length} positions and maxNewTokens = 4096 make ${row.ids.length + 4096} positions`;
  await refuse({ maxNewTokens: 4096 }, new RegExp(`${long}, more than the 4096 of max_position_embeddings`));
  const endless = { ids: new Array(4097).fill(5), images: [] };
  assert.throws(
    () => policy.logProbs([endless], [endless.ids.map((_, t) => t > 4000 ? 1 : 0)]),
    /a sequence has 4097 positions, more than the 4096/,
  );
  policy.dispose();
});
