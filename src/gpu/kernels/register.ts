/**
 * Registers our WGSL kernels with the `webgpu` backend of TensorFlow.js.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { adamw } from "./adamw.ts";
import { attention } from "./attention.ts";
import { attentionGrad } from "./attention_grad.ts";
import { gather } from "./gather.ts";
import { gelu } from "./gelu.ts";
import { logprob } from "./logprob.ts";
import { matmul } from "./matmul.ts";
import { norm } from "./norm.ts";
import { rope } from "./rope.ts";
import { attach, type Backend, type Kernel, runKernel } from "./runtime.ts";
import { sums } from "./sums.ts";
import { swiglu } from "./swiglu.ts";

const kernels: readonly Kernel[] = [
  matmul,
  gather,
  attention,
  attentionGrad,
  norm,
  swiglu,
  rope,
  logprob,
  gelu,
  sums,
  adamw,
].flat();

const attached = new WeakMap<object, Backend>();

function backendOf(backend: object): Backend {
  let known = attached.get(backend);
  if (known === undefined) attached.set(backend, known = attach(backend));
  return known;
}

/** The names of all kernels that {@link installWebgpuKernels} registers. */
export const webgpuKernelNames: readonly string[] = kernels.map(({ name }) => name);

/**
 * Makes the kernels available to `tf.engine().runKernel(name, inputs, attrs)` whenever `webgpu` is the current backend. Idempotent;
 * needs no backend to be ready: a shader is compiled when its first call runs.
 *
 * The kernels have no registered gradients: call them inside `tf.customGrad`. Inputs are contiguous float32 (int32 for
 * indices) tensors; a wrong shape, dtype or attribute is a RangeError that names the kernel, and so is a wrong index where the
 * host still has it.
 */
export function installWebgpuKernels(): void {
  for (const kernel of kernels) {
    if (tf.getKernel(kernel.name, "webgpu") !== undefined) continue;
    tf.registerKernel({
      kernelName: kernel.name,
      backendName: "webgpu",
      kernelFunc: ({ inputs, backend, attrs }) =>
        runKernel(kernel, backendOf(backend as object), inputs, (attrs ?? {}) as Record<string, unknown>),
    });
  }
}
