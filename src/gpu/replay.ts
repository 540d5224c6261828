/**
 * Replay of recorded dispatches: when an update repeats with equal shapes, its dispatches find the bind groups and uniform buffers of
 * the time before instead of making them again, which is most of what recording a dispatch costs.
 *
 * What a dispatch binds is immutable here: a uniform buffer is written once and found again by its bytes, a bind group by its layout and
 * the buffers in it. So a replayed dispatch is the one that would have been made anyway: what the host uploads may change freely,
 * other shapes find nothing and are recorded in their turn, and there is nothing that could go stale. For the buffers to be the same
 * ones again, the pool of TensorFlow.js hands out the oldest free buffer of a size instead of the one freed last: what an allocation gets
 * then depends on which buffers are free, not on the order in which they became so.
 *
 * Evidence: tfjs-backend-webgpu 4.22 (pinned in `deps.ts`), whose `makeUniforms`, `recordAndSubmit` and buffer pool are wrapped.
 * Bound: {@link MOST} entries of each kind; the buffers in a bind group are those of the pool, which stay its own.
 *
 * @module
 */
import type { Backend } from "./kernels/runtime.ts";

interface Uniforms {
  offset: number;
  size: number;
  buffer: GPUBuffer;
}

interface BufferPool {
  readonly freeBuffers: Map<string, GPUBuffer[]>;
  readonly usedBuffers: Map<string, GPUBuffer[]>;
  acquireBuffer(size: number, usage: number, mappedAtCreation?: boolean, reuse?: boolean): GPUBuffer;
  releaseBuffer(buffer: GPUBuffer, reuse?: boolean): void;
}

/** What we wrap of the backend. */
interface ReplayedBackend extends Omit<Backend, "bufferManager"> {
  readonly bufferManager: BufferPool;
  makeUniforms(values: unknown): Uniforms;
  recordAndSubmit(program: { readonly pipeline: GPUComputePipeline }, ...rest: unknown[]): void;
}

/** How often something was found again, and how often it had to be made. */
export interface ReplayCounts {
  groupsFound: number;
  groupsMade: number;
  uniformsFound: number;
  uniformsMade: number;
}

/** The most bind groups, and the most uniform buffers, that are remembered. */
const MOST = 1 << 13;

/** Remembers what the dispatches of a backend bind. */
export class DispatchReplay {
  readonly #device: GPUDevice;
  readonly #queue: GPUQueue;
  readonly #createBindGroup: GPUDevice["createBindGroup"];
  /** Layouts, and the buffers that may be in a remembered bind group: those of the pool and our uniform buffers. */
  readonly #ids = new WeakMap<object, number>();
  #nextId = 0;
  readonly #groups = new Map<string, GPUBindGroup>();
  readonly #uniforms = new Map<string, GPUBuffer>();
  /** Forgotten uniform buffers that commands not yet submitted may use. */
  #retired: GPUBuffer[] = [];
  /** Whether anything is remembered or found. */
  enabled = true;
  /** The most entries of each kind; one more, and all are forgotten. @default {8192} */
  most = MOST;
  /** What happened so far. */
  readonly counts: ReplayCounts = { groupsFound: 0, groupsMade: 0, uniformsFound: 0, uniformsMade: 0 };

  static readonly #byBackend = new WeakMap<object, DispatchReplay>();

  /**
   * The replay of a backend; set up, and switched on, by the first call.
   *
   * @returns undefined if the backend is not a WebGPU backend as TensorFlow.js 4.22 builds them.
   */
  static of(backend: object): DispatchReplay | undefined {
    const { device, bufferManager, makeUniforms, recordAndSubmit } = backend as Partial<ReplayedBackend>;
    const fits = device !== undefined && typeof makeUniforms === "function" && typeof recordAndSubmit === "function" &&
      bufferManager?.freeBuffers instanceof Map && bufferManager.usedBuffers instanceof Map;
    if (!fits) return undefined;
    let found = DispatchReplay.#byBackend.get(backend);
    if (!found) DispatchReplay.#byBackend.set(backend, found = new DispatchReplay(backend as ReplayedBackend));
    return found;
  }

