import assert from "node:assert/strict";
import { chooseTile, linearKernel, type LinearKind, outputWorkgroups, rowStride, tileRows } from "./linear.ts";
import { normals, runKernel, startWebgpu } from "./testing.ts";

/** Rows, K and N: one, primes, one more than a tile, widths that are no multiple of four. */
const sizes = [[1, 4, 1], [3, 7, 5], [8, 64, 33], [9, 37, 13], [65, 66, 37], [2, 3584, 6]] as const;
const EPS = 1e-6;

/** Rows with the gap between them that the kernels expect. */
function spread(x: Float32Array, rows: number, width: number, count: number): Float32Array<ArrayBuffer> {
  const out = new Float32Array(count * rowStride(width));
  for (let r = 0; r < rows; r++) out.set(x.subarray(r * width, (r + 1) * width), r * rowStride(width));
  return out;
}

function normed(x: Float32Array, norm: Float32Array, rows: number, k: number): Float64Array {
  const out = new Float64Array(rows * k);
  for (let r = 0; r < rows; r++) {
    let squares = 0;
    for (let i = 0; i < k; i++) squares += x[r * k + i] ** 2;
    for (let i = 0; i < k; i++) out[r * k + i] = (x[r * k + i] * norm[i]) / Math.sqrt(squares / k + EPS);
  }
  return out;
}

function product(x: ArrayLike<number>, w: Float32Array, rows: number, k: number, n: number): Float64Array {
  const out = new Float64Array(rows * n);
  for (let r = 0; r < rows; r++) {
    for (let o = 0; o < n; o++) for (let i = 0; i < k; i++) out[r * n + o] += x[r * k + i] * w[o * k + i];
  }
  return out;
}

function near(got: Float32Array, want: ArrayLike<number>, what: string): void {
  for (let i = 0; i < want.length; i++) {
    assert.ok(
      Math.abs(got[i] - want[i]) <= 2e-5 * (1 + Math.abs(want[i])),
      `${what}: element ${i}: ${got[i]} for ${want[i]}`,
    );
  }
}

async function check(kind: LinearKind["op"], rows: number, k: number, n: number, software: boolean): Promise<void> {
  const tile = chooseTile(rows, k, software),
    blocks = Math.ceil(rows / tileRows(tile)),
    count = blocks * tileRows(tile);
  const x = normals(rows * k, 1), norm = normals(rows * k, 2).slice(0, k), xs = spread(x, rows, k, count);
  const padded = spread(norm, 1, k, 1), what = `${kind} ${rows}×${k}→${n} ${software ? "software" : "hardware"}`;
  const w = normals(n * k, 3, 1 / Math.sqrt(k)), u = normals(n * k, 4, 1 / Math.sqrt(k));
  const run = async (linear: LinearKind, inputs: Float32Array<ArrayBuffer>[], out: Float32Array<ArrayBuffer>) => {
    const kernel = linearKernel({ kind: linear, depth: k, eps: EPS, tile });
    const results = await runKernel(kernel, [...inputs, out], outputWorkgroups(linear, tile), blocks);
    return new Float32Array(results.get(inputs.length)!);
  };
  const h = normed(x, norm, rows, k);
  if (kind === "qkv") {
    const few = Math.max(1, n >> 1), total = n + 2 * few, bias = normals(total, 5);
    const wk = w.slice(0, few * k), wv = u.slice(0, few * k);
    const got = await run(
      { op: "qkv", sizes: [n, few, few] },
      [xs, padded, bias, w, wk, wv],
      new Float32Array(count * total),
    );
    const parts = [[w, n, 0], [wk, few, n], [wv, few, n + few]] as const;
    const want = new Float64Array(rows * total);
    for (const [matrix, size, offset] of parts) {
      const y = product(h, matrix, rows, k, size);
      for (let r = 0; r < rows; r++) {
        for (let o = 0; o < size; o++) want[r * total + offset + o] = y[r * size + o] + bias[offset + o];
      }
    }
    near(got, want, what);
  } else if (kind === "logits") {
    // Two windows of ids, tiles in two rounds; each writes its part of the lines.
    const first = n >> 1, out = new Float32Array(count * n), y = product(h, w, rows, k, n);
    const part = { op: kind, vocab: n, rounds: 2 } as const;
    const upper = await run({ ...part, first, outputs: n - first }, [xs, padded, w.slice(first * k)], out);
    const got = first
      ? await run({ ...part, first: 0, outputs: first }, [xs, padded, w.slice(0, first * k)], upper)
      : upper;
    near(got, y, what);
  } else if (kind === "residual") {
    const before = normals(rows * n, 6),
      got = await run({ op: "residual", outputs: n }, [xs, w], spread(before, rows, n, count));
    const y = product(x, w, rows, k, n).map((v, i) => v + before[i]);
    near(got, spread(Float32Array.from(y), rows, n, rows), what);
  } else {
    const got = await run({ op: "swiglu", outputs: n }, [xs, padded, w, u], new Float32Array(count * rowStride(n)));
    const up = product(h, u, rows, k, n), y = product(h, w, rows, k, n).map((g, i) => (g / (1 + Math.exp(-g))) * up[i]);
    near(got, spread(Float32Array.from(y), rows, n, rows), what);
  }
}

for (const kind of ["qkv", "residual", "swiglu"] as const) {
  Deno.test(`decode kernel ${kind} equals plain sums at odd sizes (2e-5)`, async () => {
    if (!await startWebgpu()) return;
    for (const [rows, k, n] of sizes) for (const software of [true, false]) await check(kind, rows, k, n, software);
  });
}

Deno.test("decode kernel logits equals plain sums, window by window of ids (2e-5)", async () => {
  if (!await startWebgpu()) return;
  for (const [rows, k, n] of [[1, 4, 1], [3, 7, 5], [7, 37, 67]]) {
    for (const software of [true, false]) await check("logits", rows, k, n, software);
  }
});

Deno.test("tiles fit their rows and a workgroup of 256 threads", () => {
  for (const software of [true, false]) {
    for (let rows = 1; rows <= 200; rows++) {
      for (const depth of [1, 4, 30, 64, 3584]) {
        const tile = chooseTile(rows, depth, software), { lanes, outputGroups, rowGroups } = tile;
        assert.ok(lanes * outputGroups * rowGroups <= 256);
        assert.ok(tileRows(tile) >= Math.min(rows, 64) && tileRows(tile) < 2 * rows);
        for (const n of [lanes, outputGroups, rowGroups]) assert.ok(Number.isInteger(Math.log2(n)), `${n}`);
      }
    }
  }
});
