/**
 * What the attention kernels share: checked shapes, and the WGSL of products of 32 × 32 tiles.
 *
 * A workgroup of 64 threads (8 × 8) owns 32 tokens of one head, its *rows*, and walks over the tokens that they meet, its *columns*, 32 at
 * a time; either may be the queries, the other are the keys. Thread (tx, ty) holds rows 4·ty to 4·ty + 3 as the parts of a vector, of columns tx, tx + 8, tx + 16 and tx + 24 in a
 * score tile, and of dimensions tx, tx + 8, … in a result. Heads are taken 32 dimensions at a time, so that workgroup memory
 * is 14 KiB whatever the head size:
 *
 * - `rowsPiece` [dimension][ty]: four rows in a vector,
 * - `columnsPiece` [column][dimension], padded by one against bank conflicts,
 * - `weights` [column][ty]: a finished score tile, the left factor of a product with columns.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { element, elements, ELEMENTWISE } from "./lanes.ts";
import type { Grid, KernelCall, Shader } from "./runtime.ts";

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

/**
 * The places of segments: `cu` holds the starts of the queries' segments and, from `u.keyStarts` on, those of the keys' (the same
 * numbers where that is 0).
 */
export const segmentPlaces = `fn queriesAt(segment: u32) -> u32 { return u32(cu[segment]); }
fn keysAt(segment: u32) -> u32 { return u32(cu[u.keyStarts + segment]); }
// Causal queries see packed keys up to their own index and this many more, because the ends of a segment's queries and keys meet.
fn ahead(segment: u32) -> u32 { return keysAt(segment + 1u) - queriesAt(segment + 1u); }
fn segmentOf(start: u32, token: u32) -> u32 {
  var low = 0u;
  var high = u.segments;
  while (high - low > 1u) {
    let middle = (low + high) / 2u;
    if (u32(cu[start + middle]) <= token) { low = middle; } else { high = middle; }
  }
  return low;
}`;

/** Workgroup memory, and the places of segments. */
export const declarations = (d: number): string =>
  `var<workgroup> rowsPiece: array<vec4<f32>, ${8 * Math.min(d, 32)}>;
var<workgroup> columnsPiece: array<f32, ${32 * stride(d)}>;
var<workgroup> weights: array<vec4<f32>, 256>;
${segmentPlaces}`;

/** The uniform that counts the tokens of tensors with these heads. */
const tokensOf = (heads: "heads" | "keyHeads"): string => heads === "heads" ? "u.tokens" : "u.keyTokens";

/** `at_NAME(token, head, x)`: an element of a [tokens, heads, d] tensor, 0 beyond its end. */
export const reader = (name: string, heads: "heads" | "keyHeads", d: number): string =>
  `fn at_${name}(token: u32, head: u32, x: u32) -> f32 {
  if (token >= ${tokensOf(heads)}) { return 0.0; }
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
      const at = (c: number) => `((mine + ${c}u) * u.${heads} + ${head}) * ${d}u + ${piece.from}u + tx + ${8 * e}u`;
      const write = range(4).map((c) =>
        `if (mine + ${c}u < ${tokensOf(heads)}) { ${target}[${at(c)}] = s.${"xyzw"[c]}; }`
      );
      return `if (tx + ${8 * e}u < ${piece.width}u) { let s = ${value(sum)}; ${write.join(" ")} }`;
    })
  );
  return lines.join("\n");
}

/** Sets the thread's and the workgroup's place; the rows are tokens of tensors with these heads. */
export const place = (heads: "heads" | "keyHeads"): string =>
  `let tx = lane % 8u;
let ty = lane / 8u;
let first = wg.x * ${TILE}u;
let last = min(first + ${TILE - 1}u, ${tokensOf(heads)} - 1u);
let mine = first + 4u * ty;`;

/** What columns are, and whether pairs are cut at the row's place: keys up to there, or queries from there on. */
export interface Walk {
  readonly causal: boolean;
  readonly columns: "keys" | "queries";
}

/** First column of a row, and the end of its columns. */
function columnsOf({ causal, columns }: Walk): Record<"first" | "end", (row: string, segment: string) => string> {
  const at = columns === "keys" ? "keysAt" : "queriesAt";
  return {
    first: (row, segment) =>
      causal && columns === "queries"
        ? `max(queriesAt(${segment}), ${row} - min(${row}, ahead(${segment})))`
        : `${at}(${segment})`,
    end: (row, segment) => causal && columns === "keys" ? `${row} + 1u + ahead(${segment})` : `${at}(${segment} + 1u)`,
  };
}

const rowsOf = ({ columns }: Walk): { starts: string; total: string } =>
  columns === "keys" ? { starts: "0u", total: "u.tokens" } : { starts: "u.keyStarts", total: "u.keyTokens" };

/** Sets `since` and `until`: the columns of the four rows from `mine` on, none for rows beyond the last. */
export function rowRanges(walk: Walk, mine: string): string {
  const { first, end } = columnsOf(walk), { starts, total } = rowsOf(walk);
  return `var since = vec4<u32>();
