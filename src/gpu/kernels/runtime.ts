/**
 * How our own WGSL kernels run on the tensors of TensorFlow.js.
 *
 * A kernel records its dispatches into the compute pass that the webgpu backend has open, between those of tfjs itself, so order and
 * buffer re-use are tfjs's own. Unlike `runWebGPUProgram`, a dispatch may write several tensors, and tensors in place, and costs
 * no shader key of shapes. Evidence: tfjs-backend-webgpu 4.22 (pinned in `deps.ts`), whose backend object has the
 * fields of {@link Backend}; {@link attach} checks them. `tf.time` and `tf.profile` do not see these dispatches.
 *
 * A tensor may be larger than a shader can bind. Kernels therefore bind windows: runs of whole rows, at offsets that WebGPU allows,
 * one dispatch after the other ({@link KernelCall.windows}).
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { MemoryLimitError } from "../device_errors.ts";

/** What the backend keeps of a tensor: `values` on the host (not uploaded yet, or read back), `resource` on the device. */
interface TensorData {
  values: tf.TypedArray | null | undefined;
  resource?: unknown;
}

/** What we use of the WebGPU backend. */
export interface Backend {
  readonly device: GPUDevice;
  readonly queue: GPUQueue;
  readonly bufferManager: { acquireBuffer(size: number, usage: number): GPUBuffer };
  readonly tensorMap: { get(id: object): TensorData | undefined };
  commandEncoder: GPUCommandEncoder | null;
  computePassEncoder: GPUComputePassEncoder | null;
  commandQueueOwnedIds: WeakSet<object>;
  uniformPendingDisposal: GPUBuffer[];
  dispatchCountInPass: number;
  uploadToGPU(id: object): void;
  disposeData(id: object): boolean;
  ensureCommandEncoderReady(): void;
  endComputePassEncoder(): void;
  submitQueue(): void;
  makeTensorInfo(shape: number[], dtype: tf.DataType, values?: tf.TypedArray): tf.TensorInfo;
  /** A buffer with these bytes that nobody writes; set by replay.ts, undefined where that is switched off. */
  uniformBuffer?(bytes: ArrayBuffer): GPUBuffer | undefined;
}

/** A storage buffer of a shader. */
export interface Binding {
  readonly name: string;
  /** Type of its elements. */
  readonly type: "f32" | "i32" | "vec4<f32>";
  /** Whether the shader writes it (it may read it too). */
  readonly write?: boolean;
}

/** A compute shader; {@link KernelCall.dispatch} adds the declarations. */
export interface Shader {
  readonly storage: readonly Binding[];
  /** Members of the uniform `u`. */
  readonly uniforms: Readonly<Record<string, "u32" | "f32">>;
  readonly threads: number;
  /** Functions and workgroup variables. */
  readonly code?: string;
  /** Body of the entry point; it sees `wg` (workgroup_id), `groups` (num_workgroups) and `lane` (0 to threads − 1). */
  readonly main: string;
}

/** A part of a tensor, bound alone. */
export interface TensorWindow {
  readonly tensor: tf.TensorInfo;
  /** First element; a multiple of {@link ALIGNMENT}. */
  readonly offset: number;
  /** Elements. */
  readonly size: number;
}

/** How a kernel made values on the host from those of an input, so that they can be made again from another input of that length. */
export interface Derivation {
  readonly from: ArrayLike<number>;
  /** Names what is made: equal keys mean equal functions. */
  readonly key: string;
  /** Makes equally many values from every input of the same length. */
  make(from: ArrayLike<number>): Int32Array;
}

const derivations = new WeakMap<object, Derivation>();

/** How uploaded values were derived from an input; undefined for all others. */
export const derivationOf = (values: object): Derivation | undefined => derivations.get(values);

/** A run of rows. */
export interface Run {
  readonly first: number;
  readonly count: number;
}

/** Elements of four bytes to which offsets of bindings are aligned: 256 bytes, enough for every device. */
export const ALIGNMENT = 64;

