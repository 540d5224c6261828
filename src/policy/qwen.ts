/**
 * The policy: a Qwen2.5-VL of any size on TensorFlow.js, with generation and differentiable log-probs over the same weights.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { DecodeEngine } from "../gpu/decode/engine.ts";
import type { DecodeInput } from "../gpu/decode/input.ts";
import type { QwenConfig } from "./config.ts";
import type { ImageProcessor } from "./image_processor.ts";
import { currentKernels, gatherRows, headLogProbEntropy, logProbEntropy, segmentsOf } from "./ops.ts";
import type { Picture } from "./picture.ts";
import type {
  Completion,
  GenerateOptions,
  ImageInput,
  LogProbOptions,
  Message,
  Policy,
  Sequence,
  TokenLogProbs,
} from "./policy.ts";
import { type RopeIndex, ropeIndex, textRopeTable } from "./rope_index.ts";
import { type SamplerOptions, sampleToken } from "./sampler.ts";
import {
  decodeStep,
  embed,
  head,
  headParts,
  KeyValueCache,
  type RopeTensors,
  textForward,
  type TextHooks,
} from "./text.ts";
import type { Tokenizer } from "./tokenizer.ts";
import type { Tensor2D, Variable } from "../tensors.ts";
import { type Inspect, type VisionFeatures, visionForward, type Weights } from "./vision.ts";

/** Prompts are prefilled, and pictures encoded, in batches of at most this many tokens or patches. */
const BATCH_TOKENS = 1 << 14;
/** Logits are made in pieces of at most this many elements (64 MiB). */
const MAX_LOGITS = 1 << 24;
/** Suppressed logits get this much; adding it keeps everything finite. */
const SUPPRESSED = -1e30;

/** Runs `f` without recording gradients and keeps its result, which the caller owns. */
export function withoutGradient<T extends tf.Tensor>(f: () => T): T {
  // Inside a custom gradient nothing is recorded; the dummy input satisfies its signature.
  const op = tf.customGrad((x) => ({ value: f(), gradFunc: () => tf.zerosLike(x as tf.Tensor) }));
  return tf.keep(tf.tidy(() => op(tf.scalar(0)))) as T;
}

/** Packed inputs of several sequences. */
export interface Packed {
  ids: Int32Array;
  lengths: number[];
  /** Row of the concatenated image features for image tokens, −1 for words. */
  featureRow: Int32Array;
  /** The distinct images, in the order of their features. */
  images: ImageInput[];
  index: RopeIndex[];
}

