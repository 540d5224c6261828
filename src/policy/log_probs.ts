/**
 * Log-probs and entropies of chosen tokens, differentiable: common beginnings of neighbouring sequences go through the decoder
 * once, and no more than a piece of the logits exists at a time.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { QwenConfig } from "./config.ts";
import { gatherRows, headLogProbEntropy, logProbEntropy, type Segments } from "./ops.ts";
import { bucketed, type Packed, packShared, padded, type sharedSizes } from "./packing.ts";
import type { Sequence, TokenLogProbs } from "./policy.ts";
import type { RopeIndex, RopeTable } from "./rope_index.ts";
import { head, headParts, type KeySource, type RopeTensors, type TextHooks } from "./text.ts";
import type { Weights } from "./vision.ts";

/** What a `QwenPolicy` shows the functions that compute with it. */
export interface PolicyModel {
  readonly config: QwenConfig;
  readonly weights: Weights;
  /** See `QwenPolicy.hidden`. */
  hidden(
    packed: Packed,
    trainVision?: boolean,
    hooks?: TextHooks,
    given?: tf.Tensor2D,
    inputs?: HiddenInputs,
  ): tf.Tensor2D;
  /** See `QwenPolicy.ropeTensors`. */
  ropeTensors(index: readonly RopeIndex[]): RopeTensors;
}

/** What the host makes of packed tokens before their hidden states are computed. */
export interface HiddenInputs {
  /** See `embed`. */
  readonly words: Int32Array;
  /** Rotary tables. */
  readonly rope: RopeTable;
  readonly segments: Segments;
  readonly keys?: KeySource;
}

/** Logits are made in pieces of at most this many elements (64 MiB). */
const MAX_LOGITS = 1 << 24;

/** How {@linkcode computeLogProbs} works. */
export interface LogProbSettings {
  temperature: number;
  trainVision: boolean;
  /** Added to the logits, `[V]`; null for nothing. */
  suppress: tf.Tensor1D | null;
  gradientCheckpointing: boolean;
}

/** What the host makes of sequences before their log-probs are computed. */
export interface PreparedLogProbs {
  readonly packed: Packed;
  /** The packed rows that predict the chosen tokens. */
  readonly rows: Int32Array;
  /** The chosen tokens. */
  readonly targets: Int32Array;
  /** `[rows·width]` The chosen token of each place of the result, −1 for none; left out where they lie so already. */
  readonly place?: Int32Array;
  /** Shape of the result: sequences, and the most tokens of one, or more of both. */
  readonly shape: [number, number];
}

/** Chooses the sizes of a pass; see {@linkcode sharedSizes}. */
export type SizesOf = typeof sharedSizes;

/** The masked tokens of sequences, in order: their ids, the packed rows that predict them, and how many each sequence has. */
interface Targets {
  ids: number[];
  rows: number[];
  counts: number[];
}

function targetsOf(
  sequences: readonly Sequence[],
  masks: readonly (readonly number[])[],
  packedRows: readonly Int32Array[],
): Targets {
  const out: Targets = { ids: [], rows: [], counts: [] };
  sequences.forEach(({ ids }, b) => {
    const before = out.ids.length;
    for (let t = 1; t < ids.length; t++) {
      if (!masks[b][t]) continue;
      out.rows.push(packedRows[b][t - 1]);
      out.ids.push(ids[t]);
    }
    out.counts.push(out.ids.length - before);
  });
  return out;
}

function checkMasks(sequences: readonly Sequence[], masks: readonly (readonly number[])[]): void {
  sequences.forEach(({ ids }, b) => {
    if (masks[b].length !== ids.length) {
      throw new RangeError(`sequence ${b} has ${ids.length} tokens but its mask has ${masks[b].length}`);
    }
    if (masks[b][0]) throw new RangeError(`sequence ${b}: token 0 has no predecessor and cannot be masked in`);
  });
  if (!masks.some((mask) => mask.some((m) => m))) {
    throw new RangeError("no token is masked in: there is nothing to compute log-probs of");
  }
}

/**
 * Packs sequences and finds their chosen tokens. On WebGPU sizes are rounded up.
 *
 * @param sizesOf Rounds every size, that of the result too. @default {tokens, keys, features and chosen tokens, to buckets}
 */
