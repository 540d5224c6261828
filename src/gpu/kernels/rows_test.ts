import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { listsOf } from "./gather.ts";
import { call, close, gpuTest, integers, read, run, tensorsOf, values } from "./testing.ts";

const shapes = [[1, 1], [3, 7], [5, 64], [67, 96], [9, 515], [2, 8200], [300, 33]];

gpuTest("RMS norm and its gradient: within 3e-6 of float64", async () => {
  for (const [n, d] of shapes) {
    const x = values([n, d], 1, 2), w = values([d], 2), dy = values([n, d], 3), eps = 1e-6;
    const y = new Float64Array(n * d), dx = new Float64Array(n * d), dw = new Float64Array(d), rstd: number[] = [];
    for (let i = 0; i < n; i++) {
      let squares = 0, mean = 0;
      for (let j = 0; j < d; j++) squares += x.data[i * d + j] ** 2;
      const r = 1 / Math.sqrt(squares / d + eps);
      rstd.push(r);
      for (let j = 0; j < d; j++) mean += dy.data[i * d + j] * w.data[j] * x.data[i * d + j] / d;
      for (let j = 0; j < d; j++) {
        const at = i * d + j;
        y[at] = x.data[at] * r * w.data[j];
        dx[at] = r * (dy.data[at] * w.data[j] - x.data[at] * r * r * mean);
        dw[j] += dy.data[at] * x.data[at] * r;
      }
    }
    const outputs = await run("MgpoRmsNorm", { x, w }, { eps });
    close(outputs[0], y, [n, d], 3e-6);
    close(outputs[1], rstd, [n], 3e-6);
    const grads = await run("MgpoRmsNormGrad", { x, w, rstd: outputs[1], dy });
    close(grads[0], dx, [n, d], 3e-6);
    close(grads[1], dw, [d], 3e-6);
  }
});

gpuTest("rope and its inverse: within 1e-6 of float64, and the inverse undoes it", async () => {
  for (const [n, h, d] of [[1, 1, 2], [5, 3, 24], [67, 2, 10]]) {
    const x = values([n, h, d], 1), angles = values([n, d / 2], 2, 3).data;
    const table = (f: (a: number) => number) => ({
      data: Float32Array.from({ length: n * d }, (_, i) => f(angles[Math.floor(i / d) * (d / 2) + i % (d / 2)])),
      shape: [n, d],
    });
    const cos = table(Math.cos), sin = table(Math.sin);
    const expected = Float64Array.from(x.data, (value, i) => {
      const j = i % d, at = Math.floor(i / (h * d)) * d + j;
      const other = j < d / 2 ? -x.data[i + d / 2] : x.data[i - d / 2];
      return value * cos.data[at] + other * sin.data[at];
    });
    const [y] = await run("MgpoRope", { x, cos, sin }, { inverse: false });
    close(y, expected, [n, h, d], 1e-6);
    const [back] = await run("MgpoRope", { x: y, cos, sin }, { inverse: true });
    close(back, x.data, [n, h, d], 1e-6);
  }
  const odd = { x: values([1, 1, 3], 1), cos: values([1, 3], 1), sin: values([1, 3], 1) };
  await assert.rejects(run("MgpoRope", odd), /even/);
});

gpuTest(
  "gather copies rows, −1 gives zeros; a bad index is named, or gives NaN where it is on the GPU alone",
  async () => {
    for (const [n, d] of shapes.slice(0, 5)) {
      const x = values([n, d], 1), index = integers(Array.from({ length: 2 * n + 1 }, (_, i) => i * 7 % (n + 1) - 1));
      const expected = [...index.data].flatMap((r) =>
        Array.from({ length: d }, (_, j) => r < 0 ? 0 : x.data[r * d + j])
      );
      const [y] = await run("MgpoGatherRows", { x, index });
      close(y, expected, [index.data.length, d], 0);
    }
    const x = values([3, 4], 1);
    await assert.rejects(run("MgpoGatherRows", { x, index: integers([0, 3]) }), /index\[1\] is 3/);
    const onDevice = tf.tidy(() => {
      const index = tf.tensor1d([0, 3], "int32");
      call("MgpoGatherRows", { x: tf.zeros([4, 4]), index }); // from here on the host has no copy of the index
      return call("MgpoGatherRows", { ...tensorsOf({ x }), index });
    });
    const [y] = await read(onDevice);
    tf.dispose(onDevice);
    assert.ok(y.data.subarray(0, 4).every(Number.isFinite) && y.data.subarray(4).every(Number.isNaN));
  },
);

gpuTest(
  "scatter-add sums rows in order: within 1e-6 of float64, the same from a list and from an index on the GPU",
  async () => {
    for (const [m, d, rows] of [[1, 1, 1], [7, 5, 3], [67, 8, 90], [301, 33, 11]]) {
      const x = values([m, d], 1), index = integers(Array.from({ length: m }, (_, i) => (i * i) % (rows + 1) - 1));
      const expected = new Float64Array(rows * d);
      for (let i = 0; i < m; i++) {
        for (let j = 0; j < d && index.data[i] >= 0; j++) expected[index.data[i] * d + j] += x.data[i * d + j];
      }
      const [y] = await run("MgpoScatterAddRows", { x, index }, { rows });
      close(y, expected, [rows, d], 1e-6);
      const onDevice = tf.tidy(() => {
        const tensors = tensorsOf({ x, index });
        call("MgpoGatherRows", tensors.x.shape[0] >= rows ? tensors : { x: tf.zeros([rows, d]), index: tensors.index });
        return call("MgpoScatterAddRows", tensors, { rows });
      });
      const [again] = await read(onDevice);
      tf.dispose(onDevice);
      assert.deepEqual(again.data, y.data);
    }
    const x = values([2, 4], 1);
    await assert.rejects(run("MgpoScatterAddRows", { x, index: integers([0, 5]) }, { rows: 5 }), /index\[1\] is 5/);
    const [empty] = await run("MgpoScatterAddRows", { x: values([0, 4], 1), index: integers([]) }, { rows: 2 });
    close(empty, new Float32Array(8), [2, 4], 0);
  },
);

Deno.test("lists of positions keep the order and skip −1", () => {
  const { order, starts } = listsOf([2, -1, 0, 2, 0, 2], 4);
  assert.deepEqual([...starts], [0, 2, 2, 5, 5]);
  assert.deepEqual([...order], [2, 4, 0, 3, 5]);
});

gpuTest("column sums and sums of squares: within 2e-6 of float64", async () => {
  for (const [n, d] of [...shapes, [20_011, 3]]) {
    const x = values([n, d], 1), columns = new Float64Array(d);
    let squares = 0;
    for (let i = 0; i < n * d; i++) {
      columns[i % d] += x.data[i];
      squares += x.data[i] ** 2;
    }
    close((await run("MgpoColSum", { x }))[0], columns, [d], 2e-6);
    close((await run("MgpoSumSquares", { x }))[0], [squares], [], 2e-6);
  }
  close((await run("MgpoColSum", { x: values([0, 5], 1) }))[0], new Float32Array(5), [5], 0);
  const many = values([1_000_003], 4), expected = many.data.reduce((sum, value) => sum + value ** 2, 0);
  close((await run("MgpoSumSquares", { x: many }))[0], [expected], [], 2e-6);
});
