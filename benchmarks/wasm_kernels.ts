/**
 * How fast are our WebAssembly kernels beside the plain operations of tfjs-backend-wasm?
 *
 *     deno run --no-prompt --allow-read --allow-env benchmarks/wasm_kernels.ts
 *
 * Shapes are those of the embedded miniature: 96 dialogues of 72 tokens, width 96, MLP 192, 4 heads of 24, vocabulary 85. Each row is
 * the best of several interleaved runs on one thread, both sides in the same process; "ratio" is plain time over our time.
 * The peer column names the chain of tfjs operations that computes the same values.
 *
 * @module
 */
import { tf } from "../src/deps.ts";
import { installWasmKernels } from "../src/wasm/register.ts";

interface Row {
  readonly name: string;
  /** Operations (GFLOP/s) or bytes read and written (GB/s). */
  readonly work: number;
  readonly unit: "GFLOP/s" | "GB/s";
  ours(): tf.Tensor | tf.Tensor[];
  /** The plain operations, and their names; absent where there is none. */
  readonly peer?: { readonly name: string; run(): tf.Tensor | tf.Tensor[] };
}

const ROUNDS = 15;

function kernel(name: string, inputs: Record<string, tf.Tensor>, attrs: tf.NamedAttrMap = {}): tf.Tensor[] {
  const result = tf.engine().runKernel(name, inputs, attrs);
  return (Array.isArray(result) ? result : [result]) as tf.Tensor[];
}

function milliseconds(run: () => tf.Tensor | tf.Tensor[]): number {
  const start = performance.now();
  tf.dispose(tf.tidy(run));
  return performance.now() - start;
}

function measure(row: Row): void {
  // The first calls run unoptimised code while the engine compiles; they do not count.
  for (let i = 0; i < 5; i++) milliseconds(row.ours);
  if (row.peer) milliseconds(row.peer.run);
  let [ours, peer] = [Infinity, Infinity];
  for (let i = 0; i < ROUNDS; i++) {
    ours = Math.min(ours, milliseconds(row.ours));
    if (row.peer && i % 3 === 0) peer = Math.min(peer, milliseconds(row.peer.run));
  }
  const rate = `${(row.work / ours / 1e6).toFixed(1)} ${row.unit}`;
  const beside = row.peer ? `${peer.toFixed(2)} ms  ratio ${(peer / ours).toFixed(1)}  (${row.peer.name})` : "";
  console.log(`${row.name.padEnd(36)} ${ours.toFixed(3).padStart(8)} ms ${rate.padStart(13)}   ${beside}`);
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
  ];
}

/** softmax(q·kᵀ·scale + mask)·v on equal segments, heads first. */
function plainAttention(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor): tf.Tensor {
  const [Q, K, W] = [q, k, v].map((x) => tf.transpose(tf.reshape(x, [B, L, H, d]), [0, 2, 1, 3]));
  const p = tf.softmax(tf.add(tf.mul(tf.matMul(Q, K, false, true), 1 / Math.sqrt(d)), mask));
  return tf.reshape(tf.transpose(tf.matMul(p, W), [0, 2, 1, 3]), [N, H, d]);
}

function attentionRows(): Row[] {
  const [q, k, v, dout] = [0, 1, 2, 3].map(() => random([N, H, d]));
  const cuSeqlens = tf.tensor1d(Array.from({ length: B + 1 }, (_, i) => i * L), "int32");
  const attrs = { causal: true, scale: 1 / Math.sqrt(d) };
  const [out, lse] = kernel("MgpoAttention", { q, k, v, cuSeqlens }, attrs);
  const mask = tf.mul(tf.sub(1, tf.linalg.bandPart(tf.ones([L, L]), -1, 0)), -1e9);
  const pairs = B * H * L * L;
  const backward = (): tf.Tensor[] =>
    tf.grads((...x: tf.Tensor[]) => tf.sum(tf.mul(plainAttention(x[0], x[1], x[2], mask), dout)))([q, k, v]);
  return [
    {
      name: `attention ${B}×${L}, causal`,
      work: 2 * pairs * d,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoAttention", { q, k, v, cuSeqlens }, attrs),
      peer: { name: "transpose, matMul, softmax", run: () => plainAttention(q, k, v, mask) },
    },
    {
      name: `attention ${B}×${L}, all pairs`,
      work: 4 * pairs * d,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoAttention", { q, k, v, cuSeqlens }, { ...attrs, causal: false }),
    },
    {
      name: `attention gradient ${B}×${L}, causal`,
      work: 5 * pairs * d,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoAttentionGrad", { q, k, v, out, lse, dout, cuSeqlens }, attrs),
      peer: { name: "tf.grads, forward included", run: backward },
    },
    {
      name: `attention gradient ${B}×${L}, all pairs`,
      work: 10 * pairs * d,
      unit: "GFLOP/s",
      ours: () => kernel("MgpoAttentionGrad", { q, k, v, out, lse, dout, cuSeqlens }, { ...attrs, causal: false }),
    },
  ];
}

function decodeRow(): Row {
  const [q, k, v] = [0, 1, 2].map(() => random([B, H, d]));
  const [kCache, vCache] = [random([B, L, H, d]), random([B, L, H, d])];
  const lengths = tf.fill([B], L - 1, "int32");
  const rows = tf.range(0, B, 1, "int32");
  const plain = (): tf.Tensor => {
    const [K, W] = [kCache, vCache].map((x) => tf.transpose(x, [0, 2, 1, 3]));
    const scores = tf.matMul(tf.reshape(q, [B, H, 1, d]), K, false, true);
    return tf.matMul(tf.softmax(tf.mul(scores, 1 / Math.sqrt(d))), W);
  };
  return {
    name: `decode attention, ${B} × ${L} tokens`,
    work: 2 * 4 * B * L * H * d,
    unit: "GB/s",
    ours: () => kernel("MgpoDecodeAttention", { q, k, v, kCache, vCache, lengths, rows }, { scale: 1 / Math.sqrt(d) }),
    peer: { name: "transpose, matMul, softmax", run: plain },
  };
}

