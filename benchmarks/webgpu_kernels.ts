/**
 * How fast are our WebGPU kernels beside the plain operations of tfjs-backend-webgpu?
 *
 *     deno run --no-prompt --allow-read --allow-env benchmarks/webgpu_kernels.ts
 *
 * Shapes are those of the embedded miniature: 96 dialogues of 72 tokens, width 96, MLP 192, 4 heads of 24, vocabulary 85. Each row is the
 * best of several interleaved runs of the same adapter, from the first call until the GPU is idle; "ratio" is plain time over
 * our time. The peer column names the chain of tfjs operations that computes the same values. On a software adapter only the
 * ratios mean anything.
 *
 * @module
 */
import { tf } from "../src/deps.ts";
import { chooseBackend, describeBackend } from "../src/gpu/backend.ts";
import { installWebgpuKernels } from "../src/gpu/kernels/register.ts";

interface Row {
  readonly name: string;
  /** Operations (GFLOP/s) or bytes read and written (GB/s). */
  readonly work: number;
  readonly unit: "GFLOP/s" | "GB/s";
  ours(): tf.Tensor | tf.Tensor[];
  /** The plain operations, and their names. */
  readonly peer: { readonly name: string; run(): tf.Tensor | tf.Tensor[] };
}

const ROUNDS = 5;

function kernel(name: string, inputs: Record<string, tf.Tensor>, attrs: tf.NamedAttrMap = {}): tf.Tensor[] {
  const result = tf.engine().runKernel(name, inputs, attrs);
  return (Array.isArray(result) ? result : [result]) as tf.Tensor[];
}

/** Waits for everything given to the GPU so far. */
async function idle(): Promise<void> {
  const backend = tf.backend() as unknown as {
    ensureCommandEncoderReady(): void;
    endComputePassEncoder(): void;
    submitQueue(): void;
    device: GPUDevice;
  };
  backend.ensureCommandEncoderReady();
  backend.endComputePassEncoder();
  backend.submitQueue();
  await backend.device.queue.onSubmittedWorkDone();
}

/** Milliseconds of one call, by repeats where one is too short beside the wait. */
async function milliseconds(run: () => tf.Tensor | tf.Tensor[], repeats: number): Promise<number> {
  await idle();
  const start = performance.now();
  for (let i = 0; i < repeats; i++) tf.dispose(tf.tidy(run));
  await idle();
  return (performance.now() - start) / repeats;
}

async function measure(row: Row): Promise<void> {
  // The first call compiles shaders.
  const once = [await milliseconds(row.ours, 1), await milliseconds(row.peer.run, 1)];
  for (const [i, run] of [row.ours, row.peer.run].entries()) once[i] = await milliseconds(run, 1);
  const [many, few] = once.map((ms) => Math.max(1, Math.min(10, Math.round(50 / ms))));
  let [ours, peer] = [Infinity, Infinity];
  for (let i = 0; i < ROUNDS; i++) {
    ours = Math.min(ours, await milliseconds(row.ours, many));
    peer = Math.min(peer, await milliseconds(row.peer.run, few));
  }
  const rate = `${(row.work / ours / 1e6).toFixed(1)} ${row.unit}`;
  const beside = `${peer.toFixed(2)} ms  ratio ${(peer / ours).toFixed(1)}  (${row.peer.name})`;
  console.log(`${row.name.padEnd(40)} ${ours.toFixed(2).padStart(8)} ms ${rate.padStart(13)}   ${beside}`);
}

const [B, L, D, M, H, d, V] = [96, 72, 96, 192, 4, 24, 85];
const N = B * L;
const random = (shape: number[]): tf.Tensor => tf.randomUniform(shape, -1, 1, "float32", 7);

function matrixRows(): Row[] {
  const [x, w, h] = [random([N, D]), random([D, M]), random([N, M])];
  const product = (name: string, a: tf.Tensor, b: tf.Tensor, transposeA: boolean, transposeB: boolean): Row => ({
    name: `matmul ${name}`,
    work: 2 * N * D * M,
    unit: "GFLOP/s",
    ours: () => kernel("MgpoMatMul", { a, b }, { transposeA, transposeB }),
    peer: { name: "matMul", run: () => tf.matMul(a, b, transposeA, transposeB) },
  });
  const [s, t] = [random([B * H, L, d]), random([B * H, d, L])];
  const [a, b] = [random([1024, 1024]), random([1024, 1024])];
  return [
    product(`NN [${N},${D}]·[${D},${M}]`, x, w, false, false),
    product(`NT [${N},${M}]·[${D},${M}]ᵀ`, h, w, false, true),
    product(`TN [${N},${D}]ᵀ·[${N},${M}]`, x, h, true, false),
    {
      name: `matmul [${B * H},${L},${d}]·[${B * H},${d},${L}]`,
      work: 2 * B * H * L * L * d,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoMatMul", { a: s, b: t }),
      peer: { name: "matMul", run: () => tf.matMul(s, t) },
    },
    {
      name: "matmul NN [1024,1024]·[1024,1024]",
      work: 2 * 1024 ** 3,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoMatMul", { a, b }),
      peer: { name: "matMul", run: () => tf.matMul(a, b) },
    },
  ];
}

