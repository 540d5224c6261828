/**
 * An end to allocations that fail silently.
 *
 * tfjs-backend-wasm 4.22 (pinned in `deps.ts`) takes what `malloc` returns as the address of a tensor, also 0, which is how `malloc` says
 * that there is no room: the tensor then lies over the module's own data, results are wrong, and sooner or later it breaks down (tried by
 * filling the memory; a test shows it). {@link guardAllocation} lets such an allocation throw instead. It can go when TensorFlow.js
 * checks the address.
 *
 * @module
 */
import { MemoryLimitError } from "../gpu/device_errors.ts";

/** Bytes that the backend's memory can have: `getHeapMax()` of its glue code, 4 GiB less one page. */
export const MOST_WASM_BYTES = 4_294_901_760;

interface Allocating {
  readonly wasm?: {
    _malloc(bytes: number): number;
    _free(address: number): void;
    readonly asm: { readonly memory: WebAssembly.Memory };
  };
}

const guarded = new WeakSet<object>();

/** Lets allocations of a WebAssembly backend throw a {@link MemoryLimitError} where there is no room. Idempotent. */
export function guardAllocation(backend: object): void {
  const { wasm } = backend as Allocating;
  if (!wasm || guarded.has(wasm)) return;
  guarded.add(wasm);
  // The first calls replace these functions by those of the module.
  wasm._free(wasm._malloc(16));
  const allocate = wasm._malloc;
  wasm._malloc = (bytes) => {
    const address = allocate(bytes);
    if (address === 0 && bytes > 0) throw full(bytes, wasm.asm.memory.buffer.byteLength);
    return address;
  };
}

function full(bytes: number, size: number): MemoryLimitError {
  const mebibytes = (n: number) => (n / 2 ** 20).toFixed(n < 2 ** 20 ? 3 : 0);
  return new MemoryLimitError(
    `WebAssembly memory is full: ${mebibytes(bytes)} MiB more were asked for, it has grown to ${mebibytes(size)} of ` +
      `${
        mebibytes(MOST_WASM_BYTES)
      } MiB; use smaller batches (--tokens-per-pass, --group-size, --prompts) or shorter prompts`,
  );
}
