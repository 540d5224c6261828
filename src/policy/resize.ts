/**
 * Bicubic resampling in fixed point, bit for bit as Pillow does it: Keys' cubic with a = −0.5, widened by the scale
 * when shrinking, in two passes (within rows first, then across them) with 8-bit values in between.
 *
 * @module
 */
import { precision, tapsFor } from "./bicubic.ts";
import { Resampler } from "./resize_wasm.ts";

const half = 1 << (precision - 1);

/** Compiled at first use; null where the engine has no SIMD. */
let resampler: Resampler | null | undefined;

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
  if (outWidth === width && outHeight === height) return dropAlpha(source, channels);
  if (resampler === undefined) resampler = Resampler.create() ?? null;
  return resampler?.resize(source, channels, tapsFor(width, outWidth), tapsFor(height, outHeight)) ??
    resizePlain(source, channels, width, height, outWidth, outHeight);
}

/**
 * {@linkcode resizeBicubic} in plain code: for engines without SIMD, for rows of enormous length, and to test against.
 */
export function resizePlain(
  source: Uint8Array,
  channels: 3 | 4,
  width: number,
  height: number,
  outWidth: number,
  outHeight: number,
): Uint8Array {
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
