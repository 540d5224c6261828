/**
 * What the tests and the benchmark of the generation engine share: a WebGPU backend or a reason to skip, and the engine run
 * behind the prefill of a policy.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { gatherRows, segmentsOf } from "../../policy/ops.ts";
import type { GenerateOptions, Sequence } from "../../policy/policy.ts";
import type { QwenPolicy } from "../../policy/qwen.ts";
import { head } from "../../policy/text.ts";
import { RandomStream } from "../../random.ts";
import { chooseBackend } from "../backend.ts";
import { guarded, Pipelines, webgpuBackend } from "./memory.ts";
import { nucleusShare } from "./nucleus.ts";
import { type Kernel, STEP_STRIDE } from "./wgsl.ts";
import type { DecodeEngine, DecodeInput, DecodeOutput } from "./engine.ts";

/** Whether WebGPU runs now; says so where it does not. */
export async function startWebgpu(): Promise<boolean> {
  if (!await navigator.gpu?.requestAdapter()) {
    console.log("skipped: no WebGPU adapter; the software one of Mesa (mesa-vulkan-drivers) is enough");
    return false;
  }
  if (tf.getBackend() !== "webgpu") await chooseBackend("webgpu");
  return true;
}

/** The prompts' keys, values and last logits, as generation prefills them; {@linkcode release} frees them. */
export function prefill(policy: QwenPolicy, sequences: readonly Sequence[]) {
  const k: tf.Tensor3D[] = [], v: tf.Tensor3D[] = [], packed = policy.pack(sequences);
  const firstLogits = tf.tidy(() => {
    const keysValues = (_layer: number, key: tf.Tensor3D, value: tf.Tensor3D) => {
      k.push(tf.keep(key.clone()));
      v.push(tf.keep(value.clone()));
    };
    const hidden = policy.hidden(packed, false, { keysValues });
    const ends = segmentsOf(packed.lengths).cu.slice(1).map((end) => end - 1);
    return head(policy.config, policy.weights, gatherRows(hidden, ends));
  });
  const release = () => tf.dispose([...k, ...v, firstLogits]);
  return { k, v, firstLogits, lengths: packed.lengths, nextPosition: packed.index.map(({ next }) => next), release };
}

/** Generates as the policy does, with the engine in the place of its loop. */
export async function generateWith(
  engine: DecodeEngine,
  policy: QwenPolicy,
  sequences: readonly Sequence[],
  options: GenerateOptions & Pick<DecodeInput, "checkEvery">,
): Promise<DecodeOutput> {
  const suppressed = new Uint8Array(policy.config.text.vocabSize);
  for (const id of options.suppressTokens ?? policy.suppressTokens) suppressed[id] = 1;
  const { release, ...prompts } = prefill(policy, sequences);
  try {
    return await engine.generate({
      ...prompts,
      keys: options.keys ?? sequences.map((_, i) => [0, i, 0] as const),
      seed: options.seed ?? 0,
      temperature: options.temperature ?? 1,
      topP: options.topP,
      suppressed,
      stop: new Set(options.stopTokens ?? policy.stopTokens),
      maxNewTokens: options.maxNewTokens,
      checkEvery: options.checkEvery,
      onToken: options.onToken,
    });
  } finally {
    release();
  }
}

/** The words of a step record. */
export function stepRecord(
  step: number,
  slots: number,
  seed: readonly [number, number],
  scale: number,
  topP = 1,
): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(STEP_STRIDE / 4), { share, fromTop } = nucleusShare(topP);
  words.set([step, slots, ...seed]);
  new Float32Array(words.buffer).set([scale, share], 4);
  words[6] = Number(fromTop);
  return words;
}

/** Dispatches a kernel once on given contents and gives back those of the bindings that it may write, by index. */
export async function runKernel(
  kernel: Kernel,
  contents: readonly (Float32Array<ArrayBuffer> | Uint32Array<ArrayBuffer>)[],
  x: number,
  y: number,
): Promise<Map<number, ArrayBuffer>> {
  const { device } = webgpuBackend()!, { UNIFORM, STORAGE, COPY_DST, COPY_SRC, MAP_READ } = GPUBufferUsage;
  const buffers = contents.map((data, i) => {
    const use = kernel.bindings[i] === "step" ? UNIFORM : STORAGE;
    const buffer = device.createBuffer({ size: Math.max(16, data.byteLength), usage: use | COPY_DST | COPY_SRC });
    device.queue.writeBuffer(buffer, 0, data);
    return buffer;
  });
  const written = new Map<number, GPUBuffer>();
  await guarded(device, kernel.key, () => {
    const pipelines = Pipelines.of(device), compiled = pipelines.get(kernel), encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    pass.setPipeline(compiled.pipeline);
    pass.setBindGroup(0, pipelines.bind(compiled, kernel, buffers), compiled.stepped ? [0] : []);
    pass.dispatchWorkgroups(x, y);
    pass.end();
    kernel.bindings.forEach((kind, i) => {
      if (kind !== "write") return;
      const staging = device.createBuffer({ size: buffers[i].size, usage: MAP_READ | COPY_DST });
      encoder.copyBufferToBuffer(buffers[i], 0, staging, 0, buffers[i].size);
      written.set(i, staging);
    });
    device.queue.submit([encoder.finish()]);
  });
  const out = new Map<number, ArrayBuffer>();
  for (const [i, staging] of written) {
    await staging.mapAsync(GPUMapMode.READ);
    out.set(i, staging.getMappedRange().slice(0));
    staging.destroy();
  }
  for (const buffer of buffers) buffer.destroy();
  return out;
}

/** Normal numbers times `scale`, named by a seed. */
export function normals(count: number, seed: number, scale = 1): Float32Array<ArrayBuffer> {
  const stream = new RandomStream(seed, "kernel test");
  return Float32Array.from({ length: count }, () => stream.normal() * scale);
}
