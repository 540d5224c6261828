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
 * Tables larger than a binding are taken in windows of rows: a dispatch of the gather writes the rows of y whose row of x it has,
 * one of the sum adds what its rows of x give, so that additions keep their order.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { element, elements, ELEMENTWISE, packed } from "./lanes.ts";
import { type Kernel, type KernelCall, rowsOf, type Shader } from "./runtime.ts";

/** Both kernels. */
export const gather: readonly Kernel[] = [
  { name: "MgpoGatherRows", run: gatherRows },
  { name: "MgpoScatterAddRows", run: scatterAddRows },
];

type Type = "f32" | "vec4<f32>";

function gatherShader(type: Type): Shader {
  return {
    storage: [{ name: "x", type }, { name: "index", type: "i32" }, { name: "y", type, write: true }],
    uniforms: {
      ...{ size: "u32", width: "u32", rows: "u32", nan: "f32" },
      ...{ first: "u32", count: "u32", firstOutput: "u32" },
    },
    threads: ELEMENTWISE,
    main: `${element}
let source = index[u.firstOutput + i / u.width];
if (source >= 0 && u32(source) < u.rows) {
  let row = u32(source) - u.first;
  if (u32(source) >= u.first && row < u.count) { y[i] = x[row * u.width + i % u.width]; }
} else if (u.first == 0u) { y[i] = ${type}(select(u.nan, 0.0, source == -1)); }`,
  };
}

/** What both sums know: windows of x and of y; all windows of x but the first add to what is there. */
const windowed = { size: "u32", width: "u32", firstX: "u32", countX: "u32", firstY: "u32" } as const;
const begin = (type: Type) =>
  `let row = u.firstY + i / u.width;
let column = i % u.width;
var sum = ${type}(0.0);
if (u.firstX > 0u) { sum = y[i]; }`;

/** Row n of the output sums x[order[j]] over starts[n] ≤ j < starts[n + 1]. */
function listShader(type: Type): Shader {
  return {
    storage: [
      { name: "x", type },
      { name: "order", type: "i32" },
      { name: "starts", type: "i32" },
      { name: "y", type, write: true },
    ],
    uniforms: windowed,
    threads: ELEMENTWISE,
    main: `${element}
${begin(type)}
for (var j = starts[row]; j < starts[row + 1u]; j++) {
  let source = u32(order[j]) - u.firstX;
  if (u32(order[j]) >= u.firstX && source < u.countX) { sum += x[source * u.width + column]; }
}
y[i] = sum;`,
  };
}

function scanShader(type: Type): Shader {
  return {
    storage: [{ name: "x", type }, { name: "index", type: "i32" }, { name: "y", type, write: true }],
    uniforms: windowed,
    threads: ELEMENTWISE,
    main: `${element}
${begin(type)}
for (var j = 0u; j < u.countX; j++) {
  if (index[u.firstX + j] == i32(row)) { sum += x[j * u.width + column]; }
}
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
  for (const output of call.windows(count, [width])) {
    const size = output.count * width / step;
    for (const run of call.windows(rows, [width])) {
      const place = { first: run.first, count: run.count, firstOutput: output.first };
      const uniforms = { size, width: width / step, rows, nan: NaN, ...place };
      const tensors = [rowsOf(x, run, width), index, rowsOf(y, output, width)];
      call.dispatch(`${call.name} ${type}`, () => gatherShader(type), tensors, uniforms, elements(size));
    }
  }
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

// They are kept with recordings, so they hold on to nothing but the number of rows.
const orderOf = (rows: number) => (index: ArrayLike<number>): Int32Array => {
  const { order } = listsOf(index, rows), whole = new Int32Array(index.length);
  whole.set(order.subarray(0, whole.length));
  return whole;
};
const startsOf = (rows: number) => (index: ArrayLike<number>): Int32Array => listsOf(index, rows).starts;

/** Both lists as the shader takes them; their lengths depend on those of the index and of the sum alone. */
function uploadLists(call: KernelCall, from: ArrayLike<number>, rows: number): tf.TensorInfo[] {
  return [
    call.uploadDerived({ from, key: `order of ${rows}`, make: orderOf(rows) }),
    call.uploadDerived({ from, key: `starts of ${rows}`, make: startsOf(rows) }),
  ];
}

function scatterAddRows(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]), index = call.input("index", [x.shape[0]], "int32");
  const rows = call.number("rows"), [count, width] = x.shape;
  if (!Number.isInteger(rows) || rows < 0) throw call.error(`attribute rows must be an integer ≥ 0, is ${rows}`);
  const host = call.hostValues(index);
  if (host) checkIndex(call, host, rows);
  if (count * rows * width === 0) return call.zeros([rows, width]);
  const y = call.output([rows, width]), { type, count: step } = packed(width);
  const where = host ? uploadLists(call, host, rows) : [index];
  const key = `${call.name} ${host ? "" : "scan "}${type}`, make = () => host ? listShader(type) : scanShader(type);
  for (const output of call.windows(rows, [width])) {
    const size = output.count * width / step;
    for (const run of call.windows(count, [width])) {
      const place = { firstX: run.first, countX: run.count, firstY: output.first };
      const tensors = [rowsOf(x, run, width), ...where, rowsOf(y, output, width)];
      call.dispatch(key, make, tensors, { size, width: width / step, ...place }, elements(size));
    }
  }
  return y;
}
