/**
 * A pass (forward, loss, backward) as a recorded list of GPU commands: pipelines, bind groups and grids in order, with the buffers that
 * they bind. To do the pass again, what the host made is written into the recorded buffers and the list is encoded again, without
 * TensorFlow.js: no tape, no shader keys, no tensors.
 *
 * **What is recorded.** While the pass runs once, the backend allocates from {@link Scratch} instead of its own pool and encodes into a
 * command encoder that takes notes. The buffers that a dispatch binds are of four kinds:
 *
 * - scratch: results and what lies between. Re-used within the pass as the pool re-uses them, which stays right because the order of
 *   commands stays the same. All recordings of a device share them: passes never overlap, and nothing in them outlives a pass, because
 *   results are copied out.
 * - inputs: arrays of the pass ({@link RecordablePass.arrays}), recognised by identity when they are uploaded, and what kernels derive from
 *   them ({@link KernelCall.uploadDerived}).
 * - constants of the host: uploaded arrays that are none of these. Only arrays of a single value are taken for constants (factors,
 *   zeros); any other could be data that a new pass would have to bring, so the recording is refused.
 * - constants of the device ({@link RecordablePass.constants}): weights. Whether they are still the same buffers is asked before each replay.
 *
 * A pass that binds anything else, or leaves a tensor alive, is refused: {@link Recording.refusal} says why, its results are right.
 *
 * Evidence: tfjs-backend-webgpu 4.22 (pinned in `deps.ts`), whose `bufferManager`, `uploadToGPU` and `recordAndSubmit` are replaced
 * while a pass is recorded, and `createCommandEncoder` and `createBindGroup` of its device.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { HostArrays } from "../policy/pass.ts";
import { type Backend, bindableBytes, derivationOf } from "./kernels/runtime.ts";
import { DispatchReplay } from "./replay.ts";

interface BufferPool {
  numUsedBuffers: number;
  numBytesUsed: number;
  numBytesAllocated: number;
  readonly usedBuffers: Map<string, GPUBuffer[]>;
  acquireBuffer(size: number, usage: number, mappedAtCreation?: boolean, reuse?: boolean): GPUBuffer;
  releaseBuffer(buffer: GPUBuffer, reuse?: boolean): void;
}

interface TensorData {
  values: ArrayLike<number> | null | undefined;
  resource?: unknown;
  dtype: tf.DataType;
}

/** What is used and replaced of the backend. */
export interface RecordedBackend extends Omit<Backend, "bufferManager" | "tensorMap"> {
  bufferManager: Pick<BufferPool, "acquireBuffer" | "releaseBuffer">;
  readonly tensorMap: { get(id: object): TensorData | undefined };
  recordAndSubmit(program: object, output: tf.TensorInfo, ...rest: unknown[]): void;
}

/** A pass that may be recorded, or done from a recording. */
export interface RecordablePass {
  /** Everything that the host makes anew for each pass and that differs between them. `compute` uploads these very arrays. */
  readonly arrays: HostArrays;
  /** Matrices of the device that differ between passes, one below the other, and the shape of all of them with spare rows. */
  readonly stacked?: { readonly parts: readonly tf.Tensor[]; readonly shape: readonly [number, number] };
  /** Tensors that passes have in common. */
  readonly constants: readonly tf.Tensor[];
  /**
   * Runs the pass.
   *
   * @param stacked The stacked matrices; not owned.
   * @returns Results by name, owned by the caller.
   */
  compute(stacked: tf.Tensor2D | undefined): Map<string, tf.Tensor>;
}

const STORAGE = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
/** A scratch buffer serves a tensor of at least this share of its size. */
const LEAST_SHARE = 1 / 2;
/** Commands of a submission, so that the device begins before all are encoded, and none takes long. */
const SUBMITTED = 64;

/** Buffers that all recordings of a device share. */
export class Scratch {
  readonly #device: GPUDevice;
  /** All buffers with the number of recordings that use them. */
  readonly #users = new Map<GPUBuffer, number>();
  #free = new Set<GPUBuffer>();
  #bytes = 0;

  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /** Bytes of all of them. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Begins a recording: nothing is in use. */
  begin(): void {
    this.#free = new Set(this.#users.keys());
  }

