/**
 * Registers our WebAssembly kernels with the `wasm` backend of TensorFlow.js.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { adamw } from "./adamw.ts";
import { attention } from "./attention.ts";
import { attentionGrad } from "./attention_grad.ts";
import { decode } from "./decode.ts";
import { gather } from "./gather.ts";
import { gelu } from "./gelu.ts";
import { logprob } from "./logprob.ts";
import { matmul } from "./matmul.ts";
import { ModuleBuilder } from "./module.ts";
import { norm } from "./norm.ts";
import { emitParts } from "./parts.ts";
import { rope } from "./rope.ts";
import { attach, type Instance, type Kernel, KernelCall, type KernelFile } from "./runtime.ts";
import { sums } from "./sums.ts";
import { swiglu } from "./swiglu.ts";

const files: readonly KernelFile[] = [
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
  decode,
];

let compiled: WebAssembly.Module | undefined;
const instances = new WeakMap<object, Instance>();

function compile(): WebAssembly.Module {
  const m = new ModuleBuilder();
  const parts = emitParts(m);
  for (const file of files) file.emit(m, parts);
  return new WebAssembly.Module(m.bytes());
}

function instanceFor(backend: object): Instance {
  let instance = instances.get(backend);
  if (instance === undefined) {
    compiled ??= compile();
    instance = attach(backend, compiled);
    instances.set(backend, instance);
  }
  return instance;
}

/** The names of all kernels that {@link installWasmKernels} registers. */
export const wasmKernelNames: readonly string[] = files.flatMap(({ kernels }) => kernels.map(({ name }) => name));

function register({ name, run }: Kernel): void {
  tf.registerKernel({
    kernelName: name,
    backendName: "wasm",
    kernelFunc: ({ inputs, backend, attrs }) =>
      run(new KernelCall(name, instanceFor(backend as object), inputs, (attrs ?? {}) as Record<string, unknown>)),
  });
}

/**
 * Makes the kernels available to `tf.engine().runKernel(name, inputs, attrs)` whenever `wasm` is the current backend. Idempotent;
 * needs no backend to be ready: the module is compiled for a backend when its first kernel runs.
 *
 * The kernels have no registered gradients: call them inside `tf.customGrad`. Inputs are contiguous float32 (int32 for
 * indices) tensors; a wrong shape, dtype, attribute or index is a RangeError that names the kernel.
 */
export function installWasmKernels(): void {
  for (const kernel of files.flatMap(({ kernels }) => kernels)) {
    if (tf.getKernel(kernel.name, "wasm") === undefined) register(kernel);
  }
}
