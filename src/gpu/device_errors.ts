/**
 * What happens when the machine gives up in the middle of a computation: a lost device, an error that the device reports to nobody
 * in particular, full memory. All of it ends as one {@link MachineError}, before a result of that computation is written.
 *
 * A device tells of such errors in events, which arrive between tasks: whoever is about to write results calls {@link checkDevice}
 * first. TensorFlow.js ignores these events, and results that follow one may be zeros.
 *
 * @module
 */
import { tf, tfwebgpu } from "../deps.ts";
import { InputError } from "../run/errors.ts";

/** The machine gave up; what was computed since the last checkpoint is void. */
export class MachineError extends InputError {
  override name = "MachineError";
}

/** A tensor or buffer is larger than the machine allows, or there is no room for it. */
export class MemoryLimitError extends RangeError {
  override name = "MemoryLimitError";
}

const failures = new WeakMap<GPUDevice, string>();
const watched = new WeakSet<GPUDevice>();

/** The device of the current backend, if it is WebGPU. */
function currentDevice(): GPUDevice | undefined {
  const backend = tf.backend();
  return backend instanceof tfwebgpu.WebGPUBackend ? backend.device : undefined;
}

/**
 * Keeps what the current backend's device reports; without WebGPU does nothing.
 *
 * @param report Called with the first report; the others are its consequences.
 */
export function watchDevice(report: (message: string) => void): void {
  const device = currentDevice();
  if (!device || watched.has(device)) return;
  watched.add(device);
  const failed = (message: string) => {
    if (failures.has(device)) return;
    failures.set(device, message);
    // Whoever has moved on to another device isn't concerned.
    if (currentDevice() === device) report(message);
  };
  device.lost.then(({ reason, message }) => failed(`the GPU device was lost: ${message || reason}`));
  device.addEventListener("uncapturederror", (event) => {
    const { error } = event as GPUUncapturedErrorEvent;
    failed(
      error instanceof GPUOutOfMemoryError
        ? `the GPU is out of memory: ${error.message}`
        : `the GPU reported an error: ${error.message}`,
    );
  });
}

/** What the current device reported first, if it has reported anything. */
export function deviceFailure(): string | undefined {
  const device = currentDevice();
  return device && failures.get(device);
}

/** Lets the events in that tell of errors so far: they are dispatched as tasks. */
const events = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 0));

/**
 * Checks that the device has reported no error so far. Costs a turn of the event loop on WebGPU and nothing elsewhere.
 *
 * @throws {MachineError} It has: results of the present step must not be used.
 */
export async function checkDevice(): Promise<void> {
  if (!currentDevice()) return;
  await events();
  const failure = deviceFailure();
  if (failure !== undefined) throw new MachineError(failure);
}

/**
 * What an error of a computation means: a {@link MachineError} where the machine gave up, otherwise the error itself.
 *
 * @param error As caught.
 */
export async function machineError(error: unknown): Promise<unknown> {
  if (error instanceof MachineError) return error;
  if (currentDevice()) await events();
  const failure = deviceFailure();
  if (failure !== undefined) return new MachineError(failure, { cause: error });
  if (error instanceof MemoryLimitError) return new MachineError(error.message, { cause: error });
  // What is allocated inside the module of TensorFlow.js ends in abort(), after which it must not be used.
  if (error instanceof WebAssembly.RuntimeError && tf.getBackend() === "wasm") {
    const message = `the WebAssembly backend broke down (${error.message.split("\n")[0]}), as it does when its ` +
      "4 GiB of memory are full; use smaller batches (--tokens-per-pass, --group-size, --prompts) or shorter prompts";
    return new MachineError(message, { cause: error });
  }
  return error;
}
