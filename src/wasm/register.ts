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
import { attach, type Instance, isShared, type Kernel, KernelCall, type KernelFile, LEAST_COST } from "./runtime.ts";
import { sums } from "./sums.ts";
import { swiglu } from "./swiglu.ts";
import { ThreadTeam } from "./threads.ts";

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

/** The module, for memory that is shared and for memory that isn't. */
const compiled = new Map<boolean, WebAssembly.Module>();
const instances = new WeakMap<object, Instance>();

function compile(sharedMemory: boolean): WebAssembly.Module {
  let module = compiled.get(sharedMemory);
  if (module === undefined) {
    const m = new ModuleBuilder();
    const parts = emitParts(m);
    for (const file of files) file.emit(m, parts);
    module = new WebAssembly.Module(m.bytes({ sharedMemory }));
    compiled.set(sharedMemory, module);
  }
  return module;
}

function instanceFor(backend: object): Instance {
  let instance = instances.get(backend);
  if (instance === undefined) {
    instance = attach(backend, compile);
    instances.set(backend, instance);
  }
  return instance;
}

/** What {@link useWasmThreads} could do. */
export interface ThreadsInUse {
  /** Threads that compute from here on, the calling one counted. */
  readonly threads: number;
  /** Why they are fewer than asked for, in one line; absent where they aren't. */
  readonly notice?: string;
}

/** The backend whose kernels have threads, if any: one at a time. */
let threaded: Instance | undefined;

/** The threads that {@link useWasmThreads} started; undefined while there is one thread only. */
export function wasmThreads(): ThreadTeam | undefined {
  return threaded?.team;
}

/**
 * Gives the kernels of the current backend, `wasm`, so many threads. More than one need memory that is shared: see `startShared`. Results
 * do not depend on the number. The threads do not keep the process alive; 1 ends them.
 *
 * @param threads 1 or more.
 * @param options.leastCost Work below which a kernel is not shared out, in nanoseconds; 0, for tests, always shares out. @default {30000}
 */
export async function useWasmThreads(threads: number, options: { leastCost?: number } = {}): Promise<ThreadsInUse> {
  const instance = instanceFor(tf.backend());
  instance.leastCost = options.leastCost ?? LEAST_COST;
  if (threads > 1 && instance.team?.threads === threads && !instance.team.isLost) return { threads };
  const old = threaded?.team;
  if (threaded) threaded.team = undefined;
  await old?.stop();
  if (threads <= 1) return { threads: 1 };
  if (!isShared(instance.memory)) {
    return { threads: 1, notice: "one thread: the wasm backend was started without shared memory" };
  }
  try {
    const { memory, functions } = instance;
    instance.team = await ThreadTeam.start({ module: compile(true), memory, functions, threads });
    threaded = instance;
    return { threads };
  } catch (error) {
    const why = error instanceof Error ? error.message.split("\n")[0] : String(error);
    return { threads: 1, notice: `one thread: the others could not be started (${why})` };
  }
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
