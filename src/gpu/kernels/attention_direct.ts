/**
 * The WGSL of `attention.ts` and `attention_grad.ts` for adapters that compute on the processor, and heads small enough.
 *
 * There a load costs many times a multiplication, from workgroup memory as much as from storage, and barriers cost more still (see
 * `matmul_direct.ts`). So each thread keeps {@link ROWS} rows of one head in registers with their sums and walks over exactly the
 * columns that they meet, one at a time: a column that was loaded serves ROWS · d multiplications, and what a tile would spend on pairs
 * that don't meet is left out. Neighbouring threads take the heads of the same rows, so that they walk equally far.
 *
 * Rows and columns are queries and keys, or keys and queries, as in `attention_tiles.ts`.
 *
 * @module
 */
import { range, rowRanges, segmentPlaces, uniforms, type Walk, walkRange } from "./attention_tiles.ts";
import { fold, group } from "./lanes.ts";
import type { Grid, Shader } from "./runtime.ts";

/** Rows of a thread, a multiple of 4. */
const ROWS = Number(Deno.env.get("ROWS") ?? 8);
const THREADS = 32;
const halves = range(ROWS / 4);

/** Whether heads of this size fit: their rows and sums in registers, and whole vectors to load. */
export const fitsDirect = (d: number): boolean => d <= 32 && d % 4 === 0;

/** A thread per ROWS tokens and head. */
export const directGrid = (tokens: number, heads: number): Grid =>
  fold(Math.ceil(Math.ceil(tokens / ROWS) * heads / THREADS));

type Heads = "heads" | "keyHeads";
const each = (line: (half: number) => string): string => halves.map(line).join("\n  ");

/** Sets the thread's `head`, its rows from `first` to `last`, and their columns. */
function place(rows: Heads, causal: boolean): string {
  const total = rows === "heads" ? "u.tokens" : "u.keyTokens";
  const walk: Walk = { causal, columns: rows === "heads" ? "keys" : "queries" };
  return `${group}
let thread = group * ${THREADS}u + lane;
let ${rows === "heads" ? "head" : "keyHead"} = thread % u.${rows};
let first = thread / u.${rows} * ${ROWS}u;
if (first >= ${total}) { return; }
let last = min(first + ${ROWS - 1}u, ${total} - 1u);
let groupSize = u.heads / u.keyHeads;
${rows === "heads" ? "let keyHead = head / groupSize;" : ""}
${each((h) => `let mine${h} = first + ${4 * h}u;\n${rowRanges(walk, `mine${h}`, `${h}`)}`)}
${walkRange(walk)}`;
}

/** An expression of each of the four rows of a half. */
const four = (half: number, value: (row: string) => string): string =>
  `vec4<f32>(${range(4).map((c) => value(`min(mine${half} + ${c}u, last)`)).join(", ")})`;

/**
 * Loads the rows of a tensor: NAMEh_x holds dimension x of four of them. The loop with its selections keeps loads few in the code, on
 * whose number the time to compile depends.
 */
const loadRows = (name: string, heads: Heads, head: string, d: number): string =>
  `${declare(name, d)}
for (var x = 0u; x < ${d}u; x++) {
  ${
    each((h) =>
      `let row${h} = ${four(h, (row) => `${name}[(${row} * u.${heads} + ${head}) * ${d}u + x]`)};
  ${range(d).map((x) => `${name}${h}_${x} = select(${name}${h}_${x}, row${h}, x == ${x}u);`).join(" ")}`
    )
  }
}`;

/** Loads column `at` of a tensor of vectors: NAME_g holds dimensions 4·g to 4·g + 3. */
const loadColumn = (name: string, heads: Heads, head: string, d: number): string =>
  `let at_${name} = (at * u.${heads} + ${head}) * ${d / 4}u;
  ${range(d / 4).map((g) => `let ${name}_${g} = ${name}[at_${name} + ${g}u];`).join(" ")}`;

const part = (column: string, x: number): string => `${column}_${Math.floor(x / 4)}.${"xyzw"[x % 4]}`;

/** The products of a half's rows with the column. */
const product = (rows: string, column: string, half: number, d: number): string =>
  range(d).map((x) => `${rows}${half}_${x} * ${part(column, x)}`).join(" + ");

const declare = (name: string, d: number): string =>
  each((h) => range(d).map((x) => `var ${name}${h}_${x} = vec4<f32>();`).join(" "));

/** Adds weight · column to sums. */
const add = (name: string, weight: string, column: string, half: number, d: number): string =>
  range(d).map((x) => `${name}${half}_${x} += ${weight}${half} * ${part(column, x)};`).join(" ");

/** Writes sums to the rows of a tensor; rows beyond the last don't exist. `value` turns a sum into what is written. */
const store = (
  name: string,
  target: string,
  heads: Heads,
  head: string,
  d: number,
  value = (sum: string, _half: number): string => sum,
): string =>
  `for (var x = 0u; x < ${d}u; x++) {
  ${
    each((h) =>
      `var row${h} = vec4<f32>();
  ${range(d).map((x) => `row${h} = select(row${h}, ${name}${h}_${x}, x == ${x}u);`).join(" ")}
  row${h} = ${value(`row${h}`, h)};
  ${
        range(4).map((c) =>
          `if (mine${h} + ${c}u <= last) { ${target}[((mine${h} + ${c}u) * u.${heads} + ${head}) * ${d}u + x] = row${h}.${
            "xyzw"[c]
          }; }`
        ).join("\n  ")
      }`
    )
  }
}`;

