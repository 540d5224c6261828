/**
 * The WGSL of `matmul.ts`: a product of tiles with a register tile per thread.
 *
 * A workgroup owns BM × BN of the result. It walks the inner axis 16 at a time: the pieces of op(A) and op(B) go to workgroup memory
 * as blocks of 4 × 4, turned in registers where the operand is transposed, so that both lie there as [k][four rows or
 * columns] and one inner loop serves all four orders. Each thread then holds RM × RN sums and adds outer products of vectors.
 *
 * @module
 */
import type { Shader } from "./runtime.ts";

/** A tile of the result: threads across and down, and the sums of one thread. */
export interface Tile {
  readonly name: string;
  readonly across: number;
  readonly down: number;
  /** Rows per thread, a multiple of 4. */
  readonly rows: number;
  /** Columns per thread, a multiple of 4. */
  readonly columns: number;
}

/**
 * From the most work per byte to the most workgroups; workgroup memory 13, 9 and 5 KiB. `direct` is that of
 * `matmul_direct.ts`.
 */
export const tiles = {
  large: { name: "large", across: 16, down: 8, rows: 8, columns: 8 },
  medium: { name: "medium", across: 8, down: 8, rows: 8, columns: 8 },
  small: { name: "small", across: 8, down: 8, rows: 4, columns: 4 },
  direct: { name: "direct", across: 4, down: 2, rows: 16, columns: 12 },
} as const satisfies Record<string, Tile>;

/** Rows of the result per workgroup. */
export const tileRows = ({ down, rows }: Tile): number => down * rows;
/** Columns of the result per workgroup. */
export const tileColumns = ({ across, columns }: Tile): number => across * columns;

/** Steps along the inner axis per round. */
export const DEPTH = 16;

/** What a variant of the shader depends on. */
export interface Variant {
  readonly tile: Tile;
  readonly transposeA: boolean;
  readonly transposeB: boolean;
  /** Whether rows of A, B and the result are whole vectors of four. */
  readonly packedA: boolean;
  readonly packedB: boolean;
  readonly packedC: boolean;
  readonly bias: boolean;
  /** Whether workgroups in z share the inner axis (each writing its own part) instead of the batch. */
  readonly split: boolean;
  /** Whether the sums are added to the result. */
  readonly adds: boolean;
}

/** A name for the variant. */
export const variantKey = (v: Variant): string =>
  `MgpoMatMul ${v.tile.name} ${
    [v.transposeA, v.transposeB, v.packedA, v.packedB, v.packedC, v.bias, v.split, v.adds].map(Number).join("")
  }`;

const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

/** `fetchA(start, row, place)`: four numbers along a row of the stored matrix, zeros beyond what is multiplied of it. */
function fetch(name: "a" | "b", packed: boolean): string {
  const [shape, width, edge, first] = ["rows", "width", "edge", "first"].map((word) => word + name.toUpperCase());
  const head = `fn fetch_${name}(start: u32, row: u32, place: u32) -> vec4<f32> {
  let column = u.${first} + place;
  if (row >= u.${shape} || column >= u.${edge}) { return vec4<f32>(); }
  let at = start + row * u.${width} + column;`;
  if (packed) return `${head}\n  return ${name}[at / 4u];\n}`;
  return `${head}
  var value = vec4<f32>(${name}[at], 0.0, 0.0, 0.0);
  if (column + 1u < u.${edge}) { value.y = ${name}[at + 1u]; }
  if (column + 2u < u.${edge}) { value.z = ${name}[at + 2u]; }
  if (column + 3u < u.${edge}) { value.w = ${name}[at + 3u]; }
  return value;
}`;
}

/** Fills one of the two pieces. `groups`: vectors of four along its free axis; `deep`: whether rows of the store run along k. */
function load(name: "a" | "b", groups: number, deep: boolean, threads: number): string {
  const blocks = groups * DEPTH / 4, stride = groups + 1;
  const place = deep
    ? `let deep = block % ${DEPTH / 4}u; let free = block / ${DEPTH / 4}u;`
    : `let free = block % ${groups}u; let deep = block / ${groups}u;`;
  const at = (i: number) =>
    deep
      ? `fetch_${name}(start_${name}, first_${name} + 4u * free + ${i}u, k + 4u * deep)`
      : `fetch_${name}(start_${name}, k + 4u * deep + ${i}u, first_${name} + 4u * free)`;
  const turned = deep
    ? `let turned = transpose(mat4x4<f32>(${range(4).map(at).join(", ")}));`
    : `let turned = mat4x4<f32>(${range(4).map(at).join(", ")});`;
  return `for (var block = lane; block < ${blocks}u; block += ${threads}u) {
    ${place}
    ${turned}
    ${range(4).map((i) => `piece_${name}[(4u * deep + ${i}u) * ${stride}u + free] = turned[${i}];`).join("\n    ")}
  }`;
}

