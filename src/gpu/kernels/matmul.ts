/**
 * `MgpoMatMul`: op(A)·op(B) + bias.
 *
 * Inputs: `a` and `b`, both [·, ·] or both [batch, ·, ·]; optional `bias` [N], added to each row. Attributes: `transposeA`,
 * `transposeB`. Output [M, N] or [batch, M, N]. Cost: 2·M·N·K operations per product; each element of A is read ⌈N/BN⌉ times and
 * each of B ⌈M/BM⌉ times, for tiles of BM × BN: those of a workgroup on a GPU (see `matmul_tiles.ts`), those of a thread on an
 * adapter that computes on the processor (see `matmul_direct.ts`; attribute `software` overrules what the adapter says).
 *
 * A product with few tiles and a long inner axis (gradients of weights) is cut along that axis into parts that are written apart and
 * added in order: no atomics, so equal inputs give equal bits on one adapter.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { elements, packed } from "./lanes.ts";
import { directShader } from "./matmul_direct.ts";
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
import type { Kernel, KernelCall, Shader } from "./runtime.ts";

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

/** The tile of a product and how its inner axis is cut. */
export interface Plan {
  readonly tile: Tile;
  readonly depthPerPart: number;
  readonly parts: number;
}

/**
 * Chooses tile and parts. A GPU needs some hundred workgroups to be busy, a processor a few.
 */
export function planMatMul(sizes: Sizes, software: boolean): Plan {
  const wanted = software ? 4 : 128, order = software ? [tiles.direct] : [tiles.large, tiles.medium, tiles.small];
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
  const plan = planMatMul(sizes, call.flag("software", call.software)), whole = plan.parts === 1;
  const target = whole ? c : call.temporary([plan.parts, rows, columns]);
  const product = { ...sizes, plan, transposeA, transposeB, a, b, bias: whole ? bias : undefined, c: target };
  (plan.tile === tiles.direct ? runDirect : runTiled)(call, product);
  if (!whole) addParts(call, target, bias, c, { rows, columns, parts: plan.parts });
  return c;
}

interface Product extends Sizes {
  readonly plan: Plan;
  readonly transposeA: boolean;
  readonly transposeB: boolean;
  readonly a: tf.TensorInfo;
  readonly b: tf.TensorInfo;
  readonly bias: tf.TensorInfo | undefined;
  readonly c: tf.TensorInfo;
}

/** Dispatches the tiles of all products of a batch, or all parts of one. */
function dispatchTiles(
  call: KernelCall,
  { plan: { tile, parts, depthPerPart }, batch, rows, columns, depth, a, b, bias, c }: Product,
  key: string,
  make: () => Shader,
  uniforms: Readonly<Record<string, number>>,
): void {
  const tensors = bias ? [a, b, bias, c] : [a, b, c];
  const [x, y] = [Math.ceil(columns / tileColumns(tile)), Math.ceil(rows / tileRows(tile))];
  const most = call.limits.maxComputeWorkgroupsPerDimension;
  for (let firstBatch = 0; firstBatch < batch; firstBatch += most) {
    const z = parts > 1 ? parts : Math.min(most, batch - firstBatch);
    call.dispatch(key, make, tensors, { rows, columns, depth, depthPerPart, firstBatch, ...uniforms }, [x, y, z]);
  }
}

function runDirect(call: KernelCall, product: Product): void {
  const { rows, columns, depth, transposeA, transposeB, plan } = product;
  const split = plan.parts > 1, bias = product.bias !== undefined;
  const [rowA, stepA] = transposeA ? [1, rows] : [depth, 1], [columnB, stepB] = transposeB ? [depth, 1] : [1, columns];
  const make = () => directShader(bias, split);
  dispatchTiles(call, product, `MgpoMatMul direct ${bias} ${split}`, make, { rowA, stepA, columnB, stepB });
}

function runTiled(call: KernelCall, product: Product): void {
  const { a, b, columns, transposeA, transposeB, plan: { tile, parts } } = product;
  const [rowsA, widthA] = a.shape.slice(-2), [rowsB, widthB] = b.shape.slice(-2);
  const variant: Variant = {
    tile,
    transposeA,
    transposeB,
    packedA: widthA % 4 === 0,
    packedB: widthB % 4 === 0,
    packedC: columns % 4 === 0,
    bias: product.bias !== undefined,
    split: parts > 1,
  };
  const make = () => matmulShader(variant);
  dispatchTiles(call, product, variantKey(variant), make, { rowsA, widthA, rowsB, widthB });
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