/** softmax(q·kᵀ·scale + mask)·v on equal segments, heads first. */
function plainAttention(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor): tf.Tensor {
  const [Q, K, W] = [q, k, v].map((x) => tf.transpose(tf.reshape(x, [B, L, H, d]), [0, 2, 1, 3]));
  const p = tf.softmax(tf.add(tf.mul(tf.matMul(Q, K, false, true), 1 / Math.sqrt(d)), mask));
  return tf.reshape(tf.transpose(tf.matMul(p, W), [0, 2, 1, 3]), [N, H, d]);
}

/** The gradients that tfjs derives of a chain of its operations. */
const gradients = (f: (...x: tf.Tensor[]) => tf.Tensor, inputs: tf.Tensor[], dy: tf.Tensor) => () =>
  tf.grads(f)(inputs, dy);

function attentionRows(): Row[] {
  const [q, k, v, dout] = [0, 1, 2, 3].map(() => random([N, H, d]));
  const cuSeqlens = tf.tensor1d(Array.from({ length: B + 1 }, (_, i) => i * L), "int32");
  const attrs = { causal: true, scale: 1 / Math.sqrt(d) };
  const [out, lse] = kernel("MgpoAttention", { q, k, v, cuSeqlens }, attrs);
  const upper = Float32Array.from({ length: L * L }, (_, i) => i % L > Math.floor(i / L) ? -1e9 : 0);
  const mask = tf.tensor2d(upper, [L, L]), pairs = B * H * L * L;
  const plain = (...x: tf.Tensor[]): tf.Tensor => plainAttention(x[0], x[1], x[2], mask);
  return [
    {
      name: `attention ${B}×${L}, causal`,
      work: 2 * pairs * d,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoAttention", { q, k, v, cuSeqlens }, attrs),
      peer: { name: "transpose, matMul, softmax", run: () => plain(q, k, v) },
    },
    {
      name: `attention gradient ${B}×${L}, causal`,
      work: 7 * pairs * d,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoAttentionGrad", { q, k, v, out, lse, dout, cuSeqlens }, attrs),
      peer: { name: "tf.grads, forward included", run: gradients(plain, [q, k, v], dout) },
    },
  ];
}

/** A row whose cost is memory: `floats` read and written. */
const stream = (name: string, floats: number, ours: Row["ours"], peer: string, run: Row["peer"]["run"]): Row => (
  { name, work: 4 * floats, unit: "GB/s", ours, peer: { name: peer, run } }
);

function rowRows(): Row[] {
  const [x, dy, w] = [random([N, D]), random([N, D]), random([D])];
  const index = tf.range(0, N, 1, "int32");
  const [, rstd] = kernel("MgpoRmsNorm", { x, w }, { eps: 1e-6 });
  const norm = (...x: tf.Tensor[]): tf.Tensor =>
    tf.mul(tf.mul(x[0], tf.rsqrt(tf.add(tf.mean(tf.square(x[0]), -1, true), 1e-6))), x[1]);
  const heads = random([N, H, d]), [cos, sin] = [random([N, d]), random([N, d])];
  const rope = (): tf.Tensor => {
    const [a, b] = tf.split(heads, 2, -1), [c, s] = [cos, sin].map((table) => tf.expandDims(table, 1));
    return tf.add(tf.mul(heads, c), tf.mul(tf.concat([tf.neg(b), a], -1), s));
  };
  const scatter = () => kernel("MgpoScatterAddRows", { x, index: tf.range(0, N, 1, "int32") }, { rows: N });
  return [
    stream(
      `gather ${N} rows`,
      2 * N * D,
      () => kernel("MgpoGatherRows", { x, index }),
      "gather",
      () => tf.gather(x, index),
    ),
    stream(
      `scatter-add ${N} rows`,
      2 * N * D,
      scatter,
      "unsortedSegmentSum (atomics)",
      () => tf.unsortedSegmentSum(x, index as tf.Tensor1D, N),
    ),
    stream(
      "rms norm",
      2 * N * D,
      () => kernel("MgpoRmsNorm", { x, w }, { eps: 1e-6 }),
      "square, mean, rsqrt, mul",
      () => norm(x, w),
    ),
    stream(
      "rms norm gradient",
      5 * N * D,
      () => kernel("MgpoRmsNormGrad", { x, w, rstd, dy }),
      "tf.grads, forward included",
      gradients(norm, [x, w], dy),
    ),
    stream(
      "rope",
      2 * N * D,
      () => kernel("MgpoRope", { x: heads, cos, sin }, { inverse: false }),
      "split, concat, mul, add",
      rope,
    ),
    stream("column sum", N * D, () => kernel("MgpoColSum", { x }), "sum", () => tf.sum(x, 0)),
    stream("sum of squares", N * D, () => kernel("MgpoSumSquares", { x }), "square, sum", () => tf.sum(tf.square(x))),
  ];
}

