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
 * A matrix larger than a binding is cut into windows of its rows. What that cuts depends on the operand: rows of the result (A, and the
 * result itself), its columns (transposed B), or the inner axis (transposed A, B), where products are added window by window.
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
import { type Kernel, type KernelCall, rowsOf, type Run, type Shader, type TensorWindow } from "./runtime.ts";

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
  const software = call.flag("software", call.software), given = { batch, transposeA, transposeB, a, b, bias, c };
  const whole = {
    rows: { first: 0, count: rows },
    columns: { first: 0, count: columns },
    depth: { first: 0, count: depth },
  };
  const pieces = rank === 2 ? piecesOf(call, { rows, columns, depth }, transposeA, transposeB) : [whole];
  const full = { rows, columns, depth };
  for (const piece of pieces) runPiece(call, { ...given, full, piece }, software, pieces.length > 1);
  return c;
}

/** A range of rows, columns and inner axis that is multiplied by one dispatch. */
type Piece = Readonly<Record<"rows" | "columns" | "depth", Run>>;

/** Windows start at whole vectors of four. */
const VECTOR = 4;

function piecesOf(
  call: KernelCall,
  { rows, columns, depth }: Omit<Sizes, "batch">,
  transposeA: boolean,
  transposeB: boolean,
): Piece[] {
  const inner = [...(transposeA ? [rows] : []), ...(transposeB ? [] : [columns])];
  const cut = {
    rows: call.windows(rows, transposeA ? [columns] : [columns, depth], VECTOR),
    columns: transposeB ? call.windows(columns, [depth], VECTOR) : [{ first: 0, count: columns }],
    depth: call.windows(depth, inner, VECTOR),
  };
  return cut.rows.flatMap((rows) =>
    cut.columns.flatMap((columns) => cut.depth.map((depth) => ({ rows, columns, depth })))
  );
}

/** A product, and the piece of it at hand. */
interface Given {
  readonly batch: number;
  readonly transposeA: boolean;
  readonly transposeB: boolean;
  readonly a: tf.TensorInfo;
  readonly b: tf.TensorInfo;
  readonly bias: tf.TensorInfo | undefined;
  readonly c: tf.TensorInfo;
  /** Sizes of the whole product. */
  readonly full: Omit<Sizes, "batch">;
  readonly piece: Piece;
}

/** Where an operand or the result lies: a window, the elements from row to row, and the first column at hand. */
interface Operand {
  readonly tensor: tf.TensorInfo | TensorWindow;
  readonly stride: number;
  readonly first: number;
}

interface Product extends Sizes {
  readonly plan: Plan;
  readonly transposeA: boolean;
  readonly transposeB: boolean;
  readonly a: Operand;
  readonly b: Operand;
  readonly bias: tf.TensorInfo | undefined;
  readonly c: Operand;
  /** Whether the result adds to what is there. */
  readonly adds: boolean;
}

/** The window of an operand whose stored rows are a range of one axis, and its columns one of another. */
const operand = (tensor: tf.TensorInfo, isCut: boolean, rows: Run, columns: Run, stride: number): Operand => {
  return { tensor: isCut ? rowsOf(tensor, rows, stride) : tensor, stride, first: columns.first };
};

function runPiece(call: KernelCall, given: Given, software: boolean, isCut: boolean): void {
  const { batch, transposeA, transposeB, bias, full, piece: { rows, columns, depth } } = given;
  const sizes = { batch, rows: rows.count, columns: columns.count, depth: depth.count };
  const planned = planMatMul(sizes, software);
  // Parts would have to be moved to their place in the result; a product this large has tiles enough.
  const plan = isCut ? { ...planned, depthPerPart: depth.count, parts: 1 } : planned, whole = plan.parts === 1;
  const c = operand(given.c, isCut, rows, columns, full.columns);
  const target = whole ? c : { ...c, tensor: call.temporary([plan.parts, rows.count, columns.count]) };
  const product: Product = {
    ...{ ...sizes, plan, transposeA, transposeB, c: target, adds: depth.first > 0 },
    a: transposeA ? operand(given.a, isCut, depth, rows, full.rows) : operand(given.a, isCut, rows, depth, full.depth),
    b: transposeB
      ? operand(given.b, isCut, columns, depth, full.depth)
      : operand(given.b, isCut, depth, columns, full.columns),
    bias: whole && depth.first === 0 ? bias : undefined,
  };
  (plan.tile === tiles.direct ? runDirect : runTiled)(call, product);
  if (!whole) {
    addParts(call, target.tensor, bias, given.c, { rows: rows.count, columns: columns.count, parts: plan.parts });
  }
}

/** Dispatches the tiles of all products of a batch, or all parts of one. */
function dispatchTiles(
  call: KernelCall,
  { plan: { tile, parts, depthPerPart }, batch, rows, columns, depth, a, b, bias, c }: Product,
  key: string,
  make: () => Shader,
  uniforms: Readonly<Record<string, number>>,
): void {
  const tensors = bias ? [a.tensor, b.tensor, bias, c.tensor] : [a.tensor, b.tensor, c.tensor];
  const places = { firstA: a.first, firstB: b.first, firstC: c.first, strideC: c.stride };
  const [x, y] = [Math.ceil(columns / tileColumns(tile)), Math.ceil(rows / tileRows(tile))];
  const most = call.limits.maxComputeWorkgroupsPerDimension;
  for (let firstBatch = 0; firstBatch < batch; firstBatch += most) {
    const z = parts > 1 ? parts : Math.min(most, batch - firstBatch);
    const sizes = { rows, columns, depth, depthPerPart, firstBatch };
    call.dispatch(key, make, tensors, { ...sizes, ...places, ...uniforms }, [x, y, z]);
  }
}

function runDirect(call: KernelCall, product: Product): void {
  const { a, b, transposeA, transposeB, plan, adds } = product;
  const split = plan.parts > 1, bias = product.bias !== undefined;
  const [rowA, stepA] = transposeA ? [1, a.stride] : [a.stride, 1];
  const [columnB, stepB] = transposeB ? [b.stride, 1] : [1, b.stride];
  const make = () => directShader(bias, split, adds);
  dispatchTiles(call, product, `MgpoMatMul direct ${bias} ${split} ${adds}`, make, { rowA, stepA, columnB, stepB });
}

function runTiled(call: KernelCall, product: Product): void {
  const { a, b, c, rows, columns, depth, transposeA, transposeB, adds, plan: { tile, parts } } = product;
  const [rowsA, columnsA] = transposeA ? [depth, rows] : [rows, depth];
  const [rowsB, columnsB] = transposeB ? [columns, depth] : [depth, columns];
  const variant: Variant = {
    tile,
    transposeA,
    transposeB,
    packedA: a.stride % 4 === 0,
    packedB: b.stride % 4 === 0,
    packedC: c.stride % 4 === 0,
    bias: product.bias !== undefined,
    split: parts > 1,
    adds,
  };
  const edges = { edgeA: a.first + columnsA, edgeB: b.first + columnsB };
  const make = () => matmulShader(variant), strides = { widthA: a.stride, widthB: b.stride };
  dispatchTiles(call, product, variantKey(variant), make, { rowsA, rowsB, ...strides, ...edges });
}

function addParts(
  call: KernelCall,
  target: tf.TensorInfo | TensorWindow,
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
