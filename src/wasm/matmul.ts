/**
 * `MgpoMatMul`: op(A)·op(B) + bias.
 *
 * Inputs: `a` and `b`, both [·, ·] or both [batch, ·, ·]; optional `bias` [N], added to each row. Attributes: `transposeA`,
 * `transposeB`. Output [M, N] or [batch, M, N]. Cost: 2·M·N·K operations per product; see `gemm.ts`.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { emitGemm, gemmScratchBytes } from "./gemm.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** The kernel; the module function behind it is `gemm`. */
export const matmul: KernelFile = {
  emit: (m, parts) => void emitGemm(m, parts),
  kernels: [{ name: "MgpoMatMul", run: multiply }],
};

function multiply(call: KernelCall): tf.TensorInfo {
  const a = call.input("a");
  const b = call.input("b");
  const rank = a.shape.length;
  if (b.shape.length !== rank || rank < 2 || rank > 3 || (rank === 3 && a.shape[0] !== b.shape[0])) {
    throw call.error(`a [${a.shape}] and b [${b.shape}] must both be matrices, or both batches of the same size`);
  }
  const transposeA = call.flag("transposeA");
  const transposeB = call.flag("transposeB");
  const [rows, depth] = oriented(a.shape, transposeA);
  const [depthB, columns] = oriented(b.shape, transposeB);
  if (depth !== depthB) throw call.error(`inner sizes differ: ${depth} of a, ${depthB} of b`);
  const bias = call.optional("bias", [columns]);
  const batch = rank === 3 ? a.shape[0] : 1;
  const output = call.output([...a.shape.slice(0, rank - 2), rows, columns]);
  if (batch * rows * columns === 0) return output;
  if (depth === 0) throw call.error("the inner size must be at least 1");
  const scratch = call.scratch(gemmScratchBytes(columns, depth));
  const [aStart, bStart, cStart] = [a, b, output].map((tensor) => call.address(tensor));
  const biasStart = call.address(bias);
  for (let i = 0; i < batch; i++) {
    call.functions.gemm(
      rows,
      columns,
      depth,
      aStart + 4 * i * rows * depth,
      Number(transposeA),
      bStart + 4 * i * depth * columns,
      Number(transposeB),
      biasStart,
      cStart + 4 * i * rows * columns,
      scratch,
    );
  }
  return output;
}

function oriented(shape: readonly number[], transposed: boolean): [number, number] {
  const [x, y] = shape.slice(-2);
  return transposed ? [y, x] : [x, y];
}
