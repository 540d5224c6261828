/**
 * Generation on WebGPU: a decode step is a short list of fused dispatches, recorded once for a batch's shape and encoded again
 * for each token; drawing happens on the device and the host reads ids and log-probs every few tokens only.
 *
 * Draws follow the counters of `sampler.ts`, so they are the host sampler's except where float32 rounding decides a near tie.
 * For a nucleus (top-p below 1) the head writes its logits, of 64 rows at a time, and `nucleus.ts` finds in them where each
 * row's nucleus ends; a plan serves both, and any top-p.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import type { QwenConfig } from "../../policy/config.ts";
import { bucketed } from "../../policy/packing.ts";
import { textRopeTable } from "../../policy/rope_index.ts";
import type { Weights } from "../../policy/vision.ts";
import {
  checkInput,
  type DecodeInput,
  type DecodeOutput,
  rowRecords,
  type SampledKeys,
  stepRecords,
  suppressedBits,
} from "./input.ts";
import { DeviceMemory, flushTensors, guarded, Pipelines, tensorBuffer, webgpuBackend } from "./memory.ts";
import {
  DecodePlan,
  type Drawing,
  encodeStep,
  type Launch,
  nucleusBytes,
  type PlanParts,
  type PromptBuffers,
} from "./plan.ts";
import { WeightBuffers } from "./weights.ts";
import { NOT_FINITE } from "./wgsl.ts";

export type { DecodeInput, DecodeOutput } from "./input.ts";

/** Options of {@linkcode DecodeEngine}. */
export interface DecodeEngineOptions {
  /** Whether kernels are laid out for a processor. @default {whether the adapter is a software one} */
  software?: boolean;
  /** Bytes of the embedding or the head that are bound at once; larger tables are split by rows. @default {the adapter's limit} */
  tableBytes?: number;
}

/** Plans that are kept; the one unused for longest goes first. */
const MAX_PLANS = 3;
/** Dispatches a submission: enough to make it cheap, few enough that the device starts early. */
const SUBMIT_DISPATCHES = 512;

const powerOfTwo = (n: number, least: number): number => Math.max(least, 2 ** Math.ceil(Math.log2(n)));

/** A greedy draw is that of any nucleus. */
function drawingOf({ temperature, topP = 1 }: DecodeInput): Drawing {
  return { greedy: temperature === 0, nucleus: temperature > 0 && topP < 1 };
}

/** The generation engine of one policy. Calls of {@linkcode generate} wait for each other. */
export class DecodeEngine {
  readonly #config: QwenConfig;
  readonly #device: GPUDevice;
  readonly #memory: DeviceMemory;
  readonly #parts: PlanParts;
  readonly #plans = new Map<string, DecodePlan>();
  #turns: { positions: number; buffer: GPUBuffer } | undefined;
  #queue: Promise<unknown> = Promise.resolve();
  #disposed = false;

  /**
   * Why the engine cannot run a model of these sizes on the current backend, or undefined where it can.
   *
   * @param nucleus Whether it is to draw from a nucleus (top-p below 1), which takes the logits of 64 rows in one binding.
   */
  static unsupported({ text }: QwenConfig, nucleus = false): string | undefined {
    const backend = webgpuBackend();
    if (!backend) return "the backend is not WebGPU";
    const { limits } = backend.device, { hiddenSize, heads, headDim, intermediateSize } = text;
    if (limits.maxStorageBuffersPerShaderStage < 8) return "the adapter binds fewer than 8 storage buffers";
    if (limits.maxComputeInvocationsPerWorkgroup < 256) return "the adapter runs fewer than 256 threads a workgroup";
    const largest = 4 * hiddenSize * Math.max(intermediateSize, heads * headDim);
    if (largest > limits.maxStorageBufferBindingSize) {
      return `a weight matrix takes ${largest} bytes, but the adapter binds ${limits.maxStorageBufferBindingSize} at most`;
    }
    const most = Math.min(limits.maxStorageBufferBindingSize, limits.maxBufferSize);
    if (nucleus && nucleusBytes(text.vocabSize) > most) {
      return `the logits of a nucleus (topP < 1) take ${nucleusBytes(text.vocabSize)} bytes, ` +
        `but the adapter binds ${most} at most`;
    }
    const shared = 4 * (2 * headDim + 3 * 128 + 4 * Math.max(128, headDim));
    if (shared > limits.maxComputeWorkgroupStorageSize) return `heads of ${headDim} are too wide for the adapter`;
    return undefined;
  }

