/**
 * Resampling of 8-bit pixels with integer weights, both passes of `policy/resize.ts`.
 *
 * A weight has up to 26 bits, more than an i16 can hold, so it is split exactly: `w = high · 2¹¹ + low`, 0 ≤ low < 2¹¹.
 * Each half takes part in products of i16 summed by neighbours (two taps at a time), and `(Σ high·p << 11) + Σ low·p`
 * equals `Σ w·p` in integers that wrap around at 32 bits, whatever the values: the results are those of plain code, bit
 * for bit.
 *
 * Measured on 672 × 672 → 112 × 112 (the pass within rows; plain code: 2.8 ms): one tap at a time with i32 products
 * 0.56 ms, this 0.47 ms; three 7-bit digits with the four-tap products of relaxed SIMD 0.35 ms where the processor has
 * them as one instruction (AVX-VNNI), but 0.61 ms where it hasn't.
 *
 * @module
 */
import { type FunctionBuilder, type I32, load, type Local, V128 } from "./asm.ts";
import type { ModuleBuilder } from "./module.ts";

/** Bits of the lower half of a weight. */
const LOW_BITS = 11;
/** Rows that {@link emitResample}'s `rows` functions take at once: they share each load of weights. */
export const ROWS_AT_ONCE = 4;
/** Taps of an entry come in groups of so many; the last ones may have no weight but are read. */
export const TAPS_AT_ONCE = 4;
/** Functions may read or write so many bytes beyond the end of what they were given. */
export const SLACK_BYTES = 64;

/** The weights of one side as the functions read them: an entry for each output position, all `entryBytes` long. */
export interface TapTable {
  readonly entryBytes: number;
  /**
   * By entry: position of the first tap, bytes of the entry that count, then for each four taps low, low, high, high in
   * pairs.
   */
  readonly words: Int32Array;
}

/** The functions' view of taps: `first` and `count` by output position, `size` weights for each, |weight| < 2²⁶. */
export function tapTable(
  { size, first, count, weights }: { size: number; first: Int32Array; count: Int32Array; weights: Int32Array },
): TapTable {
  const groups = Math.ceil(size / TAPS_AT_ONCE), entry = 2 + TAPS_AT_ONCE * groups, mask = (1 << LOW_BITS) - 1;
  const words = new Int32Array(first.length * entry);
  for (let i = 0; i < first.length; i++) {
    const at = i * entry;
    words[at] = first[i];
    words[at + 1] = 4 * (2 + TAPS_AT_ONCE * Math.ceil(count[i] / TAPS_AT_ONCE));
    for (let k = 0; k < count[i]; k++) {
      const weight = weights[i * size + k], shift = 16 * (k & 1);
      // Taps 0 and 1 of four go into one word, 2 and 3 into the next, and their upper halves two words further.
      const to = at + 2 + (k & -4) + (k >> 1 & 1);
      words[to] |= (weight & mask) << shift;
      words[to + 2] |= (weight >> LOW_BITS & 0xffff) << shift;
    }
  }
  return { entryBytes: 4 * entry, words };
}

/** Sums of four lanes: products with low and with high halves. */
type Sums = readonly [low: Local<"v128">, high: Local<"v128">];

/** New sums; as a local is one variable for the whole function, they are set to zero here on every turn. */
function zeroSums(f: FunctionBuilder, count: number): Sums[] {
  return Array.from({ length: count }, () => [f.v128(V128.ofBits(0)), f.v128(V128.ofBits(0))]);
}

/** The sums put together, rounded and held to 0..255: sixteen bytes of four sums. */
function roundSums(f: FunctionBuilder, sums: readonly Sums[], precision: number): Local<"v128"> {
  const half = f.v128(V128.ofBits(1 << (precision - 1)));
  const [a, b, c, d] = sums.map(([low, high]) =>
    f.v128(low.intAdd(half).intAdd(high.intShl(LOW_BITS)).intShr(precision))
  );
  return f.v128(a.narrowToI16(b).narrowToU8(c.narrowToI16(d)));
}

/**
 * Bytes of four pixels, so that each channel's first two taps and then its last two are neighbours; no alpha in three
 * channels.
 */
const byChannel = {
  3: [0, 3, 1, 4, 2, 5, 2, 5, 6, 9, 7, 10, 8, 11, 8, 11],
  4: [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15],
} as const;

/**
 * `rows3`, `rows4(source, sourceStride, rows, table, entryBytes, outWidth, to, toStride)`: the pass within rows, from
 * pixels of three or four bytes to pixels of four. Rows are taken four at a time, so up to three more are read and
 * written.
 */
