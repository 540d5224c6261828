import assert from "node:assert/strict";
import { RandomStream } from "../random.ts";
import { precision, type Taps, tapsFor } from "./bicubic.ts";
import { resizeBicubic, resizePlain } from "./resize.ts";
import { Resampler } from "./resize_wasm.ts";

const resampler = Resampler.create()!;

/** The fast way itself, whatever `resizeBicubic` would choose. */
function resizeFast(
  source: Uint8Array,
  channels: 3 | 4,
  w: number,
  h: number,
  outW: number,
  outH: number,
  strip?: number,
) {
  return resampler.resize(source, channels, tapsFor(w, outW), tapsFor(h, outH), strip);
}

/**
 * Kinds of pixels: noise, and what overshoots most: black and white in blocks of one and of two pixels and at a
 * threshold.
 */
const pixels = {
  noise: (random: RandomStream) => random.int(256),
  checkers: (_: RandomStream, x: number, y: number, c: number) => (x + y + c) % 2 * 255,
  blocks: (_: RandomStream, x: number, y: number, c: number) => ((x >> 1) + (y >> 1) + (c >> 1)) % 2 * 255,
  extremes: (random: RandomStream) => random.int(2) * 255,
  white: () => 255,
};

function picture(kind: keyof typeof pixels, channels: 3 | 4, w: number, h: number): Uint8Array {
  const random = new RandomStream(w, "fast resize", h), out = new Uint8Array(w * h * channels);
  for (let i = 0; i < out.length; i++) {
    const pixel = Math.floor(i / channels);
    out[i] = pixels[kind](random, pixel % w, Math.floor(pixel / w), i % channels);
  }
  return out;
}

/** Width and height, then those of the result. */
const sizes = [
  [1, 1, 1, 1],
  [1, 1, 3, 2],
  [1, 7, 1, 3],
  [2, 1, 5, 1],
  [2, 3, 28, 28],
  [3, 2, 1, 1],
  [5, 9, 28, 28],
  [13, 50, 28, 50],
  [17, 19, 17, 5],
  [23, 29, 7, 29],
  [31, 17, 7, 5],
  [40, 12, 40, 6],
  [61, 67, 113, 127],
  [84, 60, 112, 112],
  [97, 5, 2, 31],
  [101, 103, 11, 13],
  [127, 131, 112, 112],
  [224, 224, 28, 28],
  [300, 1, 17, 1],
  [1, 300, 1, 17],
  [997, 3, 1, 1],
] as const;

Deno.test("the fast way gives what plain code gives, for all sizes, channels and kinds of pixels", () => {
  for (const [w, h, outW, outH] of sizes) {
    for (const channels of [3, 4] as const) {
      for (const kind of ["noise", "checkers", "blocks", "extremes", "white"] as const) {
        const source = picture(kind, channels, w, h);
        const want = resizePlain(source, channels, w, h, outW, outH);
        const name = `${kind}, ${w}x${h}x${channels} to ${outW}x${outH}`;
        assert.deepEqual(resizeFast(source, channels, w, h, outW, outH), want, name);
        assert.deepEqual(resizeBicubic(source, channels, w, h, outW, outH), want, `${name}, chosen`);
      }
    }
  }
});

Deno.test("the fast way gives what plain code gives for many random sizes", () => {
  const random = new RandomStream(3, "fast resize");
  for (let i = 0; i < 200; i++) {
    const [w, h, outW, outH] = Array.from({ length: 4 }, () => 1 + random.int(2 ** (1 + random.int(7))));
    const channels = i % 2 ? 3 : 4, source = picture("extremes", channels, w, h);
    const want = resizePlain(source, channels, w, h, outW, outH);
    assert.deepEqual(resizeFast(source, channels, w, h, outW, outH), want, `${w}x${h}x${channels} to ${outW}x${outH}`);
  }
});

