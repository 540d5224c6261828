/**
 * Forward passes that keep what they saw, read back from whichever backend is current.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { Sequence } from "../policy/policy.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { head } from "../policy/text.ts";

/** Logits `[N, V]` and what the pass reported on the way, by the goldens' names. */
export interface Captured {
  logits: Float32Array;
  values: Map<string, Float32Array>;
}

/** A copy of a tensor's values; releases the tensor. */
export async function take(x: tf.Tensor): Promise<Float32Array> {
  const data = Float32Array.from(await x.data());
  x.dispose();
  return data;
}

/** The forward pass of one sequence with all its intermediate results. */
export async function captureForward(policy: QwenPolicy, sequence: Sequence): Promise<Captured> {
  const kept = new Map<string, tf.Tensor>();
  const logits = policy.forward(sequence, (name, value) => kept.set(name, tf.keep(tf.clone(value))));
  const values = new Map<string, Float32Array>();
  for (const [name, value] of kept) values.set(name, await take(value));
  return { logits: await take(logits), values };
}

/** Logits of several sequences in one packed pass, `[sum of lengths, V]`. */
export async function packedLogits(policy: QwenPolicy, sequences: readonly Sequence[]): Promise<Float32Array> {
  return await take(
    tf.tidy(() => head(policy.config, policy.weights, policy.hidden(policy.pack(sequences)))),
  );
}

/** Log-probs and entropies of every token but the first of each sequence, over the whole vocabulary. */
export async function allLogProbs(
  policy: QwenPolicy,
  sequences: readonly Sequence[],
  temperature: number,
): Promise<{ logprobs: Float32Array[]; entropy: Float32Array[] }> {
  const masks = sequences.map(({ ids }) => ids.map((_, t) => t > 0 ? 1 : 0));
  const out = policy.logProbs(sequences, masks, { temperature, suppressTokens: [] });
  const width = out.logprobs.shape[1];
  const [logprobs, entropy] = await Promise.all([take(out.logprobs), take(out.entropy)]);
  const rows = (x: Float32Array) => sequences.map(({ ids }, b) => x.subarray(b * width, b * width + ids.length - 1));
  return { logprobs: rows(logprobs), entropy: rows(entropy) };
}

/** How far each named token's logit lies below the largest of its row: 0 where the token is the argmax. */
export function belowArgmax(logits: Float32Array, vocab: number, tokens: ArrayLike<number>): number[] {
  return Array.from(tokens, (token, row) => {
    let top = -Infinity;
    for (let v = 0; v < vocab; v++) top = Math.max(top, logits[row * vocab + v]);
    return top - logits[row * vocab + token];
  });
}