/** Rows `first`, `first + 1`, … of a tensor whose rows have `width` elements. */
export function rowsOf(tensor: tf.TensorInfo, { first, count }: Run, width: number): TensorWindow {
  return { tensor, offset: first * width, size: count * width };
}

let bindingLimit: number | undefined;

/**
 * Lowers what kernels bind at once, as if the adapter allowed no more.
 *
 * @param bytes At least 256. @default {what the device allows}
 */
export function limitBindings(bytes?: number): void {
  bindingLimit = bytes;
}

/** Bytes of a storage buffer that a kernel binds at once on a device. */
export function bindableBytes(device: GPUDevice): number {
  return Math.min(bindingLimit ?? Infinity, device.limits.maxStorageBufferBindingSize);
}

/** A kernel as `register.ts` registers it. */
export interface Kernel {
  readonly name: string;
  /** Checks its inputs, allocates its outputs, records its dispatches. */
  run(call: KernelCall): tf.TensorInfo | tf.TensorInfo[];
}

/** Numbers of workgroups in x, y and z. */
export type Grid = readonly [number, number, number];

interface Compiled {
  readonly pipeline: GPUComputePipeline;
  readonly layout: GPUBindGroupLayout;
  readonly uniforms: readonly (readonly [string, "u32" | "f32"])[];
}

const compiled = new WeakMap<GPUDevice, Map<string, Compiled>>();

/**
 * The backend with the members that we use.
 *
 * @throws {TypeError} if it is not built as tfjs-backend-webgpu 4.22 is.
 */
export function attach(backend: object): Backend {
  const b = backend as Partial<Backend>;
  const fits = b.device !== undefined && typeof b.bufferManager?.acquireBuffer === "function" &&
    typeof b.tensorMap?.get === "function" && typeof b.submitQueue === "function" &&
    b.commandQueueOwnedIds instanceof WeakSet && Array.isArray(b.uniformPendingDisposal) &&
    typeof b.dispatchCountInPass === "number";
  if (!fits) throw new TypeError("the webgpu backend has no pass that kernels can share: use tfjs-backend-webgpu 4.22");
  return backend as Backend;
}

/** The WGSL of a shader with its declarations. */
export function wgsl({ storage, uniforms, threads, code = "", main }: Shader): string {
  const members = Object.entries(uniforms).map(([name, type]) => `${name}: ${type}`);
  const buffers = storage.map(({ name, type, write }, i) =>
    `@group(0) @binding(${i}) var<storage, ${write ? "read_write" : "read"}> ${name}: array<${type}>;`
  );
  return `struct Uniforms { ${[...members, "unused: u32"].join(", ")} }
${buffers.join("\n")}
@group(0) @binding(${storage.length}) var<uniform> u: Uniforms;
${code}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
${main}
}`;
}

function compile(device: GPUDevice, key: string, shader: Shader): Compiled {
  const visibility = GPUShaderStage.COMPUTE;
  const layout = device.createBindGroupLayout({
    entries: [
      ...shader.storage.map(({ write }, binding): GPUBindGroupLayoutEntry => ({
        binding,
        visibility,
        buffer: { type: write ? "storage" : "read-only-storage" },
      })),
      { binding: shader.storage.length, visibility, buffer: { type: "uniform" } },
    ],
  });
  const pipeline = device.createComputePipeline({
    label: key,
    layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
    compute: { module: device.createShaderModule({ label: key, code: wgsl(shader) }), entryPoint: "main" },
  });
  return { pipeline, layout, uniforms: Object.entries(shader.uniforms) };
}

/** What a kernel sees of one call. */
export class KernelCall {
  readonly #temporary: tf.TensorInfo[] = [];

  constructor(
    readonly name: string,
    private readonly backend: Backend,
    private readonly inputs: Readonly<Record<string, tf.TensorInfo | null | undefined>>,
    private readonly attributes: Readonly<Record<string, unknown>>,
  ) {}

