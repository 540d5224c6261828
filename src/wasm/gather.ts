/**
 * Rows by index, and the transpose of that map.
 *
 * - `MgpoGatherRows`: x [N, D], index int32 [M] → y [M, D], y[i] = x[index[i]], or zeros where index[i] is −1.
 * - `MgpoScatterAddRows`: x [M, D], index int32 [M], attribute `rows` = N → y [N, D], y[n] = Σ x[i] over index[i] = n, added in
 *   the order of i (so the result does not depend on anything else); −1 is skipped.
 *
 * Cost: one read and one write per element of x or y.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { I32, load } from "./asm.ts";
import { eachVector } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** Both kernels. */
export const gather: KernelFile = {
  emit,
  kernels: [{ name: "MgpoGatherRows", run: gatherRows }, { name: "MgpoScatterAddRows", run: scatterAddRows }],
};

const parameters = ["i32", "i32", "i32", "i32", "i32", "i32"] as const;

/**
 * `gather_rows(count, width, rows, index, x, y)` and `scatter_add_rows(count, width, stride, rows, index, x, y)`, which treats `width` columns
 * of rows that lie `stride` bytes apart and adds to what is there: the result is −1, or the position of a bad index.
 */
function emit(m: ModuleBuilder, parts: Parts): void {
  m.function("gather_rows", parameters, (f, count, width, rows, index, x, y) => {
    const stride = f.i32(width.shl(2));
    const target = f.i32(y);
    f.for(0, count, 1, (i) => {
      const row = f.i32(load.i32(index.add(i.shl(2))));
      f.if(row.lt(-1).or(row.ge(rows)), () => f.return(i));
      const source = f.i32(x.add(row.mul(stride)));
      f.if(
        row.eq(-1),
        () => f.zero(target, stride),
        () => eachVector(f, parts, width, (at) => at.store(target, at.load(source))),
      );
      target.set(target.add(stride));
    });
    f.return(I32.of(-1));
  }, { result: "i32", exported: true });
  m.function("scatter_add_rows", [...parameters, "i32"] as const, (f, count, width, stride, rows, index, x, y) => {
    const source = f.i32(x);
    f.for(0, count, 1, (i) => {
      const row = f.i32(load.i32(index.add(i.shl(2))));
      f.if(row.lt(-1).or(row.ge(rows)), () => f.return(i));
      const target = f.i32(y.add(row.mul(stride)));
      f.if(
        row.ne(-1),
        () => eachVector(f, parts, width, (at) => at.store(target, at.load(target).add(at.load(source)))),
      );
      source.set(source.add(stride));
    });
    f.return(I32.of(-1));
  }, { result: "i32", exported: true });
}

/** Rough nanoseconds per element. */
const COST = 0.3;
/** Columns that are treated together at least: two cache lines. */
const COLUMNS = 32;

function gatherRows(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]);
  const index = call.input("index", [null], "int32");
  const output = call.output([index.shape[0], x.shape[1]]);
  const [count, width, rows] = [index.shape[0], x.shape[1], x.shape[0]];
  const [indexAt, xAt, outputAt] = [index, x, output].map((tensor) => call.address(tensor));
  const cost = COST * count * width, ranges = call.ranges(count, cost);
  const calls = ranges.map(([from, to]) => [
    ...[to - from, width, rows, indexAt + 4 * from, xAt, outputAt + 4 * from * width],
  ]);
  const bad = call.run("gather_rows", calls, cost).map((at, i) => at < 0 ? at : at + ranges[i][0]);
  checkIndex(call, bad.find((at) => at >= 0) ?? -1, index, rows);
  return output;
}

function scatterAddRows(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]);
  const index = call.input("index", [x.shape[0]], "int32");
  const rows = call.number("rows");
  if (!Number.isInteger(rows) || rows < 0) throw call.error(`attribute rows must be an integer ≥ 0, is ${rows}`);
  const output = call.output([rows, x.shape[1]]);
  const [indexAt, xAt, outputAt] = [index, x, output].map((tensor) => call.address(tensor));
  const [count, width] = x.shape, cost = COST * count * width;
  call.functions.zero(outputAt, 4 * rows * width);
  // By columns: rows may be chosen very unequally often.
  const calls = call.ranges(width, cost, COLUMNS).map(([from, to]) => [
    ...[count, to - from, 4 * width, rows, indexAt, xAt + 4 * from, outputAt + 4 * from],
  ]);
  checkIndex(call, call.run("scatter_add_rows", calls, cost)[0], index, rows);
  return output;
}

function checkIndex(call: KernelCall, bad: number, index: tf.TensorInfo, rows: number): void {
  if (bad === -1) return;
  throw call.error(`index[${bad}] is ${call.integers(index)[bad]}, must be −1 or a row below ${rows}`);
}