export function prepareLogProbs(
  config: QwenConfig,
  sequences: readonly Sequence[],
  masks: readonly (readonly number[])[],
  sharePrefix: boolean,
  sizesOf?: SizesOf,
): PreparedLogProbs {
  checkMasks(sequences, masks);
  const layout = packShared(config, sequences, sharePrefix);
  const { ids, rows, counts } = targetsOf(sequences, masks, layout.rows), chosen = ids.length;
  checkPositions(config, layout.packed);
  let packed = layout.packed, shape: [number, number] = [sequences.length, Math.max(...counts)];
  if (tf.getBackend() === "webgpu") {
    const sizes = sizesOf?.(packed, config, { chosen, rows: shape[0], width: shape[1] });
    packed = padded(packed, config, sizes);
    // Padding predicts padding.
    const more = (sizes?.chosen ?? bucketed(chosen)) - chosen;
    const first = layout.packed.ids.length, spare = packed.ids.length - first;
    for (let i = 0; i < more; i++) rows.push(first + i % spare);
    ids.push(...new Array(more).fill(0));
    if (sizes) shape = [sizes.rows, sizes.width];
  }
  const [height, width] = shape;
  const isDense = !sizesOf && rows.length === chosen && chosen === height * width;
  const place = new Int32Array(height * width).fill(-1);
  for (let b = 0, t = 0; b < counts.length; b++) for (let i = 0; i < counts[b]; i++) place[b * width + i] = t++;
  return {
    ...{ packed, shape, rows: Int32Array.from(rows), targets: Int32Array.from(ids) },
    ...(isDense ? {} : { place }),
  };
}

/**
 * The log-probs and entropies of what was prepared.
 *
 * @param inputs What `hiddenInputs` made of the packed tokens. @default {made now}
 * @param features Of the packed images. @default {computed, or found, now}
 */
export function computeLogProbs(
  model: PolicyModel,
  { packed, rows, targets, place, shape }: PreparedLogProbs,
  { temperature, trainVision, suppress, gradientCheckpointing }: LogProbSettings,
  inputs?: HiddenInputs,
  features?: tf.Tensor2D,
): TokenLogProbs {
  const [logprobs, entropy] = tf.tidy(() => {
    const hidden = model.hidden(packed, trainVision, { recompute: gradientCheckpointing }, features, inputs);
    const both = chosenLogProbs(model, hidden, rows, targets, suppress, temperature);
    return [0, 1].map((row) => {
      const flat = tf.reshape(tf.slice(both, [row, 0], [1, rows.length]), [rows.length, 1]) as tf.Tensor2D;
      const placed = place ? gatherRows(flat, place) : flat;
      return tf.reshape(placed, shape) as tf.Tensor2D;
    });
  });
  return { logprobs, entropy };
}

/** Whether the logits of so many chosen tokens are made in one piece. */
export const isOnePiece = ({ text }: QwenConfig, chosen: number): boolean => chosen <= pieceOf(text.vocabSize);

const pieceOf = (vocabSize: number): number => Math.max(1, Math.floor(MAX_LOGITS / vocabSize));

/** `[2, n]` log-probs and entropies of `targets` at hidden rows, the logits made in pieces. */
function chosenLogProbs(
  { config, weights }: PolicyModel,
  hidden: tf.Tensor2D,
  rows: Int32Array,
  targets: Int32Array,
  suppress: tf.Tensor1D | null,
  temperature: number,
): tf.Tensor2D {
  const piece = pieceOf(config.text.vocabSize), at = gatherRows(hidden, rows);
  if (rows.length <= piece) return logProbEntropy(head(config, weights, at), targets, suppress, temperature);
  const { normed, table } = headParts(config, weights, at);
  return headLogProbEntropy(normed, table, targets, suppress, temperature, piece);
}

/**
 * Checks that packed sequences, with `more` tokens behind each, keep to the positions that the model was made for.
 *
 * @throws {RangeError} One does not.
 */
export function checkPositions({ text }: QwenConfig, { index }: Packed, more = 0): void {
  const { maxPositions = Infinity } = text;
  for (const { next } of index) {
    if (next + more <= maxPositions) continue;
    const what = more > 0 ? `a prompt of ${next} positions and maxNewTokens = ${more} make` : "a sequence has";
    throw new RangeError(
      `${what} ${next + more} positions, more than the ${maxPositions} of max_position_embeddings in the policy's ` +
        `config.json; ask for shorter replies (maxNewTokens), smaller pictures (maxPixels) or fewer turns`,
    );
  }
}
