/**
 * Rows by index, and the transpose of that map.
 *
 * - `MgpoGatherRows`: x [N, D], index int32 [M] → y [M, D], y[i] = x[index[i]], or zeros where index[i] is −1.
 * - `MgpoScatterAddRows`: x [M, D], index int32 [M], attribute `rows` = N → y [N, D], y[n] = Σ x[i] over index[i] = n, added in
 *   the order of i (so the result does not depend on anything else); −1 is skipped.
 *
 * Where the host still has the index, a bad one is a RangeError, and the sum runs over lists of the i of each n, made on the
 * host: one read and one write per element. Otherwise a bad index gives a row of NaN (gather) or is skipped (scatter), and
 * each row of y looks through the whole index: N·M integers are read.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { element, elements, ELEMENTWISE, packed } from "./lanes.ts";
import type { Kernel, KernelCall, Shader } from "./runtime.ts";

/** Both kernels. */
export const gather: readonly Kernel[] = [
  { name: "MgpoGatherRows", run: gatherRows },
  { name: "MgpoScatterAddRows", run: scatterAddRows },
];

type Type = "f32" | "vec4<f32>";

function gatherShader(type: Type): Shader {
  return {
    storage: [{ name: "x", type }, { name: "index", type: "i32" }, { name: "y", type, write: true }],
    uniforms: { size: "u32", width: "u32", rows: "u32", nan: "f32" },
    threads: ELEMENTWISE,
    main: `${element}
let source = index[i / u.width];
if (source >= 0 && u32(source) < u.rows) { y[i] = x[u32(source) * u.width + i % u.width]; }
else { y[i] = ${type}(select(u.nan, 0.0, source == -1)); }`,
  };
}

/** Row n of the output sums x[order[j]] over starts[n] ≤ j < starts[n + 1]. */
function listShader(type: Type): Shader {
  return {
    storage: [
      { name: "x", type },
      { name: "order", type: "i32" },
      { name: "starts", type: "i32" },
      { name: "y", type, write: true },
    ],
    uniforms: { size: "u32", width: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
let row = i / u.width;
let column = i % u.width;
var sum = ${type}(0.0);
for (var j = starts[row]; j < starts[row + 1u]; j++) { sum += x[u32(order[j]) * u.width + column]; }
y[i] = sum;`,
  };
}

function scanShader(type: Type): Shader {
  return {
    storage: [{ name: "x", type }, { name: "index", type: "i32" }, { name: "y", type, write: true }],
    uniforms: { size: "u32", width: "u32", count: "u32" },
    threads: ELEMENTWISE,
    main: `${element}
let row = i32(i / u.width);
let column = i % u.width;
var sum = ${type}(0.0);
for (var j = 0u; j < u.count; j++) { if (index[j] == row) { sum += x[j * u.width + column]; } }
y[i] = sum;`,
  };
}

function checkIndex(call: KernelCall, index: ArrayLike<number>, rows: number): void {
  for (let i = 0; i < index.length; i++) {
    if (index[i] >= -1 && index[i] < rows) continue;
    throw call.error(`index[${i}] is ${index[i]}, must be −1 or a row below ${rows}`);
  }
}

function gatherRows(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]), index = call.input("index", [null], "int32");
  const [rows, width] = x.shape, count = index.shape[0], host = call.hostValues(index);
  if (host) checkIndex(call, host, rows);
  if (rows === 0 || count * width === 0) return call.zeros([count, width]);
  const y = call.output([count, width]), { type, count: step } = packed(width);
  const size = count * width / step;
  const uniforms = { size, width: width / step, rows, nan: NaN };
  call.dispatch(`${call.name} ${type}`, () => gatherShader(type), [x, index, y], uniforms, elements(size));
  return y;
}

/** The positions of each row in the index, in order, and where each row's begin. */
export function listsOf(index: ArrayLike<number>, rows: number): { order: Int32Array; starts: Int32Array } {
  const starts = new Int32Array(rows + 1);
  for (let i = 0; i < index.length; i++) if (index[i] >= 0) starts[index[i] + 1]++;
  for (let n = 0; n < rows; n++) starts[n + 1] += starts[n];
  const next = starts.slice(0, rows), order = new Int32Array(Math.max(1, starts[rows]));
  for (let i = 0; i < index.length; i++) if (index[i] >= 0) order[next[index[i]]++] = i;
  return { order, starts };
}

function scatterAddRows(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]), index = call.input("index", [x.shape[0]], "int32");
  const rows = call.number("rows"), [count, width] = x.shape;
  if (!Number.isInteger(rows) || rows < 0) throw call.error(`attribute rows must be an integer ≥ 0, is ${rows}`);
  const host = call.hostValues(index);
  if (host) checkIndex(call, host, rows);
  if (count * rows * width === 0) return call.zeros([rows, width]);
  const y = call.output([rows, width]), { type, count: step } = packed(width);
  const size = rows * width / step, common = { size, width: width / step };
  if (host) {
    const { order, starts } = listsOf(host, rows);
    const tensors = [x, call.upload(order), call.upload(starts), y];
    call.dispatch(`${call.name} ${type}`, () => listShader(type), tensors, common, elements(size));
  } else {
    const make = () => scanShader(type);
    call.dispatch(`${call.name} scan ${type}`, make, [x, index, y], { ...common, count }, elements(size));
  }
  return y;
}
