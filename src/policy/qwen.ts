/**
 * The policy: a Qwen2.5-VL of any size on TensorFlow.js, with generation and differentiable log-probs over the same weights.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { DecodeEngine } from "../gpu/decode/engine.ts";
import { PassPlans } from "../gpu/pass_plans.ts";
import type { QwenConfig } from "./config.ts";
import { FeatureCache } from "./feature_cache.ts";
import { type BatchOptions, checkSampling, generateBatch, readback } from "./generate.ts";
import type { ImageProcessor } from "./image_processor.ts";
import { computeLogProbs, type HiddenInputs, isOnePiece, type LogProbSettings, prepareLogProbs } from "./log_probs.ts";
import { currentKernels, hasFused, segmentsOf } from "./ops.ts";
import { bucketedSizes, imageTokens, type Packed, packSequences, sharedSizes } from "./packing.ts";
import { activationBytes, differentiate, type PassGradients, type PassRequest } from "./pass.ts";
import type { Picture } from "./picture.ts";
import type {
  Completion,
  GenerateOptions,
  ImageInput,
  LogProbOptions,
  Message,
  Policy,
  PrefixCache,
  Sequence,
  TokenLogProbs,
} from "./policy.ts";
import { type Bank, disposeBank, KeptPrefixes, keySource } from "./prefix_cache.ts";
import { type RopeIndex, type RopeTable, textRopeTable } from "./rope_index.ts";
import { embed, head, type RopeTensors, textForward, type TextHooks } from "./text.ts";
import type { Tokenizer } from "./tokenizer.ts";
import type { Tensor2D, Variable } from "../tensors.ts";
import { type Inspect, type VisionFeatures, visionForward, type Weights } from "./vision.ts";

/** Prompts are prefilled, and pictures encoded, in batches of at most this many tokens or patches. */
const BATCH_TOKENS = 1 << 14;
/** Suppressed logits get this much; adding it keeps everything finite. */
const SUPPRESSED = -1e30;

/** Runs `f` without recording gradients and keeps its result, which the caller owns. */
export function withoutGradient<T extends tf.Tensor>(f: () => T): T {
  // Inside a custom gradient nothing is recorded; the dummy input satisfies its signature.
  const op = tf.customGrad((x) => ({ value: f(), gradFunc: () => tf.zerosLike(x as tf.Tensor) }));
  return tf.keep(tf.tidy(() => op(tf.scalar(0)))) as T;
}

/** Names the report among the results of a pass; no parameter is called so. */
const REPORT = "";

