import assert from "node:assert/strict";
import { checkGradient, close, integers, ready, run, values } from "./testing.ts";

await ready();

interface Case {
  readonly segments: number[];
  /** Keys of each segment, where they are not as many as its queries. */
  readonly keys?: number[];
  readonly heads: number;
  readonly keyHeads: number;
  readonly d: number;
  readonly causal: boolean;
}

const cases: Case[] = [
  { segments: [1], heads: 1, keyHeads: 1, d: 8, causal: true },
  { segments: [16, 1, 37, 0, 64], heads: 4, keyHeads: 4, d: 24, causal: true },
  { segments: [16, 5, 64], heads: 4, keyHeads: 2, d: 24, causal: false },
  { segments: [131, 3], heads: 2, keyHeads: 1, d: 20, causal: true },
  { segments: [7, 150], heads: 2, keyHeads: 2, d: 13, causal: false },
  { segments: [289], heads: 1, keyHeads: 1, d: 64, causal: true },
  { segments: [40, 41], heads: 6, keyHeads: 2, d: 128, causal: true },
  // Keys of other lengths than queries: after a prefix, one query, no queries, and (not causal) fewer keys.
  { segments: [1], keys: [77], heads: 2, keyHeads: 1, d: 8, causal: true },
  { segments: [5, 0, 31, 1, 23], keys: [29, 17, 31, 150, 24], heads: 4, keyHeads: 2, d: 24, causal: true },
  { segments: [67, 0, 3], keys: [67, 0, 131], heads: 3, keyHeads: 3, d: 13, causal: true },
  { segments: [40, 7, 0, 1], keys: [3, 61, 11, 1], heads: 6, keyHeads: 2, d: 20, causal: false },
  { segments: [0, 0, 9], keys: [5, 40, 290], heads: 2, keyHeads: 2, d: 64, causal: true },
  {
    segments: Array.from({ length: 37 }, (_, s) => s % 5),
    keys: Array.from({ length: 37 }, (_, s) => s % 5 + s * 7 % 11),
    heads: 2,
    keyHeads: 1,
    d: 5,
    causal: true,
  },
];

const label = (c: Case): string =>
  `${c.segments.slice(0, 5)}${c.keys ? ` on ${c.keys.slice(0, 5)}` : ""} × ${c.heads}/${c.keyHeads} heads of ${c.d}` +
  (c.causal ? ", causal" : "");

/** First and last + 1 of the keys that each query meets. */
function partners(c: Case): [number, number][] {
  const keys = starts(c.keys ?? c.segments);
  return c.segments.flatMap((length, s) =>
    Array.from(
      { length },
      (_, i): [number, number] => [keys[s], c.causal ? keys[s + 1] - length + i + 1 : keys[s + 1]],
    )
  );
}

/** Attention in float64, one query at a time. */
function plain(c: Case, scale: number, q: ArrayLike<number>, k: ArrayLike<number>, v: ArrayLike<number>) {
  const ranges = partners(c);
  const out = new Float64Array(ranges.length * c.heads * c.d);
  const lse = new Float64Array(ranges.length * c.heads);
  for (const [i, [from, to]] of ranges.entries()) {
    for (let h = 0; h < c.heads; h++) {
      const kh = Math.floor(h * c.keyHeads / c.heads);
      const scores: number[] = [];
      for (let j = from; j < to; j++) {
        let score = 0;
        for (let x = 0; x < c.d; x++) score += q[(i * c.heads + h) * c.d + x] * k[(j * c.keyHeads + kh) * c.d + x];
        scores.push(score * scale);
      }
      const top = Math.max(...scores);
      const total = scores.reduce((sum, score) => sum + Math.exp(score - top), 0);
      lse[i * c.heads + h] = top + Math.log(total);
      for (const [j, score] of scores.entries()) {
        const p = Math.exp(score - top) / total;
        for (let x = 0; x < c.d; x++) {
          out[(i * c.heads + h) * c.d + x] += p * v[((from + j) * c.keyHeads + kh) * c.d + x];
        }
      }
    }
  }
  return { out, lse };
}

/** Starts of segments and the total. */
const starts = (lengths: readonly number[]): number[] =>
  lengths.reduce((ends, length) => [...ends, ends[ends.length - 1] + length], [0]);

function inputs(c: Case, size = 1) {
  const cuSeqlens = integers(starts(c.segments)), cuKeys = integers(starts(c.keys ?? c.segments));
  const n = cuSeqlens.data[c.segments.length], m = cuKeys.data[c.segments.length];
  return {
    q: values([n, c.heads, c.d], 1, size),
    k: values([m, c.keyHeads, c.d], 2, size),
    v: values([m, c.keyHeads, c.d], 3),
    cuSeqlens,
    ...(c.keys ? { cuSeqlensK: cuKeys } : {}),
  };
}

