/**
 * Root-mean-square norm.
 *
 * - `MgpoRmsNorm`: x [N, D], w [D], attribute `eps` → y [N, D], rstd [N]:
 *   rstd = (mean(x²) + eps)^−½, y = x · rstd · w.
 * - `MgpoRmsNormGrad`: x, w, rstd, dy → dx, dw:
 *   dx = rstd · (dy·w − x · rstd² · mean(dy·w·x)), dw = Σ_rows dy · x · rstd.
 *
 * Cost: two passes over each row, which stays in the first-level cache. dw is summed over 64 rows at a time, then in total: so the
 * order of the sum does not depend on who computes which rows.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { F64, load, madd, nmadd, V128 } from "./asm.ts";
import { eachVector, sumLanes } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** Both kernels. */
export const norm: KernelFile = {
  emit,
  kernels: [{ name: "MgpoRmsNorm", run: forward }, { name: "MgpoRmsNormGrad", run: backward }],
};

/** Rows per partial sum of dw. */
const ROWS_PER_SUM = 64;

function emit(m: ModuleBuilder, parts: Parts): void {
  emitForward(m, parts);
  emitBackward(m, parts);
}

/** `rms_norm(rows, width, eps, x, w, y, rstd)` */
function emitForward(m: ModuleBuilder, parts: Parts): void {
  const parameters = ["i32", "i32", "f64", "i32", "i32", "i32", "i32"] as const;
  m.function("rms_norm", parameters, (f, rows, width, eps, x, w, y, rstd) => {
    const stride = f.i32(width.shl(2));
    const sum = f.v128();
    f.for(0, rows, 1, (i) => {
      sum.set(V128.of(0));
      eachVector(f, parts, width, (at) => {
        const value = f.v128(at.load(x));
        sum.set(madd(value, value, sum));
      });
      const mean = sumLanes(f, sum).toF64().div(width.toF32().toF64());
      const inverse = f.f32(F64.of(1).div(mean.add(eps).sqrt()).toF32());
      f.storeF32(rstd.add(i.shl(2)), inverse);
      const scale = f.v128(inverse.splat());
      eachVector(f, parts, width, (at) => at.store(y, at.load(x).mul(scale).mul(at.load(w))));
      x.set(x.add(stride));
      y.set(y.add(stride));
    });
  }, { exported: true });
}

/** `rms_norm_grad(rows, width, x, w, rstd, dy, dx, sums)`; sums: a row of Σ dy · x · rstd for each {@link ROWS_PER_SUM} rows. */
function emitBackward(m: ModuleBuilder, parts: Parts): void {
  const parameters = ["i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;
  m.function("rms_norm_grad", parameters, (f, rows, width, x, w, rstd, dy, dx, sums) => {
    const stride = f.i32(width.shl(2));
    const sum = f.v128();
    f.for(0, rows, 1, (i) => {
      f.if(i.and(ROWS_PER_SUM - 1).eq(0), () => f.zero(sums, stride));
      const inverse = f.f32(load.f32(rstd.add(i.shl(2))));
      const scale = f.v128(inverse.splat());
      sum.set(V128.of(0));
      eachVector(f, parts, width, (at) => {
        const product = f.v128(at.load(dy).mul(at.load(x)));
        sum.set(madd(product, at.load(w), sum));
        at.store(sums, madd(product, scale, at.load(sums)));
      });
      const mean = sumLanes(f, sum).div(width.toF32());
      const pull = f.v128(mean.mul(inverse).mul(inverse).splat());
      eachVector(f, parts, width, (at) => {
        at.store(dx, nmadd(at.load(x), pull, at.load(dy).mul(at.load(w))).mul(scale));
      });
      f.if(i.and(ROWS_PER_SUM - 1).eq(ROWS_PER_SUM - 1), () => sums.set(sums.add(stride)));
      x.set(x.add(stride));
      dy.set(dy.add(stride));
      dx.set(dx.add(stride));
    });
  }, { exported: true });
}

/** Rough nanoseconds per element. */
const COST = { forward: 0.4, backward: 0.8 } as const;

function forward(call: KernelCall): tf.TensorInfo[] {
  const x = call.input("x", [null, null]);
  const [rows, width] = x.shape;
  const w = call.input("w", [width]);
  const y = call.output(x.shape);
  const rstd = call.output([rows]);
  const eps = call.number("eps"), cost = COST.forward * rows * width;
  const [xAt, wAt, yAt, rstdAt] = [x, w, y, rstd].map((tensor) => call.address(tensor));
  const calls = call.ranges(rows, cost).map(([from, to]) => {
    const skip = 4 * from * width;
    return [to - from, width, eps, xAt + skip, wAt, yAt + skip, rstdAt + 4 * from];
  });
  call.run("rms_norm", calls, cost);
  return [y, rstd];
}

function backward(call: KernelCall): tf.TensorInfo[] {
  const x = call.input("x", [null, null]);
  const [rows, width] = x.shape;
  const w = call.input("w", [width]);
  const rstd = call.input("rstd", [rows]);
  const dy = call.input("dy", x.shape);
  const dx = call.output(x.shape);
  const dw = call.output([width]);
  const blocks = Math.ceil(rows / ROWS_PER_SUM);
  const sums = call.scratch(4 * width * (blocks + 1));
  const [xAt, wAt, rstdAt, dyAt, dxAt, dwAt] = [x, w, rstd, dy, dx, dw].map((tensor) => call.address(tensor));
  const cost = COST.backward * rows * width;
  const calls = call.ranges(rows, cost, ROWS_PER_SUM).map(([from, to]) => {
    const skip = 4 * from * width;
    const sumsAt = sums + 4 * width * (from / ROWS_PER_SUM);
    return [to - from, width, xAt + skip, wAt, rstdAt + 4 * from, dyAt + skip, dxAt + skip, sumsAt];
  });
  call.run("rms_norm_grad", calls, cost);
  call.functions.column_sum(blocks, width, 4 * width, sums, dwAt, sums + 4 * width * blocks);
  return [dx, dw];
}
