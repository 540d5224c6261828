/**
 * Pieces of WGSL that several kernels share, and the grids that go with them.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { type Grid, type KernelCall, rowsOf, type Shader } from "./runtime.ts";

/** Workgroups of one long axis, folded so that no dimension exceeds the limit of every WebGPU device. */
export function fold(workgroups: number): Grid {
  if (workgroups <= 65535) return [Math.max(1, workgroups), 1, 1];
  const y = Math.ceil(workgroups / 65535);
  return [Math.ceil(workgroups / y), y, 1];
}

/** The number of the workgroup in a grid of {@link fold}. */
export const group = "let group = wg.y * groups.x + wg.x;";

/** Threads of an elementwise workgroup. */
export const ELEMENTWISE = 64;

/** Sets `i` to the element of a thread and ends threads beyond `u.size`. */
export const element = `${group}
let i = group * ${ELEMENTWISE}u + lane;
if (i >= u.size) { return; }`;

/** Grid of an elementwise shader. */
export const elements = (size: number): Grid => fold(Math.ceil(size / ELEMENTWISE));

/** The widest type that divides `size` evenly: four numbers a thread, or one. */
export function packed(size: number): { readonly type: "f32" | "vec4<f32>"; readonly count: number } {
  return size % 4 === 0 ? { type: "vec4<f32>", count: 4 } : { type: "f32", count: 1 };
}

/**
 * Dispatches a shader over the elements of tensors of one size, window by window. The shader has a uniform `size`: threads.
 *
 * @param total Elements of each tensor.
 * @param step Elements a thread, as {@link packed} says; divides `total`.
 */
export function dispatchElements(
  call: KernelCall,
  key: string,
  make: () => Shader,
  tensors: readonly tf.TensorInfo[],
  { total, step }: { total: number; step: number },
  uniforms: Readonly<Record<string, number>> = {},
): void {
  for (const run of call.windows(total, [1])) {
    const size = run.count / step;
    call.dispatch(key, make, tensors.map((x) => rowsOf(x, run, 1)), { size, ...uniforms }, elements(size));
  }
}

/** How a workgroup is shared by rows: `lanes` threads each, `rows` at once. */
export interface RowSplit {
  readonly threads: number;
  readonly lanes: number;
  readonly rows: number;
}

/** Few lanes for short rows, a whole workgroup for long ones. */
export function splitRows(width: number): RowSplit {
  const threads = width >= 8192 ? 256 : 64;
  const lanes = width >= 8192 ? 256 : width >= 512 ? 64 : width >= 64 ? 16 : 4;
  return { threads, lanes, rows: threads / lanes };
}

/** Sets `row` and `at` (the lane within it); rows beyond the last take part in sums but must not be written. */
export const rowStart = ({ lanes, rows }: RowSplit): string =>
  `${group}
let row = group * ${rows}u + lane / ${lanes}u;
let at = lane % ${lanes}u;
let live = row < u.rows;`;

/** `laneSum` and `laneMax`: over the lanes of a row, in a fixed order, for every lane. All threads must call them. */
export const rowReductions = ({ threads, lanes }: RowSplit): string =>
  [["laneSum", "sum + part[first + i]"], ["laneMax", "max(sum, part[first + i])"]].map(([name, step]) =>
    `fn ${name}(lane: u32, value: f32) -> f32 {
  part[lane] = value;
  workgroupBarrier();
  let first = lane - lane % ${lanes}u;
  var sum = part[first];
  for (var i = 1u; i < ${lanes}u; i++) { sum = ${step}; }
  workgroupBarrier();
  return sum;
}`
  ).join("\n") + `\nvar<workgroup> part: array<f32, ${threads}>;`;
