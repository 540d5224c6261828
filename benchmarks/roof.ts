/**
 * What can the machine do at best? The bounds that other figures are held against: what the host pays for a dispatch that is
 * prepared and encoded again, how fast memory is read, how fast large matrices are multiplied.
 *
 * @module
 */
import { tf } from "../src/deps.ts";
import { flushTensors, webgpuBackend } from "../src/gpu/decode/memory.ts";
import { type Benchmark, median, type Row } from "./benchmark.ts";

const ROUNDS = 5;
/** Seconds that a timed run takes at least: long beside the 10 ms that a wait for the GPU may overshoot by. */
const LEAST_SECONDS = 0.2;

/** The device that computes now. @throws {RangeError} The backend is not WebGPU. */
export function currentDevice(): GPUDevice {
  const backend = webgpuBackend();
  if (!backend) throw new RangeError("the backend is not WebGPU");
  return backend.device;
}

/** Whether the current backend is WebGPU on a GPU, not on a processor that imitates one. */
export function onRealGpu(): boolean {
  const info = webgpuBackend()?.device.adapterInfo;
  if (!info) return false;
  return !(info.isFallbackAdapter ?? /llvmpipe|swiftshader|basic render/i.test(`${info.description} ${info.device}`));
}

/** Waits for everything given to the backend so far. */
export async function idle(): Promise<void> {
  const backend = webgpuBackend();
  if (!backend) return;
  flushTensors(backend);
  await backend.device.queue.onSubmittedWorkDone();
}

/** Seconds of one repeat: a long run less a short one, so that the wait at the end drops out. Median of several. */
export async function secondsOf(run: (repeats: number) => void, rounds = ROUNDS): Promise<number> {
  const time = async (repeats: number) => {
    await idle();
    const start = performance.now();
    run(repeats);
    await idle();
    return (performance.now() - start) / 1000;
  };
  await time(1);
  let few = 1;
  while (await time(few) < LEAST_SECONDS) few *= 2;
  const values: number[] = [];
  for (let i = 0; i < rounds; i++) {
    const short = await time(few);
    values.push((await time(3 * few) - short) / (2 * few));
  }
  return median(values);
}

interface Prepared {
  pipeline: GPUComputePipeline;
  group: GPUBindGroup;
}

function prepare(device: GPUDevice, code: string, buffers: readonly GPUBuffer[]): Prepared {
  const compute = { module: device.createShaderModule({ code }), entryPoint: "main" };
  const pipeline = device.createComputePipeline({ layout: "auto", compute });
  const entries = buffers.map((buffer, binding) => ({ binding, resource: { buffer } }));
  return { pipeline, group: device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }) };
}

/** Encodes `count` dispatches, the given ones in turns. */
function encode(device: GPUDevice, prepared: readonly Prepared[], count: number, groups = 1): GPUCommandBuffer {
  const encoder = device.createCommandEncoder(), pass = encoder.beginComputePass();
  for (let i = 0; i < count; i++) {
    const { pipeline, group } = prepared[i % prepared.length];
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(groups);
  }
  pass.end();
  return encoder.finish();
}

// ------------------------------------------------------------------------------------------------------------ dispatches

/** Dispatches of a submission, as generation makes them. */
const SUBMISSION = 512;
/** Eager operations that the peer is timed by. */
const EAGER = 500;

/** Microseconds of the host for each of {@linkcode EAGER} tfjs operations; on fewer numbers tfjs would compute on the host. */
async function eagerMicroseconds(): Promise<number> {
  const [a, b] = [tf.ones([4096]), tf.ones([4096])], values: number[] = [];
  for (let round = 0; round <= ROUNDS; round++) {
    await idle();
    const start = performance.now();
    for (let i = 0; i < EAGER; i++) tf.add(a, b).dispose();
    // The first round compiles.
    if (round > 0) values.push((performance.now() - start) * 1000 / EAGER);
  }
  tf.dispose([a, b]);
  return median(values);
}

