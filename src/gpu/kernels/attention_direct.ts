/**
 * The WGSL of `attention.ts` and `attention_grad.ts` for adapters that compute on the processor, and heads small enough.
 *
 * There a load costs many times a multiplication, from workgroup memory as much as from storage, and barriers cost more still (see
 * `matmul_direct.ts`). So each thread keeps four rows of one head in registers, with their sums, and walks over exactly the
 * columns that they meet, one at a time: a number of a column serves four multiplications or more, and what a tile would spend on pairs
 * that don't meet is left out. Neighbouring threads take the heads of the same rows, so that they walk equally far.
 * On llvmpipe, segments of 66 tokens and heads of 24, that is several times as fast as tiles; eight rows gain a few percent more and
 * take twice as long to compile.
 *
 * Rows and columns are queries and keys, or keys and queries, as in `attention_tiles.ts`; the four rows are the parts of vectors.
 *
 * @module
 */
import { range, rowRanges, segmentPlaces, uniforms, type Walk, walkRange } from "./attention_tiles.ts";
import { fold, group } from "./lanes.ts";
import type { Binding, Grid, Shader } from "./runtime.ts";

const THREADS = 32;

/** Whether heads of this size fit: rows and sums in registers, and whole vectors to load. */
export const fitsDirect = (d: number): boolean => d <= 32 && d % 4 === 0;

/** A thread per four tokens and head. */
export const directGrid = (tokens: number, heads: number): Grid =>
  fold(Math.ceil(Math.ceil(tokens / 4) * heads / THREADS));

type Heads = "heads" | "keyHeads";

/** Sets the thread's head, its rows from `first` to `last`, and their columns. */
function place(rows: Heads, causal: boolean): string {
  const total = rows === "heads" ? "u.tokens" : "u.keyTokens";
  const walk: Walk = { causal, columns: rows === "heads" ? "keys" : "queries" };
  return `${group}
let thread = group * ${THREADS}u + lane;
let first = thread / u.${rows} * 4u;
if (first >= ${total}) { return; }
let last = min(first + 3u, ${total} - 1u);
let perKeyHead = u.heads / u.keyHeads;
${
    rows === "heads"
      ? "let head = thread % u.heads; let keyHead = head / perKeyHead;"
      : "let keyHead = thread % u.keyHeads;"
  }
${rowRanges(walk, "first")}
${walkRange(walk)}`;
}

/** An expression of each row. */
const four = (value: (row: string) => string): string =>
  `vec4<f32>(${range(4).map((c) => value(`min(first + ${c}u, last)`)).join(", ")})`;

/** Sums or rows of d dimensions: NAME0, NAME1, … */
const declare = (name: string, d: number): string => range(d).map((x) => `var ${name}${x} = vec4<f32>();`).join(" ");

/**
 * Loads the rows of a tensor to NAME0, NAME1, … The loop with its selections keeps loads few in the code, on whose number the time to
 * compile depends.
 */
const loadRows = (name: string, heads: Heads, head: string, d: number): string =>
  `${declare(name, d)}
for (var x = 0u; x < ${d}u; x++) {
  let rows = ${four((row) => `${name}[(${row} * u.${heads} + ${head}) * ${d}u + x]`)};
  ${range(d).map((x) => `${name}${x} = select(${name}${x}, rows, x == ${x}u);`).join(" ")}
}`;

/** Writes sums to the rows of a tensor, each as `value` of it. */
const store = (sums: string, target: string, heads: Heads, head: string, d: number, value = "rows"): string =>
  `for (var x = 0u; x < ${d}u; x++) {
  var rows = vec4<f32>();
  ${range(d).map((x) => `rows = select(rows, ${sums}${x}, x == ${x}u);`).join(" ")}
  rows = ${value};
  ${
    range(4).map((c) =>
      `if (first + ${c}u <= last) { ${target}[((first + ${c}u) * u.${heads} + ${head}) * ${d}u + x] = rows[${c}]; }`
    ).join("\n  ")
  }
}`;

/** Loads column `at` of a tensor of vectors: NAME_g holds dimensions 4·g to 4·g + 3. */
const loadColumn = (name: string, heads: Heads, head: string, d: number): string =>
  `let at_${name} = (at * u.${heads} + ${head}) * ${d / 4}u;
  ${range(d / 4).map((g) => `let ${name}_${g} = ${name}[at_${name} + ${g}u];`).join(" ")}`;

const part = (column: string, x: number): string => `${column}_${Math.floor(x / 4)}.${"xyzw"[x % 4]}`;

/** The products of the rows with the column. */
const product = (rows: string, column: string, d: number): string =>
  `(${range(d).map((x) => `${rows}${x} * ${part(column, x)}`).join(" + ")})`;

