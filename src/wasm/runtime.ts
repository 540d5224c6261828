/**
 * How our own WebAssembly module works on the tensors of TensorFlow.js.
 *
 * The WebAssembly backend keeps its tensors in one `WebAssembly.Memory` and knows each one's byte offset. A module of ours that
 * imports that memory reads and writes those tensors in place. Evidence: tfjs-backend-wasm 4.22 (pinned in `deps.ts`), whose
 * backend object holds `wasm.asm.memory`, `wasm._malloc`, `wasm._free`, `dataIdMap` and `makeOutput`; {@link attach} checks
 * each. Offsets stay valid when the memory grows, JavaScript views do not: take views late and drop them.
 *
 * Where the memory is shared, a {@link ThreadTeam} can share out a kernel's work. A kernel then states it as several calls of one
 * function, each of which computes its own part of the output; what is added up for one element, and in which order, must not
 * depend on where the cuts are, so that results are the same for any number of threads.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import { MOST_CALLS, type ThreadTeam } from "./threads.ts";

/** What we use of the WebAssembly backend. */
interface WasmBackend {
  readonly wasm: {
    readonly asm: { readonly memory: WebAssembly.Memory };
    _malloc(bytes: number): number;
    _free(address: number): void;
  };
  readonly dataIdMap: { get(id: object): { readonly memoryOffset: number } | undefined };
  makeOutput(shape: number[], dtype: tf.DataType): tf.TensorInfo;
}

type Functions = Readonly<Record<string, (...values: number[]) => number | undefined>>;

/** A kernel as `register.ts` registers it. */
export interface Kernel {
  readonly name: string;
  /** Checks its inputs, allocates its outputs, calls the module. */
  run(call: KernelCall): tf.TensorInfo | tf.TensorInfo[];
}

/** A file of kernels: the code that goes into the module and the kernels that call it. */
export interface KernelFile {
  emit(m: ModuleBuilder, parts: Parts): void;
  readonly kernels: readonly Kernel[];
}

/** Work below which threads do not pay, in nanoseconds, and how many times as much it must be to wake them. */
export const LEAST_COST = 30_000;
const WAKING = 3;
/** The least work that is handed out. */
const LEAST_PART = 10_000;
/** Parts per thread: more than one, so that a thread that the system holds up leaves its rest to the others. */
const PARTS_PER_THREAD = 2;
/** Bytes of a cache line, doubled for its prefetched neighbour: threads must not write to the same one. */
const LINE = 128;
/** Elements that are treated together at least: whole vectors, and few shared cache lines. */
const ELEMENTS = 64;
const aligned = (bytes: number): number => Math.ceil(bytes / LINE) * LINE;

/** Whether a memory can be used by several threads. */
export function isShared(memory: WebAssembly.Memory): boolean {
  return typeof SharedArrayBuffer === "function" && (memory.buffer as ArrayBufferLike) instanceof SharedArrayBuffer;
}

/** Memory that only grows. */
interface Room {
  address: number;
  bytes: number;
}

/** One instance of the module on the memory of one backend. */
export class Instance {
  readonly memory: WebAssembly.Memory;
  readonly functions: Functions;
  /** Cost from which work is cut, in nanoseconds; 0, for tests, cuts always, also where it does not pay. */
  leastCost = LEAST_COST;
  /** The threads; undefined while the calling one is alone. */
  team?: ThreadTeam;
  #backend: WasmBackend;
  #scratch: Room = { address: 0, bytes: 0 };
  #threadScratch: Room = { address: 0, bytes: 0 };

  constructor(backend: WasmBackend, module: WebAssembly.Module) {
    this.#backend = backend;
    this.memory = backend.wasm.asm.memory;
    const env = { memory: this.memory, log: Math.log };
    this.functions = new WebAssembly.Instance(module, { env }).exports as Functions;
  }

  /** Byte offset of a tensor's data. */
  address(tensor: tf.TensorInfo): number {
    const data = this.#backend.dataIdMap.get(tensor.dataId);
    if (data === undefined) throw new TypeError("tensor is not on the wasm backend, or was disposed");
    return data.memoryOffset;
  }

