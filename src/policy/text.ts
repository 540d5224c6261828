/**
 * The language model of Qwen2.5-VL: embedding with image features in place, decoder blocks, and the head.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { QwenConfig } from "./config.ts";
import { attention, gatherRows, hasFused, linear, rmsNorm, rope, run, type Segments, swiglu } from "./ops.ts";
import type { Inspect, Weights } from "./vision.ts";

/** Rotary tables of packed tokens, `[N, headDim]` each. */
export interface RopeTensors {
  cos: tf.Tensor2D;
  sin: tf.Tensor2D;
}

/** How one block mixes its tokens: gets rotated queries and keys, gives `[N, H, d]`. */
type Mixer = (layer: number, q: tf.Tensor3D, k: tf.Tensor3D, v: tf.Tensor3D) => tf.Tensor3D;

/**
 * Token embeddings with image features at image tokens.
 *
 * @param ids N token ids
 * @param featureRow For each token the row of `features` that takes its place, or −1
 * @param features `[M, D]`, or null where there are no images
 * @returns `[N, D]`
 */
export function embed(
  weights: Weights,
  ids: ArrayLike<number>,
  featureRow: ArrayLike<number>,
  features: tf.Tensor2D | null,
): tf.Tensor2D {
  const table = weights("model.embed_tokens.weight") as tf.Tensor2D;
  if (!features) return gatherRows(table, ids);
  const words = Int32Array.from(ids, (id, i) => featureRow[i] >= 0 ? -1 : id);
  return tf.add(gatherRows(table, words), gatherRows(features, featureRow)) as tf.Tensor2D;
}

function decoderBlock(
  x: tf.Tensor2D,
  config: QwenConfig,
  weights: Weights,
  layer: number,
  { cos, sin }: RopeTensors,
  mix: Mixer,
): tf.Tensor2D {
  const { heads, kvHeads, headDim, rmsNormEps } = config.text, n = x.shape[0];
  const w = (name: string) => weights(`model.layers.${layer}.${name}`);
  const h = rmsNorm(x, w("input_layernorm.weight") as tf.Tensor1D, rmsNormEps);
  const project = (name: string, count: number) =>
    tf.reshape(
      linear(h, w(`self_attn.${name}.weight`) as tf.Tensor2D, w(`self_attn.${name}.bias`) as tf.Tensor1D),
      [n, count, headDim],
    ) as tf.Tensor3D;
  const q = rope(project("q_proj", heads), cos, sin), k = rope(project("k_proj", kvHeads), cos, sin);
  const mixed = tf.reshape(mix(layer, q, k, project("v_proj", kvHeads)), [n, heads * headDim]) as tf.Tensor2D;
  const y = tf.add(x, linear(mixed, w("self_attn.o_proj.weight") as tf.Tensor2D)) as tf.Tensor2D;
  const g = rmsNorm(y, w("post_attention_layernorm.weight") as tf.Tensor1D, rmsNormEps);
  const dense = (input: tf.Tensor2D, name: string) => linear(input, w(`mlp.${name}.weight`) as tf.Tensor2D);
  return tf.add(y, dense(swiglu(dense(g, "gate_proj"), dense(g, "up_proj")), "down_proj")) as tf.Tensor2D;
}

/** What {@linkcode textForward} can report beside its result. */
export interface TextHooks {
  inspect?: Inspect;
  /** Called with the rotated keys and the values of each block, `[N, Hkv, d]`; the callee keeps what it wants to keep. */
  keysValues?: (layer: number, k: tf.Tensor3D, v: tf.Tensor3D) => void;
  /** Called with the input of each block, `[N, D]`. */
  blockInput?: (layer: number, x: tf.Tensor2D) => void;
  /** Called with the rotated queries and keys of each block. */
  queriesKeys?: (layer: number, q: tf.Tensor3D, k: tf.Tensor3D) => void;
}