  private constructor(backend: ReplayedBackend) {
    this.#device = backend.device;
    this.#queue = backend.queue;
    this.#createBindGroup = backend.device.createBindGroup.bind(backend.device);
    this.#device.createBindGroup = (descriptor) => this.#group(descriptor);
    this.#orderPool(backend.bufferManager);
    this.#wrapPrograms(backend);
    const submit = backend.submitQueue.bind(backend);
    backend.submitQueue = () => {
      submit();
      for (const buffer of this.#retired) buffer.destroy();
      this.#retired = [];
    };
  }

  /** Keeps free buffers of a size in the order of their age, the oldest last, where the pool takes from. */
  #orderPool(pool: BufferPool): void {
    for (const buffers of [...pool.usedBuffers.values(), ...pool.freeBuffers.values()]) {
      buffers.forEach((buffer) => this.#idOf(buffer));
    }
    for (const free of pool.freeBuffers.values()) free.sort((a, b) => this.#idOf(b) - this.#idOf(a));
    const acquire = pool.acquireBuffer.bind(pool), release = pool.releaseBuffer.bind(pool);
    pool.acquireBuffer = (...request) => {
      const buffer = acquire(...request);
      this.#idOf(buffer);
      return buffer;
    };
    pool.releaseBuffer = (buffer, reuse) => {
      const { size, usage } = buffer;
      release(buffer, reuse);
      const free = pool.freeBuffers.get(`${size}_${usage}`);
      if (!this.enabled || free?.at(-1) !== buffer) return;
      free.pop();
      free.splice(this.#placeAmong(free, this.#idOf(buffer)), 0, buffer);
    };
  }

  /** How many of these buffers, the youngest first, are younger. */
  #placeAmong(free: readonly GPUBuffer[], id: number): number {
    let low = 0, high = free.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#idOf(free[middle]) > id) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  #wrapPrograms(backend: ReplayedBackend): void {
    backend.uniformBuffer = (bytes) => this.enabled ? this.#uniformBuffer(bytes) : undefined;
    const make = backend.makeUniforms;
    backend.makeUniforms = (values) => {
      if (!this.enabled) return make.call(backend, values);
      // It lays the values out, then asks `this` for a buffer and a write, which we answer in its place.
      let bytes = new ArrayBuffer(0);
      const uniforms = make.call({
        bufferManager: { acquireBuffer: () => undefined },
        queue: { writeBuffer: (_: unknown, __: number, data: ArrayBuffer) => bytes = data },
        uniformPendingDisposal: [],
      } as unknown as ReplayedBackend, values);
      return { ...uniforms, buffer: this.#uniformBuffer(bytes) };
    };
    const record = backend.recordAndSubmit.bind(backend);
    backend.recordAndSubmit = (program, ...rest) => {
      const { pipeline } = program;
      if (!Object.hasOwn(pipeline, "getBindGroupLayout")) {
        // A pipeline gives a new object for the same layout every time.
        const layout = pipeline.getBindGroupLayout(0);
        Object.defineProperty(pipeline, "getBindGroupLayout", { value: () => layout });
      }
      record(program, ...rest);
    };
  }

  #idOf(known: object): number {
    let id = this.#ids.get(known);
    if (id === undefined) this.#ids.set(known, id = this.#nextId++);
    return id;
  }

  /** A buffer with these bytes, which nobody may write. */
  #uniformBuffer(bytes: ArrayBuffer): GPUBuffer {
    const key = String.fromCharCode(...new Uint16Array(bytes));
    let buffer = this.#uniforms.get(key);
    if (buffer) {
      this.counts.uniformsFound++;
      return buffer;
    }
    this.counts.uniformsMade++;
    if (this.#uniforms.size >= this.most) this.forget();
    buffer = this.#device.createBuffer({
      size: bytes.byteLength,
      usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST,
    });
    this.#queue.writeBuffer(buffer, 0, bytes);
    this.#idOf(buffer);
    this.#uniforms.set(key, buffer);
    return buffer;
  }

  #group(descriptor: GPUBindGroupDescriptor): GPUBindGroup {
    const key = this.enabled ? this.#keyOf(descriptor) : undefined;
    if (key === undefined) return this.#createBindGroup(descriptor);
    let group = this.#groups.get(key);
    if (group) {
      this.counts.groupsFound++;
      return group;
    }
    this.counts.groupsMade++;
    if (this.#groups.size >= this.most) this.#groups.clear();
    group = this.#createBindGroup(descriptor);
    this.#groups.set(key, group);
    return group;
  }

  /** Names a bind group of buffers of the pool; undefined for any other, whose buffers a remembered group would keep alive. */
  #keyOf({ layout, entries }: GPUBindGroupDescriptor): string | undefined {
    let key = `${this.#idOf(layout)}`;
    for (const { binding, resource } of entries) {
      const { buffer, offset = 0, size = "" } = resource as Partial<GPUBufferBinding>;
      const id = buffer && this.#ids.get(buffer);
      if (id === undefined) return undefined;
      key += `|${binding},${id},${offset},${size}`;
    }
    return key;
  }

  /** Entries of both kinds. */
  get size(): number {
    return this.#groups.size + this.#uniforms.size;
  }

  /** Forgets everything. */
  forget(): void {
    this.#groups.clear();
    this.#retired.push(...this.#uniforms.values());
    this.#uniforms.clear();
  }
}
