/**
 * One forward and backward pass of training: log-probs, a loss of them, gradients. What the host gives the loss is spelled out as
 * arrays, so that a policy can do the pass again with other arrays without running any of this.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { QwenConfig } from "./config.ts";
import type { LogProbOptions, Sequence, TokenLogProbs } from "./policy.ts";
import type { Tensor, Tensor1D, Variable } from "../tensors.ts";

/** Arrays that the host makes for a pass, by name. */
export type HostArrays = Readonly<Record<string, Float32Array | Int32Array>>;

/** A loss of log-probs, and what it needs to know of a batch. */
export interface PassLoss {
  /** Names the computation: losses of equal names do the same operations on arrays of equal sizes. */
  readonly name: string;
  /** Everything that differs from batch to batch, for log-probs of a shape `[rows, width]`. */
  arrays(rows: number, width: number): HostArrays;
  /**
   * The loss, differentiable.
   *
   * @param arrays As {@linkcode arrays} made them; handed to the device as they are, not as copies.
   */
  of(out: TokenLogProbs, arrays: HostArrays): tf.Scalar;
}

/** What a pass is asked for. */
export interface PassRequest {
  readonly sequences: readonly Sequence[];
  /** As `Policy.logProbs` takes them. */
  readonly masks: readonly (readonly number[])[];
  readonly options?: LogProbOptions;
  readonly loss: PassLoss;
  /** What gradients are taken of, by any name. */
  readonly variables: ReadonlyMap<string, Variable>;
}

/** What the tape of a pass keeps, about: per token and layer 15·D + 6·I + 11·H·d floats (see `memory_plan.ts` for the symbols). */
export function activationBytes({ text }: QwenConfig, tokens: number): number {
  const { hiddenSize, intermediateSize, heads, headDim, layers } = text;
  return 4 * tokens * layers * (15 * hiddenSize + 6 * intermediateSize + 11 * heads * headDim);
}

/** What a pass gives; the caller owns it. */
export interface PassGradients {
  /** `[1 + 2·rows·width]`: the loss, the log-probs and the entropies. */
  readonly report: Tensor1D;
  /** By the names of the variables, those that the loss depends on. */
  readonly grads: Map<string, Tensor>;
  /** Width of a row of the log-probs. */
  readonly width: number;
}

/**
 * The pass itself, through the tape of TensorFlow.js.
 *
 * @param logProbs Computes them, differentiable.
 * @param arrays Those of the loss, where they are made already. @default {made for the shape of the log-probs}
 */
export function differentiate(
  logProbs: () => TokenLogProbs,
  { loss, variables }: Pick<PassRequest, "loss" | "variables">,
  arrays?: HostArrays,
): PassGradients {
  let report: tf.Tensor1D | undefined, width = 0;
  const found = tf.variableGrads(() => {
    const out = logProbs(), shape = out.logprobs.shape;
    const value = loss.of(out, arrays ?? loss.arrays(...shape));
    width = shape[1];
    report = tf.keep(
      tf.concat1d([tf.reshape(value, [1]), tf.reshape(out.logprobs, [-1]), tf.reshape(out.entropy, [-1])]),
    );
    return value;
  }, [...variables.values()]);
  found.value.dispose();
  const grads = new Map<string, tf.Tensor>();
  for (const [name, variable] of variables) {
    const grad = found.grads[variable.name];
    if (grad) grads.set(name, grad);
  }
  return { report: report!, grads, width };
}
