/**
 * Sums.
 *
 * - `MgpoColSum`: x [N, D] → [D], Σ over rows (gradients of biases). Rows are added 64 at a time, then in total.
 * - `MgpoSumSquares`: x (any shape) → scalar Σ x², accumulated in f64 (gradient norms), 65,536 elements at a time, then in total.
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

/** Elements per partial sum of squares. */
const SQUARES_PER_SUM = 65536;

/**
 * `column_sum(rows, width, stride, x, y, scratch)`: stride in bytes, scratch: one row of `width`.
 * `sum_squares(count, x)` → the sum in f64.
 */
function emit(m: ModuleBuilder, parts: Parts): void {
  m.function("column_sum", ["i32", "i32", "i32", "i32", "i32", "i32"], (f, rows, width, stride, x, y, scratch) => {
    const bytes = f.i32(width.shl(2));
    f.zero(y, bytes);
    f.for(0, rows, ROWS_PER_SUM, (i) => {
      const part = f.i32(rows.sub(i)).min(ROWS_PER_SUM);
      const end = f.i32(part);
      f.zero(scratch, bytes);
      f.for(0, end, 1, () => {
        eachVector(f, parts, width, (at) => at.store(scratch, at.load(scratch).add(at.load(x))));
        x.set(x.add(stride));
      });
      eachVector(f, parts, width, (at) => at.store(y, at.load(y).add(at.load(scratch))));
    });
  }, { exported: true });
  m.function("sum_squares", ["i32", "i32"], (f, count, x) => {
    const both: Parameters<typeof doubleTotal>[1] = [f.v128(V128.of(0)), f.v128(V128.of(0))];
    eachVector(f, parts, count, (at) => {
      const value = f.v128(at.load(x));
      const [low, high] = [value, value.shuffle(value, [2, 3, 2, 3])].map((pair) => f.v128(pair.promoteLow()));
      both[0].set(both[0].doubleAdd(low.doubleMul(low)));
      both[1].set(both[1].doubleAdd(high.doubleMul(high)));
    });
    f.return(doubleTotal(f, both));
  }, { result: "f64", exported: true });
}

/** Rough nanoseconds per element. */
const COST = 0.3;
/** Columns that are summed together at least: two cache lines. */
const COLUMNS = 32;

function columnSum(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]);
  const [rows, width] = x.shape;
  const y = call.output([width]);
  const cost = COST * rows * width, [xAt, yAt] = [call.address(x), call.address(y)];
  const calls = call.ranges(width, cost, COLUMNS).map(([from, to]) => [
    ...[rows, to - from, 4 * width, xAt + 4 * from, yAt + 4 * from],
  ]);
  call.run("column_sum", calls, cost, [4 * width]);
  return y;
}

function sumSquares(call: KernelCall): tf.TensorInfo {
  const x = call.input("x");
  const y = call.output([]);
  const count = tf.util.sizeFromShape(x.shape), at = call.address(x);
  const calls = Array.from({ length: Math.ceil(count / SQUARES_PER_SUM) }, (_, i) => {
    const from = i * SQUARES_PER_SUM;
    return [Math.min(SQUARES_PER_SUM, count - from), at + 4 * from];
  });
  const total = call.run("sum_squares", calls, COST * count).reduce((sum, part) => sum + part, 0);
  new Float32Array(call.instance.memory.buffer, call.address(y), 1)[0] = total;
  return y;
}
