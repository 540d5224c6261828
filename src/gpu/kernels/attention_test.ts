import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { fitsDirect } from "./attention_direct.ts";
import { call, close, gpuTest, integers, read, run, tensorsOf, values } from "./testing.ts";

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
  { segments: [0, 16, 5, 64, 0], heads: 4, keyHeads: 2, d: 24, causal: false },
  { segments: [131, 3], heads: 2, keyHeads: 1, d: 20, causal: true },
  { segments: [7, 50], heads: 2, keyHeads: 2, d: 13, causal: false },
  { segments: Array.from({ length: 40 }, () => 4), heads: 1, keyHeads: 1, d: 1, causal: false },
  { segments: [97], heads: 1, keyHeads: 1, d: 64, causal: true },
  { segments: [33, 32], heads: 2, keyHeads: 1, d: 80, causal: false },
  { segments: [40, 41], heads: 6, keyHeads: 2, d: 128, causal: true },
  // Keys of other lengths than queries: after a prefix, one query, no queries, and (not causal) fewer keys.
  { segments: [1], keys: [77], heads: 2, keyHeads: 1, d: 8, causal: true },
  { segments: [5, 0, 31, 1, 23], keys: [29, 17, 31, 150, 24], heads: 4, keyHeads: 2, d: 24, causal: true },
  { segments: [67, 0, 3], keys: [67, 0, 131], heads: 3, keyHeads: 3, d: 13, causal: true },
  { segments: [40, 7, 0, 1], keys: [3, 61, 11, 1], heads: 6, keyHeads: 2, d: 24, causal: false },
  { segments: [0, 0, 9], keys: [5, 40, 290], heads: 2, keyHeads: 2, d: 64, causal: true },
  {
    segments: Array.from({ length: 37 }, (_, s) => s % 5),
    keys: Array.from({ length: 37 }, (_, s) => s % 5 + s * 7 % 11),
    heads: 2,
    keyHeads: 1,
    d: 8,
    causal: true,
  },
];

const label = (c: Case): string =>
  `${c.segments.slice(0, 5)}${c.keys ? ` on ${c.keys.slice(0, 5)}` : ""} × ${c.heads}/${c.keyHeads} heads of ${c.d}` +
  (c.causal ? ", causal" : "");

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

/** Attention and, with dout, its gradient in float64, one query at a time. */
function plain(c: Case, scale: number, given: ReturnType<typeof inputs>, dout: ArrayLike<number>) {
  const { heads, keyHeads, d } = c, [q, k, v] = [given.q.data, given.k.data, given.v.data];
  const [out, dq] = [new Float64Array(q.length), new Float64Array(q.length)];
  const [dk, dv] = [new Float64Array(k.length), new Float64Array(k.length)];
  const lse = new Float64Array(q.length / d);
  const dot = (a: ArrayLike<number>, i: number, b: ArrayLike<number>, j: number): number => {
    let sum = 0;
    for (let x = 0; x < d; x++) sum += a[i + x] * b[j + x];
    return sum;
  };
  for (let s = 0; s < c.segments.length; s++) {
    const [from, end] = given.cuSeqlens.data.subarray(s, s + 2), cuKeys = given.cuSeqlensK ?? given.cuSeqlens;
    const [keysFrom, keysEnd] = cuKeys.data.subarray(s, s + 2);
    for (let row = from * heads; row < end * heads; row++) {
      const i = Math.floor(row / heads), a = row * d, kh = Math.floor(row % heads * keyHeads / heads);
      const key = (j: number) => ((keysFrom + j) * keyHeads + kh) * d;
      const scores = Array.from(
        { length: keysEnd - keysFrom - (c.causal ? end - i - 1 : 0) },
        (_, j) => scale * dot(q, a, k, key(j)),
      );
      const top = Math.max(...scores);
      lse[row] = top + Math.log(scores.reduce((sum, score) => sum + Math.exp(score - top), 0));
      const p = scores.map((score) => Math.exp(score - lse[row]));
      p.forEach((p, j) => {
        for (let x = 0; x < d; x++) out[a + x] += p * v[key(j) + x];
      });
      const mean = dot(dout, a, out, a);
      p.forEach((p, j) => {
        const ds = scale * p * (dot(dout, a, v, key(j)) - mean);
        for (let x = 0; x < d; x++) {
          dv[key(j) + x] += p * dout[a + x];
          dq[a + x] += ds * k[key(j) + x];
          dk[key(j) + x] += ds * q[a + x];
        }
      });
    }
  }
  return { out, lse, dq, dk, dv };
}

