/**
 * The engine's own device memory and pipelines, counted, and the seam to the buffers of TensorFlow.js.
 *
 * @module
 */
import { tf, tfwebgpu } from "../../deps.ts";
import { MemoryLimitError } from "../device_errors.ts";
import { type BindingKind, type Kernel, STEP_BYTES } from "./wgsl.ts";

/** The backend of TensorFlow.js, if it is WebGPU. */
export function webgpuBackend(): InstanceType<typeof tfwebgpu.WebGPUBackend> | undefined {
  if (tf.getBackend() !== "webgpu") return undefined;
  const backend = tf.backend();
  return backend instanceof tfwebgpu.WebGPUBackend ? backend : undefined;
}

/** Submits what TensorFlow.js has recorded, so that a submission of ours comes after it. */
export function flushTensors(backend: InstanceType<typeof tfwebgpu.WebGPUBackend>): void {
  backend.ensureCommandEncoderReady();
  backend.endComputePassEncoder();
  backend.submitQueue();
}

/** The buffer that holds a float tensor, not a copy. It stays valid until the tensor is disposed or assigned. */
export function tensorBuffer(backend: InstanceType<typeof tfwebgpu.WebGPUBackend>, x: tf.Tensor): GPUBuffer {
  backend.uploadToGPU(x.dataId);
  return backend.tensorMap.get(x.dataId).resource as GPUBuffer;
}

/** Buffers that were made and not yet released. */
export class DeviceMemory {
  readonly #live = new Map<GPUBuffer, number>();
  #bytes = 0;

  constructor(readonly device: GPUDevice) {}

  /** Bytes that are held now. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Buffers that are held now. */
  get buffers(): number {
    return this.#live.size;
  }

  /**
   * A zeroed buffer.
   *
   * @throws {MemoryLimitError} It is larger than the adapter can make or bind.
   */
  create(label: string, bytes: number, usage: number): GPUBuffer {
    const size = Math.max(16, Math.ceil(bytes / 4) * 4),
      { maxBufferSize, maxStorageBufferBindingSize } = this.device.limits;
    const most = usage & GPUBufferUsage.STORAGE ? Math.min(maxBufferSize, maxStorageBufferBindingSize) : maxBufferSize;
    if (size > most) {
      throw new MemoryLimitError(
        `generation: the ${label} would take ${mebibytes(size)}, but the adapter allows ${
          mebibytes(most)
        } in one piece; ` +
          "generate fewer rows at a time, or fewer tokens",
      );
    }
    const buffer = this.device.createBuffer({ label, size, usage });
    this.#live.set(buffer, size);
    this.#bytes += size;
    return buffer;
  }

  /** Destroys a buffer; one that is gone already is left alone. */
  release(buffer: GPUBuffer): void {
    this.#bytes -= this.#live.get(buffer) ?? 0;
    if (this.#live.delete(buffer)) buffer.destroy();
  }

  /** Destroys all of them. */
  dispose(): void {
    for (const buffer of [...this.#live.keys()]) this.release(buffer);
  }
}

const mebibytes = (bytes: number): string => `${(bytes / 1048576).toFixed(bytes < 1048576 ? 3 : 0)} MiB`;

/** A compiled kernel. */
export interface Compiled {
  pipeline: GPUComputePipeline;
  layout: GPUBindGroupLayout;
  /** Whether it takes the step record, at a dynamic offset. */
  stepped: boolean;
}

/** Kernels compiled once. Kernels with the same bindings share a layout, so bind groups serve all their variants. */
export class Pipelines {
  readonly #compiled = new Map<string, Compiled>();
  readonly #layouts = new Map<string, GPUBindGroupLayout>();

  static readonly #byDevice = new WeakMap<GPUDevice, Pipelines>();

  /** The pipelines of a device, compiled once for all who use it. */
  static of(device: GPUDevice): Pipelines {
    const found = Pipelines.#byDevice.get(device) ?? new Pipelines(device);
    Pipelines.#byDevice.set(device, found);
    return found;
  }

  private constructor(readonly device: GPUDevice) {}

  #layout(bindings: readonly BindingKind[]): GPUBindGroupLayout {
    const key = bindings.join();
    let layout = this.#layouts.get(key);
    if (!layout) {
      const entries = bindings.map((kind, binding): GPUBindGroupLayoutEntry => ({
        binding,
        visibility: GPUShaderStage.COMPUTE,
        buffer: kind === "step"
          ? { type: "uniform", hasDynamicOffset: true, minBindingSize: STEP_BYTES }
          : { type: kind === "read" ? "read-only-storage" : "storage" },
      }));
      layout = this.device.createBindGroupLayout({ entries });
      this.#layouts.set(key, layout);
    }
    return layout;
  }

  /** The pipeline of a kernel. */
  get(kernel: Kernel): Compiled {
    let found = this.#compiled.get(kernel.key);
    if (!found) {
      const layout = this.#layout(kernel.bindings);
      const pipeline = this.device.createComputePipeline({
        label: kernel.key,
        layout: this.device.createPipelineLayout({ bindGroupLayouts: [layout] }),
        compute: { module: this.device.createShaderModule({ code: kernel.source }), entryPoint: "main" },
      });
      found = { pipeline, layout, stepped: kernel.bindings.includes("step") };
      this.#compiled.set(kernel.key, found);
    }
    return found;
  }

  /** A bind group for a kernel and all that share its layout; a step record's buffer is bound at a dynamic offset. */
  bind({ layout }: Compiled, kernel: Kernel, resources: readonly (GPUBuffer | GPUBufferBinding)[]): GPUBindGroup {
    return this.device.createBindGroup({
      layout,
      entries: resources.map((r, binding) => {
        const resource = "buffer" in r ? r : { buffer: r };
        return {
          binding,
          resource: kernel.bindings[binding] === "step" ? { ...resource, size: STEP_BYTES } : resource,
        };
      }),
    });
  }
}

/**
 * Runs `f` and turns a validation or memory error of the device into an exception.
 *
 * @throws {MemoryLimitError} The device is out of memory. @throws {Error} It refused a kernel or a binding.
 */
export async function guarded<T>(device: GPUDevice, what: string, f: () => T): Promise<T> {
  device.pushErrorScope("out-of-memory");
  device.pushErrorScope("validation");
  let result: T | undefined, failure: unknown;
  try {
    result = f();
  } catch (error) {
    failure = error;
  }
  const [invalid, memory] = [await device.popErrorScope(), await device.popErrorScope()];
  if (failure) throw failure;
  if (memory) {
    throw new MemoryLimitError(`${what}: the device is out of memory; generate fewer rows at a time, or fewer tokens`);
  }
  if (invalid) throw new Error(`${what}: ${invalid.message}`);
  return result as T;
}
