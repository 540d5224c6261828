/**
 * How our own WebAssembly module works on the tensors of TensorFlow.js.
 *
 * The WebAssembly backend keeps its tensors in one `WebAssembly.Memory` and knows each one's byte offset. A module of ours that
 * imports that memory reads and writes those tensors in place. Evidence: tfjs-backend-wasm 4.22 (pinned in `deps.ts`), whose
 * backend object holds `wasm.asm.memory`, `wasm._malloc`, `wasm._free`, `dataIdMap` and `makeOutput`; {@link attach} checks
 * each. Offsets stay valid when the memory grows, JavaScript views do not: take views late and drop them.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";

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

type Functions = Readonly<Record<string, (...values: number[]) => number>>;

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

/** One instance of the module on the memory of one backend. */
export class Instance {
  readonly memory: WebAssembly.Memory;
  readonly functions: Functions;
  #backend: WasmBackend;
  #scratch = { address: 0, bytes: 0 };

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
    if (bytes > this.#scratch.bytes) {
      const { _free, _malloc } = this.#backend.wasm;
      if (this.#scratch.address !== 0) _free(this.#scratch.address);
      this.#scratch = { address: 0, bytes: 0 };
      const address = _malloc(bytes) >>> 0;
      if (address === 0) throw outOfMemory(bytes);
      this.#scratch = { address, bytes };
    }
    return this.#scratch.address;
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
 * @throws {TypeError} if the backend is not built as tfjs-backend-wasm 4.22 is.
 */
export function attach(backend: object, module: WebAssembly.Module): Instance {
  const { wasm, dataIdMap, makeOutput } = backend as Partial<WasmBackend>;
  const fits = wasm?.asm?.memory instanceof WebAssembly.Memory && typeof wasm._malloc === "function" &&
    typeof wasm._free === "function" && typeof dataIdMap?.get === "function" && typeof makeOutput === "function";
  if (!fits) throw new TypeError("the wasm backend has no memory that kernels can share: use tfjs-backend-wasm 4.22");
  return new Instance(backend as WasmBackend, module);
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
  optional(name: string, shape: readonly (number | null)[]): tf.TensorInfo | undefined {
    return this.inputs[name] === undefined || this.inputs[name] === null ? undefined : this.input(name, shape);
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

  /** A copy of a small int32 input. */
  integers(tensor: tf.TensorInfo): Int32Array {
    const length = tf.util.sizeFromShape(tensor.shape);
    return new Int32Array(this.instance.memory.buffer, this.address(tensor), length).slice();
  }
}
