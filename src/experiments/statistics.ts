/**
 * How sure are we? Deviations over seeds, bootstrap intervals over seeds and items, paired tests, effect sizes.
 *
 * Values come as a matrix: a row a seed, a column a held-out item, the same items in every row. Seeds and items are crossed, so a
 * resample draws seeds and items independently (Davison & Hinkley 1997, §3.8).
 *
 * @module
 */
import { bdtr, mean, quantileSorted, sampleStandardDeviation, stdtr, stdtri } from "../deps_statistics.ts";
import { RandomStream } from "../random.ts";

/** A row a seed, a column an item. */
export type Values = readonly Float64Array[];

/** A 95 % interval. */
export type Interval = [low: number, high: number];

/** Resamples of an interval: its ends then vary by about 3 % of its width from one seed of the draws to another. */
const RESAMPLES = 2000;

/** Mean of each row. */
export function rowMeans(values: Values): number[] {
  return values.map((row) => row.reduce((sum, value) => sum + value, 0) / row.length);
}

/** Mean and sample standard deviation over seeds; the deviation of a single seed is 0, which its n = 1 says. */
export function meanAndDeviation(values: readonly number[]): { mean: number; sd: number } {
  // Rounding of their mean would give equal values a deviation of 1e-17.
  if (values.length > 0 && values.every((value) => value === values[0])) return { mean: values[0], sd: 0 };
  return { mean: mean([...values]), sd: values.length > 1 ? sampleStandardDeviation([...values]) : 0 };
}

/** How often each seed and each item is drawn, resample by resample. */
interface Draws {
  seeds: Uint16Array[];
  items: Uint16Array[];
}
const drawsOf = new Map<string, Draws>();

/** The same draws for every metric of the same size, so that intervals of one experiment belong together. */
function draws(seeds: number, items: number, resamples: number): Draws {
  const key = [seeds, items, resamples].join();
  const known = drawsOf.get(key);
  if (known) return known;
  const counts = (purpose: string, count: number) =>
    Array.from({ length: resamples }, (_, resample) => {
      const random = new RandomStream(0, purpose, resample), drawn = new Uint16Array(count);
      for (let i = 0; i < count; i++) drawn[random.int(count)]++;
      return drawn;
    });
  const made = { seeds: counts("bootstrap seeds", seeds), items: counts("bootstrap items", items) };
  drawsOf.set(key, made);
  return made;
}

/**
 * A 95 % percentile interval of a statistic of means, by resampling seeds and items.
 *
 * @param groups One matrix for each mean; all with the same seeds and the same items, which are drawn together (paired).
 * @param statistic From the groups' means to the number in question. @default {the first mean}
 * @param resamples @default {2000}
 */
export function bootstrapInterval(
  groups: readonly Values[],
  statistic: (means: number[]) => number = ([first]) => first,
  resamples = RESAMPLES,
): Interval {
  const seedCount = groups[0].length, itemCount = groups[0][0].length;
  const { seeds, items } = draws(seedCount, itemCount, resamples);
  const found = new Float64Array(resamples);
  for (let resample = 0; resample < resamples; resample++) {
    const [seedWeights, itemWeights] = [seeds[resample], items[resample]];
    found[resample] = statistic(groups.map((values) => {
      let sum = 0;
      for (let s = 0; s < seedCount; s++) if (seedWeights[s] > 0) sum += seedWeights[s] * dot(itemWeights, values[s]);
      return sum / (seedCount * itemCount);
    }));
  }
  found.sort();
  return [quantileSorted([...found], 0.025), quantileSorted([...found], 0.975)];
}

function dot(weights: Uint16Array, values: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += weights[i] * values[i];
  return sum;
}

/**
 * McNemar's exact test of two classifiers on the same items: p of at least so uneven a split of the items on which they differ.
 *
 * @param onlyA Items that only the first got right.
 * @param onlyB Items that only the second got right.
 * @returns Two-sided p.
 */
export function mcnemarExact(onlyA: number, onlyB: number): number {
  if (onlyA + onlyB === 0) return 1;
  return Math.min(1, 2 * bdtr(Math.min(onlyA, onlyB), onlyA + onlyB, 0.5));
}

/**
 * McNemar's exact test in each seed on its own, where the items are independent pairs, in the direction in which all seeds together
 * point. Pooled over seeds the pairs wouldn't be independent: the same items come back with every seed.
 *
 * @returns Two-sided p of the seed that says least for the difference; 1 if one points the other way, or all together nowhere.
 */
export function mcnemarOverSeeds(a: Values, b: Values): number {
  const [moreA, moreB] = discordant(a, b), sign = Math.sign(moreA - moreB);
  if (sign === 0) return 1;
  return Math.max(...a.map((row, s) => {
    const [onlyA, onlyB] = discordant([row], [b[s]]);
    return Math.sign(onlyA - onlyB) === sign ? mcnemarExact(onlyA, onlyB) : 1;
  }));
}

/** Cells in which only the one of two matrices of 0 and 1 has a 1. */
export function discordant(a: Values, b: Values): [onlyA: number, onlyB: number] {
  let onlyA = 0, onlyB = 0;
  for (const [s, row] of a.entries()) {
    for (const [i, value] of row.entries()) {
      if (value > b[s][i]) onlyA++;
      else if (value < b[s][i]) onlyB++;
    }
  }
  return [onlyA, onlyB];
}

/** Outcome of {@linkcode pairedT}. */
export interface PairedT {
  /** Student's t. */
  t: number;
  /** Degrees of freedom. */
  df: number;
  /** Two-sided. */
  p: number;
  /** Of the mean difference. */
  ci95: Interval;
}

/**
 * Student's paired t test.
 *
 * @param differences One for each pair.
 * @returns Undefined for fewer than two pairs.
 */
export function pairedT(differences: readonly number[]): PairedT | undefined {
  const n = differences.length;
  if (n < 2) return undefined;
  const { mean: middle, sd } = meanAndDeviation(differences), error = sd / Math.sqrt(n), df = n - 1;
  // Without any variation t is infinite, or, with no difference at all, nothing.
  const t = error > 0 ? middle / error : middle === 0 ? 0 : Math.sign(middle) * Infinity;
  const half = stdtri(df, 0.975) * error;
  return { t, df, p: Number.isFinite(t) ? 2 * stdtr(df, -Math.abs(t)) : 0, ci95: [middle - half, middle + half] };
}

/** Cohen's h of two proportions: 0.2 is called small, 0.5 medium, 0.8 large. */
export function cohensH(a: number, b: number): number {
  return 2 * Math.asin(Math.sqrt(a)) - 2 * Math.asin(Math.sqrt(b));
}

/** Cohen's d of paired differences (d_z): their mean over their standard deviation; undefined without variation. */
export function cohensD(differences: readonly number[]): number | undefined {
  const { mean: middle, sd } = meanAndDeviation(differences);
  return sd > 0 ? middle / sd : undefined;
}