  /** Whether the engine can run a model of these sizes on the current backend, see {@linkcode unsupported}. */
  static supports(config: QwenConfig): boolean {
    return DecodeEngine.unsupported(config) === undefined;
  }

  /**
   * @param weights Looks tensors up by published name; followed from call to call, so variables may be assigned in between.
   * @throws {RangeError} See {@linkcode unsupported}.
   */
  constructor(config: QwenConfig, weights: Weights, options: DecodeEngineOptions = {}) {
    const why = DecodeEngine.unsupported(config), backend = webgpuBackend();
    if (why !== undefined || !backend) throw new RangeError(`the generation engine cannot be used: ${why}`);
    this.#config = config;
    this.#device = backend.device;
    this.#memory = new DeviceMemory(this.#device);
    const words = Math.ceil(config.text.vocabSize / 32);
    this.#parts = {
      config,
      memory: this.#memory,
      pipelines: Pipelines.of(this.#device),
      weights: new WeightBuffers(config, weights, this.#memory),
      suppressed: this.#memory.create("suppressed ids", words * 4, GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST),
      software: options.software ?? this.#device.adapterInfo?.isFallbackAdapter ?? false,
      tableBytes: options.tableBytes ?? this.#device.limits.maxStorageBufferBindingSize,
    };
  }

  /** Bytes of device memory that the engine holds, weights and prompts not counted. */
  get bytes(): number {
    return this.#memory.bytes;
  }

  /** Buffers that the engine holds. */
  get buffers(): number {
    return this.#memory.buffers;
  }

  /**
   * Draws up to `maxNewTokens` tokens for each row: the first from `firstLogits`, the others by the recorded step.
   *
   * @throws {RangeError} An input does not fit the others or the device's memory, or logits are not finite.
   */
  generate(input: DecodeInput): Promise<DecodeOutput> {
    const turn = this.#queue.then(() => this.#generate(input));
    this.#queue = turn.catch(() => {});
    return turn;
  }

  #plan(slots: number, capacity: number): DecodePlan {
    const key = `${slots} ${capacity}`;
    let plan = this.#plans.get(key);
    this.#plans.delete(key);
    if (!plan) {
      for (const [old, unused] of this.#plans) {
        if (this.#plans.size < MAX_PLANS) break;
        unused.dispose();
        this.#plans.delete(old);
      }
      plan = new DecodePlan(this.#parts, slots, capacity);
    }
    this.#plans.set(key, plan);
    return plan;
  }

  /** Cosines and sines of all positions below `positions`; all three axes of a generated token stand at the same one. */
  #rotations(positions: number): GPUBuffer {
    if (this.#turns && this.#turns.positions >= positions) return this.#turns.buffer;
    if (this.#turns) this.#memory.release(this.#turns.buffer);
    const { headDim, ropeTheta, mropeSection } = this.#config.text,
      half = headDim / 2,
      count = powerOfTwo(positions, 256);
    const at = Int32Array.from({ length: count }, (_, i) => i);
    const { cos, sin } = textRopeTable([at, at, at], headDim, ropeTheta, mropeSection);
    const table = new Float32Array(count * headDim);
    for (let p = 0; p < count; p++) {
      table.set(cos.subarray(p * headDim, p * headDim + half), p * headDim);
      table.set(sin.subarray(p * headDim, p * headDim + half), p * headDim + half);
    }
    const buffer = this.#memory.create(
      "rotary table",
      table.byteLength,
      GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST,
    );
    this.#device.queue.writeBuffer(buffer, 0, table);
    this.#turns = { positions: count, buffer };
    return buffer;
  }

  /** Runs `f`; where the device refuses what it makes, all plans are dropped, because their buffers may be void. */
  async #recorded<T>(f: () => T): Promise<T> {
    try {
      return await guarded(this.#device, "generation", f);
    } catch (error) {
      for (const plan of this.#plans.values()) plan.dispose();
      this.#plans.clear();
      if (this.#turns) this.#memory.release(this.#turns.buffer);
      this.#turns = undefined;
      throw error;
    }
  }

  async #generate(input: DecodeInput): Promise<DecodeOutput> {
    const backend = webgpuBackend();
    if (this.#disposed) throw new RangeError("the generation engine was disposed of");
    if (backend?.device !== this.#device) {
      throw new RangeError("the backend has another device than the engine was made on");
    }
    checkInput(input, this.#config, this.#device.limits.maxStorageBufferBindingSize);
    const count = input.lengths.length, slots = powerOfTwo(count, 1), capacity = powerOfTwo(input.maxNewTokens, 32);
    flushTensors(backend);
    const { plan, prompt, first } = await this.#recorded(() => {
      const encoder = this.#device.createCommandEncoder();
      this.#parts.weights.refresh(backend, encoder);
      // Norms that lived on the host were uploaded just now, through the backend's own encoder.
      flushTensors(backend);
      this.#device.queue.submit([encoder.finish()]);
      const plan = this.#plan(slots, capacity);
      plan.releasePrompts();
      const prompt: PromptBuffers = {
        k: input.k.map((x) => tensorBuffer(backend, x)),
        v: input.v.map((x) => tensorBuffer(backend, x)),
        turns: this.#rotations(Math.max(...input.nextPosition) + input.maxNewTokens),
      };
      const logits = tensorBuffer(backend, input.firstLogits);
      flushTensors(backend);
      this.#writeInputs(plan, input);
      return { plan, prompt, first: plan.first(count, logits, drawingOf(input)) };
    });
    try {
      const out = await this.#run(plan, prompt, first, input);
      return input.keep ? { ...out, kept: await this.#kept(plan, out.ids) } : out;
    } finally {
      plan.releasePrompts();
    }
  }

  /** Writes row descriptions, step records and suppressed ids. */
  #writeInputs(plan: DecodePlan, input: DecodeInput): void {
    const { queue } = this.#device;
    queue.writeBuffer(plan.rows, 0, rowRecords(input, input.lengths.map((_, i) => i)));
    queue.writeBuffer(plan.lines, 0, Uint32Array.from(input.logitsRows ?? input.lengths.keys()));
    queue.writeBuffer(plan.steps, 0, stepRecords(input, plan.slots));
    queue.writeBuffer(this.#parts.suppressed, 0, suppressedBits(input.suppressed));
  }

  async #run(plan: DecodePlan, prompt: PromptBuffers, first: Launch[], input: DecodeInput): Promise<DecodeOutput> {
    const { lengths, maxNewTokens, checkEvery = 16 } = input, drawing = drawingOf(input);
    const out: DecodeOutput = {
      ids: lengths.map(() => []),
      logprobs: lengths.map(() => []),
      finish: lengths.map(() => "length"),
    };
    let running = lengths.map((_, i) => i), launches: Launch[] = [], count = 0;
    for (let done = 0; done < maxNewTokens && running.length > 0;) {
      const until = Math.min(maxNewTokens, done + Math.ceil(checkEvery));
      if (count !== running.length && until > 1) {
        count = running.length;
        launches = await this.#recorded(() => plan.step(count, prompt, drawing));
      }
      this.#submitSteps(first, launches, done, until);
      running = this.#take(await this.#read(plan, done, until), plan.slots, done, running, input, out);
      done = until;
      if (running.length > 0 && running.length < count && done < maxNewTokens) {
        this.#device.queue.writeBuffer(plan.rows, 0, rowRecords(input, running));
        const embed = plan.embed(running.length);
        this.#submit((pass) => encodeStep(pass, embed, done - 1));
      }
    }
    return out;
  }

  /** Copies of the keys and values of what was drawn: the plan's own serve the next call. */
  async #kept(plan: DecodePlan, ids: readonly (readonly number[])[]): Promise<SampledKeys | undefined> {
    const { kvHeads, headDim } = this.#config.text, k: tf.Tensor2D[] = [], v: tf.Tensor2D[] = [];
    let total = 0;
    const starts = ids.map(({ length }) => (total += length - 1) - (length - 1));
    if (total === 0) return undefined;
    try {
      await this.#recorded(() => {
        for (const store of [k, v]) {
          // Bucket sizes, because TensorFlow.js keeps freed buffers by their size.
          for (const _ of plan.caches) store.push(tf.keep(tf.fill([bucketed(total), kvHeads * headDim], 0)));
        }
        this.#copySampled(plan, ids, starts, [k, v]);
      });
    } catch (error) {
      tf.dispose([k, v]);
      throw error;
    }
    return { k, v, starts };
  }