  /** Limits of the device. */
  get limits(): GPUSupportedLimits {
    return this.backend.device.limits;
  }

  /** Bytes of a tensor that can be bound at once. */
  get bindable(): number {
    return bindableBytes(this.backend.device);
  }

  /**
   * Cuts rows into runs that can be bound, of all tensors that share them. One run where everything fits.
   *
   * @param rows How many there are.
   * @param widths Elements a row of each of these tensors.
   * @param multiple Runs begin at multiples of this power of two. @default {1}
   * @throws {MemoryLimitError} if the fewest rows that begin where a binding may are too many.
   */
  windows(rows: number, widths: readonly number[], multiple = 1): Run[] {
    const most = Math.floor(this.bindable / 4), widest = Math.max(1, ...widths);
    if (rows * widest <= most) return [{ first: 0, count: rows }];
    const granule = Math.max(multiple, ...widths.map((width) => ALIGNMENT / powerOfTwoIn(width)));
    const step = Math.floor(most / widest / granule) * granule;
    const fewest = Math.min(rows, granule);
    if (step === 0) throw this.#tooLarge(`${fewest} rows of ${widest} numbers, together`, 4 * fewest * widest);
    return Array.from({ length: Math.ceil(rows / step) }, (_, i) => {
      return { first: i * step, count: Math.min(step, rows - i * step) };
    });
  }

  /** Whether the device computes on the processor. */
  get software(): boolean {
    return isSoftware(this.backend.device);
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

  /** A list of finite numbers among the attributes. */
  numbers(name: string): readonly number[] {
    const values = this.attributes[name];
    if (!Array.isArray(values) || !values.every(Number.isFinite)) {
      throw this.error(`attribute ${name} must be a list of finite numbers, is ${String(values)}`);
    }
    return values;
  }

  /** A truth value among the attributes, or the default where it is absent. */
  flag(name: string, absent = false): boolean {
    const value = this.attributes[name] ?? absent;
    if (typeof value !== "boolean") throw this.error(`attribute ${name} must be true or false, is ${String(value)}`);
    return value;
  }

  /** A new tensor; its content is undefined until a dispatch writes it. */
  output(shape: readonly number[]): tf.TensorInfo {
    const size = tf.util.sizeFromShape([...shape]);
    return this.backend.makeTensorInfo([...shape], "float32", size === 0 ? new Float32Array(0) : undefined);
  }

  /** A new tensor of zeros, which stays on the host until someone needs it. */
  zeros(shape: readonly number[]): tf.TensorInfo {
    return this.backend.makeTensorInfo([...shape], "float32", new Float32Array(tf.util.sizeFromShape([...shape])));
  }

  /** As {@link output}, but freed after the call. */
  temporary(shape: readonly number[]): tf.TensorInfo {
    const tensor = this.output(shape);
    this.#temporary.push(tensor);
    return tensor;
  }

  /** A tensor with these values, freed after the call. */
  upload(values: Int32Array): tf.TensorInfo {
    return this.#uploaded(values);
  }

  /** As {@link upload}, of values that depend on the host's values of an input and on nothing else that changes. */
  uploadDerived(derivation: Derivation): tf.TensorInfo {
    const values = derivation.make(derivation.from);
    derivations.set(values, derivation);
    return this.#uploaded(values);
  }

  #uploaded(values: Int32Array): tf.TensorInfo {
    const tensor = this.backend.makeTensorInfo([values.length], "int32", values);
    this.#temporary.push(tensor);
    return tensor;
  }

  /** The values of an int32 input where the host has them; a tensor that a shader has used usually lives on the device alone. */
  hostValues(tensor: tf.TensorInfo): ArrayLike<number> | undefined {
    return this.backend.tensorMap.get(tensor.dataId)?.values ?? undefined;
  }

