/**
 * The weights of bicubic resampling as Pillow has them: Keys' cubic with a = −0.5, widened by the scale when shrinking,
 * in fixed point.
 *
 * @module
 */

/** Fractional bits of a weight. */
export const precision = 22;

/**
 * For every output position: where its taps begin, how many there are, and their integer weights, `size` places each.
 */
export interface Taps {
  /** How many positions are resampled. */
  readonly from: number;
  /** No output position has more taps. */
  readonly size: number;
  readonly first: Int32Array;
  readonly count: Int32Array;
  readonly weights: Int32Array;
}

/** Keys' cubic convolution kernel, a = −0.5, zero from 2 on. */
function cubic(x: number): number {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** The taps that resample `from` positions to `to`. */
function makeTaps(from: number, to: number): Taps {
  const scale = from / to, stretch = Math.max(scale, 1), support = 2 * stretch;
  const size = Math.ceil(support) * 2 + 1;
  const taps: Taps = {
    from,
    size,
    first: new Int32Array(to),
    count: new Int32Array(to),
    weights: new Int32Array(to * size),
  };
  const real = new Float64Array(size);
  for (let i = 0; i < to; i++) {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const count = Math.min(from, Math.trunc(center + support + 0.5)) - first;
    let sum = 0;
    for (let k = 0; k < count; k++) sum += real[k] = cubic((k + first - center + 0.5) * (1 / stretch));
    for (let k = 0; k < count; k++) {
      const weight = (sum !== 0 ? real[k] / sum : real[k]) * (1 << precision);
      taps.weights[i * size + k] = Math.trunc(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    taps.first[i] = first;
    taps.count[i] = count;
  }
  return taps;
}

/** Taps by sizes: a run resizes pictures of the same few sizes over and over. Bounded, as crops can have any size. */
const known = new Map<number, Taps>();

/** The taps that resample `from` positions to `to`; equal sizes give weights of exactly 0 and 1. */
export function tapsFor(from: number, to: number): Taps {
  const key = from * 2 ** 26 + to;
  let taps = known.get(key);
  if (!taps) {
    if (known.size >= 64) known.clear();
    known.set(key, taps = makeTaps(from, to));
  }
  return taps;
}
