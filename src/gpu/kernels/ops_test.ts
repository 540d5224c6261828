/**
 * The operations of a policy with our kernels, beside the same operations in plain tfjs and its own gradients, on one backend.
 */
import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import * as ops from "../../policy/ops.ts";
import { webgpuKernelNames } from "./register.ts";
import { close, gpuTest, type Plain, read, tensorsOf, values } from "./testing.ts";

type Operation = (...inputs: tf.Tensor[]) => tf.Tensor;

/** Value, and gradients of Σ weight·value, under one choice of kernels. */
async function both(kernels: ops.Kernels, f: Operation, inputs: readonly Plain[]): Promise<Plain[]> {
  ops.useKernels(kernels);
  try {
    const outputs = tf.tidy(() => {
      const tensors = Object.values(tensorsOf(Object.fromEntries(inputs.map((x, i) => [`x${i}`, x]))));
      const { value, grads } = tf.valueAndGrads((...x: tf.Tensor[]) => {
        const y = f(...x);
        return tf.sum(tf.mul(y, tf.tensor(values(y.shape, 99).data, y.shape)));
      })(tensors);
      return [f(...tensors), value, ...grads];
    });
    const plain = await read(outputs);
    tf.dispose(outputs);
    return plain;
  } finally {
    ops.useKernels("fused");
  }
}

async function compare(f: Operation, inputs: readonly Plain[], tolerance: number): Promise<void> {
  const plain = await both("plain", f, inputs), fused = await both("fused", f, inputs);
  assert.equal(plain.length, 2 + inputs.length);
  // The second is a sum of all elements of the first.
  plain.forEach((p, i) => close(fused[i], p.data, p.shape, i === 1 ? 10 * tolerance : tolerance));
}

gpuTest("linear layers, as plain tfjs within 3e-6", async () => {
  for (const [n, i, o] of [[1, 1, 1], [7, 5, 3], [67, 96, 33], [700, 24, 40]]) {
    const [x, w, bias] = [values([n, i], 1), values([o, i], 2), values([o], 3)];
    await compare((x, w, b) => ops.linear(x as tf.Tensor2D, w as tf.Tensor2D, b as tf.Tensor1D), [x, w, bias], 3e-6);
    await compare((x, w) => ops.linear(x as tf.Tensor2D, w as tf.Tensor2D), [x, w], 3e-6);
  }
});

gpuTest("norm, gate, GELU and rope, as plain tfjs within 3e-6", async () => {
  for (const [n, d] of [[1, 2], [5, 14], [67, 96]]) {
    const [x, y] = [values([n, d], 1, 3), values([n, d], 2)];
    await compare((x, w) => ops.rmsNorm(x as tf.Tensor2D, w as tf.Tensor1D, 1e-6), [x, values([d], 3)], 3e-6);
    await compare((x, y) => ops.swiglu(x as tf.Tensor2D, y as tf.Tensor2D), [x, y], 3e-6);
    await compare((x) => ops.gelu(x as tf.Tensor2D), [x], 3e-6);
    const [cos, sin] = [4, 5].map((seed) => tf.tensor2d(values([n, d], seed).data, [n, d]));
    await compare((x) => ops.rope(x as tf.Tensor3D, cos, sin), [values([n, 3, d], 6)], 3e-6);
    tf.dispose([cos, sin]);
  }
});

gpuTest("gathered rows, as plain tfjs within 3e-6", async () => {
  for (const [n, d, m] of [[1, 1, 1], [5, 7, 13], [90, 24, 301]]) {
    const index = Array.from({ length: m }, (_, i) => (i * i) % (n + 1) - 1);
    await compare((x) => ops.gatherRows(x as tf.Tensor2D, index), [values([n, d], 1)], 3e-6);
  }
});

gpuTest("attention, as plain tfjs within 1e-5", async () => {
  const cases = [
    { lengths: [1], heads: 1, keyHeads: 1, d: 2, causal: true },
    { lengths: [13, 1, 40], heads: 4, keyHeads: 2, d: 12, causal: true },
    { lengths: [16, 16, 16], heads: 3, keyHeads: 3, d: 10, causal: false },
    { lengths: [13, 0, 1, 40], keys: [29, 7, 70, 40], heads: 4, keyHeads: 2, d: 12, causal: true },
    { lengths: [2, 33, 0], keys: [35, 1, 3], heads: 3, keyHeads: 3, d: 10, causal: false },
    // All are named, but as the queries are cut.
    { lengths: [5, 61], keys: [5, 61], heads: 2, keyHeads: 1, d: 24, causal: true },
  ];
  for (const { lengths, keys, heads, keyHeads, d, causal } of cases) {
    const [n, m] = [lengths, keys ?? lengths].map((x) => x.reduce((a, b) => a + b));
    const segments = ops.segmentsOf(lengths), keySegments = keys && ops.segmentsOf(keys);
    const inputs = [values([n, heads, d], 1, 2), values([m, keyHeads, d], 2, 2), values([m, keyHeads, d], 3)];
    const attend: Operation = (...x) => {
      const [q, k, v] = x as tf.Tensor3D[];
      return ops.attention(q, k, v, segments, causal, 1 / Math.sqrt(d), keySegments);
    };
    await compare(attend, inputs, 1e-5);
  }
});