/** Each case by tiles and, where heads are small enough, by the program for adapters that compute on the processor. */
const programs = cases.flatMap((c) => (fitsDirect(c.d) ? [true, false] : [false]).map((software) => ({ c, software })));

for (const { c, software } of programs) {
  const program = software ? "by rows" : "by tiles";
  gpuTest(`attention ${program}, ${label(c)}: within 3e-6 of float64, dq, dk, dv within 2e-5`, async () => {
    const given = inputs(c, 2), attrs = { causal: c.causal, scale: 1 / Math.sqrt(c.d), software };
    const dout = values(given.q.shape, 4), expected = plain(c, attrs.scale, given, dout.data);
    const [out, lse] = await run("MgpoAttention", given, attrs);
    close(out, expected.out, given.q.shape, 3e-6);
    close(lse, expected.lse, given.q.shape.slice(0, 2), 3e-6);
    const [dq, dk, dv] = await run("MgpoAttentionGrad", { ...given, out, lse, dout }, attrs);
    close(dq, expected.dq, given.q.shape, 2e-5);
    close(dk, expected.dk, given.k.shape, 2e-5);
    close(dv, expected.dv, given.v.shape, 2e-5);
  });
}

for (const { c, software } of [{ c: cases[8], software: false }, { c: cases[1], software: true }]) {
  gpuTest(`attention and its gradient give the same bits again, ${label(c)}`, async () => {
    const given = inputs(c), attrs = { causal: true, scale: 0.3, software }, dout = values(given.q.shape, 4);
    const twice = [0, 1].map(() =>
      tf.tidy(() => {
        const tensors = tensorsOf({ ...given, dout });
        const [out, lse] = call("MgpoAttention", tensors, attrs);
        return [out, lse, ...call("MgpoAttentionGrad", { ...tensors, out, lse }, attrs)];
      })
    );
    const [first, second] = await Promise.all(twice.map(read));
    first.forEach(({ data }, i) => assert.deepEqual(second[i].data, data));
    tf.dispose(twice);
  });
}

gpuTest("attention without any query: no output, and zeros for the keys' gradients", async () => {
  const given = inputs({ segments: [0, 0], keys: [3, 34], heads: 2, keyHeads: 1, d: 8, causal: true });
  const attrs = { causal: true, scale: 1 }, [out, lse] = await run("MgpoAttention", given, attrs);
  assert.deepEqual([out.shape, lse.shape], [[0, 2, 8], [0, 2]]);
  const [dq, dk, dv] = await run("MgpoAttentionGrad", { ...given, out, lse, dout: out }, attrs);
  assert.deepEqual(dq.shape, [0, 2, 8]);
  for (const gradient of [dk, dv]) close(gradient, new Float32Array(37 * 8), [37, 1, 8], 0);
});

gpuTest("attention of 2,000 tokens without an L × L tensor: a few rows within 3e-6 of float64", async () => {
  const c: Case = { segments: [2000], heads: 1, keyHeads: 1, d: 8, causal: true };
  const given = inputs(c, 3), [out, lse] = await run("MgpoAttention", given, { causal: true, scale: 0.4 });
  for (const i of [0, 127, 128, 1500, 1999]) {
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

gpuTest("attention survives scores of ±1,000", async () => {
  const c: Case = { segments: [50], heads: 1, keyHeads: 1, d: 8, causal: true };
  const given = inputs(c, 20), [out, lse] = await run("MgpoAttention", given, { causal: true, scale: 1 });
  const expected = plain(c, 1, given, new Float32Array(400));
  close(out, expected.out, given.q.shape, 1e-3);
  close(lse, expected.lse, [50, 1], 1e-6);
});

gpuTest("attention names what is wrong with its inputs", async () => {
  const given = inputs(cases[1]), attrs = { causal: true, scale: 1 };
  const wrong = { ...given, cuSeqlens: integers([0, 3]) };
  await assert.rejects(run("MgpoAttention", wrong, attrs), /rise from 0 to the 118/);
  await assert.rejects(run("MgpoAttention", { ...given, k: values([118, 3, 24], 1) }, attrs), RangeError);
  const short = { ...given, cuSeqlensK: integers([0, 16, 16, 54, 54, 118]) };
  await assert.rejects(run("MgpoAttention", short, attrs), /segment 1 has 1 queries and 0 keys/);
  await assert.rejects(
    run("MgpoAttention", { ...given, cuSeqlensK: integers([0, 118]) }, attrs),
    /cuSeqlensK must have/,
  );
  await assert.rejects(run("MgpoAttention", given, { causal: true }), /attribute scale/);
});
