/**
 * Root-mean-square norm.
 *
 * - `MgpoRmsNorm`: x [N, D], w [D], attribute `eps` → y [N, D], rstd [N]:
 *   rstd = (mean(x²) + eps)^−½, y = x · rstd · w.
 * - `MgpoRmsNormGrad`: x, w, rstd, dy → dx, dw:
 *   dx = rstd · (dy·w − x · rstd² · mean(dy·w·x)), dw = Σ_rows dy · x · rstd.
 *
 * Cost: two passes over each row, which stays in the first-level cache. dw is summed over 64 rows at a time, then in total.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { F64, type FunctionBuilder, type I32, load, madd, nmadd, V128 } from "./asm.ts";
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

/** `rms_norm_grad(rows, width, x, w, rstd, dy, dx, dw, scratch)`; scratch: one row. */
function emitBackward(m: ModuleBuilder, parts: Parts): void {
  const parameters = ["i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;
  m.function("rms_norm_grad", parameters, (f, rows, width, x, w, rstd, dy, dx, dw, scratch) => {
    const stride = f.i32(width.shl(2));
    const sum = f.v128();
    f.zero(dw, stride);
    f.zero(scratch, stride);
    f.for(0, rows, 1, (i) => {
      const inverse = f.f32(load.f32(rstd.add(i.shl(2))));
      const scale = f.v128(inverse.splat());
      sum.set(V128.of(0));
      eachVector(f, parts, width, (at) => {
        const product = f.v128(at.load(dy).mul(at.load(x)));
        sum.set(madd(product, at.load(w), sum));
        at.store(scratch, madd(product, scale, at.load(scratch)));
      });
      const mean = sumLanes(f, sum).div(width.toF32());
      const pull = f.v128(mean.mul(inverse).mul(inverse).splat());
      eachVector(f, parts, width, (at) => {
        at.store(dx, nmadd(at.load(x), pull, at.load(dy).mul(at.load(w))).mul(scale));
      });
      f.if(i.and(ROWS_PER_SUM - 1).eq(ROWS_PER_SUM - 1), () => addRow(f, parts, width, dw, scratch));
      x.set(x.add(stride));
      dy.set(dy.add(stride));
      dx.set(dx.add(stride));
    });
    addRow(f, parts, width, dw, scratch);
  }, { exported: true });
}

/** `total += partial; partial = 0` */
function addRow(f: FunctionBuilder, parts: Parts, width: I32, total: I32, partial: I32): void {
  eachVector(f, parts, width, (at) => at.store(total, at.load(total).add(at.load(partial))));
  f.zero(partial, width.shl(2));
}

function forward(call: KernelCall): tf.TensorInfo[] {
  const x = call.input("x", [null, null]);
  const [rows, width] = x.shape;
  const w = call.input("w", [width]);
  const y = call.output(x.shape);
  const rstd = call.output([rows]);
  call.functions.rms_norm(rows, width, call.number("eps"), ...[x, w, y, rstd].map((tensor) => call.address(tensor)));
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
  const scratch = call.scratch(4 * width);
  const addresses = [x, w, rstd, dy, dx, dw].map((tensor) => call.address(tensor));
  call.functions.rms_norm_grad(rows, width, ...addresses, scratch);
  return [dx, dw];
}
