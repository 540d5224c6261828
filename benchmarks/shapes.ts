/**
 * Policies of a given size with random weights: speed does not depend on what a model knows. On WebGPU the weights are made on the
 * device, so that a shape of several gigabytes passes neither through a file nor through the host.
 *
 * @module
 */
import { tf } from "../src/deps.ts";
import { flushTensors, webgpuBackend } from "../src/gpu/decode/memory.ts";
import { expectedTensors } from "../src/policy/checkpoint.ts";
import type { QwenConfig, TextConfig } from "../src/policy/config.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { QwenPolicy } from "../src/policy/qwen.ts";

/** The language models that benchmarks can imitate. */
export const shapeNames = ["tiny", "0.5b", "3b"] as const;
/** One of {@linkcode shapeNames}. */
export type ShapeName = typeof shapeNames[number];

const qwen = { vocabSize: 151936, rmsNormEps: 1e-6, ropeTheta: 1e6, tied: true } as const;
/** Qwen2.5-0.5B, and the language model of Qwen2.5-VL-3B. */
const texts: Record<Exclude<ShapeName, "tiny">, TextConfig> = {
  "0.5b": {
    ...{ ...qwen, hiddenSize: 896, intermediateSize: 4864, layers: 24 },
    ...{ heads: 14, kvHeads: 2, headDim: 64, mropeSection: [8, 12, 12] },
  },
  "3b": {
    ...{ ...qwen, hiddenSize: 2048, intermediateSize: 11008, layers: 36 },
    ...{ heads: 16, kvHeads: 2, headDim: 128, mropeSection: [16, 24, 24] },
  },
};

/** The configuration of a shape; all but its language model is that of the embedded policy. */
export function configOf(shape: ShapeName, tiny: QwenConfig): QwenConfig {
  if (shape === "tiny") return tiny;
  const tokens = { image: 151655, video: 151656, visionStart: 151652, visionEnd: 151653, eos: [151645] };
  return { ...tiny, text: texts[shape], tokens, generation: { suppressTokens: [] } };
}

/** Names and shapes of the language model's weights. */
export function textTensors(config: QwenConfig): [name: string, shape: readonly number[]][] {
  return [...expectedTensors(config)].filter(([name]) => !name.startsWith("visual."));
}

/** Elements of a tensor. */
export const sizeOf = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** Elements of all weights of the language model. */
export const textParameters = (config: QwenConfig): number =>
  textTensors(config).reduce((sum, [, shape]) => sum + sizeOf(shape), 0);

/** A policy, and what frees it and its device memory. */
export interface RandomPolicy {
  policy: QwenPolicy;
  release(): void;
}

/**
 * A policy with random weights on the current backend, with the tokenizer of the embedded one.
 *
 * @param options.vision Whether it has a vision tower; without one it reads text alone. @default {false}
 * @throws {RangeError} The device cannot hold the weights; nothing stays allocated.
 */
export async function randomPolicy(
  name: string,
  configFor: (tiny: QwenConfig) => QwenConfig,
  { vision = false } = {},
): Promise<RandomPolicy> {
  const tiny = await loadPolicy(), config = configFor(tiny.config), { tokenizer, processor } = tiny;
  tiny.dispose();
  const wanted = vision ? [...expectedTensors(config)] : textTensors(config);
  const { variables, release } = webgpuBackend() ? await deviceWeights(name, wanted) : hostWeights(wanted);
  const policy = new QwenPolicy({
    ...{ name, config, tokenizer, processor, parameters: variables, stopTokens: config.tokens.eos },
    suppressTokens: [config.tokens.image, config.tokens.video],
    save: () => Promise.reject(new RangeError("a policy of random weights is not worth a file")),
  });
  return {
    policy,
    release() {
      policy.dispose();
      release();
    },
  };
}

interface MadeWeights {
  variables: Map<string, tf.Variable>;
  release(): void;
}

/** Norms are 1; all else is uniform about 0, narrow enough that activations stay near 1. */
function spread(name: string, shape: readonly number[]): { base: number; width: number } {
  if (/norm|ln_q/.test(name)) return { base: 1, width: 0 };
  return { base: 0, width: name.endsWith("bias") ? 0.02 : 1 / Math.sqrt(sizeOf(shape.slice(1))) };
}

function variableOf(tensor: tf.Tensor): tf.Variable {
  const variable = tf.variable(tensor, true);
  tensor.dispose();
  return variable;
}

