import assert from "node:assert/strict";
import { hashName } from "../../random.ts";
import { type Draw, sampleToken } from "../../policy/sampler.ts";
import { DRAW_PARTS, joinKernel, LOGITS_WORKGROUPS, logitsKernel } from "./draw.ts";
import { chooseTile, linearKernel, type LinearKind, outputWorkgroups, rowStride, tileRows } from "./linear.ts";
import { suppressedBits } from "./input.ts";
import { nucleusKernel } from "./nucleus.ts";
import { normals, runKernel, startWebgpu, stepRecord } from "./testing.ts";
import { NO_ID, NOT_FINITE, ROW_WORDS } from "./wgsl.ts";

const STEP = 3, SEED = 7 * 4294967296 + 12345;

function rowWords(rows: number, count: number): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(count * ROW_WORDS);
  for (let r = 0; r < rows; r++) words.set([r, 0, 1, 0, ...keyOf(r)], r * ROW_WORDS);
  return words;
}
const keyOf = (row: number) => [3, 1000 + row, row % 4] as const;

const record = (rows: number, temperature: number, topP = 1) =>
  stepRecord(
    STEP,
    rows,
    [((SEED >>> 0) ^ hashName("sample")) >>> 0, Math.floor(SEED / 4294967296)],
    1 / (temperature || 1),
    topP,
  );

async function drawAll(
  logits: Float32Array<ArrayBuffer>,
  vocab: number,
  temperature: number,
  suppressed: Uint8Array,
  topP = 1,
) {
  const rows = logits.length / vocab, isNucleus = topP < 1;
  const kernel = logitsKernel(vocab, temperature === 0, DRAW_PARTS, isNucleus);
  // The logits stand in another order than the rows: each row finds its line.
  const turned = new Float32Array(logits.length);
  for (let r = 0; r < rows; r++) turned.set(logits.subarray(r * vocab, (r + 1) * vocab), (rows - 1 - r) * vocab);
  const lines = Uint32Array.from({ length: rows }, (_, r) => rows - 1 - r);
  const empty = new Uint32Array(rows * DRAW_PARTS * 5), step = record(rows, temperature, topP);
  const before = [turned, lines, suppressedBits(suppressed)], floors: Float32Array<ArrayBuffer>[] = [];
  if (isNucleus) {
    const inputs = [...before, new Float32Array(rows), step];
    floors.push(new Float32Array((await runKernel(nucleusKernel(vocab, 16), inputs, rows, 1)).get(3)!));
  }
  const parts = await runKernel(
    kernel,
    [...before, rowWords(rows, rows), ...floors, empty, step],
    LOGITS_WORKGROUPS,
    rows,
  );
  return await finish([...parts.values()][0], DRAW_PARTS, DRAW_PARTS, rows, step);
}

/** Joins the rows' partial draws. */
async function finish(draws: ArrayBuffer, parts: number, stride: number, rows: number, step: Uint32Array<ArrayBuffer>) {
  const kernel = joinKernel({ parts, stride, table: null, width: 1, threads: 16 });
  const drawn = new Uint32Array((STEP + 1) * rows * 2), none = new Float32Array(4);
  const results = await runKernel(
    kernel,
    [new Uint32Array(draws), rowWords(rows, rows), drawn, none, none, step],
    rows,
    1,
  );
  const words = new Uint32Array(results.get(2)!), floats = new Float32Array(words.buffer), at = STEP * rows * 2;
  return Array.from({ length: rows }, (_, r) => ({ id: words[at + 2 * r], logprob: floats[at + 2 * r + 1] }));
}

/** Compares with the host's sampler: the share of equal ids, and the largest error of a log-prob of an equal id. */
function compare(
  got: Draw[],
  logits: Float32Array,
  vocab: number,
  temperature: number,
  suppressed: Uint8Array,
  topP = 1,
) {
  const options = { temperature, topP, seed: SEED, suppressed };
  let equal = 0, worst = 0;
  got.forEach(({ id, logprob }, r) => {
    const want = sampleToken(logits.subarray(r * vocab, (r + 1) * vocab), keyOf(r), STEP, options);
    assert.ok(id < vocab && !suppressed[id], `row ${r} drew ${id}`);
    if (id !== want.id) return;
    equal++;
    worst = Math.max(worst, Math.abs(logprob - want.logprob));
  });
  return { equal: equal / got.length, worst };
}

Deno.test("draws on the device equal the host's: at least 99.9 % of ids, log-probs within 1e-5", async () => {
  if (!await startWebgpu()) return;
  for (
    const [rows, vocab, temperature, scale] of [[6000, 512, 1, 3], [1500, 101, 0.7, 1], [4, 151_936, 1.3, 4]] as const
  ) {
    const logits = normals(rows * vocab, vocab, scale), suppressed = new Uint8Array(vocab);
    for (let v = 0; v < vocab; v += 7) suppressed[v] = 1;
    const { equal, worst } = compare(
      await drawAll(logits, vocab, temperature, suppressed),
      logits,
      vocab,
      temperature,
      suppressed,
    );
    assert.ok(equal >= 0.999, `vocabulary ${vocab}: ${equal} of the draws are equal`);
    assert.ok(worst < 1e-5, `vocabulary ${vocab}: a log-prob is off by ${worst}`);
  }
});