  /** The smallest free buffer that is large enough and not too large, or a new one. */
  acquire(size: number): GPUBuffer {
    const most = Math.max(size, Math.min(size / LEAST_SHARE, bindableBytes(this.#device)));
    let best: GPUBuffer | undefined;
    for (const buffer of this.#free) {
      if (buffer.size >= size && buffer.size <= (best ? best.size - 1 : most)) best = buffer;
      if (best?.size === size) break;
    }
    if (best) this.#free.delete(best);
    else {
      best = this.#device.createBuffer({ size, usage: STORAGE });
      this.#users.set(best, 0);
      this.#bytes += size;
    }
    return best;
  }

  /** Whether a buffer is one of these. */
  has(buffer: GPUBuffer): boolean {
    return this.#users.has(buffer);
  }

  /** Gives a buffer back within a recording. */
  release(buffer: GPUBuffer): void {
    this.#free.add(buffer);
  }

  /** Keeps buffers for a recording that uses them. */
  keep(buffers: Iterable<GPUBuffer>): void {
    for (const buffer of buffers) this.#users.set(buffer, this.#users.get(buffer)! + 1);
  }

  /** Ends a recording's use of its buffers, and destroys those that nobody uses. */
  drop(buffers: Iterable<GPUBuffer>): void {
    for (const buffer of buffers) this.#users.set(buffer, this.#users.get(buffer)! - 1);
    this.sweep();
  }

  /** Destroys what no recording uses. */
  sweep(): void {
    for (const [buffer, users] of this.#users) {
      if (users > 0) continue;
      this.forget(buffer);
      buffer.destroy();
    }
  }

  /** Lets a buffer go that someone else owns from now on. */
  forget(buffer: GPUBuffer): void {
    if (this.#users.delete(buffer)) this.#bytes -= buffer.size;
    this.#free.delete(buffer);
  }
}

interface Dispatch {
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly grid: readonly [number, number?, number?];
}
/** Any other command. */
type Other = (encoder: GPUCommandEncoder) => void;
type Command = Dispatch | Other;

/** Where an input is written, and how its values are made of the arrays of a pass. */
interface Input {
  readonly buffer: GPUBuffer;
  valuesOf(arrays: HostArrays): Float32Array | Int32Array;
}

interface Result {
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype: tf.DataType;
  readonly buffer: GPUBuffer;
}

/** Submits what the backend has open, so that what follows comes after it. */
function flush(backend: RecordedBackend): void {
  backend.ensureCommandEncoderReady();
  backend.endComputePassEncoder();
  backend.submitQueue();
}

/** A pass that was done once and can be done again. */
export class Recording {
  readonly #backend: RecordedBackend;
  readonly #scratch: Scratch;
  readonly #commands: Command[] = [];
  readonly #inputs = new Map<string, Input>();
  /** Buffers of its own: inputs, constants of the host, uniforms. */
  readonly #own = new Set<GPUBuffer>();
  readonly #used = new Set<GPUBuffer>();
  /** Constants of the device: those that a dispatch binds, once the pass is recorded. */
  readonly #constants = new Map<GPUBuffer, tf.Tensor>();
  readonly #bound = new Set<GPUBuffer>();
  #results: Result[] = [];
  #stacked?: GPUBuffer;
  #refusal?: string;
  #ownBytes = 0;

  private constructor(backend: RecordedBackend, scratch: Scratch) {
    this.#backend = backend;
    this.#scratch = scratch;
  }

  /**
   * Does a pass and records it.
   *
   * @returns The results, and the recording; if that {@link refusal | was refused} it is empty.
   */
  static of(
    backend: RecordedBackend,
    scratch: Scratch,
    pass: RecordablePass,
  ): { results: Map<string, tf.Tensor>; recording: Recording } {
    const recording = new Recording(backend, scratch);
    try {
      const results = recording.#record(pass);
      if (recording.#refusal === undefined) scratch.keep(recording.#used);
      else recording.#release();
      return { results, recording };
    } catch (error) {
      recording.#release();
      throw error;
    } finally {
      scratch.sweep();
    }
  }

  /** Why the pass cannot be done from this recording; undefined where it can. */
  get refusal(): string | undefined {
    return this.#refusal;
  }

  /** Bytes that it holds alone. */
  get ownBytes(): number {
    return this.#ownBytes;
  }

  /** Bytes that it shares with others. */
  get sharedBytes(): number {
    let sum = 0;
    for (const { size } of this.#used) sum += size;
    return sum;
  }

  /** Whether the constants of the device still are where they were. */
  get isCurrent(): boolean {
    for (const [buffer, tensor] of this.#constants) {
      if (tensor.isDisposed || this.#backend.tensorMap.get(tensor.dataId)?.resource !== buffer) return false;
    }
    return true;
  }

  /** Does a pass of equal shape with its own data; the recording must be current. */
  replay({ arrays, stacked }: RecordablePass): Map<string, tf.Tensor> {
    const { device, queue } = this.#backend;
    for (const { buffer, valuesOf } of this.#inputs.values()) {
      const values = valuesOf(arrays);
      if (values.byteLength !== buffer.size) throw new RangeError("a pass does not have the shape of its recording");
      queue.writeBuffer(buffer, 0, values as Float32Array<ArrayBuffer>);
    }
    this.#stack(stacked);
    flush(this.#backend);
    let encoder = device.createCommandEncoder(), open: GPUComputePassEncoder | undefined, count = 0;
    let pipeline: GPUComputePipeline | undefined;
    const close = () => {
      open?.end();
      open = pipeline = undefined;
    };
    for (const command of this.#commands) {
      if (typeof command === "function") {
        close();
        command(encoder);
        continue;
      }
      open ??= encoder.beginComputePass();
      if (pipeline !== command.pipeline) open.setPipeline(pipeline = command.pipeline);
      open.setBindGroup(0, command.group);
      open.dispatchWorkgroups(...command.grid);
      if (++count % SUBMITTED > 0) continue;
      close();
      queue.submit([encoder.finish()]);
      encoder = device.createCommandEncoder();
    }
    close();
    queue.submit([encoder.finish()]);
    return this.#copyResults();
  }

  /** Releases what it holds. */
  dispose(): void {
    this.#scratch.drop(this.#used);
    this.#release();
  }

  #release(): void {
    for (const buffer of this.#own) buffer.destroy();
    this.#own.clear();
    this.#used.clear();
    this.#inputs.clear();
    this.#constants.clear();
    this.#commands.length = this.#ownBytes = 0;
    this.#results = [];
  }

  #refuse(why: string): void {
    this.#refusal ??= why;
  }

  #record(pass: RecordablePass): Map<string, tf.Tensor> {
    const backend = this.#backend;
    for (const tensor of pass.constants) {
      backend.uploadToGPU(tensor.dataId);
      this.#constants.set(backend.tensorMap.get(tensor.dataId)!.resource as GPUBuffer, tensor);
    }
    const used = new Set<GPUBuffer>();
    if (pass.stacked) {
      const [rows, width] = pass.stacked.shape;
      this.#stacked = this.#create(4 * rows * width, STORAGE);
      this.#stack(pass.stacked);
    }
    flush(backend);
    const names = new Map(Object.entries(pass.arrays).map(([name, array]) => [array as object, name]));
    const restore = this.#intercept(names, used);
    const results: Result[] = [];
    let stacked: tf.Tensor | undefined;
    try {
      stacked = pass.stacked && this.#tensorOn(this.#stacked!, pass.stacked.shape);
      const found = pass.compute(stacked as tf.Tensor2D | undefined);
      for (const [name, tensor] of found) {
        backend.uploadToGPU(tensor.dataId);
        const { shape, dtype } = tensor, buffer = backend.tensorMap.get(tensor.dataId)!.resource as GPUBuffer;
        results.push({ name, shape, dtype, buffer });
      }
      tf.dispose([...found.values()]);
    } finally {
      stacked?.dispose();
      // What is disposed of goes back at the next submission: to us, not to the pool.
      flush(backend);
      restore();
      if (used.size > 0) this.#refuse(`${used.size} tensors outlive the pass`);
      used.forEach((buffer) => this.#adopt(buffer));
    }
    for (const buffer of [...this.#constants.keys()]) if (!this.#bound.has(buffer)) this.#constants.delete(buffer);
    this.#results = results;
    return this.#copyResults();
  }

  /** Copies matrices below each other. */
  #stack(stacked: RecordablePass["stacked"]): void {
    if (!stacked) return;
    const backend = this.#backend;
    for (const { dataId } of stacked.parts) backend.uploadToGPU(dataId);
    backend.ensureCommandEncoderReady();
    backend.endComputePassEncoder();
    let at = 0;
    for (const { dataId, size } of stacked.parts) {
      const from = backend.tensorMap.get(dataId)!.resource as GPUBuffer;
      backend.commandEncoder!.copyBufferToBuffer(from, 0, this.#stacked!, at, 4 * size);
      backend.commandQueueOwnedIds.add(dataId);
      at += 4 * size;
    }
  }

  /** Tensors with copies of the results. */
  #copyResults(): Map<string, tf.Tensor> {
    const backend = this.#backend, copies = new Map<string, tf.Tensor>();
    for (const { name, shape, dtype } of this.#results) {
      const info = backend.makeTensorInfo([...shape], dtype);
      backend.uploadToGPU(info.dataId);
      copies.set(name, tf.engine().makeTensorFromTensorInfo(info));
    }
    backend.ensureCommandEncoderReady();
    backend.endComputePassEncoder();
    for (const { name, buffer } of this.#results) {
      const { dataId, size } = copies.get(name)!, to = backend.tensorMap.get(dataId)!.resource as GPUBuffer;
      backend.commandEncoder!.copyBufferToBuffer(buffer, 0, to, 0, 4 * size);
      backend.commandQueueOwnedIds.add(dataId);
    }
    // A later pass writes the same scratch buffers through another encoder.
    flush(backend);
    return copies;
  }

  #create(size: number, usage: number): GPUBuffer {
    const buffer = this.#backend.device.createBuffer({ size, usage });
    this.#own.add(buffer);
    this.#ownBytes += size;
    return buffer;
  }

  #tensorOn(buffer: GPUBuffer, shape: readonly number[]): tf.Tensor {
    const info = this.#backend.makeTensorInfo([...shape], "float32");
    this.#backend.tensorMap.get(info.dataId)!.resource = buffer;
    return tf.engine().makeTensorFromTensorInfo(info);
  }

  /** Gives a scratch buffer of a tensor that lives on to the pool of the backend. */
  #adopt(buffer: GPUBuffer): void {
    const pool = this.#backend.bufferManager as BufferPool, key = `${buffer.size}_${buffer.usage}`;
    this.#scratch.forget(buffer);
    this.#used.delete(buffer);
    pool.usedBuffers.set(key, [...pool.usedBuffers.get(key) ?? [], buffer]);
    pool.numUsedBuffers++;
    pool.numBytesUsed += buffer.size;
    pool.numBytesAllocated += buffer.size;
  }

  /**
   * Turns what the backend does into notes.
   *
   * @param names Names of the arrays of the pass.
   * @param used Gets the scratch buffers that tensors hold.
   * @returns Undoes it.
   */
  #intercept(names: ReadonlyMap<object, string>, used: Set<GPUBuffer>): () => void {
    const backend = this.#backend, { device, bufferManager: pool } = backend, replay = DispatchReplay.of(backend);
    const before = { enabled: replay?.enabled ?? false };
    const undo = [
      replaced(backend, "bufferManager", this.#pool(pool, used)),
      replaced(backend, "uploadToGPU", this.#uploads(names)),
      replaced(backend, "uniformBuffer", this.#uniforms()),
      replaced(backend, "recordAndSubmit", this.#programs(backend.recordAndSubmit.bind(backend))),
      replaced(device, "createBindGroup", this.#groups(device.createBindGroup.bind(device))),
      replaced(device, "createCommandEncoder", this.#encoders(device.createCommandEncoder.bind(device))),
    ];
    if (replay) replay.enabled = false;
    this.#scratch.begin();
    return () => {
      undo.forEach((f) => f());
      if (replay) replay.enabled = before.enabled;
    };
  }

  #pool(pool: RecordedBackend["bufferManager"], used: Set<GPUBuffer>): RecordedBackend["bufferManager"] {
    return {
      acquireBuffer: (size, usage, mappedAtCreation, reuse) => {
        // Uniforms are written from the host, before all commands: each needs a buffer of its own.
        if (usage & GPUBufferUsage.UNIFORM) return this.#create(size, usage);
        // Refused where a dispatch binds it.
        if (usage !== STORAGE || mappedAtCreation) return pool.acquireBuffer(size, usage, mappedAtCreation, reuse);
        const buffer = this.#scratch.acquire(size);
        this.#used.add(buffer);
        used.add(buffer);
        return buffer;
      },
      releaseBuffer: (buffer, reuse) => {
        if (this.#own.has(buffer)) return;
        if (!this.#scratch.has(buffer)) return pool.releaseBuffer(buffer, reuse);
        used.delete(buffer);
        this.#scratch.release(buffer);
      },
    };
  }

  #uploads(names: ReadonlyMap<object, string>): (id: object) => void {
    const backend = this.#backend, upload = backend.uploadToGPU.bind(backend), fills = new Map<string, GPUBuffer>();
    return (id) => {
      const data = backend.tensorMap.get(id)!, { values, dtype } = data;
      if (data.resource || !values) return upload(id);
      const whole = dtype === "float32" ? Float32Array.from(values) : Int32Array.from(values);
      const input = this.#inputOf(values, names);
      if (input) {
        let known = this.#inputs.get(input.key);
        if (!known) {
          known = { buffer: this.#create(whole.byteLength, STORAGE), valuesOf: input.valuesOf };
          this.#inputs.set(input.key, known);
          backend.queue.writeBuffer(known.buffer, 0, whole);
        }
        data.resource = known.buffer;
      } else {
        if (whole.some((x) => !Object.is(x, whole[0]))) {
          this.#refuse(`${whole.length} values from the host have no name`);
        }
        const key = `${dtype} ${whole.length} ${Object.is(whole[0], -0) ? "-0" : whole[0]}`;
        let buffer = fills.get(key);
        if (!buffer) {
          fills.set(key, buffer = this.#create(whole.byteLength, STORAGE));
          backend.queue.writeBuffer(buffer, 0, whole);
        }
        data.resource = buffer;
      }
      data.values = null;
    };
  }

  /** How uploaded values follow from the arrays of the pass; undefined if they don't. */
  #inputOf(
    values: object,
    names: ReadonlyMap<object, string>,
  ): { key: string; valuesOf: Input["valuesOf"] } | undefined {
    const name = names.get(values), derivation = derivationOf(values);
    if (name !== undefined) return { key: name, valuesOf: (arrays) => arrays[name] };
    if (!derivation) return undefined;
    const from = names.get(derivation.from), { key, make } = derivation;
    return from === undefined ? undefined : { key: `${key}, ${from}`, valuesOf: (arrays) => make(arrays[from]) };
  }

  #uniforms(): (bytes: ArrayBuffer) => GPUBuffer {
    const known = new Map<string, GPUBuffer>();
    return (bytes) => {
      const key = String.fromCharCode(...new Uint16Array(bytes));
      let buffer = known.get(key);
      if (!buffer) {
        buffer = this.#create(bytes.byteLength, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST);
        this.#backend.queue.writeBuffer(buffer, 0, bytes);
        known.set(key, buffer);
      }
      return buffer;
    };
  }

  #programs(record: RecordedBackend["recordAndSubmit"]): RecordedBackend["recordAndSubmit"] {
    return (program, output, ...rest) => {
      const buffer = this.#backend.tensorMap.get(output.dataId)?.resource as GPUBuffer;
      // The next pass would find it changed.
      if (this.#own.has(buffer)) this.#refuse("a program writes an input or a constant");
      record(program, output, ...rest);
    };
  }

  #groups(create: GPUDevice["createBindGroup"]): GPUDevice["createBindGroup"] {
    return (descriptor) => {
      for (const { resource } of descriptor.entries) {
        const { buffer } = resource as Partial<GPUBufferBinding>;
        if (buffer && this.#constants.has(buffer)) this.#bound.add(buffer);
        else if (!buffer || !(this.#own.has(buffer) || this.#scratch.has(buffer))) {
          this.#refuse("a dispatch binds what does not belong to the pass");
        }
      }
      return create(descriptor);
    };
  }

  /** Makes encoders that take notes; what they encode is done all the same. */
  #encoders(create: GPUDevice["createCommandEncoder"]): GPUDevice["createCommandEncoder"] {
    return (descriptor) => {
      const encoder = create(descriptor);
      const { beginComputePass, copyBufferToBuffer, clearBuffer } = encoder;
      encoder.beginComputePass = (descriptor) => this.#noted(beginComputePass.call(encoder, descriptor));
      const note = (command: Other): undefined => {
        this.#commands.push(command);
        command(encoder);
      };
      // Both have several forms; what they are given is passed on as it is.
      encoder.copyBufferToBuffer = (...given) => note((encoder) => copyBufferToBuffer.apply(encoder, given));
      encoder.clearBuffer = (...given) => note((encoder) => clearBuffer.apply(encoder, given));
      return encoder;
    };
  }

  #noted(pass: GPUComputePassEncoder): GPUComputePassEncoder {
    const { setPipeline, dispatchWorkgroups } = pass, setBindGroup = pass.setBindGroup.bind(pass);
    let pipeline: GPUComputePipeline, group: GPUBindGroup;
    pass.setPipeline = (given) => setPipeline.call(pass, pipeline = given);
    pass.setBindGroup = (index: number, given: GPUBindGroup | null) => {
      group = given!;
      setBindGroup(index, given);
    };
    pass.dispatchWorkgroups = (...grid) => {
      this.#commands.push({ pipeline, group, grid });
      dispatchWorkgroups.apply(pass, grid);
    };
    return pass;
  }
}

/** Replaces a property of an object by one of its own. @returns Undoes it. */
function replaced<T extends object, K extends keyof T>(object: T, key: K, value: T[K]): () => void {
  const own = Object.getOwnPropertyDescriptor(object, key);
  Object.defineProperty(object, key, { value, writable: true, configurable: true, enumerable: true });
  return () => {
    delete object[key];
    if (own) Object.defineProperty(object, key, own);
  };
}