function hostWeights(wanted: readonly [string, readonly number[]][]): MadeWeights {
  const variables = new Map(wanted.map(([name, shape], i) => {
    const { base, width } = spread(name, shape);
    return [name, variableOf(tf.randomUniform([...shape], base - width, base + width, "float32", i + 1))];
  }));
  return { variables, release: () => {} };
}

/** Workgroups of the filling kernel, of 256 threads. */
const FILL_GROUPS = 2048;
const fill = /* wgsl */ `
struct Fill { size: u32, seed: u32, base: f32, width: f32 }
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<uniform> u: Fill;
fn mixed(v: u32) -> u32 { // a permutation of the words whose bits look random (PCG)
  let s = v * 747796405u + 2891336453u;
  let w = ((s >> ((s >> 28u) + 4u)) ^ s) * 277803737u;
  return (w >> 22u) ^ w;
}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3u) {
  for (var i = id.x; i < u.size; i += ${FILL_GROUPS * 256}u) {
    x[i] = u.base + u.width * (f32(mixed(i ^ mixed(u.seed))) * 4.656612873077393e-10 - 1.0);
  }
}`;

/** Buffers that are given to TensorFlow.js without a copy, so they can be destroyed: its own pool keeps what it once had. */
async function deviceWeights(policy: string, wanted: readonly [string, readonly number[]][]): Promise<MadeWeights> {
  const backend = webgpuBackend()!, { device } = backend, { STORAGE, COPY_SRC, COPY_DST } = GPUBufferUsage;
  const bytes = wanted.map(([, shape]) => Math.max(16, 4 * sizeOf(shape)));
  const total = `${(bytes.reduce((a, b) => a + b, 0) / 1e9).toFixed(2)} GB`, most = device.limits.maxBufferSize;
  const large = bytes.findIndex((size) => size > most);
  if (large >= 0) {
    throw new RangeError(`${policy}: ${wanted[large][0]} takes ${bytes[large]} bytes, but the adapter allows ${most}`);
  }
  const buffers: GPUBuffer[] = [];
  device.pushErrorScope("out-of-memory");
  for (const size of bytes) buffers.push(device.createBuffer({ size, usage: STORAGE | COPY_SRC | COPY_DST }));
  const release = () => {
    // What tfjs has recorded and not yet submitted may still name them.
    flushTensors(backend);
    for (const buffer of buffers) buffer.destroy();
  };
  if (await device.popErrorScope()) {
    release();
    throw new RangeError(`${policy}: the device has no room for weights of ${total}`);
  }
  flushTensors(backend);
  const fillBuffer = filler(device);
  const variables = new Map<string, tf.Variable>();
  wanted.forEach(([name, shape], i) => {
    fillBuffer(buffers[i], sizeOf(shape), i, spread(name, shape));
    const data = { buffer: buffers[i], zeroCopy: true };
    variables.set(name, variableOf(tf.tensor(data, [...shape], "float32")));
  });
  return { variables, release };
}

/** Fills buffers, piece by piece where one is larger than a binding may be. */
function filler(device: GPUDevice) {
  const module = device.createShaderModule({ code: fill });
  const pipeline = device.createComputePipeline({ layout: "auto", compute: { module, entryPoint: "main" } });
  const layout = pipeline.getBindGroupLayout(0);
  const most = Math.floor(device.limits.maxStorageBufferBindingSize / 256) * 256;
  return (buffer: GPUBuffer, size: number, number: number, { base, width }: { base: number; width: number }) => {
    for (let offset = 0; offset < 4 * size; offset += most) {
      const bytes = Math.min(most, 4 * size - offset), words = new Uint32Array([bytes / 4, number * 97 + offset, 0, 0]);
      new Float32Array(words.buffer).set([base, width], 2);
      const uniform = device.createBuffer({ size: 16, usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST });
      device.queue.writeBuffer(uniform, 0, words);
      const entries = [
        { binding: 0, resource: { buffer, offset, size: bytes } },
        { binding: 1, resource: { buffer: uniform } },
      ];
      const encoder = device.createCommandEncoder(), pass = encoder.beginComputePass();
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, device.createBindGroup({ layout, entries }));
      pass.dispatchWorkgroups(Math.min(FILL_GROUPS, Math.ceil(bytes / 1024)));
      pass.end();
      device.queue.submit([encoder.finish()]);
      uniform.destroy();
    }
  };
}