/** Feature cache of a frozen tower: least recently used first. */
class FeatureCache {
  #byKey = new Map<string, tf.Tensor2D>();
  #rows = 0;
  constructor(readonly maxRows: number) {}
  get(key: string): tf.Tensor2D | undefined {
    const found = this.#byKey.get(key);
    if (found) {
      this.#byKey.delete(key);
      this.#byKey.set(key, found);
    }
    return found;
  }
  set(key: string, features: tf.Tensor2D): void {
    this.#byKey.set(key, features);
    this.#rows += features.shape[0];
  }
  /** Drops the oldest entries beyond the bound; never called while entries are in use. */
  trim(): void {
    for (const [key, features] of this.#byKey) {
      if (this.#rows <= this.maxRows) return;
      this.#byKey.delete(key);
      this.#rows -= features.shape[0];
      features.dispose();
    }
  }
  clear(): void {
    for (const features of this.#byKey.values()) features.dispose();
    this.#byKey.clear();
    this.#rows = 0;
  }
}

/** What a {@linkcode QwenPolicy} is made of. */
export interface QwenParts {
  name: string;
  config: QwenConfig;
  stopTokens: readonly number[];
  suppressTokens: readonly number[];
  tokenizer: Tokenizer;
  processor: ImageProcessor;
  /** By published name; the policy takes ownership. */
  parameters: Map<string, tf.Variable>;
  /** Writes a Hugging Face style folder with these weights. */
  save: (folder: string, tensors: { name: string; shape: number[]; data: Float32Array }[]) => Promise<void>;
}

/** A Qwen2.5-VL policy. Make one with `loadPolicy` of load.ts. */
export class QwenPolicy implements Policy {
  readonly name: string;
  /** Sizes and token ids, as `config.json` and `generation_config.json` have them. */
  readonly config: QwenConfig;
  readonly stopTokens: readonly number[];
  readonly suppressTokens: readonly number[];
  /** The most tokens of a reply that the folder's generation_config.json suggests. */
  readonly maxNewTokens?: number;
  /** Text ↔ ids, and the chat template. */
  readonly tokenizer: Tokenizer;
  /** Picture → normalised patches, within the pixel budget. */
  readonly processor: ImageProcessor;
  readonly parameters: ReadonlyMap<string, Variable>;
  /**
   * Looks a parameter up by its published name.
   *
   * @internal
   */
  readonly weights: Weights;
  #features: FeatureCache;
  #stale = false;
  #save: QwenParts["save"];
  #engine?: DecodeEngine;
  #suppressBias = new Map<string, tf.Tensor1D>();

  /**
   * Takes over tensors that are on the backend already; `loadPolicy` reads them from a folder.
   *
   * @internal
   */
  constructor(parts: QwenParts) {
    this.name = parts.name;
    this.config = parts.config;
    this.stopTokens = parts.stopTokens;
    this.suppressTokens = parts.suppressTokens;
    this.maxNewTokens = parts.config.generation.maxNewTokens;
    this.tokenizer = parts.tokenizer;
    this.processor = parts.processor;
    this.parameters = parts.parameters;
    this.#save = parts.save;
    this.#features = new FeatureCache(Math.max(1024, Math.floor((1 << 26) / parts.config.text.hiddenSize)));
    this.weights = (name) => {
      const found = parts.parameters.get(name);
      if (!found) throw new RangeError(`the policy has no parameter ${name}`);
      return found;
    };
    // Made now, so that the number of tensors doesn't depend on what is asked first.
    this.#suppressTensor(this.suppressTokens);
  }

  prepareImage(picture: Picture): ImageInput {
    return this.processor.prepare(picture);
  }

  #imageTokens(images: readonly ImageInput[]): number[] {
    const unit = this.config.vision.spatialMergeSize ** 2;
    return images.map(({ grid_thw: [t, h, w] }) => (t * h * w) / unit);
  }

  encodeChat(messages: readonly Message[], images: readonly ImageInput[], addGenerationPrompt = true): number[] {
    const text = this.tokenizer.renderChat(messages, { addGenerationPrompt });
    return this.tokenizer.encodeWithImages(text, this.#imageTokens(images), this.config.tokens.image);
  }

  encodeContinuation(
    history: readonly Message[],
    messages: readonly Message[],
    images: readonly ImageInput[],
    ended: boolean,
  ): number[] {
    const text = this.tokenizer.continuation(history, messages, ended);
    return this.tokenizer.encodeWithImages(text, this.#imageTokens(images), this.config.tokens.image);
  }

  encode(text: string): number[] {
    return this.tokenizer.encode(text);
  }

  decode(ids: readonly number[], skipSpecial = true): string {
    return this.tokenizer.decode([...ids], skipSpecial);
  }

  /** Forgets cached image features: at the end of a step, and after changing the tower's weights by hand. */
  releaseFeatures(): void {
    this.#features.clear();
    this.#stale = false;
  }

  /**
   * Tower features of the given images, `[M, D]` and, when asked for, per-patch features. Differentiable.
   *
   * @internal
   */
  imageFeatures(images: readonly ImageInput[], wantPatches = false, inspect?: Inspect): VisionFeatures {
    const width = this.config.vision.inChannels * this.config.vision.temporalPatchSize *
      this.config.vision.patchSize ** 2;
    const count = images.reduce((s, i) => s + i.pixel_values.length, 0);
    const pixels = new Float32Array(count);
    let at = 0;
    for (const image of images) {
      pixels.set(image.pixel_values, at);
      at += image.pixel_values.length;
    }
    const x = tf.tensor2d(pixels, [count / width, width]);
    const features = visionForward(this.config, this.weights, x, images.map((i) => i.grid_thw), wantPatches, inspect);
    x.dispose();
    return features;
  }

  /** Fills the cache with the features of these images, in batches. */
  #cacheFeatures(images: readonly ImageInput[]): void {
    if (this.#stale) this.releaseFeatures();
    const missing = images.filter((image) => !this.#features.get(image.key));
    const patches = (i: ImageInput) => i.grid_thw[0] * i.grid_thw[1] * i.grid_thw[2];
    const unit = this.config.vision.spatialMergeSize ** 2;
    for (let from = 0; from < missing.length;) {
      let to = from, total = 0;
      while (to < missing.length && (to === from || total + patches(missing[to]) <= BATCH_TOKENS)) {
        total += patches(missing[to++]);
      }
      const batch = missing.slice(from, to);
      const all = withoutGradient(() => this.imageFeatures(batch).embeds);
      let row = 0;
      for (const image of batch) {
        const rows = patches(image) / unit;
        const part = tf.keep(tf.tidy(() => tf.slice(all, [row, 0], [rows, -1]))) as tf.Tensor2D;
        this.#features.set(image.key, part);
        row += rows;
      }
      all.dispose();
      from = to;
    }
  }

  /**
   * Packs sequences one after the other; equal images are taken once.
   *
   * @internal
   */
  pack(sequences: readonly Sequence[]): Packed {
    const merge = this.config.vision.spatialMergeSize, unit = merge * merge, imageToken = this.config.tokens.image;
    const images: ImageInput[] = [], start = new Map<string, number>();
    let rows = 0;
    for (const { images: own } of sequences) {
      for (const image of own) {
        if (start.has(image.key)) continue;
        start.set(image.key, rows);
        images.push(image);
        rows += (image.grid_thw[0] * image.grid_thw[1] * image.grid_thw[2]) / unit;
      }
    }
    const total = sequences.reduce((s, { ids }) => s + ids.length, 0);
    const ids = new Int32Array(total), featureRow = new Int32Array(total).fill(-1);
    const index: RopeIndex[] = [];
    let at = 0;
    for (const { ids: own, images: shown } of sequences) {
      index.push(ropeIndex(own, shown.map((i) => i.grid_thw), imageToken, merge));
      let image = 0, row = -1, left = 0;
      for (const id of own) {
        ids[at] = id;
        if (id === imageToken) {
          if (left === 0) {
            const { key, grid_thw: [t, h, w] } = shown[image++];
            row = start.get(key)!;
            left = (t * h * w) / unit;
          }
          featureRow[at] = row++;
          left--;
        }
        at++;
      }
    }
    return { ids, lengths: sequences.map(({ ids }) => ids.length), featureRow, images, index };
  }

  /**
   * Rotary tables of packed sequences.
   *
   * @internal
   */
  ropeTensors(index: readonly RopeIndex[]): RopeTensors {
    const axis = (a: 0 | 1 | 2) => {
      const out = new Int32Array(index.reduce((s, { positions }) => s + positions[a].length, 0));
      let at = 0;
      for (const { positions } of index) {
        out.set(positions[a], at);
        at += positions[a].length;
      }
      return out;
    };
    return this.#ropeAt([axis(0), axis(1), axis(2)]);
  }

  #ropeAt(positions: [ArrayLike<number>, ArrayLike<number>, ArrayLike<number>]): RopeTensors {
    const { headDim, ropeTheta, mropeSection } = this.config.text, n = positions[0].length;
    const { cos, sin } = textRopeTable(positions, headDim, ropeTheta, mropeSection);
    return { cos: tf.tensor2d(cos, [n, headDim]), sin: tf.tensor2d(sin, [n, headDim]) };
  }

  /**
   * Hidden states of packed sequences before the final norm, `[N, D]`; differentiable.
   *
   * @param trainVision Whether gradients reach the tower.
   * @param given Features of the packed images, where the caller has them already.
   * @internal
   */
  hidden(packed: Packed, trainVision = false, hooks: TextHooks = {}, given?: tf.Tensor2D): tf.Tensor2D {
    let features: tf.Tensor2D | null = given ?? null;
    if (packed.images.length > 0 && !given) {
      if (trainVision) {
        this.#stale = true;
        features = this.imageFeatures(packed.images, false, hooks.inspect).embeds;
      } else {
        this.#cacheFeatures(packed.images);
        features = tf.concat(packed.images.map((image) => this.#features.get(image.key)!), 0);
      }
    }
    const x = embed(this.weights, packed.ids, packed.featureRow, features);
    hooks.inspect?.("text.inputs_embeds", x);
    const table = this.ropeTensors(packed.index);
    hooks.inspect?.("text.rope_cos", table.cos);
    hooks.inspect?.("text.rope_sin", table.sin);
    return textForward(this.config, this.weights, x, table, segmentsOf(packed.lengths), hooks);
  }

  /** Logits of all tokens of one sequence, `[L, V]`, reporting intermediate results by the goldens' names. */
  forward(sequence: Sequence, inspect?: Inspect): Tensor2D {
    return tf.tidy(() => {
      const hidden = this.hidden(this.pack([sequence]), inspect !== undefined, { inspect });
      return head(this.config, this.weights, hidden, inspect);
    });
  }

  #suppressTensor(ids: readonly number[]): tf.Tensor1D | null {
    if (ids.length === 0) return null;
    const key = ids.join();
    let bias = this.#suppressBias.get(key);
    if (!bias) {
      const values = new Float32Array(this.config.text.vocabSize);
      for (const id of ids) values[id] = SUPPRESSED;
      bias = tf.keep(tf.tensor1d(values));
      this.#suppressBias.set(key, bias);
    }
    return bias;
  }

  logProbs(
    sequences: readonly Sequence[],
    masks: readonly (readonly number[])[],
    options: LogProbOptions = {},
  ): TokenLogProbs {
    const { temperature = 1, trainVision = false, suppressTokens = this.suppressTokens } = options;
    const rows: number[] = [], targets: number[] = [], counts: number[] = [];
    let base = 0;
    sequences.forEach(({ ids }, b) => {
      const before = rows.length;
      if (masks[b].length !== ids.length) {
        throw new RangeError(`sequence ${b} has ${ids.length} tokens but its mask has ${masks[b].length}`);
      }
      if (masks[b][0]) throw new RangeError(`sequence ${b}: token 0 has no predecessor and cannot be masked in`);
      for (let t = 1; t < ids.length; t++) {
        if (!masks[b][t]) continue;
        rows.push(base + t - 1);
        targets.push(ids[t]);
      }
      counts.push(rows.length - before);
      base += ids.length;
    });
    const width = Math.max(...counts);
    if (width <= 0) throw new RangeError("no token is masked in: there is nothing to compute log-probs of");
    const suppress = this.#suppressTensor(suppressTokens);
    const [logprobs, entropy] = tf.tidy(() => {
      const hidden = this.hidden(this.pack(sequences), trainVision);
      const both = this.#chosen(hidden, rows, targets, suppress, temperature);
      const place = new Int32Array(sequences.length * width).fill(-1);
      for (let b = 0, t = 0; b < counts.length; b++) for (let i = 0; i < counts[b]; i++) place[b * width + i] = t++;
      return [0, 1].map((row) => {
        const flat = tf.reshape(tf.slice(both, [row, 0], [1, rows.length]), [rows.length, 1]) as tf.Tensor2D;
        const padded = rows.length === place.length ? flat : gatherRows(flat, place);
        return tf.reshape(padded, [sequences.length, width]) as tf.Tensor2D;
      });
    });
    this.#trimFeatures();
    return { logprobs, entropy };
  }

  /** `[2, n]` log-probs and entropies of `targets` at hidden rows, the logits made in pieces. */
  #chosen(
    hidden: tf.Tensor2D,
    rows: readonly number[],
    targets: readonly number[],
    suppress: tf.Tensor1D | null,
    temperature: number,
  ): tf.Tensor2D {
    const piece = Math.max(1, Math.floor(MAX_LOGITS / this.config.text.vocabSize));
    const parts: tf.Tensor2D[] = [];
    for (let from = 0; from < rows.length; from += piece) {
      const at = gatherRows(hidden, rows.slice(from, from + piece)), ids = targets.slice(from, from + piece);
      if (rows.length <= piece) {
        parts.push(logProbEntropy(head(this.config, this.weights, at), ids, suppress, temperature));
      } else {
        const { normed, table } = headParts(this.config, this.weights, at);
        parts.push(headLogProbEntropy(normed, table, ids, suppress, temperature));
      }
    }
    return parts.length === 1 ? parts[0] : tf.concat(parts, 1);
  }

  #trimFeatures(): void {
    this.#features.trim();
  }

  async generate(sequences: readonly Sequence[], options: GenerateOptions): Promise<Completion[]> {
    const completions: Completion[] = [];
    for (let from = 0; from < sequences.length;) {
      let to = from, tokens = 0;
      while (to < sequences.length && (to === from || tokens + sequences[to].ids.length <= BATCH_TOKENS)) {
        tokens += sequences[to++].ids.length;
      }
      const keys = sequences.slice(from, to).map((_, i) => options.keys?.[from + i] ?? [0, from + i, 0] as const);
      completions.push(...await this.#generateBatch(sequences.slice(from, to), keys, options));
      from = to;
    }
    this.#trimFeatures();
    return completions;
  }

  async #generateBatch(
    sequences: readonly Sequence[],
    keys: readonly (readonly [number, number, number])[],
    options: GenerateOptions,
    inspectLogits?: (step: number, logits: Float32Array) => void,
  ): Promise<Completion[]> {
    const { maxNewTokens, temperature = 1, topP = 1, seed = 0, stopTokens = this.stopTokens } = options;
    checkSampling(maxNewTokens, temperature, topP);
    const vocab = this.config.text.vocabSize, stop = new Set(stopTokens);
    const suppressed = new Uint8Array(vocab);
    for (const id of options.suppressTokens ?? this.suppressTokens) suppressed[id] = 1;
    const sampler: SamplerOptions = { temperature, topP, seed, suppressed };
    // The rollouts of a group have one prompt: it is computed once, its keys and values are handed to each row.
    const { distinct, which } = distinctSequences(sequences);
    const packed = this.pack(distinct), { cu } = segmentsOf(packed.lengths);
    const prompts = which.map((d) => ({ start: cu[d], length: packed.lengths[d] }));
    const prefill = (keysValues: NonNullable<TextHooks["keysValues"]>) =>
      tf.tidy(() => {
        const hidden = this.hidden(packed, false, { keysValues });
        return head(
          this.config,
          this.weights,
          gatherRows(hidden, prompts.map(({ start, length }) => start + length - 1)),
        );
      });
    const engine = topP === 1 && !inspectLogits ? this.#decodeEngine() : undefined;
    if (engine) {
      const nextPosition = which.map((d) => packed.index[d].next);
      const { onToken } = options;
      return await decodeOnDevice(engine, prefill, {
        ...{ starts: prompts.map((p) => p.start), lengths: prompts.map((p) => p.length), nextPosition },
        ...{ keys, seed, temperature, suppressed, stop, maxNewTokens, onToken },
      });
    }
    const cache = new KeyValueCache(this.config, prompts, maxNewTokens);
    const completions: Completion[] = sequences.map(() => ({ ids: [], logprobs: [], finish: "length" }));
    try {
      let logits = prefill((_layer, k, v) => cache.fill(k, v));
      let running = sequences.map((_, i) => i);
      for (let step = 0; step < maxNewTokens; step++) {
        const values = await readback(logits);
        logits.dispose();
        inspectLogits?.(step, values);
        const kept: number[] = [];
        running.forEach((row, i) => {
          const { id, logprob } = sampleToken(values.subarray(i * vocab, (i + 1) * vocab), keys[row], step, sampler);
          completions[row].ids.push(id);
          completions[row].logprobs.push(logprob);
          if (stop.has(id)) completions[row].finish = "stop";
          else kept.push(i);
        });
        cache.compact(kept);
        running = kept.map((i) => running[i]);
        options.onToken?.(step + 1, running.length);
        if (running.length === 0 || step + 1 === maxNewTokens) break;
        logits = tf.tidy(() => {
          const last = running.map((row) => completions[row].ids[step]);
          const at = Int32Array.from(running, (row) => packed.index[which[row]].next + step);
          const x = embed(this.weights, last, [], null);
          return head(
            this.config,
            this.weights,
            decodeStep(this.config, this.weights, x, this.#ropeAt([at, at, at]), cache),
          );
        });
      }
    } finally {
      cache.dispose();
    }
    return completions;
  }

  /** The recorded decoding plans of the current device; undefined where plain operations are asked for or it cannot run. */
  #decodeEngine(): DecodeEngine | undefined {
    if (currentKernels() === "plain" || !DecodeEngine.supports(this.config)) return undefined;
    return this.#engine ??= new DecodeEngine(this.config, this.weights);
  }

  /**
   * Like {@linkcode generate} on one batch, giving the raw logits of each step too, `[B, V]` each (rows that still run).
   */
  async generateWithLogits(
    sequences: readonly Sequence[],
    options: GenerateOptions,
  ): Promise<{ completions: Completion[]; logits: Float32Array[] }> {
    const logits: Float32Array[] = [];
    const keys = sequences.map((_, i) => options.keys?.[i] ?? [0, i, 0] as const);
    const completions = await this.#generateBatch(sequences, keys, options, (_, values) => logits.push(values));
    return { completions, logits };
  }

  /** Writes a folder that Hugging Face's `from_pretrained` and {@linkcode loadPolicy} read. */
  async save(folder: string): Promise<void> {
    const tensors = [];
    for (const [name, variable] of this.parameters) {
      tensors.push({ name, shape: variable.shape, data: await readback(variable) });
    }
    await this.#save(folder, tensors);
  }

  dispose(): void {
    this.#engine?.dispose();
    this.#features.clear();
    for (const bias of this.#suppressBias.values()) bias.dispose();
    this.#suppressBias.clear();
    for (const variable of this.parameters.values()) variable.dispose();
  }
}

/** Leaves out sequences that were there before; `which[i]` is the place of sequence i among the distinct ones. */
function distinctSequences(sequences: readonly Sequence[]): { distinct: Sequence[]; which: number[] } {
  const places = new Map<string, number>(), distinct: Sequence[] = [];
  const which = sequences.map((sequence) => {
    const name = `${sequence.ids.join()}|${sequence.images.map(({ key }) => key).join()}`;
    let place = places.get(name);
    if (place === undefined) places.set(name, place = distinct.push(sequence) - 1);
    return place;
  });
  return { distinct, which };
}

/** Prefills, then lets the engine decode; the prompts' keys and values stay until it is done. */
async function decodeOnDevice(
  engine: DecodeEngine,
  prefill: (keysValues: NonNullable<TextHooks["keysValues"]>) => tf.Tensor2D,
  input: Omit<DecodeInput, "k" | "v" | "firstLogits">,
): Promise<Completion[]> {
  const k: tf.Tensor3D[] = [], v: tf.Tensor3D[] = [];
  let firstLogits: tf.Tensor2D | undefined;
  try {
    firstLogits = prefill((_layer, keys, values) => {
      k.push(tf.keep(keys.clone()));
      v.push(tf.keep(values.clone()));
    });
    const { ids, logprobs, finish } = await engine.generate({ ...input, k, v, firstLogits });
    return ids.map((row, i) => ({ ids: row, logprobs: logprobs[i], finish: finish[i] }));
  } finally {
    tf.dispose([k, v, firstLogits ?? []]);
  }
}

/** A copy of a float tensor's values. */
async function readback(x: tf.Tensor): Promise<Float32Array> {
  return (tf.getBackend() === "webgpu" ? await x.data() : x.dataSync()).slice() as Float32Array;
}

function checkSampling(maxNewTokens: number, temperature: number, topP: number): void {
  if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
    throw new RangeError(`maxNewTokens must be a positive integer, got ${maxNewTokens}`);
  }
  if (!(temperature >= 0)) throw new RangeError(`temperature must be ≥ 0, got ${temperature}`);
  if (!(topP > 0 && topP <= 1)) throw new RangeError(`topP must be in (0, 1], got ${topP}`);
}
