/**
 * How much memory tensors take, and a bound on it.
 *
 * On WebGPU every buffer of the device counts, whoever made it: those of TensorFlow.js, in use or kept for later, the generation
 * engine's, the kernels'. On WebAssembly it is the size of the linear memory, which never shrinks.
 *
 * **Why this wraps TensorFlow.js.** Its WebGPU buffer manager keeps every freed buffer for a later tensor of exactly the same size, without a
 * bound, so memory grows with each new length (`dist/buffer_manager.js` of tfjs-backend-webgpu 4.22, pinned in `deps.ts`; a test shows
 * it). {@link DeviceMemoryUse} lets the buffers unused for longest go as soon as all buffers together would exceed {@link BOUND} times the most
 * that was ever in use at once. It also counts, because the manager reports no peak. It can go when TensorFlow.js bounds its pool and
 * reports a peak.
 *
 * **Why destroying them is safe.** A tensor that a recorded command uses is given back after that command's submission only, but one that
 * was just uploaded may be given back before it (`uploadToGPU` records a copy without marking the tensor). So a buffer goes only when a
 * submission has passed since it was freed; the device itself waits for submitted work.
 *
 * @module
 */
import { tf } from "../deps.ts";

/** The parts of a WebGPU backend of TensorFlow.js 4.22 that are read or wrapped. */
interface PoolingBackend {
  readonly device: GPUDevice;
  readonly bufferManager: BufferPool;
  submitQueue(): void;
}

interface BufferPool {
  numFreeBuffers: number;
  numBytesAllocated: number;
  readonly numBytesUsed: number;
  readonly freeBuffers: Map<string, GPUBuffer[]>;
  readonly usedBuffers: Map<string, GPUBuffer[]>;
  acquireBuffer(size: number, usage: number, mappedAtCreation?: boolean, reuse?: boolean): GPUBuffer;
  releaseBuffer(buffer: GPUBuffer, reuse?: boolean): void;
}

/** All buffers may take this much more than the most that was ever in use at once. */
export const BOUND = 1.5;
/** Below this the pool is left alone: small runs are to re-use everything. */
export const LEAST_BOUND = 32 * 2 ** 20;

const keyOf = (size: number, usage: number): string => `${size}_${usage}`;

/** Counts the buffers of a device and bounds those that TensorFlow.js keeps. */
export class DeviceMemoryUse {
  readonly #pool: BufferPool;
  /** Freed buffers, the one unused for longest first, with the number of submissions before they were freed. */
  readonly #freed = new Map<GPUBuffer, number>();
  readonly #least: number;
  #bytes = 0;
  #peak = 0;
  #mostUsed = 0;
  #submissions = 0;

  static readonly #byBackend = new WeakMap<object, DeviceMemoryUse>();

  /**
   * The count of a backend; made, and the bound set up, by the first call.
   *
   * @param least Bytes below which nothing is let go; infinite for no bound. Read by the first call. @default {LEAST_BOUND}
   * @returns undefined if the backend is not a WebGPU backend as TensorFlow.js 4.22 builds them.
   */
  static of(backend: object, least: number = LEAST_BOUND): DeviceMemoryUse | undefined {
    const { device, bufferManager, submitQueue } = backend as Partial<PoolingBackend>;
    const fits = device !== undefined && typeof submitQueue === "function" &&
      bufferManager?.freeBuffers instanceof Map && bufferManager.usedBuffers instanceof Map &&
      typeof bufferManager.numBytesAllocated === "number";
    if (!fits) return undefined;
    let found = DeviceMemoryUse.#byBackend.get(backend);
    if (!found) {
      found = new DeviceMemoryUse(backend as PoolingBackend, least);
      DeviceMemoryUse.#byBackend.set(backend, found);
    }
    return found;
  }

  private constructor(backend: PoolingBackend, least: number) {
    this.#pool = backend.bufferManager;
    this.#least = least;
    this.#countDevice(backend.device);
    this.#boundPool();
    const submit = backend.submitQueue.bind(backend);
    backend.submitQueue = () => {
      submit();
      this.#submissions++;
    };
  }

