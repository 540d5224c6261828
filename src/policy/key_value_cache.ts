/**
 * Keys and values of rows that decode one token a step on plain or WebAssembly kernels.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { QwenConfig } from "./config.ts";
import { gatherRows, hasFused, run } from "./ops.ts";

/** A prompt among packed tokens. */
export interface Prompt {
  /** Its first token. */
  readonly start: number;
  readonly length: number;
}

/** Keys and values of finished generation, owned by whoever took them. */
export interface TakenKeys {
  /** Per layer, `[n, Hkv·d]`. */
  k: tf.Tensor2D[];
  /** Per layer, `[n, Hkv·d]`. */
  v: tf.Tensor2D[];
  /** First of each row's tokens: its prompt's, then the sampled ones but the last. */
  starts: number[];
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
  /** Plain rows that were compacted away, where they are kept: per layer, and first tokens by row. */
  #finished: { k: tf.Tensor2D[]; v: tf.Tensor2D[] }[] = [];
  #finishedTokens = 0;
  readonly #starts: number[];
  readonly #keepFinished: boolean;

  /**
   * @param prompts Where each row's prompt lies among the packed tokens; rows may share one.
   * @param maxNewTokens The most tokens that a row will add.
   * @param keepFinished Whether {@linkcode take} will be called, so that finished rows must stay.
   */
  constructor(readonly config: QwenConfig, prompts: readonly Prompt[], maxNewTokens: number, keepFinished = false) {
    this.#prompts = prompts;
    this.#starts = prompts.map(() => 0);
    this.#keepFinished = keepFinished;
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
      if (this.#keepFinished) this.#setAside(this.#rows.map((_, i) => i).filter((i) => !keep.includes(i)));
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

  /** Copies the tokens of plain batch rows, one row after the other. */
  #setAside(rows: readonly number[]): void {
    const { kvHeads, headDim } = this.config.text, width = this.#k[0].shape[2], index: number[] = [];
    for (const r of rows) {
      this.#starts[this.#rows[r]] = this.#finishedTokens + index.length;
      for (let i = 0; i < this.#lengths[r]; i++) index.push(r * width + i);
      for (let i = 0; i < this.#generated; i++) index.push(r * width + this.#prefix + i);
    }
    this.#finishedTokens += index.length;
    const copy = (x: tf.Tensor4D) =>
      tf.keep(tf.tidy(() => {
        const tokens = tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [x.shape[0] * width, kvHeads * headDim]);
        return gatherRows(tokens as tf.Tensor2D, index);
      }));
    this.#finished.push({ k: this.#k.map(copy), v: this.#v.map(copy) });
  }

  /** Hands over keys and values of all tokens that rows have so far, finished rows too; the cache is empty then. */
  take(): TakenKeys {
    const { kvHeads, headDim } = this.config.text;
    if (!this.#fused && this.#rows.length > 0) this.#setAside(this.#rows.map((_, i) => i));
    const layers = Array.from({ length: this.config.text.layers }, (_, i) => i);
    const flat = (store: tf.Tensor4D[]) =>
      store.map((x) => tf.keep(tf.reshape(x, [x.shape[0] * x.shape[1], kvHeads * headDim]) as tf.Tensor2D));
    const joined = (what: "k" | "v") =>
      layers.map((l) => tf.keep(tf.tidy(() => tf.concat(this.#finished.map((part) => part[what][l]), 0))));
    const taken = this.#fused
      ? { k: flat(this.#k), v: flat(this.#v), starts: this.#starts.map((_, r) => r * this.#capacity) }
      : { k: joined("k"), v: joined("v"), starts: this.#starts };
    this.dispose();
    return taken;
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
    tf.dispose([this.#k, this.#v, this.#finished]);
    this.#finished = [];
    this.#k = [];
    this.#v = [];
  }
}
