/**
 * The gate of the MLP.
 *
 * - `MgpoSwiGLU`: gate, up (same shape) → y = gate · σ(gate) · up.
 * - `MgpoSwiGLUGrad`: gate, up, dy → dgate = dy · up · s · (1 + gate · (1 − s)) with s = σ(gate), dup = dy · gate · s.
 *
 * Cost: one exponential per element; 3 or 5 streams of memory.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { dispatchElements, element, ELEMENTWISE, packed } from "./lanes.ts";
import type { Kernel, KernelCall } from "./runtime.ts";

/** Both kernels. */
export const swiglu: readonly Kernel[] = [
  { name: "MgpoSwiGLU", run: forward },
  { name: "MgpoSwiGLUGrad", run: backward },
];

/** The exponent is bounded so that no infinity arises; beyond it σ is below the smallest normal number. */
const sigmoid = (type: string) => `${type}(1.0) / (${type}(1.0) + exp(min(-g, ${type}(87.0))))`;

function forward(call: KernelCall): tf.TensorInfo {
  const gate = call.input("gate"), up = call.input("up", gate.shape);
  const y = call.output(gate.shape), size = tf.util.sizeFromShape(gate.shape);
  if (size === 0) return y;
  const { type, count } = packed(size);
  const make = () => ({
    storage: [{ name: "gate", type }, { name: "up", type }, { name: "y", type, write: true }],
    uniforms: { size: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
let g = gate[i];
y[i] = g * up[i] * (${sigmoid(type)});`,
  } as const);
  dispatchElements(call, `${call.name} ${type}`, make, [gate, up, y], { total: size, step: count });
  return y;
}

function backward(call: KernelCall): tf.TensorInfo[] {
  const gate = call.input("gate"), up = call.input("up", gate.shape), dy = call.input("dy", gate.shape);
  const outputs = [call.output(gate.shape), call.output(gate.shape)], size = tf.util.sizeFromShape(gate.shape);
  if (size === 0) return outputs;
  const { type, count } = packed(size);
  const make = () => ({
    storage: [
      ...["gate", "up", "dy"].map((name) => ({ name, type })),
      ...["dgate", "dup"].map((name) => ({ name, type, write: true })),
    ],
    uniforms: { size: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
let g = gate[i];
let s = ${sigmoid(type)};
let d = dy[i] * s;
dgate[i] = d * up[i] * (1.0 + g * (1.0 - s));
dup[i] = d * g;`,
  } as const);
  dispatchElements(call, `${call.name} ${type}`, make, [gate, up, dy, ...outputs], { total: size, step: count });
  return outputs;
}
