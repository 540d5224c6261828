import assert from "node:assert/strict";
import { planMatMul } from "./matmul.ts";
import { tileColumns, tileRows, tiles } from "./matmul_tiles.ts";
import { close, gpuTest, type Plain, run, values } from "./testing.ts";

/** op(A)·op(B) + bias in float64. */
function plain(a: Plain, b: Plain, [batch, m, n, k]: number[], ta: boolean, tb: boolean, bias?: Plain): Float64Array {
  const c = new Float64Array(batch * m * n);
  for (let z = 0; z < batch; z++) {
    for (let i = 0; i < m; i++) {
      for (let j = 0; j < n; j++) {
        let sum = bias ? bias.data[j] : 0;
        for (let x = 0; x < k; x++) {
          sum += a.data[z * m * k + (ta ? x * m + i : i * k + x)] * b.data[z * n * k + (tb ? j * k + x : x * n + j)];
        }
        c[(z * m + i) * n + j] = sum;
      }
    }
  }
  return c;
}

/** Both programs: that for processors and that for GPUs. */
const programs = [true, false];
const sizes = [[1, 1, 1], [1, 7, 3], [5, 1, 64], [31, 33, 17], [64, 64, 16], [65, 130, 40], [3, 4, 2000], [
  130,
  36,
  72,
]];

for (const [m, n, k] of sizes) {
  gpuTest(
    `matmul [${m}, ${k}]·[${k}, ${n}], both programs, four orders, with and without bias: within 1e-5 of float64`,
    async () => {
      for (const software of programs) {
        for (const [transposeA, transposeB] of [[false, false], [false, true], [true, false], [true, true]]) {
          const a = values(transposeA ? [k, m] : [m, k], 1), b = values(transposeB ? [n, k] : [k, n], 2);
          const bias = values([n], 3), attrs = { transposeA, transposeB, software };
          const [c] = await run("MgpoMatMul", { a, b }, attrs);
          close(c, plain(a, b, [1, m, n, k], transposeA, transposeB), [m, n], 1e-5);
          const [d] = await run("MgpoMatMul", { a, b, bias }, attrs);
          close(d, plain(a, b, [1, m, n, k], transposeA, transposeB, bias), [m, n], 1e-5);
        }
      }
    },
  );
}

gpuTest("matmul of a batch: within 1e-5 of float64", async () => {
  for (const [batch, m, n, k] of [[3, 5, 6, 7], [2, 40, 33, 12], [5, 1, 1, 1]]) {
    for (const [transposeB, software] of [[false, false], [true, false], [false, true], [true, true]]) {
      const a = values([batch, m, k], 1), b = values(transposeB ? [batch, n, k] : [batch, k, n], 2);
      const [c] = await run("MgpoMatMul", { a, b }, { transposeB, software });
      close(c, plain(a, b, [batch, m, n, k], false, transposeB), [batch, m, n], 1e-5);
    }
  }
});

gpuTest("matmul gives the same bits again, also where the inner axis is cut", async () => {
  const [rows, columns, depth] = [12, 20, 3001];
  const a = values([depth, rows], 1), b = values([depth, columns], 2), bias = values([columns], 3);
  for (const software of programs) {
    assert.ok(planMatMul({ batch: 1, rows, columns, depth }, software).parts > 1);
    const [first] = await run("MgpoMatMul", { a, b, bias }, { transposeA: true, software });
    close(first, plain(a, b, [1, rows, columns, depth], true, false, bias), [rows, columns], 1e-5);
    const [second] = await run("MgpoMatMul", { a, b, bias }, { transposeA: true, software });
    assert.deepEqual(second.data, first.data);
  }
});

gpuTest("the large and medium tiles of matmul: within 1e-5 of float64", async () => {
  for (const [m, n, k] of [[1030, 1100, 5], [700, 900, 6]]) {
    const plan = planMatMul({ batch: 1, rows: m, columns: n, depth: k }, false);
    assert.equal(plan.tile, m > 1000 ? tiles.large : tiles.medium);
    const a = values([m, k], 1), b = values([n, k], 2);
    const [c] = await run("MgpoMatMul", { a, b }, { transposeB: true, software: false });
    close(c, plain(a, b, [1, m, n, k], false, true), [m, n], 1e-5);
  }
});

gpuTest("matmul names what is wrong with its inputs", async () => {
  await assert.rejects(run("MgpoMatMul", { a: values([2, 3], 1), b: values([4, 2], 1) }), /inner sizes differ: 3 .* 4/);
  await assert.rejects(run("MgpoMatMul", { a: values([2, 3], 1), b: values([1, 3, 2], 1) }), /both be matrices/);
  await assert.rejects(run("MgpoMatMul", { a: values([2, 0], 1), b: values([0, 2], 1) }), /inner size/);
  const [empty] = await run("MgpoMatMul", { a: values([0, 3], 1), b: values([3, 2], 1) });
  assert.deepEqual(empty.shape, [0, 2]);
});

Deno.test("matmul plans: parts cover the inner axis, tiles fit the result", () => {
  for (const software of [true, false]) {
    for (
      const [rows, columns, depth] of [[1, 1, 1], [96, 96, 6912], [6912, 96, 192], [4096, 4096, 4096], [
        8,
        151936,
        2048,
      ]]
    ) {
      const { tile, depthPerPart, parts } = planMatMul({ batch: 1, rows, columns, depth }, software);
      assert.ok(depthPerPart * parts >= depth && depthPerPart * (parts - 1) < depth);
      assert.ok(parts === 1 || depthPerPart % 16 === 0);
      if (rows >= 4096 && columns >= 4096) assert.equal(tile, software ? tiles.direct : tiles.large);
      assert.ok(tileRows(tile) % 4 === 0 && tileColumns(tile) % 4 === 0);
    }
  }
  assert.ok(planMatMul({ batch: 1, rows: 96, columns: 96, depth: 6912 }, false).parts > 4);
});