for (const c of cases) {
  Deno.test(`attention ${label(c)}: out and lse within 3e-6 of float64`, () => {
    const given = inputs(c, 2);
    const scale = 1 / Math.sqrt(c.d);
    const [out, lse] = run("MgpoAttention", given, { causal: c.causal, scale });
    const expected = plain(c, scale, given.q.data, given.k.data, given.v.data);
    close(out, expected.out, given.q.shape, 3e-6);
    close(lse, expected.lse, given.q.shape.slice(0, 2), 3e-6);
  });

  Deno.test(`attention gradient ${label(c)}: dq, dk, dv within 2e-5 of the formulas in float64`, () => {
    const given = inputs(c, 2);
    const scale = 1 / Math.sqrt(c.d);
    const dout = values(given.q.shape, 4);
    const [out, lse] = run("MgpoAttention", given, { causal: c.causal, scale });
    const [dq, dk, dv] = run("MgpoAttentionGrad", { ...given, out, lse, dout }, { causal: c.causal, scale });
    const expected = plainGradient(c, scale, given, dout.data);
    close(dq, expected.dq, given.q.shape, 2e-5);
    close(dk, expected.dk, given.k.shape, 2e-5);
    close(dv, expected.dv, given.v.shape, 2e-5);
  });
}

/** The gradient of Σ dout·out in float64, one pair of tokens at a time. */
function plainGradient(c: Case, scale: number, given: ReturnType<typeof inputs>, dout: Float32Array) {
  const [q, k, v] = [given.q.data, given.k.data, given.v.data];
  const { out, lse } = plain(c, scale, q, k, v);
  const [dq, dk, dv] = [new Float64Array(q.length), new Float64Array(k.length), new Float64Array(v.length)];
  for (const [i, [from, to]] of partners(c).entries()) {
    for (let h = 0; h < c.heads; h++) {
      const kh = Math.floor(h * c.keyHeads / c.heads);
      const a = (i * c.heads + h) * c.d;
      for (let j = from; j < to; j++) {
        const b = (j * c.keyHeads + kh) * c.d;
        let [score, slope] = [0, 0];
        for (let x = 0; x < c.d; x++) {
          score += q[a + x] * k[b + x];
          slope += dout[a + x] * (v[b + x] - out[a + x]);
        }
        const p = Math.exp(scale * score - lse[i * c.heads + h]);
        for (let x = 0; x < c.d; x++) {
          dv[b + x] += p * dout[a + x];
          dq[a + x] += scale * p * slope * k[b + x];
          dk[b + x] += scale * p * slope * q[a + x];
        }
      }
    }
  }
  return { dq, dk, dv };
}

Deno.test("attention gradient: central differences of the float64 attention within 1e-4", () => {
  const c: Case = { segments: [3, 9], heads: 2, keyHeads: 1, d: 8, causal: true };
  const given = inputs(c);
  const dout = values(given.q.shape, 4);
  const [out, lse] = run("MgpoAttention", given, { causal: true, scale: 0.5 });
  const gradients = run("MgpoAttentionGrad", { ...given, out, lse, dout }, { causal: true, scale: 0.5 });
  for (const [index, name] of (["q", "k", "v"] as const).entries()) {
    const loss = (data: Float64Array): number => {
      const [q, k, v] = (["q", "k", "v"] as const).map((other) => other === name ? data : given[other].data);
      return plain(c, 0.5, q, k, v).out.reduce((sum, value, i) => sum + value * dout.data[i], 0);
    };
    checkGradient(given[name], gradients[index], loss, 1e-4);
  }
});

Deno.test("attention of 5,000 tokens: a few rows against float64, and no L × L allocation", () => {
  const c: Case = { segments: [5000], heads: 1, keyHeads: 1, d: 8, causal: true };
  const given = inputs(c, 3);
  const [out, lse] = run("MgpoAttention", given, { causal: true, scale: 0.4 });
  for (const i of [0, 127, 128, 2500, 4999]) {
    const scores = Array.from({ length: i + 1 }, (_, j) => {
      let score = 0;
      for (let x = 0; x < 8; x++) score += given.q.data[i * 8 + x] * given.k.data[j * 8 + x];
      return 0.4 * score;
    });
    const total = scores.reduce((sum, score) => sum + Math.exp(score), 0);
    const first = scores.reduce((sum, score, j) => sum + Math.exp(score) * given.v.data[j * 8], 0) / total;
    assert.ok(Math.abs(lse.data[i] - Math.log(total)) < 1e-5, `lse of row ${i}`);
    assert.ok(Math.abs(out.data[i * 8] - first) < 3e-6, `out of row ${i}`);
  }
});

Deno.test("attention survives scores of ±1,000", () => {
  const c: Case = { segments: [50], heads: 1, keyHeads: 1, d: 8, causal: true };
  const given = inputs(c, 20);
  const [out, lse] = run("MgpoAttention", given, { causal: true, scale: 1 });
  const expected = plain(c, 1, given.q.data, given.k.data, given.v.data);
  close(out, expected.out, given.q.shape, 1e-3);
  close(lse, expected.lse, [50, 1], 1e-6);
});

Deno.test("attention names what is wrong with its inputs", () => {
  const given = inputs(cases[1]);
  const attrs = { causal: true, scale: 1 };
  assert.throws(() => run("MgpoAttention", { ...given, cuSeqlens: integers([0, 3]) }, attrs), /rise from 0 to the 118/);
  assert.throws(() => run("MgpoAttention", { ...given, k: values([118, 3, 24], 1) }, attrs), RangeError);
  const cuSeqlensK = integers([0, 16, 16, 54, 54, 118]);
  assert.throws(() => run("MgpoAttention", { ...given, cuSeqlensK }, attrs), /segment 1 has 1 queries and 0 keys/);
  assert.throws(
    () => run("MgpoAttention", { ...given, cuSeqlensK: integers([0, 118]) }, attrs),
    /5 segments of queries but 1 segments of keys/,
  );
  assert.throws(() => run("MgpoAttention", given, { causal: true }), /attribute scale/);
});