gpuTest(
  "queries after a prefix get what a causal pass over everything gives them, and gradients, within 2e-6",
  async () => {
    const rows = [...Array.from({ length: 9 }, (_, i) => 40 + i), ...Array.from({ length: 30 }, (_, i) => 49 + i)];
    const inputs = [values([90, 72], 1, 2), values([90, 1, 24], 2, 2), values([90, 1, 24], 3)];
    const [full, suffix] = [[49, 30, 11], [9, 30, 0]].map(ops.segmentsOf);
    const pick = (x: tf.Tensor) => ops.gatherRows(x as tf.Tensor2D, rows);
    const heads = (x: tf.Tensor) => tf.reshape(x, [x.shape[0], 3, 24]) as tf.Tensor3D;
    const whole = await both("fused", (q, k, v) => {
      const out = ops.attention(heads(q), k as tf.Tensor3D, v as tf.Tensor3D, full, true, 0.2);
      return pick(tf.reshape(out, [90, 72]));
    }, inputs);
    const part = await both("fused", (q, k, v) => {
      const out = ops.attention(heads(pick(q)), k as tf.Tensor3D, v as tf.Tensor3D, suffix, true, 0.2, full);
      return tf.reshape(out, [39, 72]);
    }, inputs);
    assert.ok(whole[0].data.every((x) => x !== 0));
    whole.forEach((w, i) => close(part[i], w.data, w.shape, 2e-6));
  },
);

gpuTest("log-probabilities and entropies, as plain tfjs within 1e-5", async () => {
  for (const [n, vocabulary] of [[1, 2], [13, 85], [5, 515]]) {
    const target = Array.from({ length: n }, (_, i) => i * 7 % vocabulary);
    const mask = Float32Array.from({ length: vocabulary }, (_, j) => j % 5 === 4 && !target.includes(j) ? -1e9 : 0);
    for (const suppress of [null, tf.tensor1d(mask)]) {
      const f: Operation = (x) => ops.logProbEntropy(x as tf.Tensor2D, target, suppress, 0.8);
      await compare(f, [values([n, vocabulary], 1, 4)], 1e-5);
      suppress?.dispose();
    }
  }
});

gpuTest("no kernel leaks tensors or buffers", async () => {
  const inputs = [values([67, 3, 8], 1), values([67, 3, 8], 2), values([67, 3, 8], 3)];
  const once = () =>
    both("fused", (...x) => {
      const [q, k, v] = x as tf.Tensor3D[];
      const first = ops.attention(q, k, v, ops.segmentsOf([60, 7]), true, 0.3);
      const out = ops.attention(first, k, v, ops.segmentsOf([40, 27]), true, 0.3, ops.segmentsOf([40, 27]));
      const w = ops.linear(out.reshape([67, 24]) as tf.Tensor2D, q.reshape([67, 24]) as tf.Tensor2D);
      return ops.logProbEntropy(ops.gatherRows(w, [1, -1, 3, 3]), [0, 1, 2, 3], null, 1);
    }, inputs);
  const counts: number[][] = [];
  for (let i = 0; i < 4; i++) {
    await once();
    const { numTensors, numDataBuffers, ...memory } = tf.memory() as tf.MemoryInfo & Record<string, number>;
    counts.push([numTensors, numDataBuffers, memory.numBytesInGPU, memory.numBytesAllocatedInGPU]);
  }
  assert.deepEqual(counts[3], counts[1]);
});

gpuTest("every kernel that an operation asks for is registered", async () => {
  const source = await Deno.readTextFile(new URL("../../policy/ops.ts", import.meta.url));
  const asked = new Set(source.match(/"Mgpo\w+"/g)?.map((name) => name.slice(1, -1)));
  assert.ok(asked.size >= 10);
  for (const name of asked) assert.ok(webgpuKernelNames.includes(name), name);
});
