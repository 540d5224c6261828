/**
 * The vision tower of Qwen2.5-VL: patch embedding, transformer blocks with window or full attention, and the merger that
 * turns 2×2 patches into one image token.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { Tensor } from "../tensors.ts";
import type { QwenConfig } from "./config.ts";
import { attention, gatherRows, gelu, linear, rmsNorm, rope, type Segments, swiglu } from "./ops.ts";
import { type Grid, visionRopeTable, windowIndex } from "./rope_index.ts";

/** Looks a weight up by its published name; throws if there is none. */
export type Weights = (name: string) => tf.Tensor;

/** Called with intermediate results, named as the goldens name them; must not keep the tensor. */
export type Inspect = (name: string, value: Tensor) => void;

/** The epsilon of every norm in the tower, whatever the text model's is. */
const VISION_EPS = 1e-6;

/** Rows `part·size …` of a stacked weight or bias; cut on the weight, so that its gradient, not the activations', is padded. */
function stacked(w: tf.Tensor, part: number, size: number): tf.Tensor {
  return w.rank === 1
    ? tf.slice(w as tf.Tensor1D, [part * size], [size])
    : tf.slice(w as tf.Tensor2D, [part * size, 0], [size, w.shape[1]!]);
}

function block(
  x: tf.Tensor2D,
  weights: Weights,
  prefix: string,
  heads: number,
  cos: tf.Tensor2D,
  sin: tf.Tensor2D,
  segments: Segments,
): tf.Tensor2D {
  const [n, hidden] = x.shape, d = hidden / heads;
  const w = (name: string) => weights(prefix + name);
  const h = rmsNorm(x, w("norm1.weight") as tf.Tensor1D, VISION_EPS);
  const [q, k, v] = [0, 1, 2].map((part) =>
    tf.reshape(
      linear(
        h,
        stacked(w("attn.qkv.weight"), part, hidden) as tf.Tensor2D,
        stacked(w("attn.qkv.bias"), part, hidden) as tf.Tensor1D,
      ),
      [n, heads, d],
    ) as tf.Tensor3D
  );
  const mixed = attention(rope(q, cos, sin), rope(k, cos, sin), v, segments, false, 1 / Math.sqrt(d));
  const projected = linear(
    tf.reshape(mixed, [n, hidden]),
    w("attn.proj.weight") as tf.Tensor2D,
    w("attn.proj.bias") as tf.Tensor1D,
  );
  const y = tf.add(x, projected) as tf.Tensor2D;
  const g = rmsNorm(y, w("norm2.weight") as tf.Tensor1D, VISION_EPS);
  const dense = (input: tf.Tensor2D, name: string) =>
    linear(input, w(`mlp.${name}.weight`) as tf.Tensor2D, w(`mlp.${name}.bias`) as tf.Tensor1D);
  return tf.add(y, dense(swiglu(dense(g, "gate_proj"), dense(g, "up_proj")), "down_proj")) as tf.Tensor2D;
}

/** What the tower gives. */
export interface VisionFeatures {
  /** Image tokens in image order, `[M, out]`. */
  embeds: tf.Tensor2D;
  /** The merger's normed input in image order, `[M, 4·hidden]`, when asked for. */
  patches?: tf.Tensor2D;
}

/**
 * Image features of several images at once; images never attend to each other.
 *
 * @param pixels `[N, 3·T·P·P]`, the images' patches one after the other in processor order
 * @param grids The images' grids in patches
 * @param wantPatches Whether to give the per-patch features too (for pretraining's probes)
 */
export function visionForward(
  config: QwenConfig,
  weights: Weights,
  pixels: tf.Tensor2D,
  grids: readonly Grid[],
  wantPatches = false,
  inspect?: Inspect,
): VisionFeatures {
  const { vision } = config, merge = vision.spatialMergeSize, unit = merge * merge, hidden = vision.hiddenSize;
  const n = pixels.shape[0], headDim = hidden / vision.heads;
  const { order, windows, frames } = windowIndex(grids, vision.windowSize, vision.patchSize, merge);
  const byPatch = new Int32Array(n), inverse = new Int32Array(order.length);
  let moved = false;
  for (let i = 0; i < order.length; i++) {
    inverse[order[i]] = i;
    if (order[i] !== i) moved = true;
    for (let j = 0; j < unit; j++) byPatch[i * unit + j] = order[i] * unit + j;
  }
  const table = visionRopeTable(grids, headDim, merge);
  const permute = (x: Float32Array) => {
    const out = new Float32Array(x.length);
    for (let i = 0; i < n; i++) out.set(x.subarray(byPatch[i] * headDim, (byPatch[i] + 1) * headDim), i * headDim);
    return tf.tensor2d(out, [n, headDim]);
  };
  inspect?.("vision.rope_cos", tf.tensor2d(table.cos, [n, headDim]));
  inspect?.("vision.rope_sin", tf.tensor2d(table.sin, [n, headDim]));
  const cos = permute(table.cos), sin = permute(table.sin);
  const patchWeight = weights("visual.patch_embed.proj.weight");
  let x = linear(pixels, tf.reshape(patchWeight, [hidden, pixels.shape[1]]) as tf.Tensor2D);
  inspect?.("vision.patch_embed", x);
  if (moved) x = gatherRows(x, byPatch);
  for (let i = 0; i < vision.depth; i++) {
    const full = vision.fullAttentionBlocks.includes(i);
    x = block(x, weights, `visual.blocks.${i}.`, vision.heads, cos, sin, { cu: full ? frames : windows });
    inspect?.(`vision.block${i}`, x);
  }
  const normed = rmsNorm(x, weights("visual.merger.ln_q.weight") as tf.Tensor1D, VISION_EPS);
  const grouped = tf.reshape(normed, [n / unit, unit * hidden]) as tf.Tensor2D;
  const merger = (input: tf.Tensor2D, layer: number) =>
    linear(
      input,
      weights(`visual.merger.mlp.${layer}.weight`) as tf.Tensor2D,
      weights(`visual.merger.mlp.${layer}.bias`) as tf.Tensor1D,
    );
  const merged = merger(gelu(merger(grouped, 0)), 2);
  inspect?.("vision.merger_window_order", merged);
  const restore = (y: tf.Tensor2D) => moved ? gatherRows(y, inverse) : y;
  const embeds = restore(merged);
  inspect?.("vision.image_embeds", embeds);
  return wantPatches ? { embeds, patches: restore(grouped) } : { embeds };
}
