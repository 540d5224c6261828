import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { gelu, linear, logProbEntropy, rmsNorm, rope, swiglu } from "../../policy/ops.ts";
import { limitBindings } from "./runtime.ts";
import { call, close, gpuTest, integers, type Plain, read, tensorsOf, values } from "./testing.ts";

const KIB = 1024;

/** Outputs of a kernel where no more than `limit` bytes are bound at once; undefined for no limit. */
async function limited(
  limit: number | undefined,
  name: string,
  inputs: Record<string, Plain>,
  attrs: Record<string, unknown>,
): Promise<Plain[]> {
  limitBindings(limit);
  try {
    const outputs = tf.tidy(() => call(name, tensorsOf(inputs), attrs)), plain = await read(outputs);
    tf.dispose(outputs);
    return plain;
  } finally {
    limitBindings();
  }
}

interface Case {
  name: string;
  inputs: Record<string, Plain>;
  attrs?: Record<string, unknown>;
  /** Bytes: for two windows, three, and many of the largest tensor. */
  limits: readonly number[];
  /** Relative to the largest value; 0 where the order of additions is kept. */
  tolerance?: number;
}

const table = (rows: number, width: number): Plain => values([rows, width], 7, 1);
const someRows = (count: number, rows: number): Plain =>
  integers(Array.from({ length: count }, (_, i) => i % 11 === 10 ? -1 : (i * 37 + (i >> 2)) % rows));
const long = { gate: values([5, 4099], 1, 3), up: values([5, 4099], 2, 3) };
const logits = { logits: values([61, 1000], 1, 6), target: someRows(61, 1000) };

/** 64,000 floats and more: 250 KiB, so 64 KiB need four windows. */
const cases: Case[] = [
  // The largest tensor is the table; then the rows that are read, then both.
  {
    name: "MgpoGatherRows",
    inputs: { x: table(1000, 64), index: someRows(200, 1000) },
    limits: [128 * KIB, 96 * KIB, 64 * KIB, 4 * KIB],
  },
  { name: "MgpoGatherRows", inputs: { x: table(999, 65), index: someRows(700, 999) }, limits: [128 * KIB, 20 * KIB] },
  {
    name: "MgpoScatterAddRows",
    inputs: { x: table(200, 64), index: someRows(200, 1000) },
    attrs: { rows: 1000 },
    limits: [128 * KIB, 96 * KIB, 64 * KIB, 5 * KIB],
  },
  {
    name: "MgpoScatterAddRows",
    inputs: { x: table(900, 65), index: someRows(900, 130) },
    attrs: { rows: 130 },
    limits: [128 * KIB, 96 * KIB, 17 * KIB],
  },
  ...["MgpoSwiGLU", "MgpoAdd"].map((name): Case => {
    const { gate, up } = long;
    return { name, inputs: name === "MgpoAdd" ? { a: gate, b: up } : long, limits: [64 * KIB, 30 * KIB, 1 * KIB] };
  }),
  { name: "MgpoSwiGLUGrad", inputs: { ...long, dy: values([5, 4099], 3) }, limits: [64 * KIB, 30 * KIB, 2 * KIB] },
  { name: "MgpoGelu", inputs: { x: long.gate }, limits: [64 * KIB, 30 * KIB, 2 * KIB] },
  { name: "MgpoGeluGrad", inputs: { x: long.gate, dy: long.up }, limits: [64 * KIB, 30 * KIB, 2 * KIB] },
  {
    name: "MgpoRope",
    inputs: { x: values([301, 3, 8], 1), cos: values([301, 8], 2), sin: values([301, 8], 3) },
    attrs: { inverse: true },
    limits: [20 * KIB, 10 * KIB, 2 * KIB],
  },
  {
    name: "MgpoRmsNorm",
    inputs: { x: values([300, 70], 1), w: values([70], 2) },
    attrs: { eps: 1e-6 },
    limits: [64 * KIB, 30 * KIB, 9 * KIB],
  },
  { name: "MgpoColSum", inputs: { x: table(1000, 63) }, limits: [128 * KIB, 96 * KIB, 16 * KIB], tolerance: 2e-6 },
  { name: "MgpoSumSquares", inputs: { x: table(1001, 63) }, limits: [128 * KIB, 96 * KIB, 5 * KIB], tolerance: 2e-6 },
  {
    name: "MgpoLogSoftmaxGather",
    inputs: logits,
    attrs: { temperature: 0.7 },
    limits: [128 * KIB, 96 * KIB, 32 * KIB],
  },
  {
    name: "MgpoLogSoftmaxGatherGrad",
    inputs: {
      ...{ ...logits, lse: values([61], 2), entropy: values([61], 3) },
      ...{ dlogprob: values([61], 4), dentropy: values([61], 5) },
    },
    attrs: { temperature: 0.7 },
    limits: [128 * KIB, 96 * KIB, 32 * KIB],
  },
];

