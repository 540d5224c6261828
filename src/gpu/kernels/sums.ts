/**
 * Sums, in an order that depends on the shape alone.
 *
 * - `MgpoColSum`: x [N, D] → [D], Σ over rows (gradients of biases).
 * - `MgpoSumSquares`: x (any shape) → scalar Σ x² (gradient norms).
 *
 * Both take two dispatches: partial sums of at most 256 parts, then their total. Cost: one read per element.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { type Kernel, type KernelCall, rowsOf, type Shader } from "./runtime.ts";

/** Both kernels. */
export const sums: readonly Kernel[] = [
  { name: "MgpoColSum", run: columnSum },
  { name: "MgpoSumSquares", run: sumSquares },
];

const THREADS = 64;
const MOST_PARTS = 256;

/** Threads are columns; workgroups (x, y) are column blocks and parts of the rows. */
function columnShader(names: readonly string[], value: string): Shader {
  return {
    storage: [...names.map((name) => ({ name, type: "f32" } as const)), { name: "y", type: "f32", write: true }],
    uniforms: { rows: "u32", width: "u32", perPart: "u32", before: "u32", firstPart: "u32" },
    threads: THREADS,
    main: `let column = wg.x * ${THREADS}u + lane;
if (column >= u.width) { return; }
let first = wg.y * u.perPart;
let last = min(first + u.perPart, u.rows);
var sum = 0.0;
for (var local = first; local < last; local++) {
  let row = u.before + local;
  let i = local * u.width + column;
  sum += ${value};
}
y[(u.firstPart + wg.y) * u.width + column] = sum;`,
  };
}

/**
 * Σ over rows of a value per element, as a new tensor [width].
 *
 * @param matrices By their names in WGSL, [rows, width] each.
 * @param value WGSL of the value of an element: number `i` of the matrices, number `row` of the vectors.
 * @param vectors By their names in WGSL, [rows] each.
 */
export function sumColumns(
  call: KernelCall,
  key: string,
  matrices: Readonly<Record<string, tf.TensorInfo>>,
  value: string,
  [rows, width]: readonly number[],
  vectors: Readonly<Record<string, tf.TensorInfo>> = {},
): tf.TensorInfo {
  if (rows * width === 0) return call.zeros([width]);
  const perPart = Math.max(32, Math.ceil(rows / MOST_PARTS)), blocks = Math.ceil(width / THREADS);
  const windows = call.windows(rows, [width]).map((run) => ({ run, parts: Math.ceil(run.count / perPart) }));
  const parts = windows.reduce((sum, { parts }) => sum + parts, 0);
  const y = call.output([width]), partial = parts === 1 ? y : call.temporary([parts, width]);
  const make = () => columnShader([...Object.keys(matrices), ...Object.keys(vectors)], value);
  let firstPart = 0;
  for (const { run, parts } of windows) {
    const tensors = [...Object.values(matrices).map((x) => rowsOf(x, run, width)), ...Object.values(vectors), partial];
    const uniforms = { rows: run.count, width, perPart, before: run.first, firstPart };
    call.dispatch(`column sum of ${key}`, make, tensors, uniforms, [blocks, parts, 1]);
    firstPart += parts;
  }
  if (parts > 1) {
    const uniforms = { rows: parts, width, perPart: parts, before: 0, firstPart: 0 };
    call.dispatch("column sum of x", () => columnShader(["x"], "x[i]"), [partial, y], uniforms, [blocks, 1, 1]);
  }
  return y;
}

function columnSum(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]);
  return sumColumns(call, "x", { x }, "x[i]", x.shape);
}

const WIDE = 256;

/** Each workgroup sums elements at a stride of the whole grid. */
function squaresShader(value: string): Shader {
  return {
    storage: [{ name: "x", type: "f32" }, { name: "y", type: "f32", write: true }],
    uniforms: { size: "u32", firstPart: "u32" },
    threads: WIDE,
    code: `var<workgroup> part: array<f32, ${WIDE}>;`,
    main: `var sum = 0.0;
for (var i = wg.x * ${WIDE}u + lane; i < u.size; i += groups.x * ${WIDE}u) { sum += ${value}; }
part[lane] = sum;
workgroupBarrier();
for (var step = ${WIDE / 2}u; step > 0u; step /= 2u) {
  if (lane < step) { part[lane] += part[lane + step]; }
  workgroupBarrier();
}
if (lane == 0u) { y[u.firstPart + wg.x] = part[0]; }`,
  };
}

function sumSquares(call: KernelCall): tf.TensorInfo {
  const x = call.input("x"), size = tf.util.sizeFromShape(x.shape);
  if (size === 0) return call.zeros([]);
  const windows = call.windows(size, [1]).map((run) => {
    return { run, parts: Math.min(MOST_PARTS, Math.ceil(run.count / (4 * WIDE))) };
  });
  const parts = windows.reduce((sum, { parts }) => sum + parts, 0);
  const y = call.output([]), partial = parts === 1 ? y : call.temporary([parts]);
  let firstPart = 0;
  for (const { run, parts } of windows) {
    const uniforms = { size: run.count, firstPart };
    call.dispatch(call.name, () => squaresShader("x[i] * x[i]"), [rowsOf(x, run, 1), partial], uniforms, [parts, 1, 1]);
    firstPart += parts;
  }
  if (parts > 1) {
    const uniforms = { size: parts, firstPart: 0 };
    call.dispatch(`${call.name} total`, () => squaresShader("x[i]"), [partial, y], uniforms, [1, 1, 1]);
  }
  return y;
}