/** A row whose cost is memory: `floats` read and written. */
function stream(name: string, floats: number, ours: Row["ours"], peer?: Row["peer"]): Row {
  return { name, work: 4 * floats, unit: "GB/s", ours, peer };
}

function rowRows(): Row[] {
  const [x, dy, w] = [random([N, D]), random([N, D]), random([D])];
  const index = tf.range(0, N, 1, "int32");
  const [, rstd] = kernel("MgpoRmsNorm", { x, w }, { eps: 1e-6 });
  const plainNorm = (): tf.Tensor => tf.mul(tf.mul(x, tf.rsqrt(tf.add(tf.mean(tf.square(x), -1, true), 1e-6))), w);
  const heads = random([N, H, d]);
  const [cos, sin] = [random([N, d]), random([N, d])];
  const plainRope = (): tf.Tensor => {
    const [a, b] = tf.split(heads, 2, -1);
    const [c, s] = [cos, sin].map((table) => tf.expandDims(table, 1));
    return tf.add(tf.mul(heads, c), tf.mul(tf.concat([tf.neg(b), a], -1), s));
  };
  return [
    stream(`gather ${N} rows of ${D}`, 2 * N * D, () => kernel("MgpoGatherRows", { x, index }), {
      name: "gather",
      run: () => tf.gather(x, index),
    }),
    stream(`scatter-add ${N} rows of ${D}`, 3 * N * D, () => kernel("MgpoScatterAddRows", { x, index }, { rows: N })),
    stream("rms norm", 3 * N * D, () => kernel("MgpoRmsNorm", { x, w }, { eps: 1e-6 }), {
      name: "square, mean, rsqrt, mul",
      run: plainNorm,
    }),
    stream("rms norm gradient", 5 * N * D, () => kernel("MgpoRmsNormGrad", { x, w, rstd, dy })),
    stream("rope", 2 * N * D, () => kernel("MgpoRope", { x: heads, cos, sin }, { inverse: false }), {
      name: "split, concat, mul, add",
      run: plainRope,
    }),
    stream("column sum", N * D, () => kernel("MgpoColSum", { x }), { name: "sum", run: () => tf.sum(x, 0) }),
    stream("sum of squares", N * D, () => kernel("MgpoSumSquares", { x }), {
      name: "square, sum",
      run: () => tf.sum(tf.square(x)),
    }),
  ];
}

function elementRows(): Row[] {
  const [gate, up, dy] = [random([N, M]), random([N, M]), random([N, M])];
  const plainGelu = (): tf.Tensor => tf.mul(tf.mul(gate, 0.5), tf.add(tf.erf(tf.mul(gate, Math.SQRT1_2)), 1));
  const logits = random([N, V]);
  const target = tf.zeros([N], "int32");
  const attrs = { temperature: 1 };
  const [, entropy, lse] = kernel("MgpoLogSoftmaxGather", { logits, target }, attrs);
  const [dlogprob, dentropy] = [random([N]), random([N])];
  const gradient = { logits, target, lse, entropy, dlogprob, dentropy };
  const size = 956_256;
  const [param, m, v, grad] = [random([size]), tf.zeros([size]), tf.zeros([size]), random([size])];
  const settings = { lr: 1e-3, beta1: 0.9, beta2: 0.98, eps: 1e-8, weightDecay: 0.01 };
  const step = { ...settings, correction1: 0.1, correction2: 0.02, clipScale: 1 };
  return [
    stream("SwiGLU", 3 * N * M, () => kernel("MgpoSwiGLU", { gate, up }), {
      name: "sigmoid, mul, mul",
      run: () => tf.mul(tf.mul(gate, tf.sigmoid(gate)), up),
    }),
    stream("SwiGLU gradient", 5 * N * M, () => kernel("MgpoSwiGLUGrad", { gate, up, dy })),
    stream("GELU", 2 * N * M, () => kernel("MgpoGelu", { x: gate }), { name: "erf, add, mul", run: plainGelu }),
    stream("GELU gradient", 3 * N * M, () => kernel("MgpoGeluGrad", { x: gate, dy })),
    stream(`log-probabilities of ${V}`, N * V, () => kernel("MgpoLogSoftmaxGather", { logits, target }, attrs), {
      name: "logSoftmax, exp, mul, sum",
      run: () => {
        const log = tf.logSoftmax(logits);
        return [log, tf.sum(tf.mul(tf.exp(log), log), -1)];
      },
    }),
    stream("log-probabilities gradient", 2 * N * V, () => kernel("MgpoLogSoftmaxGatherGrad", gradient, attrs)),
    stream("AdamW, 956,256 parameters", 7 * size, () => kernel("MgpoAdamW", { param, m, v, grad }, step)),
  ];
}

await tf.setBackend("wasm");
await tf.ready();
installWasmKernels();
console.log(`Deno ${Deno.version.deno}, V8 ${Deno.version.v8}, tfjs ${tf.version_core}; one thread, best of ${ROUNDS}`);
for (const row of [...matrixRows(), ...attentionRows(), decodeRow(), ...rowRows(), ...elementRows()]) measure(row);
