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
import { tf } from "../../deps.ts";
import { dispatchElements, element, ELEMENTWISE, packed } from "./lanes.ts";
import type { Kernel, KernelCall } from "./runtime.ts";

/** The kernel. */
export const adamw: readonly Kernel[] = [{ name: "MgpoAdamW", run: step }];

const scalars = ["decay", "clip", "beta1", "rest1", "beta2", "rest2", "rate", "denominator", "eps"];

/**
 * The step of element `i` of `param`, `m`, `v` and `grad`.
 *
 * @param decay WGSL of 1 − lr · weightDecay.
 * @param rate WGSL of lr / correction1.
 */
export const update = (decay: string, rate: string): string =>
  `let g = grad[i] * u.clip;
let mean = m[i] * u.beta1 + g * u.rest1;
let square = v[i] * u.beta2 + g * g * u.rest2;
m[i] = mean;
v[i] = square;
param[i] = param[i] * ${decay} - ${rate} * (mean / (sqrt(square) * u.denominator + u.eps));`;

function step(call: KernelCall): tf.TensorInfo {
  const param = call.input("param");
  const [m, v, grad] = ["m", "v", "grad"].map((name) => call.input(name, param.shape));
  const [lr, beta1, beta2, eps] = ["lr", "beta1", "beta2", "eps"].map((name) => call.number(name));
  const [weightDecay, clip] = [call.number("weightDecay"), call.number("clipScale")];
  const [correction1, correction2] = [call.number("correction1"), call.number("correction2")];
  const done = call.zeros([]), total = tf.util.sizeFromShape(param.shape);
  if (total === 0) return done;
  const { type, count } = packed(total);
  const make = () => ({
    storage: [
      ...["param", "m", "v"].map((name) => ({ name, type, write: true })),
      { name: "grad", type },
    ],
    uniforms: { size: "u32", ...Object.fromEntries(scalars.map((name) => [name, "f32"])) } as Record<
      string,
      "u32" | "f32"
    >,
    threads: ELEMENTWISE,
    main: `${element}
${update("u.decay", "u.rate")}`,
  });
  for (const tensor of [param, m, v]) call.overwrite(tensor);
  const moments = { beta1, rest1: 1 - beta1, beta2, rest2: 1 - beta2 };
  const rates = { rate: lr / correction1, denominator: 1 / Math.sqrt(correction2), eps };
  const uniforms = { decay: 1 - lr * weightDecay, clip, ...moments, ...rates };
  dispatchElements(call, `${call.name} ${type}`, make, [param, m, v, grad], { total, step: count }, uniforms);
  return done;
}