function elementRows(): Row[] {
  const [gate, up, dy] = [random([N, M]), random([N, M]), random([N, M])];
  const swiglu = (...x: tf.Tensor[]): tf.Tensor => tf.mul(tf.mul(x[0], tf.sigmoid(x[0])), x[1]);
  const gelu = (...x: tf.Tensor[]): tf.Tensor =>
    tf.mul(tf.mul(x[0], 0.5), tf.add(tf.erf(tf.mul(x[0], Math.SQRT1_2)), 1));
  const chain = "tf.grads, forward included";
  return [
    stream("SwiGLU", 3 * N * M, () => kernel("MgpoSwiGLU", { gate, up }), "sigmoid, mul, mul", () => swiglu(gate, up)),
    stream(
      "SwiGLU gradient",
      5 * N * M,
      () => kernel("MgpoSwiGLUGrad", { gate, up, dy }),
      chain,
      gradients(swiglu, [gate, up], dy),
    ),
    stream("GELU", 2 * N * M, () => kernel("MgpoGelu", { x: gate }), "erf, add, mul", () => gelu(gate)),
    stream(
      "GELU gradient",
      3 * N * M,
      () => kernel("MgpoGeluGrad", { x: gate, dy }),
      chain,
      gradients(gelu, [gate], dy),
    ),
  ];
}

function logProbRows(): Row[] {
  const logits = random([N, V]), target = tf.zeros([N], "int32"), attrs = { temperature: 1 };
  const [, entropy, lse] = kernel("MgpoLogSoftmaxGather", { logits, target }, attrs);
  const [dlogprob, dentropy] = [random([N]), random([N])];
  const given = { logits, target, lse, entropy, dlogprob, dentropy };
  const one = tf.oneHot(target, V), weights = tf.stack([dlogprob, dentropy]);
  const plain = (...x: tf.Tensor[]): tf.Tensor => {
    const log = tf.logSoftmax(x[0]);
    return tf.stack([tf.sum(tf.mul(log, one), -1), tf.neg(tf.sum(tf.mul(tf.exp(log), log), -1))]);
  };
  return [
    stream(
      `log-probabilities of ${V}`,
      2 * N * V,
      () => kernel("MgpoLogSoftmaxGather", { logits, target }, attrs),
      "logSoftmax, exp, mul, sum",
      () => plain(logits),
    ),
    stream(
      "log-probabilities gradient",
      2 * N * V,
      () => kernel("MgpoLogSoftmaxGatherGrad", given, attrs),
      "tf.grads, forward included",
      gradients(plain, [logits], weights),
    ),
  ];
}

/** AdamW on all parameters of the miniature at once. */
function optimizerRow(): Row {
  const size = 956_256, [param, grad] = [random([size]), random([size])], [m, v] = [random([size]), tf.ones([size])];
  const settings = { lr: 1e-3, beta1: 0.9, beta2: 0.98, eps: 1e-8, weightDecay: 0.01 };
  const step = { ...settings, correction1: 0.1, correction2: 0.02, clipScale: 1 };
  const plain = (): tf.Tensor[] => {
    const g = tf.mul(grad, 1), mean = tf.add(tf.mul(m, 0.9), tf.mul(g, 0.1));
    const square = tf.add(tf.mul(v, 0.98), tf.mul(tf.square(g), 0.02));
    const root = tf.add(tf.div(tf.sqrt(square), Math.sqrt(0.02)), 1e-8);
    return [tf.sub(tf.mul(param, 1 - 1e-5), tf.mul(tf.div(mean, root), 1e-2)), mean, square];
  };
  return stream(
    `AdamW, ${size} parameters`,
    7 * size,
    () => kernel("MgpoAdamW", { param, m, v, grad }, step),
    "mul, add, square, sqrt, div",
    plain,
  );
}

console.log(describeBackend(await chooseBackend("webgpu")));
installWebgpuKernels();
console.log(`Deno ${Deno.version.deno}, tfjs ${tf.version_core}; best of ${ROUNDS}`);
const wanted = Deno.args;
for (
  const row of [...matrixRows(), ...attentionRows(), ...rowRows(), ...elementRows(), ...logProbRows(), optimizerRow()]
) {
  if (wanted.length === 0 || wanted.some((name) => row.name.includes(name))) await measure(row);
}