/** Adds weight · column to sums. */
const add = (sums: string, weight: string, column: string, d: number): string =>
  range(d).map((x) => `${sums}${x} += ${weight} * ${part(column, x)};`).join(" ");

/** Which rows meet the column. */
const meet = "let ok = (since <= vec4<u32>(at)) & (vec4<u32>(at) < until);";

const read = (type: Binding["type"], ...names: string[]): Binding[] => names.map((name) => ({ name, type }));
const write = (...names: string[]): Binding[] => names.map((name) => ({ name, type: "f32", write: true }));
const shader = (storage: Binding[], main: string): Shader => (
  { storage, uniforms, threads: THREADS, code: segmentPlaces, main }
);

/** As the shader of `attention.ts`. */
export function directAttention(d: number, causal: boolean): Shader {
  const storage = [
    ...read("f32", "q"),
    ...read("vec4<f32>", "k", "v"),
    ...read("i32", "cu"),
    ...write("result", "lse"),
  ];
  return shader(
    storage,
    `${place("heads", causal)}
${loadRows("q", "heads", "head", d)}
${declare("o", d)}
var top = vec4<f32>(-1e30);
var total = vec4<f32>();
for (var at = begin; at < end; at++) {
  ${loadColumn("k", "keyHeads", "keyHead", d)}
  ${loadColumn("v", "keyHeads", "keyHead", d)}
  ${meet}
  let s = select(vec4<f32>(-1e30), u.scale * ${product("q", "k", d)}, ok);
  let most = max(top, s);
  let shrink = exp(top - most);
  let p = select(vec4<f32>(), exp(s - most), ok);
  top = most;
  total = total * shrink + p;
  ${range(d).map((x) => `o${x} *= shrink;`).join(" ")}
  ${add("o", "p", "v", d)}
}
${store("o", "result", "heads", "head", d, "rows / total")}
let l = top + log(total);
${range(4).map((c) => `if (first + ${c}u <= last) { lse[(first + ${c}u) * u.heads + head] = l[${c}]; }`).join("\n")}`,
  );
}

/** dq, as the shader by tiles of queries of `attention_grad.ts`. */
export function directQueryGrad(d: number, causal: boolean): Shader {
  const storage = [
    ...read("f32", "q"),
    ...read("vec4<f32>", "k", "v"),
    ...read("f32", "dout", "pair"),
    ...read("i32", "cu"),
    ...write("dq"),
  ];
  const pair = (offset: number) => four((row) => `pair[2u * (${row} * u.heads + head) + ${offset}u]`);
  return shader(
    storage,
    `${place("heads", causal)}
${loadRows("q", "heads", "head", d)}
${loadRows("dout", "heads", "head", d)}
let shift = ${pair(0)};
let mean = ${pair(1)};
${declare("o", d)}
for (var at = begin; at < end; at++) {
  ${loadColumn("k", "keyHeads", "keyHead", d)}
  ${loadColumn("v", "keyHeads", "keyHead", d)}
  ${meet}
  let p = exp(u.scale * ${product("q", "k", d)} - shift);
  let ds = select(vec4<f32>(), u.scale * p * (${product("dout", "v", d)} - mean), ok);
  ${add("o", "ds", "k", d)}
}
${store("o", "dq", "heads", "head", d)}`,
  );
}

/** dk and dv, as the shader by tiles of keys of `attention_grad.ts`. */
export function directKeyGrad(d: number, causal: boolean): Shader {
  const storage = [
    ...read("vec4<f32>", "q"),
    ...read("f32", "k", "v"),
    ...read("vec4<f32>", "dout"),
    ...read("f32", "pair"),
    ...read("i32", "cu"),
    ...write("dk", "dv"),
  ];
  return shader(
    storage,
    `${place("keyHeads", causal)}
${loadRows("k", "keyHeads", "keyHead", d)}
${loadRows("v", "keyHeads", "keyHead", d)}
${declare("a", d)}
${declare("b", d)}
for (var head = keyHead * perKeyHead; head < (keyHead + 1u) * perKeyHead; head++) {
for (var at = begin; at < end; at++) {
  ${loadColumn("q", "heads", "head", d)}
  ${loadColumn("dout", "heads", "head", d)}
  let query = 2u * (at * u.heads + head);
  ${meet}
  let p = select(vec4<f32>(), exp(u.scale * ${product("k", "q", d)} - pair[query]), ok);
  let ds = u.scale * p * (${product("v", "dout", d)} - pair[query + 1u]);
  ${add("b", "p", "dout", d)}
  ${add("a", "ds", "q", d)}
}
}
${store("a", "dk", "keyHeads", "keyHead", d)}
${store("b", "dv", "keyHeads", "keyHead", d)}`,
  );
}
