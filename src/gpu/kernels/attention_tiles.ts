/**
 * What the attention kernels share: checked shapes, and the WGSL of products of 32 × 32 tiles.
 *
 * A workgroup of 64 threads (8 × 8) owns 32 tokens of one head, its *rows*, and walks over the tokens that they meet, its *columns*, 32 at
 * a time. Thread (tx, ty) holds rows 4·ty to 4·ty + 3 as the parts of a vector, of columns tx, tx + 8, tx + 16 and tx + 24 in a
 * score tile, and of dimensions tx, tx + 8, … in a result. Heads are taken 32 dimensions at a time, so that workgroup memory
 * is 14 KiB whatever the head size:
 *
 * - `rowsPiece` [dimension][ty]: four rows in a vector,
 * - `columnsPiece` [column][dimension], padded by one against bank conflicts,
 * - `weights` [column][ty]: a finished score tile, the left factor of a product with columns.
 *
 * @module
 */
import type { Grid, KernelCall } from "./runtime.ts";

/** Rows and columns of a tile. */
export const TILE = 32;
/** Threads of a workgroup. */
export const THREADS = 64;

/** A piece of the head dimensions. */
export interface Piece {
  readonly index: number;
  readonly from: number;
  readonly width: number;
}

/** Cuts a head into pieces of at most 32 dimensions. */
export function piecesOf(d: number): Piece[] {
  const pieces: Piece[] = [];
  for (let from = 0; from < d; from += 32) pieces.push({ index: pieces.length, from, width: Math.min(32, d - from) });
  return pieces;
}

const stride = (d: number): number => 8 * Math.ceil(Math.min(d, 32) / 8) + 1;
/** 0 to n − 1. */
export const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

/** Workgroup memory, and the search for segments in `cu`. */
export const declarations = (d: number): string =>
  `var<workgroup> rowsPiece: array<vec4<f32>, ${8 * Math.min(d, 32)}>;
var<workgroup> columnsPiece: array<f32, ${32 * stride(d)}>;
var<workgroup> weights: array<vec4<f32>, 256>;
fn segmentOf(token: u32) -> u32 {
  var low = 0u;
  var high = u.segments;
  while (high - low > 1u) {
    let middle = (low + high) / 2u;
    if (u32(cu[middle]) <= token) { low = middle; } else { high = middle; }
  }
  return low;
}`;

/** `at_NAME(token, head, x)`: an element of a [tokens, heads, d] tensor, 0 beyond its end. */
export const reader = (name: string, heads: "heads" | "keyHeads", d: number): string =>
  `fn at_${name}(token: u32, head: u32, x: u32) -> f32 {
  if (token >= u.tokens) { return 0.0; }
  return ${name}[(token * u.${heads} + head) * ${d}u + x];
}`;

/** Fills `rowsPiece` with 32 tokens from `first`. */
export const loadRows = (name: string, head: string, { from, width }: Piece): string =>
  `for (var i = lane; i < ${8 * width}u; i += ${THREADS}u) {
  let x = i % ${width}u;
  let r = first + 4u * (i / ${width}u);
  rowsPiece[x * 8u + i / ${width}u] = vec4<f32>(${
    range(4).map((c) => `at_${name}(r + ${c}u, ${head}, ${from}u + x)`).join(", ")
  });
}`;

/** Fills `columnsPiece` with 32 tokens from `at`. */
export const loadColumns = (name: string, head: string, { from, width }: Piece, d: number): string =>
  `for (var i = lane; i < ${32 * width}u; i += ${THREADS}u) {
  let x = i % ${width}u;
  let c = i / ${width}u;
  columnsPiece[c * ${stride(d)}u + x] = at_${name}(at + c, ${head}, ${from}u + x);
}`;

/** Adds the product of both pieces to NAME0 … NAME3, the thread's four columns of a score tile. */
export const scoreProduct = (name: string, { width }: Piece, d: number): string =>
  `for (var x = 0u; x < ${width}u; x++) {
  let r = rowsPiece[x * 8u + ty];
  ${range(4).map((j) => `${name}${j} += r * columnsPiece[(tx + ${8 * j}u) * ${stride(d)}u + x];`).join("\n  ")}
}`;

/** Names of the sums of a thread in a result. */
export const sumsOf = (name: string, { index, width }: Piece): string[] =>
  range(Math.ceil(width / 8)).map((e) => `${name}_${index}_${e}`);

/** Adds `weights` · `columnsPiece` to the sums of a piece; columns from `count` on have no weight. */
export const weighted = (name: string, piece: Piece, d: number): string =>
  `for (var c = 0u; c < count; c++) {
  let w = weights[c * 8u + ty];
  ${sumsOf(name, piece).map((sum, e) => `${sum} += w * columnsPiece[c * ${stride(d)}u + tx + ${8 * e}u];`).join("\n  ")}
}`;

