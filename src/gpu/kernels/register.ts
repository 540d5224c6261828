/**
 * Registers our WGSL kernels with the `webgpu` backend of TensorFlow.js.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { add, addsLarge } from "./add.ts";
import { adamw } from "./adamw.ts";
import { arena } from "./arena.ts";
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
  add,
  adamw,
  arena,
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
  if (tf.getKernel(add[0].name, "webgpu") === undefined) installLargeAdd();
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

/** Puts `MgpoAdd` before `Add` of TensorFlow.js, for tensors that it cannot bind. */
function installLargeAdd(): void {
  const plain = tf.getKernel("Add", "webgpu");
  if (plain === undefined) return;
  tf.unregisterKernel("Add", "webgpu");
  tf.registerKernel({
    ...plain,
    kernelFunc: (given) => {
      const { a, b } = given.inputs, backend = backendOf(given.backend as object);
      const isLarge = a !== undefined && b !== undefined && addsLarge(backend.device, a, b);
      return isLarge ? runKernel(add[0], backend, { a, b }, {}) : plain.kernelFunc(given);
    },
  });
}
