/**
 * `MgpoAdd`: a + b of one shape, → that shape. Cost: two reads and a write per element.
 *
 * Tensors larger than a binding are added window by window, which `Add` of TensorFlow.js cannot: {@link addsLarge} takes such sums over,
 * those too that its tape makes of the gradients of a tensor that is used twice (a tied embedding).
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { dispatchElements, element, ELEMENTWISE, packed } from "./lanes.ts";
import { bindableBytes, type Kernel, type KernelCall } from "./runtime.ts";

/** The kernel. */
export const add: readonly Kernel[] = [{ name: "MgpoAdd", run: sum }];

function sum(call: KernelCall): tf.TensorInfo {
  const a = call.input("a"), b = call.input("b", a.shape), y = call.output(a.shape);
  const total = tf.util.sizeFromShape(a.shape);
  if (total === 0) return y;
  const { type, count } = packed(total);
  const make = () => ({
    storage: [{ name: "a", type }, { name: "b", type }, { name: "y", type, write: true }],
    uniforms: { size: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
y[i] = a[i] + b[i];`,
  } as const);
  // A buffer may be bound for reading twice.
  dispatchElements(call, `${call.name} ${type}`, make, [a, b, y], { total, step: count });
  return y;
}

/** Whether a sum has to be made in windows. */
export function addsLarge(device: GPUDevice, a: tf.TensorInfo, b: tf.TensorInfo): boolean {
  const isLarge = 4 * tf.util.sizeFromShape(a.shape) > bindableBytes(device);
  return isLarge && a.dtype === "float32" && b.dtype === "float32" && tf.util.arraysEqual(a.shape, b.shape);
}