var until = vec4<u32>();
for (var c = 0u; c < 4u; c++) {
  let row = ${mine} + c;
  if (row < ${total}) {
    let segment = segmentOf(${starts}, row);
    since[c] = ${first("row", "segment")};
    until[c] = ${end("row", "segment")};
  }
}`;
}

/** Sets `begin` and `end`: the columns of all rows from `first` to `last`. */
export function walkRange(walk: Walk): string {
  const { first, end } = columnsOf(walk), { starts } = rowsOf(walk);
  return `let firstSegment = segmentOf(${starts}, first);
let lastSegment = segmentOf(${starts}, last);
let begin = ${first("first", "firstSegment")};
let end = ${end("last", "lastSegment")};`;
}

/** Sets the ranges of a thread's four rows and of the workgroup. */
export const ranges = (causal: boolean, columns: "keys" | "queries"): string =>
  `${rowRanges({ causal, columns }, "mine")}
${walkRange({ causal, columns })}`;

/** Sets `ok0` … `ok3`: which of the thread's pairs of row and column meet. */
export const meet = range(4).map((j) =>
  `let column${j} = at + tx + ${8 * j}u;
let ok${j} = (since <= vec4<u32>(column${j})) & (vec4<u32>(column${j}) < until);`
).join("\n");

/** The uniforms of all attention shaders. */
export const uniforms = {
  tokens: "u32",
  keyTokens: "u32",
  heads: "u32",
  keyHeads: "u32",
  segments: "u32",
  keyStarts: "u32",
  scale: "f32",
} as const;

/** The sizes of one call, checked. */
export interface AttentionShape {
  readonly tokens: number;
  readonly keyTokens: number;
  readonly heads: number;
  readonly keyHeads: number;
  readonly d: number;
  readonly segments: number;
}

/** Reads the shapes of a call's q, k, v and segments; checks the values of segments where the host has them. */
export function attentionShape(call: KernelCall): AttentionShape {
  const [tokens, heads, d] = call.input("q", [null, null, null]).shape;
  const cu = call.input("cuSeqlens", [null], "int32"), cuKeys = call.optional("cuSeqlensK", cu.shape, "int32");
  const [keyTokens, keyHeads] = call.input("k", [cuKeys === undefined ? tokens : null, null, d]).shape;
  call.input("v", [keyTokens, keyHeads, d]);
  if (heads % keyHeads !== 0) throw call.error(`${heads} query heads are not a multiple of ${keyHeads} key heads`);
  const starts = checkStarts(call, "cuSeqlens", cu, tokens);
  const keyStarts = cuKeys && checkStarts(call, "cuSeqlensK", cuKeys, keyTokens);
  if (starts && keyStarts) checkLengths(call, starts, keyStarts);
  return { tokens, keyTokens, heads, keyHeads, d, segments: cu.shape[0] - 1 };
}

function checkStarts(call: KernelCall, name: string, cu: tf.TensorInfo, tokens: number): number[] | undefined {
  const values = call.hostValues(cu), list = values && Array.from(values);
  const ordered = list?.every((start, s) => s === 0 ? start === 0 : start >= list[s - 1]) ?? true;
  if (!ordered || cu.shape[0] < (tokens > 0 ? 2 : 1) || (list && list[list.length - 1] !== tokens)) {
    const text = list ? `[${list.slice(0, 8)}${list.length > 8 ? ", …" : ""}]` : `${cu.shape[0]} numbers`;
    throw call.error(`${name} must rise from 0 to the ${tokens} tokens, is ${text}`);
  }
  return list;
}

function checkLengths(call: KernelCall, starts: readonly number[], keyStarts: readonly number[]): void {
  const causal = call.flag("causal");
  for (let s = 0; s + 1 < starts.length; s++) {
    const [queries, keys] = [starts, keyStarts].map((cu) => cu[s + 1] - cu[s]);
    if (keys < (causal ? queries : Math.min(queries, 1))) {
      throw call.error(`segment ${s} has ${queries} queries and ${keys} keys, too few`);
    }
  }
}

/**
 * The `cu` of the shaders and its `keyStarts`. Where the keys have their own starts, one buffer holds both, because a device need not
 * bind more than eight.
 */
export function segmentStarts(call: KernelCall): { cu: tf.TensorInfo; keyStarts: number } {
  const cu = call.input("cuSeqlens", [null], "int32"), cuKeys = call.optional("cuSeqlensK", cu.shape, "int32");
  if (cuKeys === undefined) return { cu, keyStarts: 0 };
  const size = cu.shape[0], both = call.temporary([2 * size]);
  call.dispatch("attention segments", () => joinShader, [cu, cuKeys, both], { size }, elements(size));
  return { cu: both, keyStarts: size };
}

const joinShader: Shader = {
  storage: [
    { name: "cu", type: "i32" },
    { name: "cuKeys", type: "i32" },
    { name: "both", type: "i32", write: true },
  ],
  uniforms: { size: "u32" },
  threads: ELEMENTWISE,
  main: `${element}
both[i] = cu[i];
both[u.size + i] = cuKeys[i];`,
};

/** A workgroup per tile of tokens and head. */
export const tileGrid = (tokens: number, heads: number): Grid => [Math.ceil(tokens / TILE), heads, 1];