  /** A new tensor with undefined content. */
  output(shape: readonly number[], dtype: "float32" | "int32"): tf.TensorInfo {
    const tensor = this.#backend.makeOutput([...shape], dtype);
    // The backend itself would go on with address 0.
    const size = tf.util.sizeFromShape([...shape]);
    if (size > 0 && this.address(tensor) === 0) throw outOfMemory(4 * size);
    return tensor;
  }

  /**
   * Room for intermediate values, until the next call of this method. It only grows, so it costs no allocation per call;
   * tf.memory() does not count it. */
  scratch(bytes: number): number {
    return this.#grow(this.#scratch, bytes);
  }

  #grow(room: Room, bytes: number): number {
    if (bytes > room.bytes) {
      const { _free, _malloc } = this.#backend.wasm;
      if (room.address !== 0) _free(room.address);
      room.address = room.bytes = 0;
      const address = _malloc(bytes) >>> 0;
      if (address === 0) throw outOfMemory(bytes);
      Object.assign(room, { address, bytes });
    }
    return room.address;
  }

  /** The threads, if work of that cost is worth them. */
  #teamFor(cost: number): ThreadTeam | undefined {
    const { team, leastCost } = this;
    if (team === undefined || leastCost === 0) return team;
    return cost >= leastCost * (team.isAsleep ? WAKING : 1) && !team.isResting ? team : undefined;
  }

  /**
   * How to cut work.
   *
   * @param units What can be computed one by one: rows, columns, elements.
   * @param cost A rough time for all of it on one thread, in nanoseconds.
   * @param grain The cuts are at multiples of this many units. @default {1}
   * @returns Ranges from–to that cover all units; a single one where threads would not pay.
   */
  ranges(units: number, cost: number, grain = 1): [from: number, to: number][] {
    const grains = Math.ceil(units / grain), threads = this.#teamFor(cost)?.threads ?? 1;
    const worth = Math.floor(cost / Math.min(LEAST_PART, this.leastCost || 1));
    const parts = threads === 1 ? 1 : Math.max(1, Math.min(grains, threads * PARTS_PER_THREAD, worth, MOST_CALLS));
    const cut = (part: number): number => Math.min(units, Math.floor(part * grains / parts) * grain);
    return Array.from({ length: parts }, (_, part) => [cut(part), cut(part + 1)]);
  }

  /**
   * Calls a function of the module once for each list of arguments, on all threads if there are several and the cost is worth it.
   *
   * @param scratch Sizes in bytes of room that each call needs for itself; the addresses are appended to its arguments.
   * @returns The results, 0 where the function has none.
   */
  run(name: string, lists: readonly (readonly number[])[], cost: number, scratch: readonly number[] = []): number[] {
    let stride = 0;
    const offsets = scratch.map((bytes) => (stride += aligned(bytes)) - aligned(bytes));
    const team = lists.length > 1 ? this.#teamFor(cost) : undefined;
    // malloc aligns to 16 bytes only.
    const room = stride === 0 ? 0 : this.#grow(this.#threadScratch, LINE + stride * (team?.threads ?? 1));
    const address = aligned(room);
    if (team === undefined) {
      const own = offsets.map((offset) => address + offset);
      return lists.map((list) => this.functions[name](...list, ...own) ?? 0);
    }
    const results: number[] = [];
    for (let i = 0; i < lists.length; i += MOST_CALLS) {
      results.push(...team.run(name, lists.slice(i, i + MOST_CALLS), { address, stride, offsets }));
    }
    return results;
  }
}

function outOfMemory(bytes: number): RangeError {
  return new RangeError(
    `WebAssembly memory is full (${bytes} more bytes asked for): use smaller batches or shorter prompts`,
  );
}

/**
 * The instance for a backend.
 *
 * @param compile Makes the module, for shared memory or for memory that isn't shared.
 * @throws {TypeError} if the backend is not built as tfjs-backend-wasm 4.22 is.
 */
export function attach(backend: object, compile: (sharedMemory: boolean) => WebAssembly.Module): Instance {
  const { wasm, dataIdMap, makeOutput } = backend as Partial<WasmBackend>;
  const fits = wasm?.asm?.memory instanceof WebAssembly.Memory && typeof wasm._malloc === "function" &&
    typeof wasm._free === "function" && typeof dataIdMap?.get === "function" && typeof makeOutput === "function";
  if (!fits) throw new TypeError("the wasm backend has no memory that kernels can share: use tfjs-backend-wasm 4.22");
  return new Instance(backend as WasmBackend, compile(isShared(wasm.asm.memory)));
}

