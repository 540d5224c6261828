/**
 * The exact GELU (with the error function, not the tanh curve).
 *
 * - `MgpoGelu`: x (any shape) → x · Φ(x), Φ(x) = (1 + erf(x/√2)) / 2. Absolute error ≤ 5e-7 for |x| ≤ 8, relative beyond.
 * - `MgpoGeluGrad`: x, dy → dy · (Φ(x) + x · φ(x)), φ(x) = e^(−x²/2) / √(2π).
 *
 * Φ(−a) = e^(−a²/2) · t · tail(t) with t = 1 / (1 + a/2) for a = |x|: the exponential carries the decay, so a short polynomial is left,
 * and the gradient uses the exponential twice. Cost: one exponential and one division per element.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { type FunctionBuilder, madd, V128 } from "./asm.ts";
import { eachVector, exp, polynomial } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import { fitPolynomial } from "./polynomial.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** Both kernels. */
export const gelu: KernelFile = {
  emit,
  kernels: [{ name: "MgpoGelu", run: forward }, { name: "MgpoGeluGrad", run: backward }],
};

/**
 * e^(a²/2) · Φ(−a) for a ≥ 0 in double precision: the substitution u = s − a in Φ(−a) = ∫ φ leaves ∫₀^∞ e^(−u²/2 − a·u) du / √(2π),
 * a smooth integrand that vanishes beyond u = 9; the trapezium rule needs its end correction only at 0.
 */
export function scaledTail(a: number): number {
  const [step, count] = [0.005, 1800];
  let sum = 0.5;
  for (let i = 1; i <= count; i++) sum += Math.exp(-((i * step) ** 2) / 2 - a * i * step);
  // Euler–Maclaurin: the first and third derivative of the integrand at 0.
  const correction = step ** 2 / 12 * a - step ** 4 / 720 * (a ** 3 - 3 * a);
  return (step * sum - correction) / Math.sqrt(2 * Math.PI);
}

// From a = 0 (t = 1) to a = 8 (t = 0.2); beyond that the exponential is below 2e-14.
const tail = fitPolynomial((t) => scaledTail(2 * (1 / t - 1)) / t, 0.2, 1, 9);

/** Φ(x), and e^(−x²/2) for the gradient. */
function normal(f: FunctionBuilder, x: V128): { below: V128; decay: V128 } {
  const a = f.v128(x.abs());
  const t = f.v128(V128.of(1).div(madd(a, 0.5, 1)));
  const decay = exp(f, x.mul(x).mul(-0.5));
  const upper = f.v128(decay.mul(t).mul(polynomial(f, t, tail)));
  const negative = f.v128(x.lt(0));
  const below = f.v128(upper.and(negative).or(V128.of(1).sub(upper).andNot(negative)));
  return { below, decay };
}

/** `gelu(count, x, y)`, `gelu_grad(count, x, dy, dx)` */
function emit(m: ModuleBuilder, parts: Parts): void {
  m.function("gelu", ["i32", "i32", "i32"], (f, count, x, y) => {
    eachVector(f, parts, count, (at) => {
      const value = f.v128(at.load(x));
      at.store(y, value.mul(normal(f, value).below));
    });
  }, { exported: true });
  m.function("gelu_grad", ["i32", "i32", "i32", "i32"], (f, count, x, dy, dx) => {
    eachVector(f, parts, count, (at) => {
      const value = f.v128(at.load(x));
      const { below, decay } = normal(f, value);
      at.store(dx, at.load(dy).mul(madd(value.mul(decay), 1 / Math.sqrt(2 * Math.PI), below)));
    });
  }, { exported: true });
}

/** Rough nanoseconds per element. */
const COST = { forward: 1.5, backward: 2 } as const;

function forward(call: KernelCall): tf.TensorInfo {
  const x = call.input("x");
  const y = call.output(x.shape);
  call.each("gelu", [x, y], COST.forward);
  return y;
}

function backward(call: KernelCall): tf.TensorInfo {
  const x = call.input("x");
  const dy = call.input("dy", x.shape);
  const dx = call.output(x.shape);
  call.each("gelu_grad", [x, dy, dx], COST.backward);
  return dx;
}
