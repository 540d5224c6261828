import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { RandomStream } from "../random.ts";
import * as ops from "./ops.ts";

await chooseBackend("wasm");

function normal(shape: number[], seed: number): tf.Tensor {
  const random = new RandomStream(seed, "ops_test"), size = shape.reduce((a, b) => a * b, 1);
  return tf.tensor(Float32Array.from({ length: size }, () => random.normal()), shape);
}

/** Value and gradients of Σ weight·f(inputs) with either kind of kernels. */
function measure(kernels: ops.Kernels, inputs: tf.Tensor[], f: (...x: tf.Tensor[]) => tf.Tensor): Float32Array[] {
  ops.useKernels(kernels);
  const { value, grads } = tf.tidy(() => {
    const value = f(...inputs), weight = normal(value.shape, 99);
    return { value, grads: tf.grads((...x: tf.Tensor[]) => tf.sum(tf.mul(f(...x), weight)))(inputs) };
  });
  const out = [value, ...grads].map((x) => x.dataSync().slice() as Float32Array);
  tf.dispose([value, grads]);
  ops.useKernels("fused");
  return out;
}

/** Largest difference over the largest value, at least 1. */
function worst(a: Float32Array, b: Float32Array): number {
  assert.equal(a.length, b.length);
  let scale = 1, diff = 0;
  for (let i = 0; i < a.length; i++) {
    scale = Math.max(scale, Math.abs(b[i]));
    diff = Math.max(diff, Math.abs(a[i] - b[i]));
  }
  return diff / scale;
}

/** `[name, input shapes, function]`; sizes are odd and not multiples of any tile. */
const cases: [string, number[][], (...x: tf.Tensor[]) => tf.Tensor][] = [
  ["linear", [[13, 7], [5, 7], [5]], (x, w, b) => ops.linear(x as tf.Tensor2D, w as tf.Tensor2D, b as tf.Tensor1D)],
  ["linear without bias", [[1, 9], [11, 9]], (x, w) => ops.linear(x as tf.Tensor2D, w as tf.Tensor2D)],
  ["rmsNorm", [[7, 13], [13]], (x, w) => ops.rmsNorm(x as tf.Tensor2D, w as tf.Tensor1D, 1e-6)],
  ["swiglu", [[5, 11], [5, 11]], (g, u) => ops.swiglu(g as tf.Tensor2D, u as tf.Tensor2D)],
  ["gelu", [[5, 11]], (x) => ops.gelu(x as tf.Tensor2D)],
  [
    "rope",
    [[7, 3, 8]],
    (x) =>
      ops.rope(x as tf.Tensor3D, tf.cos(normal([7, 8], 5)) as tf.Tensor2D, tf.sin(normal([7, 8], 6)) as tf.Tensor2D),
  ],
  ["gatherRows, repeated and missing", [[5, 3]], (x) => ops.gatherRows(x as tf.Tensor2D, [4, -1, 0, 4, 4, 2])],
  ["gatherRows, a permutation", [[5, 3]], (x) => ops.gatherRows(x as tf.Tensor2D, [3, 1, 0, 4, 2])],
  ...[[7], [4, 4, 4], [1, 9, 3]].flatMap((lengths) =>
    [true, false].flatMap((causal) =>
      [[3, 3], [6, 2]].map(([heads, kvHeads]): typeof cases[number] => {
        const n = lengths.reduce((a, b) => a + b, 0), d = 4;
        return [
          `attention, segments ${lengths}, ${causal ? "causal" : "full"}, heads ${heads}/${kvHeads}`,
          [[n, heads, d], [n, kvHeads, d], [n, kvHeads, d]],
          (...x) => attend(x, lengths, causal),
        ];
      })
    )
  ),
  ...([
    [[1], [53], true],
    [[3, 0, 7, 1], [9, 5, 7, 40], true],
    [[4, 4], [11, 11], true],
    [[2, 13, 0], [5, 1, 3], false],
  ] as [number[], number[], boolean][]).flatMap(([lengths, keys, causal]) =>
    [[3, 3], [6, 2]].map(([heads, kvHeads]): typeof cases[number] => {
      const [n, m] = [lengths, keys].map((x) => x.reduce((a, b) => a + b, 0)), d = 4;
      return [
        `attention, segments ${lengths} on keys ${keys}, ${causal ? "causal" : "full"}, heads ${heads}/${kvHeads}`,
        [[n, heads, d], [m, kvHeads, d], [m, kvHeads, d]],
        (...x) => attend(x, lengths, causal, keys),
      ];
    })
  ),
  [
    "headLogProbEntropy",
    [[6, 5], [17, 5]],
    (x, w) =>
      ops.headLogProbEntropy(x as tf.Tensor2D, w as tf.Tensor2D, [0, 16, 3, 3, 9, 1], suppress(17, [2, 5]), 0.7),
  ],
  [
    "logProbEntropy",
    [[6, 17]],
    (x) => ops.logProbEntropy(x as tf.Tensor2D, [0, 16, 3, 3, 9, 1], suppress(17, [2, 5]), 0.7),
  ],
];

