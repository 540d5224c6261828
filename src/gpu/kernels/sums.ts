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
import type { Binding, Kernel, KernelCall, Shader } from "./runtime.ts";

/** Both kernels. */
export const sums: readonly Kernel[] = [
  { name: "MgpoColSum", run: columnSum },
  { name: "MgpoSumSquares", run: sumSquares },
];

const THREADS = 64;
const MOST_PARTS = 256;

/** Threads are columns; workgroups (x, y) are column blocks and parts of the rows. */
function columnShader(storage: readonly Binding[], value: string): Shader {
  return {
    storage: [...storage, { name: "y", type: "f32", write: true }],
    uniforms: { rows: "u32", width: "u32", perPart: "u32" },
    threads: THREADS,
    main: `let column = wg.x * ${THREADS}u + lane;
if (column >= u.width) { return; }
let first = wg.y * u.perPart;
let last = min(first + u.perPart, u.rows);
var sum = 0.0;
for (var row = first; row < last; row++) {
  let i = row * u.width + column;
  sum += ${value};
}
y[wg.y * u.width + column] = sum;`,
  };
}

/**
 * Σ over rows of a value per element, as a new tensor [width].
 *
 * @param value WGSL of the value of element `i` in `row`, from the bindings.
 */
export function sumColumns(
  call: KernelCall,
  key: string,
  storage: readonly Binding[],
  tensors: readonly tf.TensorInfo[],
  value: string,
  [rows, width]: readonly number[],
): tf.TensorInfo {
  if (rows * width === 0) return call.zeros([width]);
  const perPart = Math.max(32, Math.ceil(rows / MOST_PARTS)), parts = Math.ceil(rows / perPart);
  const blocks = Math.ceil(width / THREADS);
  const y = call.output([width]), partial = parts === 1 ? y : call.temporary([parts, width]);
  const make = () => columnShader(storage, value);
  call.dispatch(`column sum of ${key}`, make, [...tensors, partial], { rows, width, perPart }, [blocks, parts, 1]);
  if (parts > 1) {
    const total = () => columnShader([{ name: "x", type: "f32" }], "x[i]");
    const uniforms = { rows: parts, width, perPart: parts };
    call.dispatch("column sum of x", total, [partial, y], uniforms, [blocks, 1, 1]);
  }
  return y;
}

function columnSum(call: KernelCall): tf.TensorInfo {
  const x = call.input("x", [null, null]);
  return sumColumns(call, "x", [{ name: "x", type: "f32" }], [x], "x[i]", x.shape);
}

const WIDE = 256;

/** Each workgroup sums elements at a stride of the whole grid. */
function squaresShader(value: string): Shader {
  return {
    storage: [{ name: "x", type: "f32" }, { name: "y", type: "f32", write: true }],
    uniforms: { size: "u32" },
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
if (lane == 0u) { y[wg.x] = part[0]; }`,
  };
}

function sumSquares(call: KernelCall): tf.TensorInfo {
  const x = call.input("x"), size = tf.util.sizeFromShape(x.shape);
  if (size === 0) return call.zeros([]);
  const parts = Math.min(MOST_PARTS, Math.ceil(size / (4 * WIDE)));
  const y = call.output([]), partial = parts === 1 ? y : call.temporary([parts]);
  call.dispatch(call.name, () => squaresShader("x[i] * x[i]"), [x, partial], { size }, [parts, 1, 1]);
  if (parts > 1) {
    call.dispatch(`${call.name} total`, () => squaresShader("x[i]"), [partial, y], { size: parts }, [1, 1, 1]);
  }
  return y;
}