/**
 * All decoder blocks on packed sequences.
 *
 * @param x `[N, D]` embeddings
 * @param segments The sequences
 * @returns `[N, D]`, before the final norm
 */
export function textForward(
  config: QwenConfig,
  weights: Weights,
  x: tf.Tensor2D,
  table: RopeTensors,
  segments: Segments,
  hooks: TextHooks = {},
): tf.Tensor2D {
  const scale = 1 / Math.sqrt(config.text.headDim);
  const mix: Mixer = (layer, q, k, v) => {
    hooks.keysValues?.(layer, k, v);
    hooks.queriesKeys?.(layer, q, k);
    return attention(q, k, v, segments, true, scale);
  };
  for (let layer = 0; layer < config.text.layers; layer++) {
    hooks.blockInput?.(layer, x);
    x = tf.tidy(() => decoderBlock(x, config, weights, layer, table, mix));
    hooks.inspect?.(`text.layer${layer}`, x);
  }
  return x;
}

/** What the head multiplies: the normed hidden states `[N, D]` and the table `[V, D]`. */
export function headParts(
  config: QwenConfig,
  weights: Weights,
  x: tf.Tensor2D,
): { normed: tf.Tensor2D; table: tf.Tensor2D } {
  const normed = rmsNorm(x, weights("model.norm.weight") as tf.Tensor1D, config.text.rmsNormEps);
  const table = weights(config.text.tied ? "model.embed_tokens.weight" : "lm_head.weight") as tf.Tensor2D;
  return { normed, table };
}

/** Final norm and head: `[N, D]` → logits `[N, V]`. */
export function head(config: QwenConfig, weights: Weights, x: tf.Tensor2D, inspect?: Inspect): tf.Tensor2D {
  const { normed, table } = headParts(config, weights, x);
  inspect?.("text.norm", normed);
  return linear(normed, table);
}

/** A prompt among packed tokens. */
export interface Prompt {
  /** Its first token. */
  readonly start: number;
  readonly length: number;
}

/** Masked scores get this; far below any score, far above −∞ (no NaN from a row that is masked whole). */
const MASKED = -1e9;

/**
 * Keys and values of a batch that decodes one token a step. Owns its tensors; {@linkcode KeyValueCache.dispose} releases them.
 */
export class KeyValueCache {
  /** Per layer: fused `[R, C, Hkv, d]` written in place; plain `[B, Hkv, C, d]` that grows by a column a step. */
  #k: tf.Tensor4D[] = [];
  #v: tf.Tensor4D[] = [];
  #rows: number[];
  #lengths: number[];
  #generated = 0;
  readonly #prefix: number;
  readonly #fused: boolean;
  readonly #capacity: number;

  readonly #prompts: readonly Prompt[];

  /**
   * @param prompts Where each row's prompt lies among the packed tokens; rows may share one.
   * @param maxNewTokens The most tokens that a row will add.
   */
  constructor(readonly config: QwenConfig, prompts: readonly Prompt[], maxNewTokens: number) {
    this.#prompts = prompts;
    this.#lengths = prompts.map(({ length }) => length);
    this.#rows = prompts.map((_, i) => i);
    this.#prefix = Math.max(...this.#lengths);
    this.#capacity = this.#prefix + maxNewTokens;
    this.#fused = hasFused("MgpoDecodeAttention");
  }