/** What a prepared dispatch costs: the host to encode it again, the device to run it after the one before. */
export const dispatchCost: Benchmark = {
  names: ["dispatch/cost", "dispatch/device"],
  backends: ["webgpu"],
  async run(): Promise<Row[]> {
    const device = currentDevice(), buffer = device.createBuffer({ size: 256, usage: GPUBufferUsage.STORAGE });
    const code = (value: number) => /* wgsl */ `
@group(0) @binding(0) var<storage, read_write> x: array<u32>;
@compute @workgroup_size(1) fn main() { x[${value}] = x[${1 - value}] + 1u; }`;
    const two = [0, 1].map((value) => prepare(device, code(value), [buffer])), host: number[] = [];
    for (let round = 0; round <= 6 * ROUNDS; round++) {
      await idle();
      const start = performance.now();
      const commands = encode(device, two, SUBMISSION);
      if (round > 0) host.push((performance.now() - start) * 1000 / SUBMISSION);
      device.queue.submit([commands]);
    }
    const whole = await secondsOf((repeats) => {
      for (let i = 0; i < repeats; i++) device.queue.submit([encode(device, two, SUBMISSION)]);
    });
    buffer.destroy();
    const value = median(host), eager = await eagerMicroseconds();
    const ours = { name: "dispatch/cost", value, unit: "µs", ratio: eager / value, peer: "an eager tfjs operation" };
    return [
      { ...ours, n: host.length },
      { name: "dispatch/device", value: whole * 1e6 / SUBMISSION, unit: "µs", n: ROUNDS },
    ];
  },
};

// ------------------------------------------------------------------------------------------------------------- bandwidth

const READ_GROUPS = 4096, THREADS = 256;
const stride = READ_GROUPS * THREADS;

/** Every thread adds up four elements a round; that the sum is this number is all but impossible, but must be looked at. */
const readCode = (count: number): string => /* wgsl */ `
@group(0) @binding(0) var<storage, read> source: array<vec4f>;
@group(0) @binding(1) var<storage, read_write> sums: array<vec4f>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(global_invocation_id) id: vec3u) {
  var a = vec4f(); var b = vec4f(); var c = vec4f(); var d = vec4f();
  for (var i = id.x; i < ${count}u; i += ${4 * stride}u) {
    a += source[i]; b += source[i + ${stride}u]; c += source[i + ${2 * stride}u]; d += source[i + ${3 * stride}u];
  }
  let sum = (a + b) + (c + d);
  if (sum.x == 12345.678) { sums[id.x & 3u] = sum; }
}`;
const copyCode = (count: number): string => /* wgsl */ `
@group(0) @binding(0) var<storage, read> source: array<vec4f>;
@group(0) @binding(1) var<storage, read_write> copied: array<vec4f>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(global_invocation_id) id: vec3u) {
  for (var i = id.x; i < ${count}u; i += ${stride}u) { copied[i] = source[i]; }
}`;

/** What {@linkcode measureBandwidth} finds, in bytes a second. */
export interface Bandwidth {
  /** The better of the two. */
  roof: number;
  /** Bytes that a kernel which only reads reads. */
  read: number;
  /** Bytes that a copying kernel reads and writes. */
  copy: number;
}

const measured = new WeakMap<GPUDevice, Bandwidth>();