  /** Bytes of all buffers that were made and not destroyed. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Bytes of buffers that TensorFlow.js keeps for later tensors. */
  get poolBytes(): number {
    return this.#pool.numBytesAllocated - this.#pool.numBytesUsed;
  }

  /** The most that {@link bytes} was since {@link restartPeak}, or ever. */
  get peakBytes(): number {
    return this.#peak;
  }

  /** Begins a new measurement of the peak. */
  restartPeak(): void {
    this.#peak = this.#bytes;
  }

  #countDevice(device: GPUDevice): void {
    for (const buffers of [...this.#pool.freeBuffers.values(), ...this.#pool.usedBuffers.values()]) {
      buffers.forEach((buffer) => this.#count(buffer));
    }
    for (const buffers of this.#pool.freeBuffers.values()) for (const buffer of buffers) this.#freed.set(buffer, -1);
    const create = device.createBuffer.bind(device);
    device.createBuffer = (descriptor) => this.#count(create(descriptor));
  }

  #count(buffer: GPUBuffer): GPUBuffer {
    const destroy = buffer.destroy.bind(buffer), { size } = buffer;
    let isLive = true;
    this.#bytes += size;
    this.#peak = Math.max(this.#peak, this.#bytes);
    buffer.destroy = () => {
      if (isLive) this.#bytes -= size;
      isLive = false;
      destroy();
    };
    return buffer;
  }

  #boundPool(): void {
    const pool = this.#pool, acquire = pool.acquireBuffer.bind(pool), release = pool.releaseBuffer.bind(pool);
    pool.acquireBuffer = (size, usage, mappedAtCreation = false, reuse = true) => {
      if (!reuse || !pool.freeBuffers.get(keyOf(size, usage))?.length) this.#makeRoom(size);
      const buffer = acquire(size, usage, mappedAtCreation, reuse);
      this.#freed.delete(buffer);
      this.#mostUsed = Math.max(this.#mostUsed, this.#bytes - this.poolBytes);
      return buffer;
    };
    pool.releaseBuffer = (buffer, reuse = true) => {
      release(buffer, reuse);
      if (reuse) this.#freed.set(buffer, this.#submissions);
    };
  }

  /** Lets pooled buffers go where `size` more bytes would exceed the bound. */
  #makeRoom(size: number): void {
    const used = this.#bytes - this.poolBytes + size;
    const bound = Math.max(this.#least, BOUND * Math.max(this.#mostUsed, used));
    for (const [buffer, submissions] of this.#freed) {
      // The others were freed later still.
      if (this.#bytes + size <= bound || submissions === this.#submissions) return;
      this.#drop(buffer);
    }
  }

  #drop(buffer: GPUBuffer): void {
    const { size, usage } = buffer, kept = this.#pool.freeBuffers.get(keyOf(size, usage)) ?? [];
    const at = kept.indexOf(buffer);
    this.#freed.delete(buffer);
    if (at < 0) return;
    kept.splice(at, 1);
    this.#pool.numFreeBuffers--;
    this.#pool.numBytesAllocated -= size;
    buffer.destroy();
  }
}

/** What the current backend's tensors take, in bytes. */
export interface MemoryUse {
  /** The most since {@linkcode restartMemoryPeak}: of all device buffers, or the linear memory of WebAssembly. */
  peakBytes: number;
  /** WebGPU: bytes of buffers that are free and kept for later tensors, now. */
  poolBytes?: number;
}

/** Begins a new measurement of the peak on the current backend. */
export function restartMemoryPeak(): void {
  DeviceMemoryUse.of(tf.backend())?.restartPeak();
}

/** The memory that the current backend takes; undefined on a backend that tells nothing. */
export function memoryUse(): MemoryUse | undefined {
  const backend = tf.backend(), device = DeviceMemoryUse.of(backend);
  if (device) return { peakBytes: device.peakBytes, poolBytes: device.poolBytes };
  const { wasm } = backend as { wasm?: { asm?: { memory?: WebAssembly.Memory } } };
  return wasm?.asm?.memory && { peakBytes: wasm.asm.memory.buffer.byteLength };
}