/** Whether beginnings are shared. */
function sharing({ sharePrefix }: LogProbOptions): boolean {
  // The plain sum over a group is a product with a matrix as large as all keys times all tokens.
  return sharePrefix ?? hasFused("MgpoScatterAddRows");
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
  #engineNotice = false;
  readonly #caches = new Set<KeptPrefixes>();
  /** Where passes of this policy may be recorded: one for each backend that it computed on. */
  readonly #plans = new Set<PassPlans>();
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
    return images.map((image) => imageTokens(image, this.config));
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
    return packSequences(this.config, sequences);
  }

  /**
   * Rotary tables of packed sequences.
   *
   * @internal
   */
  ropeTensors(index: readonly RopeIndex[]): RopeTensors {
    return this.#onDevice(this.#ropeTable(index));
  }

  #ropeTable(index: readonly RopeIndex[]): RopeTable {
    const axis = (a: 0 | 1 | 2) => {
      const out = new Int32Array(index.reduce((s, { positions }) => s + positions[a].length, 0));
      let at = 0;
      for (const { positions } of index) {
        out.set(positions[a], at);
        at += positions[a].length;
      }
      return out;
    };
    const { headDim, ropeTheta, mropeSection } = this.config.text;
    return textRopeTable([axis(0), axis(1), axis(2)], headDim, ropeTheta, mropeSection);
  }

  #onDevice({ cos, sin }: RopeTable): RopeTensors {
    const { headDim } = this.config.text, n = cos.length / headDim;
    return { cos: tf.tensor2d(cos, [n, headDim]), sin: tf.tensor2d(sin, [n, headDim]) };
  }

  /** What the host makes of packed tokens. */
  #hiddenInputs({ ids, images, featureRow, index, lengths, keys }: Packed): HiddenInputs {
    return {
      words: images.length > 0 ? ids.map((id, i) => featureRow[i] >= 0 ? -1 : id) : ids,
      rope: this.#ropeTable(index),
      segments: segmentsOf(lengths),
      keys: keys && keySource(keys),
    };
  }

  /** Features of packed images, from the cache, one after the other, `[M, D]`. */
  #cachedFeatures(images: readonly ImageInput[]): tf.Tensor2D[] {
    this.#cacheFeatures(images);
    return images.map((image) => this.#features.get(image.key)!);
  }

  /**
   * Hidden states of packed sequences before the final norm, `[N, D]`; differentiable.
   *
   * @param trainVision Whether gradients reach the tower.
   * @param given Features of the packed images and spare rows, where the caller has them already.
   * @param inputs What the host makes of the packed tokens, where the caller has it already.
   * @internal
   */
  hidden(
    packed: Packed,
    trainVision = false,
    hooks: TextHooks = {},
    given?: tf.Tensor2D,
    inputs: HiddenInputs = this.#hiddenInputs(packed),
  ): tf.Tensor2D {
    let features: tf.Tensor2D | null = given ?? null;
    if (packed.images.length > 0 && !given) {
      if (trainVision) {
        this.#stale = true;
        features = this.imageFeatures(packed.images, false, hooks.inspect).embeds;
      } else {
        features = tf.concat(this.#cachedFeatures(packed.images), 0);
      }
      const { spareFeatures = 0 } = packed;
      if (spareFeatures > 0) features = tf.concat([features, tf.zeros([spareFeatures, features.shape[1]])], 0);
    }
    const x = embed(this.weights, inputs.words, packed.featureRow, features);
    hooks.inspect?.("text.inputs_embeds", x);
    const table = this.#onDevice(inputs.rope);
    hooks.inspect?.("text.rope_cos", table.cos);
    hooks.inspect?.("text.rope_sin", table.sin);
    const keys = hooks.keys ?? inputs.keys;
    return textForward(this.config, this.weights, x, table, inputs.segments, { ...hooks, keys });
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
    const prepared = prepareLogProbs(this.config, sequences, masks, sharing(options));
    const out = computeLogProbs(this, prepared, this.#logProbSettings(options));
    this.#features.trim();
    return out;
  }

  #logProbSettings(options: LogProbOptions): LogProbSettings {
    const { temperature = 1, trainVision = false, suppressTokens = this.suppressTokens } = options;
    const { gradientCheckpointing = false } = options, suppress = this.#suppressTensor(suppressTokens);
    return { temperature, trainVision, suppress, gradientCheckpointing };
  }

  /**
   * As `Policy` says; on WebGPU from a recording of an earlier pass, where one has the same sizes.
   *
   * @internal
   */
  gradients(request: PassRequest): PassGradients {
    const { sequences, masks, options = {}, loss, variables } = request;
    const plans = this.#plansFor(request);
    if (!plans) return differentiate(() => this.logProbs(sequences, masks, options), request);
    const { config } = this, settings = this.#logProbSettings(options);
    const fits = (tokens: number) => activationBytes(config, tokens) <= plans.mostBytes;
    const prepared = prepareLogProbs(config, sequences, masks, sharing(options), (...given) => {
      const shared = sharedSizes(...given);
      return plans.sharesSizes && fits(shared.tokens) ? shared : bucketedSizes(...given);
    });
    const { packed, shape, rows, targets, place } = prepared, inputs = this.#hiddenInputs(packed);
    const { words, rope, segments, keys } = inputs, lossArrays = loss.arrays(...shape);
    const parts = this.#cachedFeatures(packed.images), spare = packed.spareFeatures ?? 0;
    const features = parts.reduce((sum, { shape }) => sum + shape[0], spare);
    const sizes = [words, segments.cu, keys?.segments.cu ?? [], packed.keys?.rows ?? [], rows].map((x) => x.length);
    const { temperature } = settings, { suppressTokens = this.suppressTokens } = options;
    const passed = plans.run(this, {
      signature: JSON.stringify([
        ...[sizes, features, shape, place !== undefined, temperature, suppressTokens],
        ...[loss.name, [...variables.keys()]],
      ]),
      isWorthwhile: isOnePiece(config, rows.length) && fits(words.length),
      arrays: {
        ...{ words, cos: rope.cos, sin: rope.sin, segments: segments.cu, rows, targets },
        ...(parts.length > 0 ? { featureRow: packed.featureRow } : {}),
        ...(keys && packed.keys ? { keySegments: keys.segments.cu, keyRows: packed.keys.rows } : {}),
        ...(place ? { place } : {}),
        ...Object.fromEntries(Object.entries(lossArrays).map(([name, array]) => [`loss ${name}`, array])),
      },
      stacked: parts.length > 0 ? { parts, shape: [features, config.text.hiddenSize] } : undefined,
      constants: [...this.parameters.values(), ...(settings.suppress ? [settings.suppress] : [])],
      compute: (stacked) => {
        const logProbs = () => computeLogProbs(this, prepared, settings, inputs, stacked);
        const { report, grads } = differentiate(logProbs, request, lossArrays);
        return new Map([[REPORT, report], ...grads]);
      },
    });
    this.#features.trim();
    const report = passed.get(REPORT) as tf.Tensor1D;
    passed.delete(REPORT);
    return { report, grads: passed, width: shape[1] };
  }

  /** What may do a pass again from a recording; undefined where it must go through the tape every time. */
  #plansFor({ options = {} }: PassRequest): PassPlans | undefined {
    if (options.trainVision || options.gradientCheckpointing || !hasFused("MgpoAttention")) return undefined;
    const plans = PassPlans.of(tf.backend());
    if (plans) this.#plans.add(plans);
    return plans;
  }

  /**
   * Forgets recordings.
   *
   * @internal
   */
  releasePasses(): void {
    for (const plans of this.#plans) plans.forget(this);
    this.#plans.clear();
  }

  createPrefixCache(): PrefixCache {
    const cache = new KeptPrefixes((self) => this.#caches.delete(self));
    this.#caches.add(cache);
    return cache;
  }

  #kept(cache: PrefixCache | undefined): KeptPrefixes | undefined {
    const kept = [...this.#caches].find((own) => own === cache);
    if (cache && !kept) {
      throw new RangeError("this prefix cache was disposed of, or is of another policy; ask createPrefixCache for one");
    }
    return kept;
  }

  async generate(sequences: readonly Sequence[], options: GenerateOptions): Promise<Completion[]> {
    const cache = this.#kept(options.cache), banks: Bank[] = [], completions: Completion[] = [];
    checkSampling(options);
    try {
      for (let from = 0; from < sequences.length;) {
        let to = from, tokens = 0;
        while (to < sequences.length && (to === from || tokens + sequences[to].ids.length <= BATCH_TOKENS)) {
          tokens += sequences[to++].ids.length;
        }
        const batch = this.#batchOptions(options, from, to, cache);
        const result = await generateBatch(this, sequences.slice(from, to), batch);
        if (result.bank) banks.push(result.bank);
        completions.push(...result.completions);
        from = to;
      }
    } catch (error) {
      banks.forEach(disposeBank);
      throw error;
    }
    cache?.replace(banks);
    this.#features.trim();
    return completions;
  }

  /** Options of the rows from `from` up to `to` of a call. */
  #batchOptions(options: GenerateOptions, from: number, to: number, cache?: KeptPrefixes): BatchOptions {
    const { maxNewTokens, temperature = 1, topP = 1, seed = 0, onToken } = options;
    const { stopTokens = this.stopTokens, suppressTokens = this.suppressTokens, keepCache = true } = options;
    const suppressed = new Uint8Array(this.config.text.vocabSize);
    for (const id of suppressTokens) suppressed[id] = 1;
    const keys = Array.from({ length: to - from }, (_, i) => options.keys?.[from + i] ?? [0, from + i, 0] as const);
    return {
      ...{ maxNewTokens, temperature, topP, seed, onToken, suppressed, stop: new Set(stopTokens), keys },
      engine: this.#decodeEngine(temperature > 0 && topP < 1),
      find: cache && ((sequence, row) => cache.find(sequence, from + row)),
      keep: cache !== undefined && keepCache,
    };
  }

  /**
   * The recorded decoding plans of the current device; undefined where plain operations are asked for or it cannot run.
   *
   * @param nucleus Whether they are to draw from a nucleus.
   */
  #decodeEngine(nucleus: boolean): DecodeEngine | undefined {
    if (currentKernels() === "plain") return undefined;
    const why = DecodeEngine.unsupported(this.config, nucleus);
    if (why === undefined) return this.#engine ??= new DecodeEngine(this.config, this.weights);
    // On other backends nobody expects the engine.
    if (tf.getBackend() === "webgpu" && !this.#engineNotice) {
      this.#engineNotice = true;
      console.warn(`${this.name}: generation takes the slow way, token by token on the host, because ${why}`);
    }
    return undefined;
  }

  /**
   * Like {@linkcode generate} on one batch, giving the raw logits of each step too, `[B, V]` each (rows that still run).
   */
  async generateWithLogits(
    sequences: readonly Sequence[],
    options: GenerateOptions,
  ): Promise<{ completions: Completion[]; logits: Float32Array[] }> {
    checkSampling(options);
    const logits: Float32Array[] = [], batch = this.#batchOptions(options, 0, sequences.length);
    const inspectLogits = (_: number, values: Float32Array) => void logits.push(values);
    const { completions } = await generateBatch(this, sequences, { ...batch, engine: undefined, inspectLogits });
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
    this.releasePasses();
    for (const cache of [...this.#caches]) cache.dispose();
    this.#features.clear();
    for (const bias of this.#suppressBias.values()) bias.dispose();
    this.#suppressBias.clear();
    for (const variable of this.parameters.values()) variable.dispose();
  }
}
