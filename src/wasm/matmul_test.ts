import assert from "node:assert/strict";
import { close, type Plain, ready, run, values } from "./testing.ts";
import { tf } from "../deps.ts";

await ready();

/** Batched op(A)·op(B) + bias in float64. */
function plain(a: Plain, b: Plain, transposeA: boolean, transposeB: boolean, bias?: Plain): number[] {
  const [aRows, aColumns] = a.shape.slice(-2);
  const [bRows, bColumns] = b.shape.slice(-2);
  const [rows, depth, columns] = [
    transposeA ? aColumns : aRows,
    transposeA ? aRows : aColumns,
    transposeB ? bRows : bColumns,
  ];
  const batch = a.shape.length === 3 ? a.shape[0] : 1;
  const result: number[] = [];
  for (let n = 0; n < batch; n++) {
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns; j++) {
        let sum = bias?.data[j] ?? 0;
        for (let k = 0; k < depth; k++) {
          const left = a.data[n * rows * depth + (transposeA ? k * rows + i : i * depth + k)];
          sum += left * b.data[n * depth * columns + (transposeB ? j * depth + k : k * columns + j)];
        }
        result.push(sum);
      }
    }
  }
  return result;
}

// m, n, k around the tile (6 × 8), the blocks (K 256, N 512, M 144) and their remainders.
const sizes = [
  [1, 1, 1],
  [7, 5, 3],
  [13, 17, 19],
  [6, 8, 4],
  [12, 16, 256],
  [3, 520, 7],
  [150, 33, 300],
  [64, 1030, 257],
  [149, 24, 11],
  [2, 3, 1031],
]; // deno-fmt-ignore

for (const [m, n, k] of sizes) {
  Deno.test(`matmul ${m}×${n}×${k}: all transposes, with and without bias, within 1e-5`, () => {
    for (const transposeA of [false, true]) {
      for (const transposeB of [false, true]) {
        const a = values(transposeA ? [k, m] : [m, k], 1);
        const b = values(transposeB ? [n, k] : [k, n], 2);
        const bias = values([n], 3, 5);
        const attrs = { transposeA, transposeB };
        close(run("MgpoMatMul", { a, b }, attrs)[0], plain(a, b, transposeA, transposeB), [m, n], 1e-5);
        close(run("MgpoMatMul", { a, b, bias }, attrs)[0], plain(a, b, transposeA, transposeB, bias), [m, n], 1e-5);
      }
    }
  });
}

Deno.test("matmul of batches within 1e-5", () => {
  for (const [transposeA, transposeB] of [[false, false], [false, true], [true, false], [true, true]]) {
    const a = values(transposeA ? [5, 11, 13] : [5, 13, 11], 1);
    const b = values(transposeB ? [5, 9, 11] : [5, 11, 9], 2);
    const [c] = run("MgpoMatMul", { a, b }, { transposeA, transposeB });
    close(c, plain(a, b, transposeA, transposeB), [5, 13, 9], 1e-5);
  }
});

Deno.test("matmul goes on while the memory of the backend grows", () => {
  const a = values([70, 33], 1);
  const b = values([33, 40], 2);
  const expected = plain(a, b, false, false);
  const memory = (tf.backend() as unknown as { wasm: { asm: { memory: WebAssembly.Memory } } }).wasm.asm.memory;
  const before = memory.buffer.byteLength;
  const kept: tf.Tensor[] = [];
  close(run("MgpoMatMul", { a, b })[0], expected, [70, 40], 1e-5);
  for (let i = 0; memory.buffer.byteLength < before + 2 ** 26; i++) {
    kept.push(tf.ones([2 ** 20, 4]));
    close(run("MgpoMatMul", { a, b })[0], expected, [70, 40], 1e-5);
    assert.ok(i < 100, "memory does not grow");
  }
  kept.forEach((tensor) => tensor.dispose());
});

Deno.test("matmul leaves no tensors behind and gives the same bits again", () => {
  const a = values([50, 300], 1);
  const b = values([300, 50], 2);
  const first = run("MgpoMatMul", { a, b })[0].data;
  const count = tf.memory().numTensors;
  assert.deepEqual(run("MgpoMatMul", { a, b })[0].data, first);
  assert.equal(tf.memory().numTensors, count);
});

Deno.test("matmul names what is wrong with its inputs", () => {
  assert.throws(
    () => run("MgpoMatMul", { a: values([2, 3], 1), b: values([2, 3], 1) }),
    /inner sizes differ: 3 of a, 2 of b/,
  );
  assert.throws(() => run("MgpoMatMul", { a: values([2, 3], 1), b: values([1, 3, 2], 1) }), /both be matrices/);
  assert.throws(
    () => run("MgpoMatMul", { a: values([2, 3], 1), b: values([3, 2], 1), bias: values([3], 1) }),
    /input bias must have shape \[2\], has \[3\]/,
  );
});
