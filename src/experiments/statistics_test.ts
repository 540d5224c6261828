import assert from "node:assert/strict";
import {
  bootstrapInterval,
  cohensD,
  cohensH,
  discordant,
  mcnemarExact,
  mcnemarOverSeeds,
  meanAndDeviation,
  pairedT,
  rowMeans,
} from "./statistics.ts";

function close(actual: number, expected: number, tolerance: number): void {
  assert.ok(Math.abs(actual - expected) <= tolerance, `${actual} is not within ${tolerance} of ${expected}`);
}

/** Exact tail of a fair binomial by whole numbers. */
function fairTail(k: number, n: number): number {
  let term = 1n, sum = 0n;
  for (let i = 0n; i <= BigInt(k); i++) {
    sum += term;
    term = term * (BigInt(n) - i) / (i + 1n);
  }
  // 2^n and the sum have too many digits for a double, their leading 60 bits have not.
  const shift = BigInt(Math.max(0, sum.toString(2).length - 60));
  return Number(sum >> shift) * 2 ** (Number(shift) - n);
}

Deno.test("McNemar's exact test agrees with whole-number arithmetic and with R's exact2x2", () => {
  for (const [a, b] of [[0, 1], [0, 2], [1, 2], [2, 9], [9, 2], [17, 40], [300, 500], [12, 830]]) {
    const exact = Math.min(1, 2 * fairTail(Math.min(a, b), a + b));
    close(mcnemarExact(a, b) / exact, 1, 1e-9);
  }
  // mcnemar.exact(matrix(c(21, 9, 2, 12), 2, 2)) of exact2x2's manual.
  close(mcnemarExact(9, 2), 0.06543, 5e-6);
  assert.equal(mcnemarExact(0, 0), 1);
  assert.equal(mcnemarExact(5, 5), 1);
});

Deno.test("McNemar's test over seeds is that of the seed that says least", () => {
  // Items that only a, and only b, got right in a seed; nobody gets the others right.
  const seed = (onlyA: number, onlyB: number) =>
    [[onlyA, 0], [onlyB, onlyA]].map(([count, from]) =>
      Float64Array.from({ length: 60 }, (_, i) => Number(i >= from && i < from + count))
    );
  const test = (...seeds: [number, number][]) => {
    const rows = seeds.map(([onlyA, onlyB]) => seed(onlyA, onlyB));
    return mcnemarOverSeeds(rows.map(([a]) => a), rows.map(([, b]) => b));
  };
  assert.equal(test([9, 2]), mcnemarExact(9, 2));
  assert.equal(test([30, 1], [9, 2], [20, 3]), mcnemarExact(9, 2));
  assert.equal(test([2, 9], [1, 30]), mcnemarExact(2, 9));
  // One seed against it, or nothing in sum: no evidence, however clear the others are.
  assert.deepEqual([test([40, 0], [2, 5]), test([9, 2], [2, 9]), test([0, 0])], [1, 1, 1]);
});

Deno.test("the paired t test has Student's sleep data right", () => {
  const first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0, 2],
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4];
  const test = pairedT(first.map((x, i) => x - second[i]))!;
  // t.test(extra ~ group, data = sleep, paired = TRUE) in R's manual.
  close(test.t, -4.0621, 5e-5);
  assert.equal(test.df, 9);
  close(test.p, 0.002833, 5e-7);
  close(test.ci95[0], -2.4598858, 5e-8);
  close(test.ci95[1], -0.7001142, 5e-8);
  assert.equal(pairedT([1]), undefined);
  assert.deepEqual([pairedT([0, 0])!.p, pairedT([1, 1])!.p, pairedT([1, 1])!.t], [1, 0, Infinity]);
});

Deno.test("effect sizes agree with Cohen's table and by hand", () => {
  // Cohen 1988, table 6.2.2: phi(.65) = 1.875, phi(.45) = 1.471.
  close(cohensH(0.65, 0.45), 1.875 - 1.471, 1e-3);
  close(cohensH(0.45, 0.65), 1.471 - 1.875, 1e-3);
  close(cohensH(1, 0), Math.PI, 1e-12);
  close(cohensD([1, 2, 3])!, 2, 1e-12);
  assert.equal(cohensD([1, 1]), undefined);
});

