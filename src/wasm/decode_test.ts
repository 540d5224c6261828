import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { close, integers, ready, run, values } from "./testing.ts";

await ready();

for (const [heads, keyHeads, d, tokens] of [[1, 1, 8, 1], [4, 2, 24, 37], [6, 3, 13, 70], [2, 1, 128, 5]]) {
  Deno.test(`decoding token by token equals causal attention: ${heads}/${keyHeads} heads of ${d}, ${tokens} tokens`, () => {
    const batch = 3;
    const scale = 1 / Math.sqrt(d);
    const rows = tf.tensor1d([4, 0, 2], "int32");
    const caches = [0, 1].map(() => tf.zeros([5, tokens, keyHeads, d]));
    const inputs = Array.from({ length: batch }, (_, b) => ({
      q: values([tokens, heads, d], 3 * b + 1, 2),
      k: values([tokens, keyHeads, d], 3 * b + 2, 2),
      v: values([tokens, keyHeads, d], 3 * b + 3),
    }));
    const expected = inputs.map((given) => {
      const [out] = run("MgpoAttention", { ...given, cuSeqlens: integers([0, tokens]) }, { causal: true, scale });
      return out.data;
    });
    for (let t = 0; t < tokens; t++) {
      const at = (name: "q" | "k" | "v"): tf.Tensor => {
        const size = (name === "q" ? heads : keyHeads) * d;
        const data = inputs.flatMap((given) => [...given[name].data.subarray(t * size, (t + 1) * size)]);
        return tf.tensor(data, [batch, size / d, d]);
      };
      const [kCache, vCache] = caches;
      const lengths = tf.fill([batch], t, "int32");
      const given = { q: at("q"), k: at("k"), v: at("v"), kCache, vCache, lengths, rows };
      const out = tf.engine().runKernel("MgpoDecodeAttention", given, { scale }) as tf.Tensor;
      const size = heads * d;
      const wanted = expected.flatMap((data) => [...data.subarray(t * size, (t + 1) * size)]);
      close({ data: out.dataSync<"float32">(), shape: out.shape }, wanted, [batch, heads, d], 3e-6);
      tf.dispose([out, given.q, given.k, given.v, lengths]);
    }
    const kept = caches[0].dataSync().subarray(0, tokens * keyHeads * d);
    assert.deepEqual(kept, inputs[1].k.data, "the second sequence's keys lie in cache row 0");
    tf.dispose([...caches, rows]);
  });
}

Deno.test("decoding names a full row, a row outside the cache, a row used twice", () => {
  const given = (lengths: number[], rows: number[]) => ({
    q: values([2, 1, 8], 1),
    k: values([2, 1, 8], 2),
    v: values([2, 1, 8], 3),
    kCache: values([3, 4, 1, 8], 4),
    vCache: values([3, 4, 1, 8], 5),
    lengths: integers(lengths),
    rows: integers(rows),
  });
  const attempt = (lengths: number[], rows: number[]) => () =>
    run("MgpoDecodeAttention", given(lengths, rows), { scale: 1 });
  assert.throws(attempt([0, 4], [0, 1]), /lengths\[1\] is 4, must be at least 0 and below the cache's 4 places/);
  assert.throws(attempt([0, 0], [0, 3]), /rows\[1\] is 3/);
  assert.throws(attempt([0, 0], [1, 1]), /rows\[1\] is 1/);
  assert.doesNotThrow(attempt([0, 3], [2, 1]));
});
