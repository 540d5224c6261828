/**
 * The seam between the model and everything that uses it: what rollout, optimizer and evaluation need of a policy, and no
 * more. The one implementation is {@linkcode "./qwen.ts"}.
 *
 * @module
 */
import type { Tensor2D, Variable } from "../tensors.ts";
import type { PassGradients, PassRequest } from "./pass.ts";
import type { Picture } from "./picture.ts";

/** One message of a conversation, in the shape that chat templates of the Qwen-VL family take. */
export interface Message {
  /** Who speaks. */
  role: "system" | "user" | "assistant";
  /** Text alone, or text and images in the order of reading. */
  content: string | MessagePart[];
}
/** A part of a message: text, or the place of the next image. */
export type MessagePart = { type: "text"; text: string } | { type: "image" };

/** An image as the vision tower takes it. */
export interface ImageInput {
  /** Patches in time, height and width: `[1, gridH, gridW]`; image tokens = gridH·gridW/merge². */
  readonly grid_thw: readonly [number, number, number];
  /** Normalised patches, `[gridH·gridW, 3·2·14·14]`, rows in 2×2-merge-block order. */
  readonly pixel_values: Float32Array;
  /** Names the content: equal keys mean equal pixels, so features can be cached by it. */
  readonly key: string;
}

/** A token sequence with the images that its image tokens stand for, in order. */
export interface Sequence {
  /** Token ids; every image is already expanded to one image token per merged patch. */
  readonly ids: readonly number[];
  /** One for each run of image tokens in `ids`, in the same order. */
  readonly images: readonly ImageInput[];
}

/** Options of {@linkcode Policy.generate}. */
export interface GenerateOptions {
  /** The most tokens that a completion may have. */
  maxNewTokens: number;
  /** Softmax temperature; 0 is greedy decoding. @default {1} */
  temperature?: number;
  /** Nucleus mass, 0 < topP ≤ 1. Recorded log-probs are those of the whole distribution. @default {1} */
  topP?: number;
  /** The seed of all draws. @default {0} */
  seed?: number;
  /**
   * Names each sequence's draws: three counters, e.g. `[step, prompt·G + rollout, turn]`. A row's tokens depend on its name
   * and its prompt only, never on its place in the batch. @default {`[0, row, 0]`}
   */
  keys?: readonly (readonly [number, number, number])[];
  /** Ids that end a completion. @default {the policy's `stopTokens`} */
  stopTokens?: readonly number[];
  /** Ids that are never sampled. @default {the policy's `suppressTokens`} */
  suppressTokens?: readonly number[];
  /** Called after each decoding step with the number of tokens done and rows still running. */
  onToken?: (tokens: number, running: number) => void;
  /**
   * What the last call with the same cache computed is not computed again for sequences that begin with one of its sequences and
   * completions. Its results are the same but for rounding. The policy must not change between the calls.
   */
  cache?: PrefixCache;
  /**
   * Whether the cache takes in what this call computes, in place of what it held. False spares the last of several calls the
   * work.
   *
   * @default {true}
   */
  keepCache?: boolean;
}

/** Keys and values of past calls of {@linkcode Policy.generate}, made by {@linkcode Policy.createPrefixCache}. */
export interface PrefixCache {
  /** Releases everything; the cache cannot be used any more. */
  dispose(): void;
}

/** What the model wrote after one sequence. */
export interface Completion {
  /** The sampled ids, the stop token included. */
  ids: number[];
  /** ln p of each sampled id at the sampling temperature, suppressed ids excluded; for greedy decoding at temperature 1. */
  logprobs: number[];
  /** Whether a stop token ended it or the length limit did. */
  finish: "stop" | "length";
}

/** Options of {@linkcode Policy.logProbs}. */
export interface LogProbOptions {
  /** Logits are divided by it. @default {1} */
  temperature?: number;
  /** Whether gradients reach the vision tower (false: features are cached by content). @default {false} */
  trainVision?: boolean;
  /** Ids left out of the softmax, as in generation. @default {the policy's `suppressTokens`} */
  suppressTokens?: readonly number[];
  /**
   * Whether neighbouring sequences that begin with the same tokens and images go through the decoder once as far as they agree.
   * Results and gradients are the same but for rounding. @default {whether fused kernels are in use}
   */
  sharePrefix?: boolean;
  /**
   * Whether the backward pass computes each decoder block again instead of keeping its inside. Results and gradients are the same;
   * it takes less memory and one more forward pass through the decoder. @default {false}
   */
  gradientCheckpointing?: boolean;
}

