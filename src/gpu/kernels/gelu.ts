/**
 * The exact (erf) GELU.
 *
 * - `MgpoGelu`: x (any shape) → y = x · Φ(x), Φ(x) = ½ · (1 + erf(x / √2)).
 * - `MgpoGeluGrad`: x, dy → dx = dy · (Φ(x) + x · φ(x)), φ(x) = exp(−x²/2) / √(2π).
 *
 * erf is the rational approximation 7.1.26 of Abramowitz and Stegun, within 1.5e-7 everywhere. Cost: one exponential per element;
 * 2 or 3 streams of memory.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { dispatchElements, element, ELEMENTWISE, packed } from "./lanes.ts";
import type { Kernel, KernelCall } from "./runtime.ts";

/** Both kernels. */
export const gelu: readonly Kernel[] = [{ name: "MgpoGelu", run: forward }, { name: "MgpoGeluGrad", run: backward }];

/** Sets `bell` = exp(−x²/2) and `phi` = Φ(v); the upper tail is computed and mirrored, so that neither tail cancels. */
const phi = (type: string) => `
let bell = exp(max(-0.5 * v * v, ${type}(-87.0)));
let t = 1.0 / (1.0 + 0.3275911 * ${Math.SQRT1_2} * abs(v));
let tail = 0.5 * bell * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
let phi = select(tail, 1.0 - tail, v > ${type}(0.0));`;

function forward(call: KernelCall): tf.TensorInfo {
  const x = call.input("x"), y = call.output(x.shape), size = tf.util.sizeFromShape(x.shape);
  if (size === 0) return y;
  const { type, count } = packed(size);
  const make = () => ({
    storage: [{ name: "x", type }, { name: "y", type, write: true }],
    uniforms: { size: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
let v = x[i];${phi(type)}
y[i] = v * phi;`,
  } as const);
  dispatchElements(call, `${call.name} ${type}`, make, [x, y], { total: size, step: count });
  return y;
}

function backward(call: KernelCall): tf.TensorInfo {
  const x = call.input("x"), dy = call.input("dy", x.shape);
  const dx = call.output(x.shape), size = tf.util.sizeFromShape(x.shape);
  if (size === 0) return dx;
  const { type, count } = packed(size);
  const make = () => ({
    storage: [{ name: "x", type }, { name: "dy", type }, { name: "dx", type, write: true }],
    uniforms: { size: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
let v = x[i];${phi(type)}
dx[i] = dy[i] * (phi + v * bell * ${1 / Math.sqrt(2 * Math.PI)});`,
  } as const);
  dispatchElements(call, `${call.name} ${type}`, make, [x, dy, dx], { total: size, step: count });
  return dx;
}
