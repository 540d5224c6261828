/**
 * `MgpoRope`: rotary position embedding.
 *
 * Inputs: x [N, H, d] (d even), cos and sin [N, d], the same for all heads of a token; attribute `inverse`. With the halves
 * x₁ = x[…, :d/2] and x₂ = x[…, d/2:], and likewise of cos and sin, the output [N, H, d] is
 *
 * - y₁ = x₁·c₁ − x₂·s₁, y₂ = x₂·c₂ + x₁·s₂,
 * - with `inverse` the transpose, which is the gradient: y₁ = x₁·c₁ + x₂·s₂, y₂ = x₂·c₂ − x₁·s₁.
 *
 * Cost: one read and one write per element; a thread rotates one pair.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { element, elements, ELEMENTWISE } from "./lanes.ts";
import { type Kernel, type KernelCall, rowsOf } from "./runtime.ts";

/** The kernel. */
export const rope: readonly Kernel[] = [{ name: "MgpoRope", run: rotate }];

function rotate(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null, null]);
  const [rows, heads, width] = x.shape;
  if (width % 2 !== 0) throw call.error(`the head size must be even, is ${width}`);
  const cos = call.input("cos", [rows, width]), sin = call.input("sin", [rows, width]);
  const inverse = call.flag("inverse"), y = call.output(x.shape);
  if (rows * heads * width === 0) return y;
  const make = () => ({
    storage: [
      { name: "x", type: "f32" },
      { name: "cosines", type: "f32" },
      { name: "sines", type: "f32" },
      { name: "y", type: "f32", write: true },
    ],
    uniforms: { size: "u32", heads: "u32", halfWidth: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
let unit = i / u.halfWidth;
let j = i % u.halfWidth;
let low = unit * 2u * u.halfWidth + j;
let high = low + u.halfWidth;
let first = (unit / u.heads) * 2u * u.halfWidth + j;
let second = first + u.halfWidth;
let a = x[low];
let b = x[high];
y[low] = a * cosines[first] ${inverse ? "+ b * sines[second]" : "- b * sines[first]"};
y[high] = b * cosines[second] ${inverse ? "- a * sines[first]" : "+ a * sines[second]"};`,
  } as const);
  for (const run of call.windows(rows, [heads * width, width])) {
    const size = run.count * heads * width / 2, uniforms = { size, heads, halfWidth: width / 2 };
    const [tokens, table] = [heads * width, width];
    const tensors = [rowsOf(x, run, tokens), rowsOf(cos, run, table), rowsOf(sin, run, table), rowsOf(y, run, tokens)];
    call.dispatch(`${call.name} ${inverse}`, make, tensors, uniforms, elements(size));
  }
  return y;
}