  /** Declares that a tensor is about to change on the device: a copy that the host read earlier is dropped. */
  overwrite(tensor: tf.TensorInfo): void {
    this.backend.uploadToGPU(tensor.dataId);
    const data = this.backend.tensorMap.get(tensor.dataId);
    if (data) data.values = null;
  }

  /**
   * Records one dispatch.
   *
   * @param key Names the shader; equal keys must mean equal shaders.
   * @param make The shader; called once per key and device.
   * @param tensors In the order of the shader's `storage`, whole or windows.
   * @param uniforms By name.
   */
  dispatch(
    key: string,
    make: () => Shader,
    tensors: readonly (tf.TensorInfo | TensorWindow)[],
    uniforms: Readonly<Record<string, number>>,
    grid: Grid,
  ): void {
    const { backend } = this, { device } = backend;
    const most = device.limits.maxComputeWorkgroupsPerDimension;
    if (grid.some((n) => n > most)) throw this.error(`${grid.join(" × ")} workgroups are more than the GPU takes`);
    const entries = tensors.map((x, binding): GPUBindGroupEntry => ({ binding, resource: this.#binding(x) }));
    let cache = compiled.get(device);
    if (cache === undefined) compiled.set(device, cache = new Map());
    let program = cache.get(key);
    if (program === undefined) cache.set(key, program = compile(device, key, make()));
    entries.push({ binding: entries.length, resource: { buffer: this.#uniforms(program, uniforms) } });
    const bindGroup = device.createBindGroup({ layout: program.layout, entries });
    for (const x of tensors) backend.commandQueueOwnedIds.add(tensorOf(x).dataId);
    backend.ensureCommandEncoderReady();
    backend.computePassEncoder ??= backend.commandEncoder!.beginComputePass();
    backend.computePassEncoder.setPipeline(program.pipeline);
    backend.computePassEncoder.setBindGroup(0, bindGroup);
    backend.computePassEncoder.dispatchWorkgroups(...grid);
    backend.dispatchCountInPass++;
    if (backend.dispatchCountInPass < Number(tf.env().get("WEBGPU_DEFERRED_SUBMIT_BATCH_SIZE"))) return;
    backend.endComputePassEncoder();
    backend.submitQueue();
  }

  /**
   * Records copies of whole tensors to places in one tensor, without a dispatch.
   *
   * @param offsets Where each of `parts` begins in `whole`, in elements; they fit and don't overlap.
   * @param clear Whether what lies between them becomes 0; it is undefined otherwise if `whole` is new.
   */
  gather(parts: readonly tf.TensorInfo[], whole: tf.TensorInfo, offsets: readonly number[], clear = false): void {
    const to = this.#buffer(whole), from = this.#places(parts, offsets), encoder = this.#copying();
    if (clear) encoder.clearBuffer(to);
    for (const { buffer, at } of from) encoder.copyBufferToBuffer(buffer, 0, to, at, buffer.size);
    for (const tensor of [...parts, whole]) this.backend.commandQueueOwnedIds.add(tensor.dataId);
  }

  /** The reverse of {@link gather}: copies places in one tensor to whole tensors, which change in place. */
  scatter(whole: tf.TensorInfo, offsets: readonly number[], parts: readonly tf.TensorInfo[]): void {
    for (const part of parts) this.overwrite(part);
    const from = this.#buffer(whole), to = this.#places(parts, offsets), encoder = this.#copying();
    for (const { buffer, at } of to) encoder.copyBufferToBuffer(from, at, buffer, 0, buffer.size);
    for (const tensor of [...parts, whole]) this.backend.commandQueueOwnedIds.add(tensor.dataId);
  }

  /** The buffers of tensors that have elements, each with its place in bytes. */
  #places(parts: readonly tf.TensorInfo[], offsets: readonly number[]): { buffer: GPUBuffer; at: number }[] {
    return parts.flatMap((part, i) =>
      tf.util.sizeFromShape(part.shape) > 0 ? { buffer: this.#buffer(part), at: 4 * offsets[i] } : []
    );
  }

  /** The backend's encoder, between passes; call it when everything is uploaded. */
  #copying(): GPUCommandEncoder {
    this.backend.ensureCommandEncoderReady();
    this.backend.endComputePassEncoder();
    return this.backend.commandEncoder!;
  }

  /** Frees what the call made for itself; the backend waits with that until the GPU is done with it. */
  end(): void {
    for (const tensor of this.#temporary) this.backend.disposeData(tensor.dataId);
    this.#temporary.length = 0;
  }

  #buffer(tensor: tf.TensorInfo): GPUBuffer {
    this.backend.uploadToGPU(tensor.dataId);
    const buffer = this.backend.tensorMap.get(tensor.dataId)?.resource;
    if (!(buffer instanceof GPUBuffer)) throw new TypeError(`${this.name}: a tensor is not on the webgpu backend`);
    return buffer;
  }

  #binding(x: tf.TensorInfo | TensorWindow): GPUBufferBinding {
    const buffer = this.#buffer(tensorOf(x));
    const { offset, size } = "tensor" in x
      ? { offset: 4 * x.offset, size: 4 * x.size }
      : { offset: 0, size: buffer.size };
    if (size > this.bindable) throw this.#tooLarge(`a tensor [${tensorOf(x).shape.join(", ")}]`, size);
    return { buffer, offset, size };
  }

  #tooLarge(what: string, bytes: number): MemoryLimitError {
    return new MemoryLimitError(
      `${this.name}: ${what} of ${bytes} bytes is above the ${this.bindable} bytes that a shader of this GPU can bind; ` +
        "use smaller batches",
    );
  }

  #uniforms(program: Compiled, values: Readonly<Record<string, number>>): GPUBuffer {
    const bytes = Math.ceil((program.uniforms.length + 1) / 4) * 16;
    const view = new DataView(new ArrayBuffer(bytes));
    program.uniforms.forEach(([name, type], i) => {
      const value = values[name];
      if (value === undefined) throw this.error(`uniform ${name} is not set`);
      if (type === "u32") view.setUint32(4 * i, value, true);
      else view.setFloat32(4 * i, value, true);
    });
    const known = this.backend.uniformBuffer?.(view.buffer);
    if (known) return known;
    const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
    const buffer = this.backend.bufferManager.acquireBuffer(bytes, usage);
    this.backend.queue.writeBuffer(buffer, 0, view.buffer);
    this.backend.uniformPendingDisposal.push(buffer);
    return buffer;
  }
}

const tensorOf = (x: tf.TensorInfo | TensorWindow): tf.TensorInfo => "tensor" in x ? x.tensor : x;

/** The largest power of two that divides a width, at most {@link ALIGNMENT}. */
function powerOfTwoIn(width: number): number {
  let power = 1;
  while (power < ALIGNMENT && width % (2 * power) === 0) power *= 2;
  return power;
}

const software = new WeakMap<GPUDevice, boolean>();

/** Whether a device computes on the processor. */
export function isSoftware(device: GPUDevice): boolean {
  let known = software.get(device);
  if (known === undefined) {
    const { adapterInfo } = device as { adapterInfo?: Partial<GPUAdapterInfo> };
    const text = `${adapterInfo?.description ?? ""} ${adapterInfo?.device ?? ""}`;
    known = adapterInfo?.isFallbackAdapter ?? /llvmpipe|swiftshader|basic render/i.test(text);
    software.set(device, known);
  }
  return known;
}

/** Runs a kernel on the backend. */
export function runKernel(
  kernel: Kernel,
  backend: Backend,
  inputs: Readonly<Record<string, tf.TensorInfo | null | undefined>>,
  attributes: Readonly<Record<string, unknown>>,
): tf.TensorInfo | tf.TensorInfo[] {
  const call = new KernelCall(kernel.name, backend, inputs, attributes);
  try {
    return kernel.run(call);
  } finally {
    call.end();
  }
}