/** Bandwidth of the device's memory, by buffers that are larger than its caches where the adapter allows them. Kept once measured. */
export async function measureBandwidth(): Promise<Bandwidth> {
  const device = currentDevice(), known = measured.get(device);
  if (known) return known;
  const unit = 4 * 16 * stride, { maxStorageBufferBindingSize, maxBufferSize } = device.limits;
  const most = Math.min(maxStorageBufferBindingSize, maxBufferSize, onRealGpu() ? 1 << 30 : 1 << 27);
  const bytes = Math.floor(most / unit) * unit, count = bytes / 16;
  if (count === 0) throw new RangeError(`the adapter binds ${most} bytes at most; ${unit} are needed to time a read`);
  device.pushErrorScope("out-of-memory");
  const [from, into] = [0, 1].map(() => device.createBuffer({ size: bytes, usage: GPUBufferUsage.STORAGE }));
  try {
    if (await device.popErrorScope()) throw new RangeError(`the device has no room for two buffers of ${bytes} bytes`);
    const rate = async (code: string, moved: number) => {
      const kernel = [prepare(device, code, [from, into])];
      return moved / await secondsOf((repeats) => device.queue.submit([encode(device, kernel, repeats, READ_GROUPS)]));
    };
    const read = await rate(readCode(count), bytes), copy = await rate(copyCode(count), 2 * bytes);
    const found = { roof: Math.max(read, copy), read, copy };
    measured.set(device, found);
    return found;
  } finally {
    from.destroy();
    into.destroy();
  }
}

/** Bandwidth of the device's memory: the better of reading and copying. */
export const bandwidthRoof: Benchmark = {
  names: ["roof/bandwidth", "roof/bandwidth/read", "roof/bandwidth/copy"],
  backends: ["webgpu"],
  async run(_backend, log): Promise<Row[]> {
    try {
      const { roof, read, copy } = await measureBandwidth();
      const row = (name: string, value: number): Row => ({ name, value: value / 1e9, unit: "GB/s", n: ROUNDS });
      return [row("roof/bandwidth", roof), row("roof/bandwidth/read", read), row("roof/bandwidth/copy", copy)];
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      log(`roof/bandwidth left out: ${error.message}`);
      return [];
    }
  },
};

// ---------------------------------------------------------------------------------------------------------------- matmul

/** Which operand is stored transposed: none, the second (a linear layer), the first (a gradient of weights). */
type Order = "nn" | "nt" | "tn";

/** GFLOP/s of our product of square matrices and of tfjs's. */
async function multiply(size: number, order: Order): Promise<{ ours: number; tfjs: number }> {
  const make = () => tf.randomUniform([size, size], -1, 1, "float32", 7) as tf.Tensor2D, [a, b] = [make(), make()];
  const transposeA = order === "tn", transposeB = order === "nt", work = 2 * size ** 3 / 1e9;
  const rate = async (product: () => void) =>
    work / await secondsOf((repeats) => {
      for (let i = 0; i < repeats; i++) product();
    }, 3);
  const inputs = { a, b } as unknown as tf.NamedTensorMap;
  const ours = await rate(() => tf.dispose(tf.engine().runKernel("MgpoMatMul", inputs, { transposeA, transposeB })));
  const tfjs = await rate(() => tf.matMul(a, b, transposeA, transposeB).dispose());
  tf.dispose([a, b]);
  return { ours, tfjs };
}

async function matmulRow(name: string, order: Order, backend: string): Promise<Row> {
  let best = { ours: 0, tfjs: 0 }, at = 0;
  for (const size of onRealGpu() ? [1024, 2048] : [1024]) {
    const rates = await multiply(size, order);
    if (rates.ours > best.ours) [best, at] = [rates, size];
  }
  return {
    name,
    value: best.ours,
    unit: "GFLOP/s",
    ratio: best.ours / best.tfjs,
    peer: `tfjs ${backend}, ${at}²`,
    n: 3,
  };
}

/** Our matmul on large squares, f32: plain, and with either operand transposed. */
export const matmulRoof: Benchmark = {
  names: ["roof/matmul", "roof/matmul/nt", "roof/matmul/tn"],
  backends: ["webgpu"],
  run: async (backend): Promise<Row[]> => [
    await matmulRow("roof/matmul", "nn", backend),
    await matmulRow("roof/matmul/nt", "nt", backend),
    await matmulRow("roof/matmul/tn", "tn", backend),
  ],
};

/** The same on the processor. */
export const matmulRoofWasm: Benchmark = {
  names: ["roof/matmul/wasm"],
  run: async (backend): Promise<Row[]> => [await matmulRow("roof/matmul/wasm", "nn", backend)],
};
