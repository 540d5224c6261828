// Tests of the kernels that work row by row: gather, norm, gate, rotary positions.
import assert from "node:assert/strict";
import { checkGradient, close, integers, ready, run, values } from "./testing.ts";

await ready();

const shapes = [[1, 1], [1, 5], [3, 4], [7, 96], [5, 131], [2, 1024], [130, 3]];

Deno.test("gather and scatter-add of rows are exact, −1 is a zero row or skipped", () => {
  for (const [rows, width] of shapes) {
    const x = values([rows, width], 1);
    const list = Array.from({ length: 2 * rows + 1 }, (_, i) => (i * 7) % (rows + 1) - 1);
    const index = integers(list);
    const gathered = list.flatMap((row) =>
      Array.from({ length: width }, (_, j) => row < 0 ? 0 : x.data[row * width + j])
    );
    close(run("MgpoGatherRows", { x, index })[0], gathered, [list.length, width], 0);
    const given = values([list.length, width], 2);
    const sums = new Float32Array((rows + 2) * width);
    for (const [i, row] of list.entries()) {
      for (let j = 0; j < width && row >= 0; j++) sums[row * width + j] += given.data[i * width + j];
    }
    close(run("MgpoScatterAddRows", { x: given, index }, { rows: rows + 2 })[0], sums, [rows + 2, width], 0);
  }
});

Deno.test("gather and scatter-add name an index out of range", () => {
  const x = values([3, 4], 1);
  assert.throws(
    () => run("MgpoGatherRows", { x, index: integers([0, 3]) }),
    /index\[1\] is 3, must be −1 or a row below 3/,
  );
  assert.throws(() => run("MgpoGatherRows", { x, index: integers([-2]) }), RangeError);
  assert.throws(() => run("MgpoScatterAddRows", { x, index: integers([0, 5, 1]) }, { rows: 5 }), /index\[1\] is 5/);
});

function rmsNorm(x: ArrayLike<number>, w: ArrayLike<number>, width: number, eps: number) {
  const rows = x.length / width;
  const rstd = Array.from({ length: rows }, (_, i) => {
    let sum = 0;
    for (let j = 0; j < width; j++) sum += x[i * width + j] ** 2;
    return 1 / Math.sqrt(sum / width + eps);
  });
  return { rstd, y: Array.from(x, (value, i) => value * rstd[Math.floor(i / width)] * w[i % width]) };
}

Deno.test("rms norm within 1e-6, its gradient within 2e-4 of central differences", () => {
  for (const [rows, width] of shapes) {
    const [x, w, dy] = [values([rows, width], 1, 3), values([width], 2), values([rows, width], 3)];
    const expected = rmsNorm(x.data, w.data, width, 1e-6);
    const [y, rstd] = run("MgpoRmsNorm", { x, w }, { eps: 1e-6 });
    close(y, expected.y, [rows, width], 1e-6);
    close(rstd, expected.rstd, [rows], 1e-6);
    const loss = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
      rmsNorm(a, b, width, 1e-6).y.reduce((sum, value, i) => sum + value * dy.data[i], 0);
    const [dx, dw] = run("MgpoRmsNormGrad", { x, w, rstd, dy });
    if (width > 1) checkGradient(x, dx, (data) => loss(data, w.data), 2e-4);
    checkGradient(w, dw, (data) => loss(x.data, data), 2e-4);
  }
});

const silu = (x: number): number => x / (1 + Math.exp(-x));

Deno.test("SwiGLU within 1e-6, its gradient within 1e-5 of central differences, extreme gates stay finite", () => {
  for (const shape of shapes) {
    const [gate, up, dy] = [values(shape, 1, 8), values(shape, 2), values(shape, 3)];
    gate.data[0] = -200;
    if (gate.data.length > 1) gate.data[1] = 200;
    const glu = (g: ArrayLike<number>, u: ArrayLike<number>): number[] =>
      Array.from(g, (value, i) => silu(value) * u[i]);
    close(run("MgpoSwiGLU", { gate, up })[0], glu(gate.data, up.data), shape, 1e-6);
    const [dgate, dup] = run("MgpoSwiGLUGrad", { gate, up, dy });
    const loss = (g: ArrayLike<number>, u: ArrayLike<number>): number =>
      glu(g, u).reduce((sum, value, i) => sum + value * dy.data[i], 0);
    checkGradient(gate, dgate, (data) => loss(data, up.data), 1e-5);
    checkGradient(up, dup, (data) => loss(gate.data, data), 1e-5);
  }
});

Deno.test("rope within 1e-6; its inverse is the transpose", () => {
  for (const [n, heads, d] of [[1, 1, 2], [5, 3, 8], [7, 4, 24], [3, 2, 10], [4, 1, 128]]) {
    const [x, cos, sin] = [values([n, heads, d], 1), values([n, d], 2), values([n, d], 3)];
    const half = d / 2;
    const rotate = (inverse: boolean) =>
      Array.from(x.data, (value, at) => {
        const [row, j] = [Math.floor(at / (heads * d)) * d, at % d];
        const low = j < half;
        const other = x.data[at + (low ? half : -half)];
        if (!inverse) return value * cos.data[row + j] + (low ? -other : other) * sin.data[row + j];
        return value * cos.data[row + j] + (low ? other : -other) * sin.data[row + (low ? j + half : j - half)];
      });
    const [y] = run("MgpoRope", { x, cos, sin }, { inverse: false });
    close(y, rotate(false), [n, heads, d], 1e-6);
    const [z] = run("MgpoRope", { x, cos, sin }, { inverse: true });
    close(z, rotate(true), [n, heads, d], 1e-6);
    const given = values([n, heads, d], 4);
    const [back] = run("MgpoRope", { x: given, cos, sin }, { inverse: true });
    const dot = (a: ArrayLike<number>, b: ArrayLike<number>) =>
      Array.from(a, (v, i) => v * b[i]).reduce((s, v) => s + v, 0);
    assert.ok(Math.abs(dot(y.data, given.data) - dot(x.data, back.data)) < 1e-4 * Math.sqrt(n * heads * d));
  }
});
