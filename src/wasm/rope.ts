/**
 * `MgpoRope`: rotary position embedding of all heads.
 *
 * Inputs: x [N, H, d] (d even), cos and sin [N, d]. With halves x = (x₁, x₂), c = (c₁, c₂), s = (s₁, s₂):
 *
 * - forward: y = x·cos + rotateHalf(x)·sin = (x₁·c₁ − x₂·s₁, x₂·c₂ + x₁·s₂);
 * - attribute `inverse` true: the transpose of that map, its gradient: (x₁·c₁ + x₂·s₂, x₂·c₂ − x₁·s₁).
 *
 * Cost: 3 operations per element.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { type Local, madd, nmadd } from "./asm.ts";
import { type Access, eachVector } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** The kernel. */
export const rope: KernelFile = { emit, kernels: [{ name: "MgpoRope", run: rotate }] };

const parameters = ["i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;

/** `rope(rows, heads, half, x, cos, sin, y)` and `rope_inverse(…)`, with half = d / 2. */
function emit(m: ModuleBuilder, parts: Parts): void {
  for (const inverse of [false, true]) {
    m.function(inverse ? "rope_inverse" : "rope", parameters, (f, rows, heads, half, x, cos, sin, y) => {
      const bytes = f.i32(half.shl(2));
      const high = { x: f.i32(), cos: f.i32(), sin: f.i32(), y: f.i32() };
      const one = (at: Access): void => {
        const [x1, x2, s1, s2] = [x, high.x, sin, high.sin].map((base) => f.v128(at.load(base)));
        const [c1, c2] = [cos, high.cos].map((base) => at.load(base));
        at.store(y, inverse ? madd(x2, s2, x1.mul(c1)) : nmadd(x2, s1, x1.mul(c1)));
        at.store(high.y, inverse ? nmadd(x1, s1, x2.mul(c2)) : madd(x1, s2, x2.mul(c2)));
      };
      const advance = (pointers: Local<"i32">[]): void =>
        pointers.forEach((pointer) => pointer.set(pointer.add(bytes.shl(1))));
      f.for(0, rows, 1, () => {
        high.cos.set(cos.add(bytes));
        high.sin.set(sin.add(bytes));
        f.for(0, heads, 1, () => {
          high.x.set(x.add(bytes));
          high.y.set(y.add(bytes));
          eachVector(f, parts, half, one);
          advance([x, y]);
        });
        advance([cos, sin]);
      });
    }, { exported: true });
  }
}

/** Rough nanoseconds per element. */
const COST = 0.4;

function rotate(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null, null]);
  const [rows, heads, width] = x.shape;
  if (width % 2 !== 0) throw call.error(`the head size must be even, is ${width}`);
  const cos = call.input("cos", [rows, width]);
  const sin = call.input("sin", [rows, width]);
  const y = call.output(x.shape);
  const cost = COST * rows * heads * width;
  const [xAt, cosAt, sinAt, yAt] = [x, cos, sin, y].map((tensor) => call.address(tensor));
  const calls = call.ranges(rows, cost).map(([from, to]) => {
    const [skip, skipTable] = [4 * from * heads * width, 4 * from * width];
    return [to - from, heads, width / 2, xAt + skip, cosAt + skipTable, sinAt + skipTable, yAt + skip];
  });
  call.run(call.flag("inverse") ? "rope_inverse" : "rope", calls, cost);
  return y;
}