/** Which of a half's rows meet the column. */
const meet = (half: number): string =>
  `let ok${half} = (since${half} <= vec4<u32>(at)) & (vec4<u32>(at) < until${half});`;

/** As the shader of `attention.ts`. */
export function directAttention(d: number, causal: boolean): Shader {
  return {
    storage: [
      { name: "q", type: "f32" },
      { name: "k", type: "vec4<f32>" },
      { name: "v", type: "vec4<f32>" },
      { name: "cu", type: "i32" },
      { name: "result", type: "f32", write: true },
      { name: "lse", type: "f32", write: true },
    ],
    uniforms,
    threads: THREADS,
    code: segmentPlaces,
    main: `${place("heads", causal)}
${loadRows("q", "heads", "head", d)}
${declare("o", d)}
${each((h) => `var top${h} = vec4<f32>(-1e30); var total${h} = vec4<f32>();`)}
for (var at = begin; at < end; at++) {
  ${loadColumn("k", "keyHeads", "keyHead", d)}
  ${loadColumn("v", "keyHeads", "keyHead", d)}
  ${
      each((h) =>
        `${meet(h)}
  let s${h} = select(vec4<f32>(-1e30), u.scale * (${product("q", "k", h, d)}), ok${h});
  let most${h} = max(top${h}, s${h});
  let shrink${h} = exp(top${h} - most${h});
  let p${h} = select(vec4<f32>(), exp(s${h} - most${h}), ok${h});
  top${h} = most${h};
  total${h} = total${h} * shrink${h} + p${h};
  ${range(d).map((x) => `o${h}_${x} *= shrink${h};`).join(" ")}
  ${add("o", "p", "v", h, d)}`
      )
    }
}
${store("o", "result", "heads", "head", d, (sum, h) => `${sum} / total${h}`)}
${
      each((h) =>
        `let l${h} = top${h} + log(total${h});
${
          range(4).map((c) =>
            `if (mine${h} + ${c}u <= last) { lse[(mine${h} + ${c}u) * u.heads + head] = l${h}.${"xyzw"[c]}; }`
          )
            .join("\n")
        }`
      )
    }`,
  };
}

const pair = (half: number, offset: number): string =>
  four(half, (row) => `pair[2u * (${row} * u.heads + head) + ${offset}u]`);

/** dq, as the shader by tiles of queries of `attention_grad.ts`. */
export function directQueryGrad(d: number, causal: boolean): Shader {
  return {
    storage: [
      { name: "q", type: "f32" },
      { name: "k", type: "vec4<f32>" },
      { name: "v", type: "vec4<f32>" },
      { name: "dout", type: "f32" },
      { name: "pair", type: "f32" },
      { name: "cu", type: "i32" },
      { name: "dq", type: "f32", write: true },
    ],
    uniforms,
    threads: THREADS,
    code: segmentPlaces,
    main: `${place("heads", causal)}
${loadRows("q", "heads", "head", d)}
${loadRows("dout", "heads", "head", d)}
${each((h) => `let shift${h} = ${pair(h, 0)}; let mean${h} = ${pair(h, 1)};`)}
${declare("o", d)}
for (var at = begin; at < end; at++) {
  ${loadColumn("k", "keyHeads", "keyHead", d)}
  ${loadColumn("v", "keyHeads", "keyHead", d)}
  ${
      each((h) =>
        `${meet(h)}
  let p${h} = exp(u.scale * (${product("q", "k", h, d)}) - shift${h});
  let ds${h} = select(vec4<f32>(), u.scale * p${h} * ((${product("dout", "v", h, d)}) - mean${h}), ok${h});
  ${add("o", "ds", "k", h, d)}`
      )
    }
}
${store("o", "dq", "heads", "head", d)}`,
  };
}

/** dk and dv, as the shader by tiles of keys of `attention_grad.ts`. */
export function directKeyGrad(d: number, causal: boolean): Shader {
  return {
    storage: [
      { name: "q", type: "vec4<f32>" },
      { name: "k", type: "f32" },
      { name: "v", type: "f32" },
      { name: "dout", type: "vec4<f32>" },
      { name: "pair", type: "f32" },
      { name: "cu", type: "i32" },
      { name: "dk", type: "f32", write: true },
      { name: "dv", type: "f32", write: true },
    ],
    uniforms,
    threads: THREADS,
    code: segmentPlaces,
    main: `${place("keyHeads", causal)}
${loadRows("k", "keyHeads", "keyHead", d)}
${loadRows("v", "keyHeads", "keyHead", d)}
${declare("a", d)}
${declare("b", d)}
for (var head = keyHead * groupSize; head < (keyHead + 1u) * groupSize; head++) {
for (var at = begin; at < end; at++) {
  ${loadColumn("q", "heads", "head", d)}
  ${loadColumn("dout", "heads", "head", d)}
  let shift = pair[2u * (at * u.heads + head)];
  let mean = pair[2u * (at * u.heads + head) + 1u];
  ${
      each((h) =>
        `${meet(h)}
  let p${h} = select(vec4<f32>(), exp(u.scale * (${product("k", "q", h, d)}) - shift), ok${h});
  let ds${h} = u.scale * p${h} * ((${product("v", "dout", h, d)}) - mean);
  ${add("b", "p", "dout", h, d)}
  ${add("a", "ds", "q", h, d)}`
      )
    }
}
}
${store("a", "dk", "keyHeads", "keyHead", d)}
${store("b", "dv", "keyHeads", "keyHead", d)}`,
  };
}
