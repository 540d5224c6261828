/**
 * Log-probs and entropies of chosen tokens, differentiable: common beginnings of neighbouring sequences go through the decoder
 * once, and no more than a piece of the logits exists at a time.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { QwenConfig } from "./config.ts";
import { gatherRows, headLogProbEntropy, logProbEntropy } from "./ops.ts";
import { bucketed, type Packed, packShared, padded } from "./packing.ts";
import type { Sequence, TokenLogProbs } from "./policy.ts";
import type { RopeIndex } from "./rope_index.ts";
import { head, headParts, type RopeTensors, type TextHooks } from "./text.ts";
import type { Weights } from "./vision.ts";

/** What a `QwenPolicy` shows the functions that compute with it. */
export interface PolicyModel {
  readonly config: QwenConfig;
  readonly weights: Weights;
  /** See `QwenPolicy.hidden`. */
  hidden(packed: Packed, trainVision?: boolean, hooks?: TextHooks): tf.Tensor2D;
  /** See `QwenPolicy.ropeTensors`. */
  ropeTensors(index: readonly RopeIndex[]): RopeTensors;
}

/** Logits are made in pieces of at most this many elements (64 MiB). */
const MAX_LOGITS = 1 << 24;

/** How {@linkcode tokenLogProbs} works. */
export interface TokenLogProbsOptions {
  temperature: number;
  trainVision: boolean;
  /** Added to the logits, `[V]`; null for nothing. */
  suppress: tf.Tensor1D | null;
  sharePrefix: boolean;
  gradientCheckpointing: boolean;
}

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

/** The implementation of `Policy.logProbs`. */
export function tokenLogProbs(
  model: PolicyModel,
  sequences: readonly Sequence[],
  masks: readonly (readonly number[])[],
  { temperature, trainVision, suppress, sharePrefix, gradientCheckpointing }: TokenLogProbsOptions,
): TokenLogProbs {
  checkMasks(sequences, masks);
  const layout = packShared(model.config, sequences, sharePrefix);
  const { ids, rows, counts } = targetsOf(sequences, masks, layout.rows), chosen = ids.length;
  checkPositions(model.config, layout.packed);
  let packed = layout.packed;
  if (tf.getBackend() === "webgpu") {
    packed = padded(packed, model.config);
    // Padding predicts padding.
    const more = bucketed(chosen) - chosen;
    rows.push(...new Array(more).fill(packed.ids.length - 1));
    ids.push(...new Array(more).fill(0));
  }
  const width = Math.max(...counts), dense = rows.length === chosen && chosen === sequences.length * width;
  const place = new Int32Array(sequences.length * width).fill(-1);
  for (let b = 0, t = 0; b < counts.length; b++) for (let i = 0; i < counts[b]; i++) place[b * width + i] = t++;
  const [logprobs, entropy] = tf.tidy(() => {
    const hidden = model.hidden(packed, trainVision, { recompute: gradientCheckpointing });
    const both = chosenLogProbs(model, hidden, rows, ids, suppress, temperature);
    return [0, 1].map((row) => {
      const flat = tf.reshape(tf.slice(both, [row, 0], [1, rows.length]), [rows.length, 1]) as tf.Tensor2D;
      const placed = dense ? flat : gatherRows(flat, place);
      return tf.reshape(placed, [sequences.length, width]) as tf.Tensor2D;
    });
  });
  return { logprobs, entropy };
}

/** `[2, n]` log-probs and entropies of `targets` at hidden rows, the logits made in pieces. */
function chosenLogProbs(
  { config, weights }: PolicyModel,
  hidden: tf.Tensor2D,
  rows: readonly number[],
  targets: readonly number[],
  suppress: tf.Tensor1D | null,
  temperature: number,
): tf.Tensor2D {
  const piece = Math.max(1, Math.floor(MAX_LOGITS / config.text.vocabSize)), at = gatherRows(hidden, rows);
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