  /** Copies what was sampled, row after row, into tensors of keys and of values. */
  #copySampled(
    { caches, slots, capacity }: DecodePlan,
    ids: readonly (readonly number[])[],
    starts: readonly number[],
    stores: readonly (readonly tf.Tensor2D[])[],
  ): void {
    const backend = webgpuBackend()!, { kvHeads, headDim } = this.#config.text, bytes = 4 * kvHeads * headDim;
    // What fills the tensors goes first.
    flushTensors(backend);
    const encoder = this.#device.createCommandEncoder();
    stores.forEach((store, half) =>
      store.forEach((tensor, layer) => {
        const target = tensorBuffer(backend, tensor);
        ids.forEach(({ length }, row) => {
          const from = (half * slots + row) * capacity * bytes, size = (length - 1) * bytes;
          if (size > 0) encoder.copyBufferToBuffer(caches[layer], from, target, starts[row] * bytes, size);
        });
      })
    );
    this.#device.queue.submit([encoder.finish()]);
  }

  #submit(record: (pass: GPUComputePassEncoder) => void): void {
    const encoder = this.#device.createCommandEncoder(), pass = encoder.beginComputePass();
    record(pass);
    pass.end();
    this.#device.queue.submit([encoder.finish()]);
  }

  /** Submits the steps from `from` up to `until`. */
  #submitSteps(first: Launch[], launches: Launch[], from: number, until: number): void {
    const each = Math.max(1, Math.floor(SUBMIT_DISPATCHES / Math.max(1, launches.length)));
    for (let step = from; step < until; step += each) {
      this.#submit((pass) => {
        for (let s = step; s < Math.min(until, step + each); s++) encodeStep(pass, s === 0 ? first : launches, s);
      });
    }
  }

  /** Reads what the steps from `from` up to `until` drew: `[steps, slots, 2]` words. */
  async #read({ drawn, staging, slots }: DecodePlan, from: number, until: number): Promise<Uint32Array> {
    const step = slots * 8, bytes = (until - from) * step, encoder = this.#device.createCommandEncoder();
    encoder.copyBufferToBuffer(drawn, from * step, staging, 0, bytes);
    this.#device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPUMapMode.READ, 0, bytes);
    const words = new Uint32Array(staging.getMappedRange(0, bytes).slice(0));
    staging.unmap();
    return words;
  }

  /** Appends drawn tokens to their rows and gives the rows that still run. */
  #take(
    words: Uint32Array,
    slots: number,
    from: number,
    running: number[],
    input: DecodeInput,
    out: DecodeOutput,
  ): number[] {
    const floats = new Float32Array(words.buffer);
    for (let step = 0; step < words.length / (2 * slots) && running.length > 0; step++) {
      running = running.filter((row) => {
        const at = (step * slots + row) * 2, id = words[at], logprob = floats[at + 1];
        if (id >= NOT_FINITE || !Number.isFinite(logprob)) {
          throw new RangeError(
            `token ${from + step} of sequence [${input.keys[row]}]: the logits are not finite; the policy has diverged`,
          );
        }
        out.ids[row].push(id);
        out.logprobs[row].push(logprob);
        const stops = input.stop.has(id);
        if (stops) out.finish[row] = "stop";
        return !stops;
      });
      input.onToken?.(from + step + 1, running.length);
    }
    return running;
  }

  /** Releases all device memory of the engine. */
  dispose(): void {
    this.#disposed = true;
    this.#plans.clear();
    this.#memory.dispose();
  }
}
