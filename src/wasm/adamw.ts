/**
 * `MgpoAdamW`: one step of AdamW on one tensor, **in place**.
 *
 * Inputs: param, m, v, grad of one shape; param, m and v are overwritten (so are all tensors that share their data: clones and
 * reshapes). Attributes: lr, beta1, beta2, eps, weightDecay, correction1 = 1 − beta1^t, correction2 = 1 − beta2^t, clipScale (≤ 1, from
 * clipping the gradient's norm). With g = grad · clipScale, in the order of torch.optim.AdamW:
 *
 * - param ← param · (1 − lr · weightDecay)
 * - m ← beta1 · m + (1 − beta1) · g, v ← beta2 · v + (1 − beta2) · g²
 * - param ← param − (lr / correction1) · m / (√v / √correction2 + eps)
 *
 * Output: a scalar without meaning (a kernel must return something). Cost: 4 reads and 3 writes per element.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { madd, nmadd } from "./asm.ts";
import { eachVector } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** The kernel. */
export const adamw: KernelFile = { emit, kernels: [{ name: "MgpoAdamW", run: step }] };

/** `adamw(count, param, m, v, grad, decay, clip, beta1, rest1, beta2, rest2, rate, denominator, eps)` */
function emit(m: ModuleBuilder, parts: Parts): void {
  const floats = ["f32", "f32", "f32", "f32", "f32", "f32", "f32", "f32", "f32"] as const;
  const parameters = ["i32", "i32", "i32", "i32", "i32", ...floats] as const;
  m.function("adamw", parameters, (f, count, param, first, second, grad, ...scalars) => {
    const [decay, clip, beta1, rest1, beta2, rest2, rate, denominator, eps] = scalars.map((x) => f.v128(x.splat()));
    eachVector(f, parts, count, (at) => {
      const g = f.v128(at.load(grad).mul(clip));
      const mean = f.v128(madd(at.load(first), beta1, g.mul(rest1)));
      const square = f.v128(madd(at.load(second), beta2, g.mul(g).mul(rest2)));
      at.store(first, mean);
      at.store(second, square);
      const direction = mean.div(madd(square.sqrt(), denominator, eps));
      at.store(param, nmadd(rate, direction, at.load(param).mul(decay)));
    });
  }, { exported: true });
}

/** Rough nanoseconds per element. */
const COST = 0.8;

function step(call: KernelCall): tf.TensorInfo {
  const param = call.input("param");
  const tensors = [param, ...["m", "v", "grad"].map((name) => call.input(name, param.shape))];
  const [lr, beta1, beta2, eps] = ["lr", "beta1", "beta2", "eps"].map((name) => call.number(name));
  const [weightDecay, clip] = [call.number("weightDecay"), call.number("clipScale")];
  const [correction1, correction2] = [call.number("correction1"), call.number("correction2")];
  const output = call.output([]);
  call.each("adamw", tensors, COST, [
    ...[1 - lr * weightDecay, clip, beta1, 1 - beta1, beta2, 1 - beta2],
    ...[lr / correction1, 1 / Math.sqrt(correction2), eps],
  ]);
  call.functions.zero(call.address(output), 4);
  return output;
}
