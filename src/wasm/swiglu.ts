/**
 * The gate of the MLP.
 *
 * - `MgpoSwiGLU`: gate, up (same shape) → y = gate · σ(gate) · up.
 * - `MgpoSwiGLUGrad`: gate, up, dy → dgate = dy · up · s · (1 + gate · (1 − s)) with s = σ(gate), dup = dy · gate · s.
 *
 * Cost: one exponential per element.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { madd, V128 } from "./asm.ts";
import { eachVector, sigmoid } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** Both kernels. */
export const swiglu: KernelFile = {
  emit,
  kernels: [{ name: "MgpoSwiGLU", run: forward }, { name: "MgpoSwiGLUGrad", run: backward }],
};

/** `swiglu(count, gate, up, y)`, `swiglu_grad(count, gate, up, dy, dgate, dup)` */
function emit(m: ModuleBuilder, parts: Parts): void {
  m.function("swiglu", ["i32", "i32", "i32", "i32"], (f, count, gate, up, y) => {
    eachVector(f, parts, count, (at) => {
      const g = f.v128(at.load(gate));
      at.store(y, g.mul(sigmoid(f, g)).mul(at.load(up)));
    });
  }, { exported: true });
  const parameters = ["i32", "i32", "i32", "i32", "i32", "i32"] as const;
  m.function("swiglu_grad", parameters, (f, count, gate, up, dy, dgate, dup) => {
    eachVector(f, parts, count, (at) => {
      const g = f.v128(at.load(gate));
      const s = sigmoid(f, g);
      const slope = f.v128(at.load(dy).mul(s));
      at.store(dup, slope.mul(g));
      at.store(dgate, slope.mul(at.load(up)).mul(madd(g, V128.of(1).sub(s), 1)));
    });
  }, { exported: true });
}

/** Rough nanoseconds per element. */
const COST = { forward: 1, backward: 1.5 } as const;

function forward(call: KernelCall): tf.TensorInfo {
  const gate = call.input("gate");
  const up = call.input("up", gate.shape);
  const y = call.output(gate.shape);
  call.each("swiglu", [gate, up, y], COST.forward);
  return y;
}

function backward(call: KernelCall): tf.TensorInfo[] {
  const gate = call.input("gate");
  const up = call.input("up", gate.shape);
  const dy = call.input("dy", gate.shape);
  const dgate = call.output(gate.shape);
  const dup = call.output(gate.shape);
  call.each("swiglu_grad", [gate, up, dy, dgate, dup], COST.backward);
  return [dgate, dup];
}