for (const { name, inputs, attrs = {}, limits, tolerance = 0 } of cases) {
  const shapes = Object.values(inputs).map(({ shape }) => `[${shape}]`).join(" ");
  gpuTest(`${name} ${shapes} in windows: ${tolerance === 0 ? "the same bits" : `within ${tolerance}`}`, async () => {
    const whole = await limited(undefined, name, inputs, attrs);
    for (const limit of limits) {
      const windowed = await limited(limit, name, inputs, attrs);
      whole.forEach(({ data, shape }, i) => {
        if (tolerance === 0) assert.deepEqual(windowed[i].data, data, `${limit} bytes`);
        else close(windowed[i], data, shape, tolerance * Math.max(...Array.from(data, Math.abs)));
      });
    }
  });
}

gpuTest("MgpoAdamW in windows: the same bits", async () => {
  const step = { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, correction1: 0.1, correction2: 0.05 };
  const changed = async (limit?: number) => {
    const [param, m, grad] = [1, 2, 3].map((seed) => tf.tensor(values([5, 4099], seed).data, [5, 4099]));
    const v = tf.tidy(() => tf.square(tf.tensor(values([5, 4099], 4).data, [5, 4099])));
    limitBindings(limit);
    try {
      tf.dispose(call("MgpoAdamW", { param, m, v, grad }, { ...step, clipScale: 0.5 }));
      return await read([param, m, v]);
    } finally {
      limitBindings();
      tf.dispose([param, m, v, grad]);
    }
  };
  const whole = await changed();
  for (const limit of [64 * KIB, 30 * KIB, 1 * KIB]) assert.deepEqual(await changed(limit), whole);
});

// Windows of rows whose width is odd have at least 64 rows.
for (
  const [rows, columns, depth, limits] of [
    [50, 1000, 64, [200, 130]],
    [17, 333, 192, [130, 90]],
    [50, 64, 1000, [200, 64]],
    [33, 128, 1003, [260]],
    [1000, 64, 50, [130, 90, 64]],
    [129, 130, 131, [40, 34]],
  ] as const
) {
  gpuTest(`matmul ${rows} × ${depth} × ${columns} in windows: within 1e-5, all orders, both layouts`, async () => {
    for (const [transposeA, transposeB] of [[false, false], [false, true], [true, false], [true, true]]) {
      const a = values(transposeA ? [depth, rows] : [rows, depth], 1);
      const b = values(transposeB ? [columns, depth] : [depth, columns], 2), bias = values([columns], 3);
      for (const software of [false, true]) {
        const attrs = { transposeA, transposeB, software }, inputs = { a, b, bias };
        const [whole] = await limited(undefined, "MgpoMatMul", inputs, attrs);
        for (const limit of limits) {
          const [windowed] = await limited(limit * KIB, "MgpoMatMul", inputs, attrs);
          close(windowed, whole.data, [rows, columns], 1e-5 * Math.sqrt(depth));
        }
      }
    }
  });
}

gpuTest("log-probs of a tied head and their gradients through windows equal those without", async () => {
  const [tokens, vocabulary, width] = [40, 1000, 48];
  const table = tf.variable(tf.randomNormal([vocabulary, width], 0, 0.3, "float32", 5)) as tf.Variable<tf.Rank.R2>;
  const gain = tf.variable(tf.ones([width])) as tf.Variable<tf.Rank.R1>;
  const x = tf.randomNormal([tokens, width], 0, 1, "float32", 6) as tf.Tensor2D;
  const [cos, sin] = [7, 8].map((seed) => tf.randomUniform([tokens, 16], -1, 1, "float32", seed) as tf.Tensor2D);
  const targets = Array.from({ length: tokens }, (_, i) => (i * 37) % vocabulary);
  const work = async (limit?: number) => {
    limitBindings(limit);
    try {
      const { value, grads } = tf.variableGrads(() => {
        const turned = rope(tf.reshape(x, [tokens, 3, 16]), cos, sin);
        const h = rmsNorm(gelu(swiglu(tf.reshape(turned, [tokens, width]), x)), gain, 1e-6);
        return tf.sum(logProbEntropy(linear(h, table), targets, null, 1)).add(tf.sum(linear(h, table))) as tf.Scalar;
      }, [table, gain]);
      const plain = await read([value, ...Object.values(grads)]);
      tf.dispose([value, grads]);
      return plain;
    } finally {
      limitBindings();
    }
  };
  const whole = await work(), numTensors = tf.memory().numTensors;
  // The table takes 187.5 KiB and its gradient, which is used twice, too.
  for (const limit of [100 * KIB, 64 * KIB, 33 * KIB]) {
    const windowed = await work(limit);
    whole.forEach(({ data, shape }, i) => {
      close(windowed[i], data, shape, 1e-5 * Math.max(...Array.from(data, Math.abs)));
    });
  }
  assert.equal(tf.memory().numTensors, numTensors);
  tf.dispose([table, gain, x, cos, sin]);
});