function attend([q, k, v]: tf.Tensor[], lengths: number[], causal: boolean, keys?: number[]): tf.Tensor {
  const given = keys && ops.segmentsOf(keys);
  return ops.attention(
    q as tf.Tensor3D,
    k as tf.Tensor3D,
    v as tf.Tensor3D,
    ops.segmentsOf(lengths),
    causal,
    0.5,
    given,
  );
}

function suppress(vocab: number, ids: number[]): tf.Tensor1D {
  return tf.tensor1d(Float32Array.from({ length: vocab }, (_, v) => ids.includes(v) ? -1e30 : 0));
}

for (const [name, shapes, f] of cases) {
  Deno.test(`fused equals plain, value and gradients within 2e-5: ${name}`, () => {
    const inputs = shapes.map((shape, i) => normal(shape, i));
    const plain = measure("plain", inputs, f), fused = measure("fused", inputs, f);
    plain.forEach((p, i) => assert.ok(worst(fused[i], p) < 2e-5, `output ${i}: ${worst(fused[i], p)}`));
    tf.dispose(inputs);
  });
}

Deno.test("plain attention equals a loop over tokens", () => {
  const lengths = [3, 5], heads = 2, d = 4, n = 8, scale = 0.6;
  const [q, k, v] = [0, 1, 2].map((i) => normal([n, heads, d], 20 + i) as tf.Tensor3D);
  const [qs, ks, vs] = [q, k, v].map((x) => x.dataSync());
  const expected = new Float32Array(n * heads * d);
  lengths.forEach((length, s) => {
    const from = s === 0 ? 0 : lengths[0];
    for (let i = from; i < from + length; i++) {
      for (let h = 0; h < heads; h++) {
        const weight: number[] = [];
        for (let j = from; j <= i; j++) {
          let dot = 0;
          for (let c = 0; c < d; c++) dot += qs[(i * heads + h) * d + c] * ks[(j * heads + h) * d + c];
          weight.push(Math.exp(dot * scale));
        }
        const sum = weight.reduce((a, b) => a + b);
        weight.forEach((w, j) => {
          for (let c = 0; c < d; c++) {
            expected[(i * heads + h) * d + c] += w / sum * vs[((from + j) * heads + h) * d + c];
          }
        });
      }
    }
  });
  ops.useKernels("plain");
  const out = ops.attention(q, k, v, ops.segmentsOf(lengths), true, scale);
  ops.useKernels("fused");
  assert.ok(worst(out.dataSync() as Float32Array, expected) < 2e-6);
  tf.dispose([q, k, v, out]);
});

Deno.test("log-probs without kept logits equal those with them, value and gradients, on either kind of kernels", () => {
  const inputs = [normal([6, 5], 1), normal([17, 5], 2)], ids = [0, 16, 3, 3, 9, 1];
  for (const kernels of ["plain", "fused"] as const) {
    const kept = measure(
      kernels,
      inputs,
      (x, w) => ops.logProbEntropy(ops.linear(x as tf.Tensor2D, w as tf.Tensor2D), ids, null, 1.3),
    );
    // All rows at once, and in pieces of which the last is shorter.
    for (const piece of [undefined, 4, 1]) {
      const remade = measure(
        kernels,
        inputs,
        (x, w) => ops.headLogProbEntropy(x as tf.Tensor2D, w as tf.Tensor2D, ids, null, 1.3, piece),
      );
      kept.forEach((k, i) => assert.ok(worst(remade[i], k) < 1e-6, `output ${i}, pieces of ${piece}`));
    }
  }
  tf.dispose(inputs);
});