/** Writes the four sums of a row that begin at `column`. */
function store(v: Variant): string {
  const value = v.bias ? `value + ${v.packedC ? "bias[(u.firstC + column) / 4u]" : "bias4(column)"}` : "value";
  const sets = v.adds ? "+=" : "=";
  const write = v.packedC ? `c[at / 4u] ${sets} sum;` : `c[at] ${sets} sum.x;
  if (column + 1u < u.columns) { c[at + 1u] ${sets} sum.y; }
  if (column + 2u < u.columns) { c[at + 2u] ${sets} sum.z; }
  if (column + 3u < u.columns) { c[at + 3u] ${sets} sum.w; }`;
  const bias4 = `fn bias4(place: u32) -> vec4<f32> {
  let column = u.firstC + place;
  let last = u.firstC + u.columns - 1u;
  return vec4<f32>(bias[column], bias[min(column + 1u, last)], bias[min(column + 2u, last)], bias[min(column + 3u, last)]);
}`;
  return `${v.bias && !v.packedC ? bias4 : ""}
fn store(start: u32, row: u32, column: u32, value: vec4<f32>) {
  if (row >= u.rows || column >= u.columns) { return; }
  let at = start + row * u.strideC + u.firstC + column;
  let sum = ${value};
  ${write}
}`;
}

/** The shader of a variant. */
export function matmulShader(v: Variant): Shader {
  const { tile } = v, threads = tile.across * tile.down;
  const [groupsA, groupsB] = [tileRows(tile) / 4, tileColumns(tile) / 4];
  const [perA, perB] = [tile.rows / 4, tile.columns / 4];
  const parts = "xyzw", type = (packed: boolean) => packed ? "vec4<f32>" : "f32";
  const sums = range(tile.rows).flatMap((r) => range(perB).map((c) => ({ name: `sum_${r}_${c}`, r, c })));
  return {
    storage: [
      { name: "a", type: type(v.packedA) },
      { name: "b", type: type(v.packedB) },
      ...(v.bias ? [{ name: "bias", type: type(v.packedC) } as const] : []),
      { name: "c", type: type(v.packedC), write: true },
    ],
    uniforms: {
      ...{ rows: "u32", columns: "u32", depth: "u32", rowsA: "u32", widthA: "u32", rowsB: "u32", widthB: "u32" },
      ...{ depthPerPart: "u32", firstBatch: "u32", strideC: "u32" },
      ...{ firstA: "u32", edgeA: "u32", firstB: "u32", edgeB: "u32", firstC: "u32" },
    },
    threads,
    code: `var<workgroup> piece_a: array<vec4<f32>, ${DEPTH * (groupsA + 1)}>;
var<workgroup> piece_b: array<vec4<f32>, ${DEPTH * (groupsB + 1)}>;
${fetch("a", v.packedA)}
${fetch("b", v.packedB)}
${store(v)}`,
    main: `let x = lane % ${tile.across}u;
let y = lane / ${tile.across}u;
let first_a = wg.y * ${tileRows(tile)}u;
let first_b = wg.x * ${tileColumns(tile)}u;
let batch = ${v.split ? "0u" : "u.firstBatch + wg.z"};
let start_a = batch * u.rows * u.depth;
let start_b = batch * u.columns * u.depth;
${sums.map(({ name }) => `var ${name} = vec4<f32>();`).join("\n")}
let begin = ${v.split ? "wg.z * u.depthPerPart" : "0u"};
let end = ${v.split ? "min(u.depth, begin + u.depthPerPart)" : "u.depth"};
for (var k = begin; k < end; k += ${DEPTH}u) {
  ${load("a", groupsA, !v.transposeA, threads)}
  ${load("b", groupsB, v.transposeB, threads)}
  workgroupBarrier();
  for (var i = 0u; i < ${DEPTH}u; i++) {
    ${range(perA).map((r) => `let a${r} = piece_a[i * ${groupsA + 1}u + y + ${r * tile.down}u];`).join("\n    ")}
    ${range(perB).map((c) => `let b${c} = piece_b[i * ${groupsB + 1}u + x + ${c * tile.across}u];`).join("\n    ")}
    ${sums.map(({ name, r, c }) => `${name} += a${r >> 2}.${parts[r & 3]} * b${c};`).join("\n    ")}
  }
  workgroupBarrier();
}
let start = ${v.split ? "wg.z" : "batch"} * u.rows * u.columns;
${
      sums.map(({ name, r, c }) =>
        `store(start, first_a + 4u * (y + ${(r >> 2) * tile.down}u) + ${r & 3}u, first_b + 4u * (x + ${
          c * tile.across
        }u), ${name});`
      ).join("\n")
    }`,
  };
}

/** Adds the parts of a split product in order, and the bias. */
export function totalShader(packed: boolean, bias: boolean): Shader {
  const type = packed ? "vec4<f32>" : "f32";
  return {
    storage: [
      { name: "parts", type },
      ...(bias ? [{ name: "bias", type } as const] : []),
      { name: "c", type, write: true },
    ],
    uniforms: { size: "u32", count: "u32", columns: "u32" },
    threads: 64,
    main: `let i = (wg.y * groups.x + wg.x) * 64u + lane;
if (i >= u.size) { return; }
var sum = parts[i];
for (var p = 1u; p < u.count; p++) { sum += parts[p * u.size + i]; }
c[i] = sum${bias ? " + bias[i % u.columns]" : ""};`,
  };
}
