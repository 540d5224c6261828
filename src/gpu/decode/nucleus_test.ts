import assert from "node:assert/strict";
import { nucleusFloor } from "../../policy/sampler.ts";
import { suppressedBits } from "./input.ts";
import { nucleusKernel, nucleusShare } from "./nucleus.ts";
import { normals, runKernel, startWebgpu, stepRecord } from "./testing.ts";

interface Row {
  vocab: number;
  temperature: number;
  topP: number;
  suppressed: Uint8Array;
}

/** Floors on the device; the logits stand in another order than the rows. */
async function floorsOf(logits: Float32Array, { vocab, temperature, topP, suppressed }: Row, threads: number) {
  const rows = logits.length / vocab, turned = new Float32Array(logits.length);
  for (let r = 0; r < rows; r++) turned.set(logits.subarray(r * vocab, (r + 1) * vocab), (rows - 1 - r) * vocab);
  const lines = Uint32Array.from({ length: rows }, (_, r) => rows - 1 - r);
  const step = stepRecord(0, rows, [0, 0], 1 / temperature, topP);
  const inputs = [turned, lines, suppressedBits(suppressed), new Float32Array(rows), step];
  return new Float32Array((await runKernel(nucleusKernel(vocab, threads), inputs, rows, 1)).get(3)!).subarray(0, rows);
}

/** Masses of a row's ids in float64; 0 where suppressed. */
function softmax(logits: Float32Array, { temperature, suppressed }: Row) {
  let top = -Infinity, sum = 0;
  logits.forEach((x, v) => suppressed[v] || (top = Math.max(top, x)));
  logits.forEach((x, v) => suppressed[v] || (sum += Math.exp((x - top) / temperature)));
  const logZ = top / temperature + Math.log(sum);
  return { logZ, masses: Array.from(logits, (x, v) => suppressed[v] ? 0 : Math.exp(x / temperature - logZ)) };
}

/** Compares floors with the host's; where they differ, the ids between them must be a near tie: at most 2e-6 of the mass. */
async function compare(logits: Float32Array, row: Row, threads: number): Promise<number> {
  const { vocab, topP, suppressed, temperature } = row, floors = await floorsOf(logits, row, threads);
  let equal = 0;
  floors.forEach((floor, r) => {
    const own = logits.subarray(r * vocab, (r + 1) * vocab), { logZ, masses } = softmax(own, row);
    const want = nucleusFloor(own, suppressed, topP, 1 / temperature, logZ);
    if (floor === want) return void equal++;
    const [low, high] = [Math.min(floor, want), Math.max(floor, want)];
    const between = masses.reduce((sum, m, v) => own[v] >= low && own[v] < high ? sum + m : sum, 0);
    const what = `vocabulary ${vocab}, temperature ${temperature}, topP ${topP}, row ${r}`;
    assert.ok(own.includes(floor) && between <= 2e-6, `${what}: ${floor} for ${want}, ${between} of the mass between`);
  });
  return equal / floors.length;
}

const shares = [1e-6, 0.1, 0.49, 0.5, 0.9, 0.999, 0.999999];

Deno.test("floors are the host's: at least 99 % of them, the others near ties", async () => {
  if (!await startWebgpu()) return;
  const sizes = [[1, 3], [2, 20], [3, 20], [101, 40], [1009, 10], [4098, 4]] as const;
  for (const threads of [16, 64]) {
    const equal: number[] = [];
    for (const [vocab, rows] of threads === 16 ? sizes : sizes.slice(4, 5)) {
      const suppressed = new Uint8Array(vocab);
      if (vocab > 3) { for (let v = 0; v < vocab; v += 7) suppressed[v] = 1; }
      for (const [temperature, scale] of [[1, 3], [0.7, 1], [0.01, 3], [100, 3]]) {
        const logits = normals(rows * vocab, vocab, scale);
        // What is suppressed has no mass, however high it stands.
        logits.forEach((_, i) => suppressed[i % vocab] && (logits[i] += 9));
        for (const topP of shares) {
          equal.push(await compare(logits, { vocab, temperature, topP, suppressed }, threads));
        }
      }
    }
    const mean = equal.reduce((a, b) => a + b) / equal.length;
    assert.ok(mean >= 0.99, `${threads} threads: ${mean} of the floors are equal`);
  }
});

Deno.test("equal logits are in the nucleus together; zeros of both signs, far tails and single ids too", async () => {
  if (!await startWebgpu()) return;
  const vocab = 101, none = new Uint8Array(vocab), coarse = normals(5 * vocab, 4).map(Math.round);
  const alone = new Uint8Array(vocab).fill(1);
  alone[50] = 0;
  for (const topP of shares) {
    const row = { vocab, temperature: 1, topP, suppressed: none };
    // Whole numbers: a few values only, among them 0 and −0.
    assert.equal(await compare(coarse, row, 16), 1);
    assert.equal(await compare(new Float32Array(2 * vocab).fill(-3.5), row, 16), 1);
    assert.equal(await compare(normals(2 * vocab, 5), { ...row, suppressed: alone }, 16), 1);
    // A hundred ids whose mass is no float32 any more.
    const far = new Float32Array(vocab).fill(-1e5);
    far[7] = 30;
    assert.deepEqual([...await floorsOf(far, row, 16)], [30]);
  }
});

Deno.test("a share is counted from the end where it is the smaller one", () => {
  assert.deepEqual(nucleusShare(0.1), { share: 0.1, fromTop: true });
  assert.deepEqual(nucleusShare(0.75), { share: 0.25, fromTop: false });
});
