/**
 * Root-mean-square norm.
 *
 * - `MgpoRmsNorm`: x [N, D], w [D], attribute `eps` → y [N, D], rstd [N]:
 *   rstd = (mean(x²) + eps)^−½, y = x · rstd · w.
 * - `MgpoRmsNormGrad`: x, w, rstd, dy → dx, dw:
 *   dx = rstd · (dy·w − x · rstd² · mean(dy·w·x)), dw = Σ_rows dy · x · rstd.
 *
 * Several lanes share a row (4 to 256 by its length). Cost: two passes over each row, and one more over x and dy for dw,
 * whose rows are summed in parts (see `sums.ts`).
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import { fold, rowReductions, type RowSplit, rowStart, splitRows } from "./lanes.ts";
import { type Kernel, type KernelCall, rowsOf, type Shader } from "./runtime.ts";
import { sumColumns } from "./sums.ts";

/** Both kernels. */
export const norm: readonly Kernel[] = [
  { name: "MgpoRmsNorm", run: forward },
  { name: "MgpoRmsNormGrad", run: backward },
];

function forwardShader(split: RowSplit): Shader {
  return {
    storage: [
      { name: "x", type: "f32" },
      { name: "w", type: "f32" },
      { name: "y", type: "f32", write: true },
      { name: "rstd", type: "f32", write: true },
    ],
    uniforms: { rows: "u32", width: "u32", before: "u32", eps: "f32" },
    threads: split.threads,
    code: rowReductions(split),
    main: `${rowStart(split)}
let first = row * u.width;
var own = 0.0;
if (live) { for (var j = at; j < u.width; j += ${split.lanes}u) { own += x[first + j] * x[first + j]; } }
let inverse = 1.0 / sqrt(laneSum(lane, own) / f32(u.width) + u.eps);
if (!live) { return; }
for (var j = at; j < u.width; j += ${split.lanes}u) { y[first + j] = x[first + j] * inverse * w[j]; }
if (at == 0u) { rstd[u.before + row] = inverse; }`,
  };
}

function backwardShader(split: RowSplit): Shader {
  return {
    storage: [
      ...["x", "w", "rstd", "dy"].map((name) => ({ name, type: "f32" } as const)),
      { name: "dx", type: "f32", write: true },
    ],
    uniforms: { rows: "u32", width: "u32", before: "u32" },
    threads: split.threads,
    code: rowReductions(split),
    main: `${rowStart(split)}
let first = row * u.width;
var own = 0.0;
if (live) { for (var j = at; j < u.width; j += ${split.lanes}u) { own += dy[first + j] * w[j] * x[first + j]; } }
let mean = laneSum(lane, own) / f32(u.width);
if (!live) { return; }
let scale = rstd[u.before + row];
let pull = mean * scale * scale;
for (var j = at; j < u.width; j += ${split.lanes}u) {
  dx[first + j] = scale * (dy[first + j] * w[j] - x[first + j] * pull);
}`,
  };
}

function forward(call: KernelCall): tf.TensorInfo[] {
  const x = call.input("x", [null, null]);
  const [rows, width] = x.shape;
  const w = call.input("w", [width]), eps = call.number("eps");
  const y = call.output(x.shape), rstd = call.output([rows]);
  if (rows * width === 0) return [y, rstd];
  const split = splitRows(width), make = () => forwardShader(split);
  for (const run of call.windows(rows, [width])) {
    const tensors = [rowsOf(x, run, width), w, rowsOf(y, run, width), rstd];
    const uniforms = { rows: run.count, width, before: run.first, eps };
    call.dispatch(`${call.name} ${split.lanes}`, make, tensors, uniforms, fold(Math.ceil(run.count / split.rows)));
  }
  return [y, rstd];
}

function backward(call: KernelCall): tf.TensorInfo[] {
  const x = call.input("x", [null, null]);
  const [rows, width] = x.shape;
  const w = call.input("w", [width]), rstd = call.input("rstd", [rows]), dy = call.input("dy", x.shape);
  const dx = call.output(x.shape);
  if (rows * width === 0) return [dx, call.zeros([width])];
  const split = splitRows(width), make = () => backwardShader(split);
  for (const run of call.windows(rows, [width])) {
    const tensors = [rowsOf(x, run, width), w, rstd, rowsOf(dy, run, width), rowsOf(dx, run, width)];
    const uniforms = { rows: run.count, width, before: run.first };
    call.dispatch(`${call.name} ${split.lanes}`, make, tensors, uniforms, fold(Math.ceil(run.count / split.rows)));
  }
  return [dx, sumColumns(call, "x·dy·rstd", { x, dy }, "x[i] * rstd[row] * dy[i]", x.shape, { rstd })];
}
