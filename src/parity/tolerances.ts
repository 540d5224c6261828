/**
 * The tolerances of the golden layout: largest absolute differences of a float32 implementation, unless said otherwise. They
 * are about ten times the float32 noise that was measured when such sets were made.
 *
 * @module
 */

/** By quantity. */
export const tolerances = {
  /** Cosine and sine tables of both rotary embeddings. */
  rope: 2e-5,
  /** Everything inside the vision tower, and its output. */
  vision: 1e-4,
  /** Embeddings, block outputs and final norm of the text model. */
  text: 4e-4,
  logits: 1e-3,
  /** Log-probs of a model's tokens. */
  logprobs: 1e-3,
  /** Nats. */
  entropy: 1e-3,
  /** Normalised pixels of an exactly resized picture. */
  pixels: 1e-6,
  /** Levels of 255 by which JPEG decoders differ. */
  jpeg: 3,
  /** Logits of the same weights loaded in another way. */
  sameWeights: 1e-5,
  /** A batch's loss computed by a model. */
  loss: 1e-5,
  /** Global gradient norm, relative. */
  gradNorm: 1e-4,
  /** A gradient's elements, of the largest in its tensor. */
  gradient: 3e-4,
  /** Parameters after optimizer steps: every element. */
  parameters: 5e-6,
  /** Parameters after optimizer steps: 99.9 % of the elements. */
  mostParameters: 3e-7,
  /** Counts of clipped tokens as shares, and what follows from given numbers. */
  shares: 1e-5,
  /** Advantages; the set's own float32 error comes on top, fourfold. */
  advantages: 1e-5,
  /** A loss of given log-probs, relative or absolute. */
  givenLoss: { relative: 2e-5, absolute: 1e-6 },
  /** Log-probs and entropies of given logits; `wide` where logits reach ±200. */
  givenLogits: 1e-5,
  wideLogits: 1e-4,
} as const;