Deno.test("mean and standard deviation", () => {
  assert.deepEqual(meanAndDeviation([3]), { mean: 3, sd: 0 });
  assert.deepEqual(meanAndDeviation([0.1, 0.1, 0.1]), { mean: 0.1, sd: 0 });
  const { mean, sd } = meanAndDeviation([2, 4, 4, 4, 5, 5, 7, 9]);
  close(mean, 5, 1e-12);
  close(sd, Math.sqrt(32 / 7), 1e-12);
  assert.deepEqual(rowMeans([Float64Array.of(1, 2), Float64Array.of(0, 1)]), [1.5, 0.5]);
  assert.deepEqual(discordant([Float64Array.of(1, 1, 0)], [Float64Array.of(1, 0, 1)]), [1, 1]);
});

/** Every way of drawing `count` things from `count`. */
function* allDraws(count: number): Generator<number[]> {
  for (let code = 0; code < count ** count; code++) {
    yield Array.from({ length: count }, (_, i) => Math.floor(code / count ** i) % count);
  }
}

Deno.test("the bootstrap draws seeds and items as often as all draws together say", () => {
  const values = [Float64Array.of(0, 1, 1, 3), Float64Array.of(2, 5, 4, 9), Float64Array.of(7, 1, 0, 2)];
  const exact: number[] = [];
  for (const seeds of allDraws(3)) {
    for (const items of allDraws(4)) {
      exact.push(seeds.reduce((sum, s) => sum + items.reduce((part, i) => part + values[s][i], 0), 0) / 12);
    }
  }
  const below = (limit: number) => exact.filter((value) => value < limit - 1e-9).length / exact.length;
  const within = (limit: number) => exact.filter((value) => value <= limit + 1e-9).length / exact.length;
  const [low, high] = bootstrapInterval([values], undefined, 20000);
  // Five standard errors of 20,000 draws at a probability of .025.
  const tolerance = 5 * Math.sqrt(0.025 * 0.975 / 20000);
  assert.ok(
    below(low) <= 0.025 + tolerance && within(low) >= 0.025 - tolerance,
    `${low}: ${below(low)} ${within(low)}`,
  );
  assert.ok(below(high) <= 0.975 + tolerance && within(high) >= 0.975 - tolerance, `${high}: ${below(high)}`);
});

Deno.test("the bootstrap of a share is as wide as theory says, and pairs what is compared", () => {
  const items = 1000, share = (p: number) => Float64Array.from({ length: items }, (_, i) => i < p * items ? 1 : 0);
  const [low, high] = bootstrapInterval([[share(0.3)]]);
  const half = 1.96 * Math.sqrt(0.3 * 0.7 / items);
  close(low, 0.3 - half, 0.1 * half);
  close(high, 0.3 + half, 0.1 * half);
  assert.deepEqual(bootstrapInterval([[share(0.3)]]), [low, high]);
  // b is right wherever a is: the difference varies with the fifth of items between them only.
  const paired = bootstrapInterval([[share(0.5)], [share(0.3)]], ([a, b]) => a - b);
  const pairedHalf = 1.96 * Math.sqrt(0.2 * 0.8 / items);
  close(paired[0], 0.2 - pairedHalf, 0.12 * pairedHalf);
  close(paired[1], 0.2 + pairedHalf, 0.12 * pairedHalf);
  // Seeds that differ widen it, although items don't.
  const bySeed = bootstrapInterval([[new Float64Array(items).fill(0.2), new Float64Array(items).fill(0.6)]]);
  assert.deepEqual(bySeed.map((end) => Math.round(10 * end)), [2, 6]);
  const root = bootstrapInterval([[share(0.25)]], ([mean]) => Math.sqrt(mean));
  assert.ok(root[0] < 0.5 && root[1] > 0.5);
});