Deno.test("the plain gradient of log-probs and entropy is that of automatic differentiation", () => {
  const logits = normal([6, 17], 4), ids = [0, 16, 3, 3, 9, 1], temperature = 0.7;
  const own = measure("plain", [logits], (x) => ops.logProbEntropy(x as tf.Tensor2D, ids, null, temperature));
  const auto = measure("plain", [logits], (x) => {
    const logp = tf.logSoftmax(tf.div(x, temperature) as tf.Tensor2D), one = tf.oneHot(tf.tensor1d(ids, "int32"), 17);
    return tf.stack([tf.sum(tf.mul(logp, one), -1), tf.neg(tf.sum(tf.mul(tf.exp(logp), logp), -1))]);
  });
  own.forEach((o, i) => assert.ok(worst(o, auto[i]) < 2e-6, `output ${i}`));
  logits.dispose();
});

Deno.test("queries after a prefix get what a causal pass over everything gives them, within 2e-6, and so do gradients", () => {
  const full = [7, 12, 5], suffix = [3, 12, 0], rows = [4, 5, 6, ...Array.from({ length: 12 }, (_, i) => 7 + i)];
  const inputs = [normal([24, 4 * 6], 1), normal([24, 2, 6], 2), normal([24, 2, 6], 3)];
  const pick = (x: tf.Tensor) => ops.gatherRows(x as tf.Tensor2D, rows);
  const heads = (x: tf.Tensor) => tf.reshape(x, [x.shape[0], 4, 6]);
  for (const kernels of ["plain", "fused"] as const) {
    const whole = measure(
      kernels,
      inputs,
      (q, k, v) => pick(tf.reshape(attend([heads(q), k, v], full, true), [24, 24])),
    );
    const part = measure(
      kernels,
      inputs,
      (q, k, v) => tf.reshape(attend([heads(pick(q)), k, v], suffix, true, full), [15, 24]),
    );
    whole.forEach((w, i) => assert.ok(w.some((x) => x !== 0) && worst(part[i], w) < 2e-6, `${kernels} output ${i}`));
  }
  tf.dispose(inputs);
});

Deno.test("keys that are cut as their queries give the same bits whether they are named or not", () => {
  const lengths = [3, 0, 30, 6], inputs = [normal([39, 4, 6], 1), normal([39, 2, 6], 2), normal([39, 2, 6], 3)];
  for (const kernels of ["plain", "fused"] as const) {
    const [named, left] = [lengths, undefined].map((keys) =>
      measure(kernels, inputs, (...x) => attend(x, lengths, true, keys))
    );
    assert.deepEqual(named, left);
  }
  tf.dispose(inputs);
});

Deno.test("attention without any query: no output, and no gradient for the keys", () => {
  const inputs = [tf.zeros([0, 2, 4]), normal([5, 1, 4], 1), normal([5, 1, 4], 2)];
  for (const kernels of ["plain", "fused"] as const) {
    const [out, dq, dk, dv] = measure(kernels, inputs, (...x) => attend(x, [0, 0], true, [3, 2]));
    assert.deepEqual([out.length, dq.length], [0, 0]);
    assert.deepEqual([...dk, ...dv], new Array(40).fill(0));
  }
  tf.dispose(inputs);
});

Deno.test("attention names the segment whose keys are too few, and unequal counts", () => {
  const [q, k] = [tf.zeros([5, 1, 2]), tf.zeros([4, 1, 2])];
  for (const kernels of ["plain", "fused"] as const) {
    ops.useKernels(kernels);
    const refuse = (lengths: number[], keys: number[], causal: boolean, message: RegExp): void =>
      assert.throws(
        () => attend([q, k, k], lengths, causal, keys),
        (error) => error instanceof RangeError && message.test(error.message),
      );
    refuse([2, 3], [2, 2], true, /segment 1 has 3 queries and 2 keys/);
    refuse([2, 3], [4, 0], false, /segment 1 has 3 queries and 0 keys/);
    refuse([2, 3], [4], false, /2 segments of queries but 1 segments of keys/);
  }
  ops.useKernels("fused");
  tf.dispose([q, k]);
});

Deno.test("an unknown choice of kernels is refused", () => {
  assert.throws(() => ops.useKernels("fast" as ops.Kernels), /plain.*fused/);
});
