/**
 * Bicubic resampling in fixed point, bit for bit as Pillow does it: Keys' cubic with a = −0.5, widened by the scale when
 * shrinking, in two passes (columns first, then rows) with 8-bit values in between.
 *
 * @module
 */

/** Fractional bits of a weight. */
const precision = 22;
const half = 1 << (precision - 1);

/** For every output position: where its taps begin, how many there are, and their integer weights, `size` places each. */
interface Taps {
  size: number;
  first: Int32Array;
  count: Int32Array;
  weights: Int32Array;
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

function tapsFor(from: number, to: number): Taps {
  const key = from * 65536 + to;
  let taps = known.get(key);
  if (!taps) {
    if (known.size >= 64) known.clear();
    known.set(key, taps = makeTaps(from, to));
  }
  return taps;
}

/** Rounds an accumulator that began at {@linkcode half} to 0..255. */
function clip(sum: number): number {
  const value = sum >> precision;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/**
 * Resamples a picture exactly as Pillow's `resize((outWidth, outHeight), BICUBIC)` does on RGB.
 *
 * @param source `[height, width, channels]`; a fourth channel is left out.
 * @returns RGB bytes `[outHeight, outWidth, 3]`.
 * @throws {RangeError} A size is not a positive integer, or does not fit the data.
 */
export function resizeBicubic(
  source: Uint8Array,
  channels: 3 | 4,
  width: number,
  height: number,
  outWidth: number,
  outHeight: number,
): Uint8Array {
  for (const size of [width, height, outWidth, outHeight]) {
    if (!Number.isInteger(size) || size < 1) {
      throw new RangeError(`a picture's side must be at least 1 pixel, got ${size}`);
    }
  }
  if (source.length !== width * height * channels) {
    throw new RangeError(`${width}x${height} pixels of ${channels} bytes expected, got ${source.length} bytes`);
  }
  const narrowed = outWidth === width
    ? dropAlpha(source, channels)
    : resizeRows(source, channels, width, height, outWidth);
  return outHeight === height ? narrowed : resizeColumns(narrowed, outWidth, height, outHeight);
}

/** RGB bytes that are not the caller's. */
function dropAlpha(source: Uint8Array, channels: 3 | 4): Uint8Array {
  if (channels === 3) return source.slice();
  const out = new Uint8Array(source.length / 4 * 3);
  for (let from = 0, to = 0; to < out.length; from += 4, to += 3) {
    out[to] = source[from];
    out[to + 1] = source[from + 1];
    out[to + 2] = source[from + 2];
  }
  return out;
}

/** The pass within rows: `[height, width, channels]` → `[height, outWidth, 3]`. */
function resizeRows(source: Uint8Array, channels: number, width: number, height: number, outWidth: number): Uint8Array {
  const { size, first, count, weights } = tapsFor(width, outWidth);
  const out = new Uint8Array(height * outWidth * 3);
  for (let y = 0, at = 0; y < height; y++) {
    const row = y * width;
    for (let x = 0; x < outWidth; x++, at += 3) {
      let r = half, g = half, b = half;
      let from = (row + first[x]) * channels;
      const end = x * size + count[x];
      for (let k = x * size; k < end; k++, from += channels) {
        const weight = weights[k];
        r = (r + Math.imul(weight, source[from])) | 0;
        g = (g + Math.imul(weight, source[from + 1])) | 0;
        b = (b + Math.imul(weight, source[from + 2])) | 0;
      }
      out[at] = clip(r);
      out[at + 1] = clip(g);
      out[at + 2] = clip(b);
    }
  }
  return out;
}

/** The pass across rows: `[height, width, 3]` → `[outHeight, width, 3]`, a whole row of sums at a time. */
function resizeColumns(source: Uint8Array, width: number, height: number, outHeight: number): Uint8Array {
  const { size, first, count, weights } = tapsFor(height, outHeight);
  const stride = width * 3;
  const out = new Uint8Array(outHeight * stride);
  const sums = new Int32Array(stride);
  for (let y = 0; y < outHeight; y++) {
    sums.fill(half);
    for (let k = 0; k < count[y]; k++) {
      const weight = weights[y * size + k];
      const row = (first[y] + k) * stride;
      for (let x = 0; x < stride; x++) sums[x] = (sums[x] + Math.imul(weight, source[row + x])) | 0;
    }
    for (let x = 0; x < stride; x++) out[y * stride + x] = clip(sums[x]);
  }
  return out;
}