function emitRows(m: ModuleBuilder, channels: 3 | 4, precision: number): void {
  const parameters = ["i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;
  m.function(`rows${channels}`, parameters, (f, source, stride, rows, table, entryBytes, outWidth, to, toStride) => {
    f.for(0, rows, ROWS_AT_ONCE, () => {
      const entry = f.i32(table), out = f.i32(to);
      f.for(0, outWidth, 1, () => {
        const sums = zeroSums(f, ROWS_AT_ONCE);
        const first = f.i32(source.add(load.i32(entry).mul(channels)));
        const from = sums.map((_, row) => f.i32(row === 0 ? first : first.add(stride.mul(row))));
        const tap = f.i32(entry.add(8)), end = f.i32(entry.add(load.i32(entry, 4)));
        f.doWhile(() => {
          const [lowA, lowB, highA, highB] = [0, 4, 8, 12].map((at) => f.v128(load.splat(tap, at)));
          sums.forEach(([low, high], row) => {
            const four = f.v128(load.v128(from[row]));
            const taps = f.v128(four.shuffleBytes(four, byChannel[channels]));
            const a = f.v128(taps.widenLow()), b = f.v128(taps.widenHigh());
            low.set(low.intAdd(a.dotPairs(lowA)).intAdd(b.dotPairs(lowB)));
            high.set(high.intAdd(a.dotPairs(highA)).intAdd(b.dotPairs(highB)));
            from[row].set(from[row].add(TAPS_AT_ONCE * channels));
          });
          tap.set(tap.add(4 * TAPS_AT_ONCE));
        }, () => tap.lt(end));
        const pixels = roundSums(f, sums, precision);
        ([0, 1, 2, 3] as const).forEach((row) => {
          f.storeI32(row === 0 ? out : out.add(toStride.mul(row)), pixels.intLane(row));
        });
        out.set(out.add(4));
        entry.set(entry.add(entryBytes));
      });
      source.set(source.add(stride.mul(ROWS_AT_ONCE)));
      to.set(to.add(toStride.mul(ROWS_AT_ONCE)));
    });
  }, { exported: true });
}

/** Two rows' lower or upper eight bytes, alternating. */
const zipLow = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23] as const;
const zipHigh = zipLow.map((byte) => byte + 8);
/** Four pixels without their fourth bytes; what follows them does not matter. */
const rgbOnly = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 0, 0, 0, 0] as const;

/** Adds products of two rows, sixteen columns at `at` and `at + stride`, to the columns' sums. */
function addTwoRows(f: FunctionBuilder, sums: readonly Sums[], at: I32, stride: I32, low: V128, high: V128): void {
  const a = f.v128(load.v128(at)), b = f.v128(load.v128(at.add(stride)));
  [zipLow, zipHigh].forEach((zip, half) => {
    const zipped = f.v128(a.shuffleBytes(b, zip));
    [zipped.widenLow(), zipped.widenHigh()].forEach((pairs, quarter) => {
      const shared = f.v128(pairs), [lowSum, highSum] = sums[2 * half + quarter];
      lowSum.set(lowSum.intAdd(shared.dotPairs(low)));
      highSum.set(highSum.intAdd(shared.dotPairs(high)));
    });
  });
}

/**
 * `columns(source, stride, entry, width, to)`: one row of the pass across rows, from pixels of four bytes to RGB.
 * `source` is the row of the first tap; up to three rows beyond the last tap are read.
 */
function emitColumns(m: ModuleBuilder, precision: number): void {
  m.function("columns", ["i32", "i32", "i32", "i32", "i32"], (f, source, stride, entry, width, to) => {
    const first = f.i32(entry.add(8)), end = f.i32(entry.add(load.i32(entry, 4)));
    f.for(0, width, 4, () => {
      const sums = zeroSums(f, 4), from = f.i32(source), tap = f.i32(first);
      f.doWhile(() => {
        for (const pair of [0, 4]) {
          addTwoRows(f, sums, from, stride, f.v128(load.splat(tap, pair)), f.v128(load.splat(tap, pair + 8)));
          from.set(from.add(stride.shl(1)));
        }
        tap.set(tap.add(4 * TAPS_AT_ONCE));
      }, () => tap.lt(end));
      const pixels = roundSums(f, sums, precision);
      f.storeV128(to, pixels.shuffleBytes(pixels, rgbOnly));
      source.set(source.add(16));
      to.set(to.add(12));
    });
  }, { exported: true });
}

/** Adds `rows3`, `rows4` and `columns`, for weights with `precision` fractional bits. */
export function emitResample(m: ModuleBuilder, precision: number): void {
  emitRows(m, 3, precision);
  emitRows(m, 4, precision);
  emitColumns(m, precision);
}
