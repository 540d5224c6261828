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
import { MR, NR } from "./tiles.ts";

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
  const [aStart, bStart, cStart] = [a, b, output].map((tensor) => call.address(tensor));
  const biasStart = call.address(bias);
  const [aStride, bStride, cStride] = [4 * a.shape[rank - 1], 4 * b.shape[rank - 1], 4 * columns];
  const cost = batch * rows * columns * depth / MULTIPLIES_PER_NS;
  const calls: number[][] = [];
  for (let i = 0; i < batch; i++) {
    const [aAt, bAt] = [aStart + 4 * i * rows * depth, bStart + 4 * i * depth * columns];
    const cAt = cStart + 4 * i * rows * columns;
    for (const { row, column, height, width } of blocks(call, { batch, rows, columns, cost })) {
      calls.push([
        ...[height, width, depth, aAt + (transposeA ? 4 * row : row * aStride), aStride, Number(transposeA)],
        ...[bAt + (transposeB ? column * bStride : 4 * column), bStride, Number(transposeB)],
        ...[biasStart === 0 ? 0 : biasStart + 4 * column, cAt + row * cStride + 4 * column, cStride],
      ]);
    }
  }
  call.run("gemm", calls, cost, [gemmScratchBytes(columns, depth)]);
  return output;
}

/** Multiply-adds in a nanosecond on one thread, roughly. */
const MULTIPLIES_PER_NS = 12;
/** Columns of the narrowest block that is worth its own call: A is read once more for each block. */
const LEAST_COLUMNS = 2 * NR;

interface BlockOfC {
  readonly row: number;
  readonly column: number;
  readonly height: number;
  readonly width: number;
}

/**
 * One product cut for the threads: into columns, because then each thread packs its own part of B and nobody packs anything
 * twice; into rows where columns are few. A batch is cut into its products only.
 */
function blocks(
  call: KernelCall,
  { batch, rows, columns, cost }: { batch: number; rows: number; columns: number; cost: number },
): BlockOfC[] {
  const whole = { row: 0, column: 0, height: rows, width: columns };
  if (batch > 1) return [whole];
  const byColumns = call.ranges(columns, cost, LEAST_COLUMNS), byRows = call.ranges(rows, cost, MR);
  return byColumns.length >= byRows.length
    ? byColumns.map(([from, to]) => ({ ...whole, column: from, width: to - from }))
    : byRows.map(([from, to]) => ({ ...whole, row: from, height: to - from }));
}

function oriented(shape: readonly number[], transposed: boolean): [number, number] {
  const [x, y] = shape.slice(-2);
  return transposed ? [y, x] : [x, y];
}
