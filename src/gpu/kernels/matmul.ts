/**
 * `MgpoMatMul`: op(A)·op(B) + bias.
 *
 * Inputs: `a` and `b`, both [·, ·] or both [batch, ·, ·]; optional `bias` [N], added to each row. Attributes: `transposeA`,
 * `transposeB`. Output [M, N] or [batch, M, N]. Cost: 2·M·N·K operations per product; each element of A is read ⌈N/BN⌉ times and
 * each of B ⌈M/BM⌉ times (see `matmul_tiles.ts`).
 *
 * A product with few tiles and a long inner axis (gradients of weights) is cut along that axis into parts that are written apart and
 * added in order: no atomics, so equal inputs give equal bits on one adapter.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { elements, packed } from "./lanes.ts";
import {
  DEPTH,
  matmulShader,
  type Tile,
  tileColumns,
  tileRows,
  tiles,
  totalShader,
  type Variant,
  variantKey,
} from "./matmul_tiles.ts";
import type { Kernel, KernelCall } from "./runtime.ts";

/** The kernel. */
export const matmul: readonly Kernel[] = [{ name: "MgpoMatMul", run: multiply }];

interface Sizes {
  readonly batch: number;
  readonly rows: number;
  readonly columns: number;
  readonly depth: number;
}

const tileCount = (tile: Tile, { batch, rows, columns }: Sizes): number =>
  batch * Math.ceil(rows / tileRows(tile)) * Math.ceil(columns / tileColumns(tile));

/** Sums that a tile computes in vain, as a multiple of those needed. */
const waste = (tile: Tile, sizes: Sizes): number =>
  tileCount(tile, sizes) * tileRows(tile) * tileColumns(tile) / (sizes.batch * sizes.rows * sizes.columns);

/**
 * The tile and the number of parts of the inner axis. A GPU needs some hundred workgroups to be busy; a processor is busy
 * with a few, and gains by large tiles alone.
 */
export function planMatMul(sizes: Sizes, software: boolean): { tile: Tile; depthPerPart: number; parts: number } {
  const wanted = software ? 4 : 128;
  const order = [tiles.large, tiles.medium, tiles.small];
  const tile = order.find((tile) => tileCount(tile, sizes) >= wanted && waste(tile, sizes) <= 1.5) ??
    order.toSorted((s, t) => waste(s, sizes) - waste(t, sizes) || tileCount(t, sizes) - tileCount(s, sizes))[0];
  const whole = { tile, depthPerPart: sizes.depth, parts: 1 };
  const missing = Math.floor(wanted / tileCount(tile, sizes));
  if (sizes.batch > 1 || missing < 2 || sizes.depth < 512) return whole;
  const parts = Math.min(missing, Math.ceil(sizes.depth / 256), 64);
  const depthPerPart = Math.ceil(sizes.depth / parts / DEPTH) * DEPTH;
  return { tile, depthPerPart, parts: Math.ceil(sizes.depth / depthPerPart) };
}

function oriented(shape: readonly number[], transposed: boolean): [number, number] {
  const [x, y] = shape.slice(-2);
  return transposed ? [y, x] : [x, y];
}

function multiply(call: KernelCall): tf.TensorInfo {
  const a = call.input("a"), b = call.input("b"), rank = a.shape.length;
  if (b.shape.length !== rank || rank < 2 || rank > 3 || (rank === 3 && a.shape[0] !== b.shape[0])) {
    throw call.error(`a [${a.shape}] and b [${b.shape}] must both be matrices, or both batches of the same size`);
  }
  const transposeA = call.flag("transposeA"), transposeB = call.flag("transposeB");
  const [rows, depth] = oriented(a.shape, transposeA), [depthB, columns] = oriented(b.shape, transposeB);
  if (depth !== depthB) throw call.error(`inner sizes differ: ${depth} of a, ${depthB} of b`);
  const bias = call.optional("bias", [columns]), batch = rank === 3 ? a.shape[0] : 1;
  const c = call.output([...a.shape.slice(0, rank - 2), rows, columns]);
  if (batch * rows * columns === 0) return c;
  if (depth === 0) throw call.error("the inner size must be at least 1");
  const sizes = { batch, rows, columns, depth };
  const { tile, depthPerPart, parts } = planMatMul(sizes, call.software);
  const [rowsA, widthA] = a.shape.slice(-2), [rowsB, widthB] = b.shape.slice(-2);
  const target = parts === 1 ? c : call.temporary([parts, rows, columns]);
  const variant: Variant = {
    tile,
    transposeA,
    transposeB,
    packedA: widthA % 4 === 0,
    packedB: widthB % 4 === 0,
    packedC: columns % 4 === 0,
    bias: bias !== undefined && parts === 1,
    split: parts > 1,
  };
  const tensors = [a, b, ...(bias && parts === 1 ? [bias] : []), target];
  const [x, y] = [Math.ceil(columns / tileColumns(tile)), Math.ceil(rows / tileRows(tile))];
  const common = { rows, columns, depth, rowsA, widthA, rowsB, widthB, depthPerPart };
  const make = () => matmulShader(variant), key = variantKey(variant);
  const most = call.limits.maxComputeWorkgroupsPerDimension;
  for (let firstBatch = 0; firstBatch < batch; firstBatch += most) {
    const z = parts > 1 ? parts : Math.min(most, batch - firstBatch);
    call.dispatch(key, make, tensors, { ...common, firstBatch }, [x, y, z]);
  }
  if (parts > 1) addParts(call, target, bias, c, { rows, columns, parts });
  return c;
}

function addParts(
  call: KernelCall,
  target: tf.TensorInfo,
  bias: tf.TensorInfo | undefined,
  c: tf.TensorInfo,
  { rows, columns, parts }: { rows: number; columns: number; parts: number },
): void {
  const step = packed(columns), size = rows * columns / step.count;
  const make = () => totalShader(step.count === 4, bias !== undefined);
  const uniforms = { size, count: parts, columns: columns / step.count };
  const tensors = [target, ...(bias ? [bias] : []), c];
  call.dispatch(`MgpoMatMul total ${step.count} ${bias !== undefined}`, make, tensors, uniforms, elements(size));
}