/** Log-probs of chosen tokens, rows padded on the right with 0 to the longest. */
export interface TokenLogProbs {
  /** `[B, T]`: ln p(ids[t] | ids[<t]) of the masked tokens of each row, in order. Differentiable. */
  logprobs: Tensor2D;
  /** `[B, T]`: entropy in nats of the distribution that each masked token was drawn from. Differentiable. */
  entropy: Tensor2D;
}

/** A vision-language policy. */
export interface Policy {
  /** Where it came from, for messages and run files. */
  readonly name: string;
  /** Ids that end an assistant turn (`eos_token_id` of generation_config.json). */
  readonly stopTokens: readonly number[];
  /** Ids that are never sampled: image and video placeholders, and `suppress_tokens` of generation_config.json. */
  readonly suppressTokens: readonly number[];
  /** The most tokens of a reply that the policy's folder suggests (`max_new_tokens` of generation_config.json), if it does. */
  readonly maxNewTokens?: number;
  /** Trainable variables by published checkpoint name. Owned by the policy. */
  readonly parameters: ReadonlyMap<string, Variable>;
  /** Resizes a picture into the pixel budget and cuts it into normalised patches. */
  prepareImage(picture: Picture): ImageInput;
  /**
   * Renders messages by the chat template and encodes them; each image placeholder is expanded to its image's tokens.
   *
   * @param images One for each image part, in order.
   * @param addGenerationPrompt Whether the opening of an assistant turn is appended. @default {true}
   */
  encodeChat(messages: readonly Message[], images: readonly ImageInput[], addGenerationPrompt?: boolean): number[];
  /**
   * Encodes what follows an assistant's reply: the end of its turn, the new messages and the opening of the next assistant
   * turn. The reply itself is never re-encoded: append these ids to the ids as sampled.
   *
   * @param history The messages up to and without the reply.
   * @param messages The new messages after the reply.
   * @param images The images of the new messages only.
   * @param ended Whether the reply's last token is the end-of-turn token (else that token is part of the result).
   */
  encodeContinuation(
    history: readonly Message[],
    messages: readonly Message[],
    images: readonly ImageInput[],
    ended: boolean,
  ): number[];
  /** Encodes plain text (special tokens in it are recognised). */
  encode(text: string): number[];
  /** Decodes ids to text. @param skipSpecial leave out special tokens @default {true} */
  decode(ids: readonly number[], skipSpecial?: boolean): string;
  /** Samples one completion for each sequence. */
  generate(sequences: readonly Sequence[], options: GenerateOptions): Promise<Completion[]>;
  /**
   * A cache for {@linkcode GenerateOptions.cache}, to be disposed of by the caller. A policy that keeps nothing between calls (a
   * remote one) leaves this out.
   */
  createPrefixCache?(): PrefixCache;
  /**
   * Log-probs of the tokens where `masks[b][t]` is 1 (never at t = 0). Synchronous and differentiable with respect to
   * {@linkcode parameters}; the caller owns the result.
   */
  logProbs(
    sequences: readonly Sequence[],
    masks: readonly (readonly number[])[],
    options?: LogProbOptions,
  ): TokenLogProbs;
  /**
   * Gradients of a loss of {@linkcode logProbs}. A policy that cannot do better than the tape of TensorFlow.js leaves this out.
   *
   * @internal
   */
  gradients?(request: PassRequest): PassGradients;
  /**
   * Forgets what {@linkcode gradients} keeps from pass to pass. Called by a trainer that is done.
   *
   * @internal
   */
  releasePasses?(): void;
  /**
   * Forgets cached image features. Called where the pictures of a step won't come again, so that the number of tensors stays
   * the same step by step; a policy without such a cache leaves it out.
   */
  releaseFeatures?(): void;
  /** Releases every tensor. */
  dispose(): void;
}