/** What a kernel sees of one call. */
export class KernelCall {
  readonly functions: Functions;

  constructor(
    readonly name: string,
    readonly instance: Instance,
    private readonly inputs: Readonly<Record<string, tf.TensorInfo | null | undefined>>,
    private readonly attributes: Readonly<Record<string, unknown>>,
  ) {
    this.functions = instance.functions;
  }

  /** An error that names the kernel. */
  error(message: string): RangeError {
    return new RangeError(`${this.name}: ${message}`);
  }

  /**
   * A required input.
   *
   * @throws {RangeError} if it is absent or has another dtype or shape; null in `shape` fits any length.
   */
  input(name: string, shape?: readonly (number | null)[], dtype: "float32" | "int32" = "float32"): tf.TensorInfo {
    const tensor = this.inputs[name];
    if (tensor === undefined || tensor === null) throw this.error(`input ${name} is missing`);
    if (tensor.dtype !== dtype) throw this.error(`input ${name} must be ${dtype}, is ${tensor.dtype}`);
    const fits = shape === undefined ||
      (shape.length === tensor.shape.length && shape.every((size, i) => size === null || size === tensor.shape[i]));
    if (!fits) {
      const expected = shape.map((size) => size ?? "*").join(", ");
      throw this.error(`input ${name} must have shape [${expected}], has [${tensor.shape.join(", ")}]`);
    }
    return tensor;
  }

  /** As {@link input}, but undefined where the caller left it out. */
  optional(
    name: string,
    shape: readonly (number | null)[],
    dtype: "float32" | "int32" = "float32",
  ): tf.TensorInfo | undefined {
    return this.inputs[name] === undefined || this.inputs[name] === null ? undefined : this.input(name, shape, dtype);
  }

  /** A finite number among the attributes. */
  number(name: string): number {
    const value = this.attributes[name];
    if (typeof value !== "number" || !Number.isFinite(value)) {
      throw this.error(`attribute ${name} must be a finite number, is ${String(value)}`);
    }
    return value;
  }

  /** A truth value among the attributes; absent means false. */
  flag(name: string): boolean {
    const value = this.attributes[name] ?? false;
    if (typeof value !== "boolean") throw this.error(`attribute ${name} must be true or false, is ${String(value)}`);
    return value;
  }

  output(shape: readonly number[], dtype: "float32" | "int32" = "float32"): tf.TensorInfo {
    return this.instance.output(shape, dtype);
  }

  /** Byte offset of a tensor, 0 for none. */
  address(tensor: tf.TensorInfo | undefined): number {
    return tensor === undefined ? 0 : this.instance.address(tensor);
  }

  scratch(bytes: number): number {
    return this.instance.scratch(bytes);
  }

  /** See {@link Instance.ranges}. */
  ranges(units: number, cost: number, grain = 1): [from: number, to: number][] {
    return this.instance.ranges(units, cost, grain);
  }

  /** See {@link Instance.run}. */
  run(name: string, lists: readonly (readonly number[])[], cost: number, scratch: readonly number[] = []): number[] {
    return this.instance.run(name, lists, cost, scratch);
  }

  /**
   * Calls a function that treats elements one by one, `name(count, …addresses, …scalars)`.
   *
   * @param tensors All of one size; their addresses are passed in this order.
   * @param cost Rough nanoseconds per element.
   */
  each(name: string, tensors: readonly tf.TensorInfo[], cost: number, scalars: readonly number[] = []): void {
    const count = tf.util.sizeFromShape(tensors[0].shape), addresses = tensors.map((tensor) => this.address(tensor));
    const calls = this.ranges(count, cost * count, ELEMENTS).map(([from, to]) => [
      ...[to - from, ...addresses.map((address) => address + 4 * from), ...scalars],
    ]);
    this.run(name, calls, cost * count);
  }

  /** A copy of a small int32 input. */
  integers(tensor: tf.TensorInfo): Int32Array {
    const length = tf.util.sizeFromShape(tensor.shape);
    return new Int32Array(this.instance.memory.buffer, this.address(tensor), length).slice();
  }
}
