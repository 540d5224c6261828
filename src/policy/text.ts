/**
 * The language model of Qwen2.5-VL: embedding with image features in place, decoder blocks, and the head.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { QwenConfig } from "./config.ts";
import type { KeyValueCache } from "./key_value_cache.ts";
import { attention, gatherRows, linear, rmsNorm, rope, type Segments, swiglu } from "./ops.ts";
import { recomputed } from "./recompute.ts";
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
 * @param words N token ids, −1 where an image feature takes the token's place
 * @param featureRow For each token the row of `features` that takes its place, or −1
 * @param features `[M, D]`, or null where there are no images
 * @returns `[N, D]`
 */
export function embed(
  weights: Weights,
  words: ArrayLike<number>,
  featureRow: ArrayLike<number>,
  features: tf.Tensor2D | null,
): tf.Tensor2D {
  const table = weights("model.embed_tokens.weight") as tf.Tensor2D;
  if (!features) return gatherRows(table, words);
  return tf.add(gatherRows(table, words), gatherRows(features, featureRow)) as tf.Tensor2D;
}

/** Every weight of a block. */
const BLOCK_WEIGHTS = [
  ...["input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight"],
  ...["self_attn.k_proj.bias", "self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight"],
  ...["post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
];

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

/** Keys and values that are not just those of the packed tokens in their order. */
export interface KeySource {
  /** The keys of each segment of tokens; they end with those of the segment's own tokens. */
  readonly segments: Segments;
  /** The keys or values of a block, `[M, Hkv, d]`, given those of the packed tokens, `[N, Hkv, d]`. Differentiable. */
  of(layer: number, own: tf.Tensor3D, what: "k" | "v"): tf.Tensor3D;
}

/** What {@linkcode textForward} can take beside its tokens and report beside its result. */
export interface TextHooks {
  inspect?: Inspect;
  /** What tokens attend to. @default {their own segment} */
  keys?: KeySource;
  /**
   * Whether the backward pass computes each block again instead of keeping its inside; see recompute.ts. What is called with
   * parts of a block is then called twice. @default {false}
   */
  recompute?: boolean;
  /** Called with the rotated keys and the values that each block attends to; the callee keeps what it wants to keep. */
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
    hooks.queriesKeys?.(layer, q, k);
    if (hooks.keys) [k, v] = [hooks.keys.of(layer, k, "k"), hooks.keys.of(layer, v, "v")];
    hooks.keysValues?.(layer, k, v);
    return attention(q, k, v, segments, true, scale, hooks.keys?.segments);
  };
  for (let layer = 0; layer < config.text.layers; layer++) {
    hooks.blockInput?.(layer, x);
    x = hooks.recompute
      ? recomputedBlock(x, config, weights, layer, table, mix)
      : tf.tidy(() => decoderBlock(x, config, weights, layer, table, mix));
    hooks.inspect?.(`text.layer${layer}`, x);
  }
  return x;
}

/** A block whose inside is computed again when its gradient is due. */
function recomputedBlock(
  x: tf.Tensor2D,
  config: QwenConfig,
  weights: Weights,
  layer: number,
  { cos, sin }: RopeTensors,
  mix: Mixer,
): tf.Tensor2D {
  const known = new Map(BLOCK_WEIGHTS.map((name) => `model.layers.${layer}.${name}`).map((n) => [n, weights(n)]));
  const own: Weights = (name) => {
    const weight = known.get(name);
    // Its gradient would silently be lost.
    if (!weight) throw new RangeError(`the decoder block reads ${name}, which is not among its weights`);
    return weight;
  };
  return recomputed(
    x,
    { weights: [...known.values()], constants: [cos, sin] },
    (x, [cos, sin]) => decoderBlock(x, config, own, layer, { cos: cos as tf.Tensor2D, sin: sin as tf.Tensor2D }, mix),
  );
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
