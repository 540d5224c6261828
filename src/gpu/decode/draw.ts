/**
 * Draws that stand outside the head's product: over logits that exist already, the joining of a row's parts, and the look-up of
 * the next embedding.
 *
 * - {@linkcode logitsKernel}: logits `[D, V]`, of which each row takes line `lines[row]`, → `DRAW_PARTS` draws a row; where
 *   there is a nucleus, only ids with logit ≥ `floors[row]` are drawn. Cost: rows·V reads.
 * - {@linkcode joinKernel}: a row's draws → id and log-prob at `drawn[step, slot]`, and `x[row] = table[id]`.
 *   Log-prob = logit/temperature − ln Σ exp(logit/temperature) over ids that are not suppressed.
 *
 * @module
 */
import {
  considerFunction,
  declareBindings,
  drawStruct,
  gumbelFunctions,
  type Kernel,
  mathFunctions,
  NOT_FINITE,
  stepStruct,
} from "./wgsl.ts";
import { rowStride } from "./linear.ts";

/** Draws a row that {@linkcode logitsKernel} leaves. */
export const DRAW_PARTS = 256;
const LOGITS_THREADS = 32;

/**
 * Draws over given logits. Dispatch: x = `DRAW_PARTS / 32`, y = rows.
 *
 * @param parts Draws between rows of the output.
 * @param nucleus Whether rows have floors, see `nucleus.ts`.
 */
export function logitsKernel(vocab: number, greedy: boolean, parts: number, nucleus = false): Kernel {
  const list = [
    ["read", "logits", "array<f32>"],
    ["read", "lines", "array<u32>"],
    ["read", "suppressed", "array<u32>"],
    ["read", "rows", "array<Row>"],
    ...(nucleus ? [["read", "floors", "array<f32>"] as const] : []),
    ["write", "out", "array<Draw>"],
    ["step", "step", "Step"],
  ] as const;
  const source = /* wgsl */ `
${stepStruct}
${mathFunctions}
${drawStruct}
${greedy ? "" : gumbelFunctions}
${declareBindings(list)}
const vocab = ${vocab}u;
${considerFunction(greedy, nucleus)}
@compute @workgroup_size(${LOGITS_THREADS})
fn main(@builtin(global_invocation_id) id: vec3u) {
  var draw = emptyDraw();
  for (var v = id.x * 4u; v < vocab; v += ${DRAW_PARTS * 4}u) {
    let at = lines[id.y] * vocab + v;
    draw = consider(draw, rows[id.y], v, vec4f(logits[at], logits[at + 1u], logits[at + 2u], logits[at + 3u])${
    nucleus ? ", floors[id.y]" : ""
  });
  }
  out[id.y * ${parts}u + id.x] = draw;
}
`;
  return {
    key: `logits ${vocab} ${greedy} ${parts}${nucleus ? " nucleus" : ""}`,
    source,
    bindings: list.map(([kind]) => kind),
  };
}
/** Workgroups along x of {@linkcode logitsKernel}. */
export const LOGITS_WORKGROUPS = DRAW_PARTS / LOGITS_THREADS;

/** What {@linkcode joinKernel} does. */
export interface JoinOptions {
  /** Join this many draws a row (of `stride`); 0 takes the id from `drawn` as it is. */
  parts: number;
  /** Draws between rows. */
  stride: number;
  /** Rows of the table that are bound and the id of the first; null embeds nothing. */
  table: { first: number; rows: number } | null;
  /** Width of the residual stream. */
  width: number;
  threads: number;
}

/** Joins a row's draws and embeds the result. Dispatch: x = rows. */
export function joinKernel(o: JoinOptions): Kernel {
  const { parts, stride, table, width, threads } = o;
  const list = [
    ["read", "draws", "array<Draw>"],
    ["read", "rows", "array<Row>"],
    ["write", "drawn", "array<u32>"], // [step, slot, id | log-prob]
    ["read", "table", "array<f32>"],
    ["write", "x", "array<f32>"],
    ["step", "step", "Step"],
  ] as const;
  const join = /* wgsl */ `
  var draw = emptyDraw();
  for (var i = t; i < ${parts}u; i += ${threads}u) { draw = joinDraws(draw, draws[group.x * ${stride}u + i]); }
  all[t] = draw;
  workgroupBarrier();
  draw = all[0];
  for (var i = 1u; i < ${threads}u; i++) { draw = joinDraws(draw, all[i]); }
  let id = draw.id;
  if (t == 0u) {
    drawn[at] = id;
    drawn[at + 1u] = bitcast<u32>(draw.logit * step.scale - (draw.top + fln(draw.sum)));
  }`;
  const embed = table && /* wgsl */ `
  let entry = select(id, ${table.first}u, id >= ${NOT_FINITE}u) - ${table.first}u; // an id below wraps to a large number
  if (entry < ${table.rows}u) {
    for (var i = t; i < ${width}u; i += ${threads}u) { x[group.x * ${
    rowStride(width)
  }u + i] = table[entry * ${width}u + i]; }
  }`;
  const source = /* wgsl */ `
${stepStruct}
${mathFunctions}
${drawStruct}
${declareBindings(list)}
${parts ? `var<workgroup> all: array<Draw, ${threads}>;` : ""}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) t: u32) {
  let at = (step.step * step.slots + rows[group.x].slot) * 2u;
  ${parts ? join : "let id = drawn[at];"}
  ${embed ?? ""}
}
`;
  return { key: `join ${JSON.stringify(o)}`, source, bindings: list.map(([kind]) => kind) };
}