Deno.test("it does not matter where strips end", () => {
  for (const [w, h, outW, outH] of [[50, 97, 20, 13], [20, 31, 50, 97], [33, 64, 33, 63], [9, 200, 3, 2]]) {
    const source = picture("extremes", 4, w, h), want = resizePlain(source, 4, w, h, outW, outH);
    for (const rows of [0, 4, 5, 8, 12, 28, h - 1, h, h + 1, 10 * h]) {
      const strip = rows * 4 * Math.max(w, outW);
      assert.deepEqual(resizeFast(source, 4, w, h, outW, outH, strip), want, `${w}x${h}, strips of ${rows} rows`);
    }
  }
});

Deno.test("calls leave nothing behind for later ones, and results are the caller's", () => {
  const large = picture("white", 4, 200, 150), small = picture("noise", 3, 20, 15);
  const first = resizeFast(small, 3, 20, 15, 9, 7)!, kept = first.slice();
  resizeFast(large, 4, 200, 150, 333, 280);
  const bytes = resampler.memoryBytes;
  for (let i = 0; i < 20; i++) {
    assert.deepEqual(resizeFast(small, 3, 20, 15, 9, 7), kept);
    resizeFast(large, 4, 200, 150, 333, 280);
  }
  assert.deepEqual(first, kept);
  assert.equal(resampler.memoryBytes, bytes);
});

Deno.test("a high picture takes no more memory than a strip and a window", () => {
  const own = Resampler.create()!, w = 400, h = 12_000;
  const source = picture("noise", 4, w, h);
  const got = own.resize(source, 4, tapsFor(w, 50), tapsFor(h, 1500));
  assert.deepEqual(got, resizePlain(source, 4, w, h, 50, 1500));
  assert.ok(own.memoryBytes < 1.5 * 2 ** 20, `${own.memoryBytes} bytes for a picture of ${source.length}`);
});

Deno.test("sums wrap around as in plain code, and the largest weights keep their bits", () => {
  // Weights that no picture has: sums far beyond 32 bits.
  const from = 9, to = 5, size = 9, random = new RandomStream(4, "fast resize");
  for (let round = 0; round < 50; round++) {
    const taps: Taps = {
      from,
      size,
      first: new Int32Array(to),
      count: new Int32Array(to).fill(size),
      weights: Int32Array.from({ length: to * size }, () => random.int(2 ** 27) - 2 ** 26),
    };
    const source = picture("noise", 3, from, 1);
    const got = resampler.resize(source, 3, taps, tapsFor(1, 1));
    const want = Array.from({ length: to * 3 }, (_, i) => {
      let sum = 1 << (precision - 1);
      for (let k = 0; k < size; k++) {
        sum = (sum + Math.imul(taps.weights[Math.floor(i / 3) * size + k], source[k * 3 + i % 3])) | 0;
      }
      return Math.min(255, Math.max(0, sum >> precision));
    });
    assert.deepEqual([...got!], want);
  }
});

Deno.test("rows too long for the memory are left to plain code", () => {
  const w = 2 ** 24, taps = { from: w, size: 1, first: new Int32Array(1), count: new Int32Array(1).fill(1) };
  const across: Taps = { ...taps, weights: new Int32Array(1) };
  assert.equal(Resampler.create()!.resize(new Uint8Array(0), 4, across, tapsFor(1, 1)), undefined);
});

Deno.test("without SIMD there is no fast way", () => {
  const { validate } = WebAssembly;
  WebAssembly.validate = () => false;
  try {
    assert.equal(Resampler.create(), undefined);
  } finally {
    WebAssembly.validate = validate;
  }
});

Deno.test("taps of different sizes are told apart", () => {
  for (const [from, to] of [[1, 65_541], [2, 5], [65_537, 3], [1, 65_539]]) {
    const taps = tapsFor(from, to);
    assert.deepEqual([taps.from, taps.first.length], [from, to]);
    assert.equal(tapsFor(from, to), taps);
  }
});