/** Declares the sums of all pieces. */
export const declareSums = (name: string, pieces: readonly Piece[]): string =>
  pieces.flatMap((piece) => sumsOf(name, piece)).map((sum) => `var ${sum} = vec4<f32>();`).join("\n");

/** Writes the sums of all pieces to rows of a [tokens, heads, d] tensor. `value` turns the name of a sum into what is written. */
export function storeSums(
  name: string,
  target: string,
  heads: "heads" | "keyHeads",
  head: string,
  pieces: readonly Piece[],
  d: number,
  value: (sum: string) => string = (sum) => sum,
): string {
  const lines = pieces.flatMap((piece) =>
    sumsOf(name, piece).map((sum, e) => {
      const write = `let s = ${value(sum)}; ${
        range(4).map((c) =>
          `if (mine + ${c}u < u.tokens) { ${target}[((mine + ${c}u) * u.${heads} + ${head}) * ${d}u + ${piece.from}u + tx + ${
            8 * e
          }u] = s.${"xyzw"[c]}; }`
        ).join(" ")
      }`;
      return `if (tx + ${8 * e}u < ${piece.width}u) { ${write} }`;
    })
  );
  return lines.join("\n");
}

/** Sets the thread's and the workgroup's place. */
export const place = `let tx = lane % 8u;
let ty = lane / 8u;
let first = wg.x * ${TILE}u;
let last = min(first + ${TILE - 1}u, u.tokens - 1u);
let mine = first + 4u * ty;`;

/**
 * Sets `since` and `until` (columns of each row, as vectors; none for rows beyond the last), and `begin` and `end` (of the
 * workgroup). `causal` names which side is cut: `keys` where columns are keys up to the row, `queries` where they are queries
 * from the row on.
 */
export function ranges(causal: boolean, columns: "keys" | "queries"): string {
  const cutEnd = causal && columns === "keys", cutBegin = causal && columns === "queries";
  return `var since = vec4<u32>();
var until = vec4<u32>();
for (var c = 0u; c < 4u; c++) {
  let row = mine + c;
  if (row < u.tokens) {
    let segment = segmentOf(row);
    since[c] = ${cutBegin ? "row" : "u32(cu[segment])"};
    until[c] = ${cutEnd ? "row + 1u" : "u32(cu[segment + 1u])"};
  }
}
let begin = ${cutBegin ? "first" : "u32(cu[segmentOf(first)])"};
let end = ${cutEnd ? "last + 1u" : "u32(cu[segmentOf(last) + 1u])"};`;
}

/** Sets `ok0` … `ok3`: which of the thread's pairs of row and column meet. */
export const meet = range(4).map((j) =>
  `let column${j} = at + tx + ${8 * j}u;
let ok${j} = (since <= vec4<u32>(column${j})) & (vec4<u32>(column${j}) < until);`
).join("\n");

/** The sizes of one call, checked. */
export interface AttentionShape {
  readonly tokens: number;
  readonly heads: number;
  readonly keyHeads: number;
  readonly d: number;
  readonly segments: number;
}

/** Reads the shapes of q, k, v and cuSeqlens of a call; checks the values of cuSeqlens where the host has them. */
export function attentionShape(call: KernelCall): AttentionShape {
  const [tokens, heads, d] = call.input("q", [null, null, null]).shape;
  const keyHeads = call.input("k", [tokens, null, d]).shape[1];
  call.input("v", [tokens, keyHeads, d]);
  if (heads % keyHeads !== 0) throw call.error(`${heads} query heads are not a multiple of ${keyHeads} key heads`);
  const cu = call.input("cuSeqlens", [null], "int32"), starts = call.hostValues(cu);
  const list = starts && Array.from(starts);
  const ordered = list?.every((start, s) => s === 0 ? start === 0 : start >= list[s - 1]) ?? true;
  if (!ordered || cu.shape[0] < (tokens > 0 ? 2 : 1) || (list && list[list.length - 1] !== tokens)) {
    const text = list ? `[${list.slice(0, 8)}${list.length > 8 ? ", …" : ""}]` : `${cu.shape[0]} numbers`;
    throw call.error(`cuSeqlens must rise from 0 to the ${tokens} tokens, is ${text}`);
  }
  return { tokens, heads, keyHeads, d, segments: cu.shape[0] - 1 };
}

/** A workgroup per tile of tokens and head. */
export const tileGrid = (tokens: number, heads: number): Grid => [Math.ceil(tokens / TILE), heads, 1];