  /** Takes over a layer's packed prompt keys and values, `[N, Hkv, d]` (copied). Layers come in order. */
  fill(k: tf.Tensor3D, v: tf.Tensor3D): void {
    const { kvHeads, headDim } = this.config.text, count = this.#lengths.length;
    const width = this.#fused ? this.#capacity : this.#prefix, index = new Int32Array(count * width).fill(-1);
    this.#prompts.forEach(({ start, length }, r) => {
      for (let i = 0; i < length; i++) index[r * width + i] = start + i;
    });
    const place = (x: tf.Tensor3D) =>
      tf.keep(tf.tidy(() => {
        const flat = tf.reshape(x, [x.shape[0], kvHeads * headDim]) as tf.Tensor2D;
        const padded = tf.reshape(gatherRows(flat, index), [count, width, kvHeads, headDim]) as tf.Tensor4D;
        return this.#fused ? padded : tf.transpose(padded, [0, 2, 1, 3]) as tf.Tensor4D;
      }));
    this.#k.push(place(k));
    this.#v.push(place(v));
  }

  /** Keeps only the given batch rows, in that order; the others are finished. */
  compact(keep: readonly number[]): void {
    if (keep.length === this.#rows.length) return;
    if (!this.#fused) {
      const pick = (x: tf.Tensor4D) => {
        const [, h, c, d] = x.shape;
        const y = tf.tidy(() =>
          tf.reshape(gatherRows(tf.reshape(x, [x.shape[0], h * c * d]), keep), [keep.length, h, c, d]) as tf.Tensor4D
        );
        x.dispose();
        return tf.keep(y);
      };
      this.#k = this.#k.map(pick);
      this.#v = this.#v.map(pick);
    }
    this.#rows = keep.map((i) => this.#rows[i]);
    this.#lengths = keep.map((i) => this.#lengths[i]);
  }

  #append(store: tf.Tensor4D[], layer: number, x: tf.Tensor3D): tf.Tensor4D {
    const column = tf.reshape(x, [x.shape[0], x.shape[1], 1, x.shape[2]]) as tf.Tensor4D;
    const grown = tf.keep(tf.concat([store[layer], column], 2));
    store[layer].dispose();
    store[layer] = grown;
    return grown;
  }

  /** Appends this token's key and value of a layer and attends over everything so far: q `[B, H, d]` → `[B, H, d]`. */
  attend(layer: number, q: tf.Tensor3D, k: tf.Tensor3D, v: tf.Tensor3D): tf.Tensor3D {
    const [batch, heads, d] = q.shape, scale = 1 / Math.sqrt(d);
    if (this.#fused) {
      const lengths = tf.tensor1d(this.#lengths.map((n) => n + this.#generated), "int32");
      const rows = tf.tensor1d(this.#rows, "int32");
      const inputs = { q, k, v, kCache: this.#k[layer], vCache: this.#v[layer], lengths, rows };
      return run("MgpoDecodeAttention", inputs, { scale }) as tf.Tensor3D;
    }
    const keys = this.#append(this.#k, layer, k), values = this.#append(this.#v, layer, v);
    const kvHeads = keys.shape[1], width = keys.shape[2], mask = new Float32Array(batch * width);
    for (let r = 0; r < batch; r++) mask.fill(MASKED, r * width + this.#lengths[r], r * width + this.#prefix);
    const grouped = tf.reshape(q, [batch, kvHeads, heads / kvHeads, d]);
    const scores = tf.add(
      tf.mul(tf.matMul(grouped, keys, false, true), scale),
      tf.tensor4d(mask, [batch, 1, 1, width]),
    );
    return tf.reshape(tf.matMul(tf.softmax(scores), values), [batch, heads, d]);
  }

  /** Ends a step: the token just appended counts from now on. */
  advance(): void {
    this.#generated++;
  }

  /** Releases all tensors. */
  dispose(): void {
    for (const x of [...this.#k, ...this.#v]) x.dispose();
    this.#k = [];
    this.#v = [];
  }
}

/** One decoding step: embeddings `[B, D]` of the last tokens → hidden states `[B, D]` before the final norm. */
export function decodeStep(
  config: QwenConfig,
  weights: Weights,
  x: tf.Tensor2D,
  table: RopeTensors,
  cache: KeyValueCache,
): tf.Tensor2D {
  for (let layer = 0; layer < config.text.layers; layer++) {
    x = tf.tidy(() => decoderBlock(x, config, weights, layer, table, (l, q, k, v) => cache.attend(l, q, k, v)));
  }
  cache.advance();
  return x;
}
