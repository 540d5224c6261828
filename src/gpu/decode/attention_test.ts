import assert from "node:assert/strict";
import { attentionKernel, type AttentionOptions, loneAttentionKernel, vectorWidth } from "./attention.ts";
import { rowStride } from "./linear.ts";
import { normals, runKernel, startWebgpu, stepRecord } from "./testing.ts";
import { ROW_WORDS } from "./wgsl.ts";

/** Heads, key heads, width of a head. */
const shapes = [[4, 2, 16], [3, 1, 2], [4, 4, 12], [7, 1, 10], [2, 2, 24], [14, 2, 64], [2, 1, 128]] as const;
const CAPACITY = 32;

function rotate(x: Float32Array, turns: Float32Array, position: number): Float32Array {
  const d = x.length, half = d / 2, at = position * d;
  return x.map((v, i) =>
    i < half
      ? v * turns[at + i] - x[i + half] * turns[at + half + i]
      : v * turns[at + i - half] + x[i - half] * turns[at + i]
  );
}

async function check(lone: boolean, heads: number, kvHeads: number, headDim: number, made: number): Promise<void> {
  const lengths = [1, 37, 3, 130, 64], slotOf = [2, 0, 6, 5, 1], slots = 8, count = lengths.length, d = headDim;
  const o: AttentionOptions = { heads, kvHeads, headDim, slots, capacity: CAPACITY, threads: lone ? 8 : 32 };
  const tokens = lengths.reduce((a, b) => a + b), width = heads + 2 * kvHeads, stride = kvHeads * d, positions = 300;
  const qkv = normals(count * width * d, 1), k = normals(tokens * stride, 2), v = normals(tokens * stride, 3);
  const half = slots * CAPACITY * stride, cache = normals(2 * half, 4), before = cache.slice();
  const turns = Float32Array.from({ length: positions * d }, (_, i) => {
    const [p, part] = [Math.floor(i / d), i % d], angle = p / 10 ** ((part % (d / 2)) / d);
    return part < d / 2 ? Math.cos(angle) : Math.sin(angle);
  });
  const rows = new Uint32Array(slots * ROW_WORDS), starts: number[] = [];
  let at = 0;
  lengths.forEach((length, i) => {
    starts.push(at);
    rows.set([slotOf[i], at, length, 11 * i, 0, 0, 0, count], i * ROW_WORDS);
    at += length;
  });
  const kernel = (lone ? loneAttentionKernel : attentionKernel)(o),
    out = new Float32Array(slots * rowStride(heads * d));
  const [x, y] = lone ? [Math.ceil((count * heads) / 8), 1] : [heads, count];
  const results = await runKernel(
    kernel,
    [qkv, k, v, cache, turns, rows, out, stepRecord(made + 1, slots, [0, 0], 1)],
    x,
    y,
  );
  const got = new Float32Array(results.get(6)!), stored = new Float32Array(results.get(3)!);
  const what = `${lone ? "lone" : "shared"} ${heads}/${kvHeads}×${d}, ${made} made`;
  for (let r = 0; r < count; r++) {
    const piece = (unit: number) => qkv.subarray((r * width + unit) * d, (r * width + unit + 1) * d);
    for (let h = 0; h < heads; h++) {
      const kv = Math.floor(h / (heads / kvHeads)), slotAt = (slotOf[r] * CAPACITY * kvHeads + kv) * d;
      const q = rotate(piece(h), turns, 11 * r + made), mine = rotate(piece(heads + kv), turns, 11 * r + made);
      const keys = [mine], values = [piece(heads + kvHeads + kv)];
      for (let j = 0; j < lengths[r]; j++) {
        const from = (starts[r] + j) * stride + kv * d;
        keys.push(k.subarray(from, from + d));
        values.push(v.subarray(from, from + d));
      }
      for (let j = 0; j < made; j++) {
        const from = slotAt + j * stride;
        keys.push(before.subarray(from, from + d));
        values.push(before.subarray(half + from, half + from + d));
      }
      const scores = keys.map((key) => key.reduce((s, x, i) => s + x * q[i], 0) / Math.sqrt(d)),
        top = Math.max(...scores);
      const chances = scores.map((s) => Math.exp(s - top)), sum = chances.reduce((a, b) => a + b);
      for (let i = 0; i < d; i++) {
        const want = chances.reduce((s, p, j) => s + p * values[j][i], 0) / sum;
        const value = got[r * rowStride(heads * d) + h * d + i];
        assert.ok(Math.abs(value - want) < 2e-5, `${what}: row ${r} head ${h} [${i}]: ${value} for ${want}`);
        const to = slotAt + made * stride + i;
        assert.ok(Math.abs(stored[to] - mine[i]) < 1e-5, `${what}: stored key ${i}`);
        assert.equal(stored[half + to], values[0][i]);
      }
    }
  }
  const changed = stored.reduce((n, x, i) => n + (x === before[i] ? 0 : 1), 0);
  assert.ok(changed <= 2 * count * stride, `${what}: ${changed} elements of the cache changed`);
}

for (const lone of [true, false]) {
  Deno.test(`decode attention (${lone ? "a thread" : "a workgroup"} a head) equals plain loops (2e-5)`, async () => {
    if (!await startWebgpu()) return;
    for (const [heads, kvHeads, d] of shapes) if (!lone || d <= 64) await check(lone, heads, kvHeads, d, 5);
    await check(lone, 4, 2, 16, 0);
    await check(lone, 4, 2, 16, CAPACITY - 1);
  });
}

Deno.test("halves of a head are whole vectors", () => {
  assert.deepEqual([2, 10, 12, 16, 24, 80, 128].map(vectorWidth), [1, 1, 2, 4, 4, 4, 4]);
});
