/**
 * Starts the WebAssembly backend of TensorFlow.js on memory that other threads may use.
 *
 * The backend has a threaded build, but it does not fit Deno: it insists on eight workers of its own, whose start fails, and it
 * asks for permission to count the processors. Its plain SIMD build computes the same and differs, for our purpose, in one flag: its
 * memory is declared as unshared. So that flag is set in the binary on its way into the engine; every instruction stays as it
 * is, hence every result. Evidence: tfjs-backend-wasm 4.22 (pinned in `deps.ts`) compiles by one call of `WebAssembly.instantiate` with bytes,
 * defines its memory itself, and with a maximum, as shared memory must have.
 *
 * @module
 */

/** The section of a binary that defines memories. */
const MEMORY_SECTION = 5;
/** Limits of a memory: only a minimum is 0, with a maximum 1, shared (always with a maximum) 3. */
const WITH_MAXIMUM = 1, SHARED = 3;

/** Reads an unsigned LEB128 number: the number and the position after it. */
function readLeb(bytes: Uint8Array, at: number): [value: number, next: number] {
  let value = 0, shift = 0;
  for (;; shift += 7) {
    const byte = bytes[at++];
    value += (byte & 0x7f) * 2 ** shift;
    if (byte < 0x80) return [value, at];
  }
}

/**
 * A copy of a WebAssembly binary whose memory is declared as shared.
 *
 * @returns undefined where the binary defines no memory, or one without a maximum.
 */
export function withSharedMemory(binary: Uint8Array): Uint8Array<ArrayBuffer> | undefined {
  const HEADER = 8;
  for (let at = HEADER; at < binary.length;) {
    const id = binary[at], [size, content] = readLeb(binary, at + 1);
    if (id === MEMORY_SECTION) {
      const [count, limits] = readLeb(binary, content);
      if (count !== 1 || binary[limits] !== WITH_MAXIMUM) return undefined;
      const copy = new Uint8Array(binary);
      copy[limits] = SHARED;
      return copy;
    }
    at = content + size;
  }
  return undefined;
}

type Instantiate = (source: BufferSource | WebAssembly.Module, imports?: WebAssembly.Imports) => Promise<unknown>;

/** Whether the binary is that of the backend: another one that starts meanwhile is left alone. */
const isBackend = (bytes: Uint8Array): boolean => new TextDecoder("latin1").decode(bytes).includes("register_tensor");

/**
 * Runs `start`, which starts the backend, and gives it shared memory. Where the engine has none or refuses it, the backend starts
 * as it always does.
 */
export async function startShared<T>(start: () => Promise<T>): Promise<T> {
  if (typeof SharedArrayBuffer !== "function") return await start();
  const engine = WebAssembly as { instantiate: Instantiate }, { instantiate } = engine;
  engine.instantiate = async (source, imports) => {
    if (!ArrayBuffer.isView(source) && !(source instanceof ArrayBuffer)) return await instantiate(source, imports);
    const bytes = ArrayBuffer.isView(source)
      ? new Uint8Array(source.buffer, source.byteOffset, source.byteLength)
      : new Uint8Array(source);
    const shared = isBackend(bytes) ? withSharedMemory(bytes) : undefined;
    if (shared === undefined) return await instantiate(source, imports);
    try {
      return await instantiate(shared, imports);
    } catch {
      return await instantiate(source, imports);
    }
  };
  try {
    return await start();
  } finally {
    engine.instantiate = instantiate;
  }
}
