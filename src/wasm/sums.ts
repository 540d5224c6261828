/**
 * Sums.
 *
 * - `MgpoColSum`: x [N, D] → [D], Σ over rows (gradients of biases). Rows are added 64 at a time, then in total.
 * - `MgpoSumSquares`: x (any shape) → scalar Σ x², accumulated in f64 (gradient norms).
 *
 * Cost: one read per element.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { V128 } from "./asm.ts";
import { doubleTotal, eachVector } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** Both kernels. */
export const sums: KernelFile = {
  emit,
  kernels: [{ name: "MgpoColSum", run: columnSum }, { name: "MgpoSumSquares", run: sumSquares }],
};

/** Rows per partial sum. */
const ROWS_PER_SUM = 64;

/** `column_sum(rows, width, x, y, scratch)` (scratch: one row), `sum_squares(count, x, y)` */
function emit(m: ModuleBuilder, parts: Parts): void {
  m.function("column_sum", ["i32", "i32", "i32", "i32", "i32"], (f, rows, width, x, y, scratch) => {
    const stride = f.i32(width.shl(2));
    f.zero(y, stride);
    f.for(0, rows, ROWS_PER_SUM, (i) => {
      const part = f.i32(rows.sub(i)).min(ROWS_PER_SUM);
      const end = f.i32(part);
      f.zero(scratch, stride);
      f.for(0, end, 1, () => {
        eachVector(f, parts, width, (at) => at.store(scratch, at.load(scratch).add(at.load(x))));
        x.set(x.add(stride));
      });
      eachVector(f, parts, width, (at) => at.store(y, at.load(y).add(at.load(scratch))));
    });
  }, { exported: true });
  m.function("sum_squares", ["i32", "i32", "i32"], (f, count, x, y) => {
    const both: Parameters<typeof doubleTotal>[1] = [f.v128(V128.of(0)), f.v128(V128.of(0))];
    eachVector(f, parts, count, (at) => {
      const value = f.v128(at.load(x));
      const [low, high] = [value, value.shuffle(value, [2, 3, 2, 3])].map((pair) => f.v128(pair.promoteLow()));
      both[0].set(both[0].doubleAdd(low.doubleMul(low)));
      both[1].set(both[1].doubleAdd(high.doubleMul(high)));
    });
    f.storeF32(y, doubleTotal(f, both).toF32());
  }, { exported: true });
}

function columnSum(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]);
  const [rows, width] = x.shape;
  const y = call.output([width]);
  const scratch = call.scratch(4 * width);
  call.functions.column_sum(rows, width, call.address(x), call.address(y), scratch);
  return y;
}

function sumSquares(call: KernelCall): tf.TensorInfo {
  const x = call.input("x");
  const y = call.output([]);
  call.functions.sum_squares(tf.util.sizeFromShape(x.shape), call.address(x), call.address(y));
  return y;
}
