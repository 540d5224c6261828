import assert from "node:assert/strict";
import { sampleToken } from "./sampler.ts";

const none = new Uint8Array(5);
const base = { temperature: 1, topP: 1, seed: 7, suppressed: none };
const logits = Float32Array.of(1, 0, 2, -1, 0.5);

function softmax(temperature: number, allowed: (v: number) => boolean): number[] {
  const e = Array.from(logits, (x, v) => allowed(v) ? Math.exp(x / temperature) : 0);
  const sum = e.reduce((a, b) => a + b);
  return e.map((x) => x / sum);
}

function frequencies(options: Partial<typeof base>, n = 20000): number[] {
  const counts = new Array(5).fill(0);
  for (let i = 0; i < n; i++) counts[sampleToken(logits, [1, i, 0], i % 11, { ...base, ...options }).id]++;
  return counts.map((c) => c / n);
}

function assertClose(found: readonly number[], expected: readonly number[]): void {
  found.forEach((f, i) => {
    // Five standard errors of a share over 20,000 draws.
    const tolerance = 5 * Math.sqrt(Math.max(expected[i] * (1 - expected[i]), 1e-9) / 20000);
    assert.ok(Math.abs(f - expected[i]) <= tolerance, `id ${i}: ${f} for ${expected[i]}`);
  });
}

Deno.test("draws follow the softmax at the temperature, without suppressed ids, within the nucleus", () => {
  assertClose(frequencies({}), softmax(1, () => true));
  assertClose(frequencies({ temperature: 0.5 }), softmax(0.5, () => true));
  assertClose(frequencies({ suppressed: Uint8Array.of(0, 0, 1, 0, 0) }), softmax(1, (v) => v !== 2));
  // Shares: id 2 .57, id 0 .21, id 4 .13: the smallest set with at least .7 is {2, 0}.
  assertClose(frequencies({ topP: 0.7 }), softmax(1, (v) => v === 2 || v === 0));
});

Deno.test("the log-prob is that of the whole distribution over ids that may be said", () => {
  for (const temperature of [1, 0.7]) {
    const suppressed = Uint8Array.of(0, 1, 0, 0, 0), p = softmax(temperature, (v) => v !== 1);
    for (let i = 0; i < 50; i++) {
      const draw = sampleToken(logits, [0, i, 0], 0, { ...base, temperature, suppressed, topP: 0.8 });
      assert.ok(Math.abs(draw.logprob - Math.log(p[draw.id])) < 1e-12);
    }
  }
  const greedy = sampleToken(logits, [0, 0, 0], 0, { ...base, temperature: 0 });
  assert.equal(greedy.id, 2);
  assert.ok(Math.abs(greedy.logprob - Math.log(softmax(1, () => true)[2])) < 1e-12);
});

Deno.test("each part of a draw's name changes draws; the same name repeats them", () => {
  const ids = (name: (i: number) => [[number, number, number], number, number]) =>
    Array.from({ length: 64 }, (_, i) => {
      const [key, token, seed] = name(i);
      return sampleToken(new Float32Array(5), key, token, { ...base, seed }).id;
    }).join("");
  const reference = ids((i) => [[i, 1, 1], 0, 7]);
  assert.equal(ids((i) => [[i, 1, 1], 0, 7]), reference);
  assert.notEqual(ids((i) => [[i, 2, 1], 0, 7]), reference);
  assert.notEqual(ids((i) => [[i, 1, 0], 0, 7]), reference);
  assert.notEqual(ids((i) => [[i, 1, 1], 1, 7]), reference);
  assert.notEqual(ids((i) => [[i, 1, 1], 0, 8]), reference);
});

Deno.test("logits that are not finite are an error that says so", () => {
  assert.throws(
    () => sampleToken(Float32Array.of(NaN, 1), [0, 3, 1], 4, { ...base, suppressed: new Uint8Array(2) }),
    /diverged/,
  );
  assert.throws(
    () => sampleToken(Float32Array.of(1, 1), [0, 3, 1], 4, { ...base, suppressed: new Uint8Array(2).fill(1) }),
    RangeError,
  );
});
