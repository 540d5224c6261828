/**
 * Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): a block keeps its input only, and is computed again when its gradient
 * is due. The gradient is that of the block itself, number for number, because the same operations run on the same values; what it
 * costs is one more forward pass.
 *
 * @module
 */
import { tf } from "../deps.ts";

/** What a block reads beside its input. */
export interface BlockTensors {
  /** Differentiable; alive and unchanged until the backward pass is done: parameters. */
  readonly weights: readonly tf.Tensor[];
  /** Without gradient; kept until the backward pass is done: rotary tables, masks. */
  readonly constants: readonly tf.Tensor[];
}

/**
 * `block(x, constants)`, of which the tape keeps `x` and the constants alone.
 *
 * @param block Differentiable with respect to `x` and the weights, all of which it must use. Called once now and once for the gradient,
 * with constants in the order given; it must compute the same both times and have no other effect.
 */
export function recomputed<T extends tf.Tensor>(
  x: T,
  { weights, constants }: BlockTensors,
  block: (x: T, constants: readonly tf.Tensor[]) => T,
): T {
  const op = tf.customGrad((...args) => {
    // tf.customGrad is typed for tensors alone; the last argument is the function that saves some of them.
    const save = args.at(-1) as unknown as (tensors: tf.Tensor[]) => void;
    save([x, ...constants]);
    return {
      value: block(x, constants),
      gradFunc: (dy, [x, ...constants]) => gradients(() => block(x as T, constants), [x, ...weights], dy),
    };
  });
  return op(x, ...weights) as T;
}

/** Gradients of `f` with respect to `xs`, in the middle of a backward pass. Everything else that it makes is released. */
function gradients(f: () => tf.Tensor, xs: tf.Tensor[], dy: tf.Tensor): tf.Tensor[] {
  // tfjs has room for one tape: that of the pass in progress is put aside, or the inner one would take its place for good.
  const { state } = tf.engine(), outer = state.activeTape;
  try {
    return tf.tidy(() => tf.engine().gradients(f, xs, dy).grads);
  } finally {
    state.activeTape = outer;
  }
}