Deno.test("draws from a nucleus equal the host's: at least 99.9 % of ids, log-probs within 1e-5", async () => {
  if (!await startWebgpu()) return;
  for (const [rows, vocab, temperature, scale, topP] of [[1000, 101, 0.7, 1, 0.9], [200, 1001, 1.3, 3, 0.3]] as const) {
    const logits = normals(rows * vocab, vocab, scale), suppressed = new Uint8Array(vocab);
    for (let v = 0; v < vocab; v += 7) suppressed[v] = 1;
    const got = await drawAll(logits, vocab, temperature, suppressed, topP);
    const { equal, worst } = compare(got, logits, vocab, temperature, suppressed, topP);
    assert.ok(equal >= 0.999, `topP ${topP}: ${equal} of the draws are equal`);
    assert.ok(worst < 1e-5, `topP ${topP}: a log-prob is off by ${worst}`);
    // So small a share holds the highest logit only, but its log-prob is that of the whole distribution.
    const least = await drawAll(logits, vocab, temperature, suppressed, 1e-6);
    assert.equal(compare(least, logits, vocab, temperature, suppressed, 1e-6).equal, 1);
    const greedy = await drawAll(logits, vocab, 0, suppressed);
    assert.deepEqual(least.map(({ id }) => id), greedy.map(({ id }) => id));
  }
});

Deno.test("greedy draws take the highest logit, the first of equals, never a suppressed id", async () => {
  if (!await startWebgpu()) return;
  for (const vocab of [1, 3, 33, 1000]) {
    const logits = normals(5 * vocab, 9), suppressed = new Uint8Array(vocab);
    if (vocab > 3) {
      suppressed[1] = 1;
      for (let r = 0; r < 5; r++) logits[r * vocab + 1] = logits[r * vocab + 2] = logits[r * vocab + vocab - 1] = 50;
    }
    const got = await drawAll(logits, vocab, 0, suppressed);
    assert.deepEqual(compare(got, logits, vocab, 0, suppressed).equal, 1);
    if (vocab > 3) assert.ok(got.every(({ id }) => id === 2));
  }
});

Deno.test("logits that are not finite, or no id left, are marked", async () => {
  if (!await startWebgpu()) return;
  const logits = normals(4 * 40, 9);
  logits[5] = NaN;
  logits[40 + 39] = Infinity;
  const suppressed = new Uint8Array(40);
  for (const topP of [1, 0.9, 1e-6]) {
    const drawn = async (suppressed: Uint8Array) =>
      (await drawAll(logits, 40, 1, suppressed, topP)).map(({ id }) => id);
    assert.deepEqual((await drawn(suppressed)).slice(0, 2), [NOT_FINITE, NOT_FINITE]);
    assert.deepEqual(await drawn(new Uint8Array(40).fill(1)), Array(4).fill(NO_ID));
  }
});

/** The head's product over `vocab` ids of width k. */
async function headDraws(
  rows: number,
  k: number,
  vocab: number,
  temperature: number,
  software: boolean,
  rounds: number,
) {
  const tile = chooseTile(rows, k, software),
    blocks = Math.ceil(rows / tileRows(tile)),
    count = blocks * tileRows(tile);
  const x = normals(rows * k, 1),
    w = normals(vocab * k, 2, 3 / Math.sqrt(k)),
    norm = new Float32Array(rowStride(k)).fill(1);
  const xs = new Float32Array(count * rowStride(k)), suppressed = new Uint8Array(vocab);
  for (let r = 0; r < rows; r++) xs.set(x.subarray(r * k, (r + 1) * k), r * rowStride(k));
  for (let v = 0; v < vocab; v += 5) suppressed[v] = 1;
  const shape = {
    op: "head",
    vocab,
    first: 0,
    outputs: vocab,
    greedy: temperature === 0,
    parts: 0,
    firstPart: 0,
    rounds,
  } as const;
  const groups = outputWorkgroups(shape, tile),
    parts = groups * tile.outputGroups,
    kind: LinearKind = { ...shape, parts };
  const step = record(rows, temperature), kernel = linearKernel({ kind, depth: k, eps: 0, tile });
  const empty = new Uint32Array(count * parts * 5);
  const draws = await runKernel(
    kernel,
    [xs, norm, w, suppressedBits(suppressed), rowWords(rows, count), empty, step],
    groups,
    blocks,
  );
  const logits = new Float32Array(rows * vocab);
  for (let r = 0; r < rows; r++) {
    let squares = 0;
    for (let i = 0; i < k; i++) squares += x[r * k + i] ** 2;
    for (let v = 0; v < vocab; v++) {
      let sum = 0;
      for (let i = 0; i < k; i++) sum += x[r * k + i] * w[v * k + i];
      logits[r * vocab + v] = sum / Math.sqrt(squares / k);
    }
  }
  return compare(await finish(draws.get(5)!, parts, parts, rows, step), logits, vocab, temperature, suppressed);
}

Deno.test("the head's kernel draws as the host does from plain logits, whatever the tile", async () => {
  if (!await startWebgpu()) return;
  const cases = [[1, 8, 30_000, 9], [3, 7, 37, 1], [70, 64, 509, 2], [9, 30, 200, 1], [2, 3584, 65, 1]] as const;
  for (const [rows, k, vocab, rounds] of cases) {
    for (const software of [true, false]) {
      for (const temperature of rows === 70 ? [0, 0.8] : [0.8]) {
        const { equal, worst } = await headDraws(rows, k, vocab, temperature, software, rounds);
        const what = `${rows}×${k}→${vocab} ${software} at ${temperature}`;
        assert.ok(equal === 1, `${what}: ${equal} of the draws are equal`);
        assert.ok(worst < 2e-5, `${what}: a log-prob is off by ${worst}`);
      }
    }
  }
});
