/**
 * Draws the scenes of signs.ts: a soft noise background, signs with plates and letters, and a light that changes across the
 * picture. About 1 ms for 672 × 672 pixels once the background textures exist.
 *
 * @module
 */
import { Image } from "../deps.ts";
import { Picture } from "../policy/picture.ts";
import { RandomStream } from "../random.ts";
import type { Scene, Sign, SignLetter } from "./signs.ts";

/** How many background textures there are. */
export const textureCount = 12;
/** How many further ones the shifted world has; they follow the others. */
export const shiftedTextureCount = 6;
/** Width and height of a texture in pixels; it repeats without a seam. */
export const textureSide = 1024;

const plateGrey = 28;
const letterGrey = 240;
/** How much the light changes: red by ±20 % from left to right, blue by ±20 % from top to bottom. */
const lighting = 0.2;

/** The letters: rows of five font pixels, top to bottom. */
export const signFont: Record<SignLetter, readonly string[]> = {
  E: ["11111", "10000", "10000", "11110", "10000", "10000", "11111"],
  H: ["10001", "10001", "10001", "11111", "10001", "10001", "10001"],
  K: ["10001", "10010", "10100", "11000", "10100", "10010", "10001"],
  L: ["10000", "10000", "10000", "10000", "10000", "10000", "11111"],
  P: ["11110", "10001", "10001", "11110", "10000", "10000", "10000"],
  S: ["01111", "10000", "10000", "01110", "00001", "00001", "11110"],
  T: ["11111", "00100", "00100", "00100", "00100", "00100", "00100"],
  X: ["10001", "10001", "01010", "00100", "01010", "10001", "10001"],
};

/** Each octave: cells along a side of the texture, and the standard deviation of the noise in a cell. */
const octaves = [[8, 14], [32, 10], [128, 10], [512, 10]] as const;

/** Weights of the four cells around output pixel `phase` of a cell that is `factor` pixels wide (Catmull–Rom). */
function cubicWeights(factor: number, phase: number): [number, number, number, number] {
  const position = (phase + 0.5) / factor - 0.5;
  const t = position - Math.floor(position);
  return [
    ((-0.5 * t + 1) * t - 0.5) * t,
    (1.5 * t - 2.5) * t * t + 1,
    ((-1.5 * t + 2) * t + 0.5) * t,
    (0.5 * t - 0.5) * t * t,
  ];
}

/** The first of the four cells around an output pixel, before wrapping. */
function firstCell(factor: number, at: number): number {
  return Math.floor((at + 0.5) / factor - 0.5) - 1;
}

/** Nearly normal noise, mean 0 and variance 1: the sum of a draw's four bytes. One draw a cell keeps start-up short. */
function noise(random: RandomStream, length: number): Float32Array {
  const scale = 1 / Math.sqrt(4 * (256 * 256 - 1) / 12);
  const out = new Float32Array(length);
  for (let i = 0; i < length; i++) {
    const word = random.next();
    out[i] = ((word & 255) + (word >>> 8 & 255) + (word >>> 16 & 255) + (word >>> 24) - 510) * scale;
  }
  return out;
}

/** Widens each row of `cells` (`n × n`) to the texture's side: `[n, side]`. */
function widen(cells: Float32Array, n: number): Float32Array {
  const side = textureSide, factor = side / n, mask = n - 1; // n is a power of two, so `& mask` wraps around
  const out = new Float32Array(n * side);
  for (let phase = 0; phase < factor; phase++) {
    const [w0, w1, w2, w3] = cubicWeights(factor, phase);
    const shift = firstCell(factor, phase);
    for (let y = 0; y < n; y++) {
      const row = y * n, to = y * side + phase;
      for (let cell = 0; cell < n; cell++) {
        const at = cell + shift;
        out[to + cell * factor] = w0 * cells[row + (at & mask)] + w1 * cells[row + (at + 1 & mask)] +
          w2 * cells[row + (at + 2 & mask)] + w3 * cells[row + (at + 3 & mask)];
      }
    }
  }
  return out;
}

/** Adds `gain[c]` × one row of an octave to three channel rows that lie one after another in `sums`. */
function addOctaveRow(wide: Float32Array, n: number, y: number, gain: readonly number[], sums: Float32Array): void {
  const side = textureSide, factor = side / n, mask = n - 1;
  const [w0, w1, w2, w3] = cubicWeights(factor, y % factor);
  const first = firstCell(factor, y);
  const a = (first & mask) * side, b = (first + 1 & mask) * side;
  const c = (first + 2 & mask) * side, d = (first + 3 & mask) * side;
  const [red, green, blue] = gain;
  for (let x = 0; x < side; x++) {
    const v = w0 * wide[a + x] + w1 * wide[b + x] + w2 * wide[c + x] + w3 * wide[d + x];
    sums[x] += red * v;
    sums[side + x] += green * v;
    sums[2 * side + x] += blue * v;
  }
}

/** Stripes across a texture, `[side]` along a row at height y, without a seam: whole numbers of periods along either side. */
type Stripes = (x: number, y: number) => number;

function makeStripes(random: RandomStream): Stripes {
  const across = 4 + random.int(12), down = random.int(16), height = random.uniform(10, 22);
  return (x, y) => Math.sin(2 * Math.PI * (across * x + down * y) / textureSide) > 0 ? height : -height;
}

function makeTexture(kind: number): Uint32Array {
  const side = textureSide, isShifted = kind >= textureCount;
  const random = new RandomStream(1234, "signs texture", kind);
  const grey = random.uniform(90, 165), tint = isShifted ? 34 : 14;
  const base = [0, 1, 2].map(() => grey + random.uniform(-tint, tint));
  const layers = octaves.map(([n, amplitude]) => {
    const gain = [0, 1, 2].map(() => amplitude * (1 + 0.3 * random.normal()));
    return { n, gain, wide: widen(noise(random, n * n), n) };
  });
  const stripes = isShifted ? makeStripes(random) : undefined;
  const rgba = new Uint8ClampedArray(side * side * 4);
  const sums = new Float32Array(3 * side);
  for (let y = 0, o = 0; y < side; y++) {
    for (let c = 0; c < 3; c++) sums.fill(base[c], c * side, (c + 1) * side);
    for (const { n, gain, wide } of layers) addOctaveRow(wide, n, y, gain, sums);
    if (stripes) { for (let i = 0; i < sums.length; i++) sums[i] += stripes(i % side, y); }
    for (let x = 0; x < side; x++, o += 4) {
      rgba[o] = sums[x];
      rgba[o + 1] = sums[side + x];
      rgba[o + 2] = sums[2 * side + x];
      rgba[o + 3] = 255;
    }
  }
  return new Uint32Array(rgba.buffer);
}

const textures = new Map<number, Uint32Array>();

/** A background texture, RGBA in memory order, `[side, side]`; made at first use and kept (4 MB each). */
function textureOf(kind: number): Uint32Array {
  let texture = textures.get(kind);
  if (!texture) textures.set(kind, texture = makeTexture(kind));
  return texture;
}

function drawBackground(image: Image, { texture: kind, window: [left, top], size }: Scene): void {
  const texture = textureOf(kind), side = textureSide;
  const pixels = new Uint32Array(image.bitmap.buffer);
  for (let y = 0; y < size; y++) {
    const row = (top + y) % side * side;
    for (let x = 0; x < size;) {
      const from = (left + x) % side;
      const length = Math.min(size - x, side - from);
      pixels.set(texture.subarray(row + from, row + from + length), y * size + x);
      x += length;
    }
  }
}

/** ImageScript's `drawBox` counts pixels from 1; this counts from 0. */
function box(image: Image, x: number, y: number, width: number, height: number, colour: number): void {
  image.drawBox(x + 1, y + 1, width, height, colour);
}

function drawShape(image: Image, { shape, rgb, centre: [x, y], side, box: [left, top, right, bottom] }: Sign): void {
  const colour = Image.rgbToColor(...rgb);
  const half = side / 2;
  switch (shape) {
    case "square":
      return box(image, left, top, side, side, colour);
    case "circle":
      image.drawCircle(x + 1, y + 1, half, colour);
      return;
    case "diamond": // its corners are cut, so that enough colour shows around the plate
      for (let row = 0; row < side; row++) {
        const toEdge = Math.min(row, side - 1 - row);
        const reach = Math.min(half, Math.round(0.3 * half) + toEdge + 1);
        box(image, x - reach, top + row, 2 * reach, 1, colour);
      }
      return;
    case "rounded": {
      const radius = half >> 1;
      box(image, left, top + radius, side, side - 2 * radius, colour);
      box(image, left + radius, top, side - 2 * radius, side, colour);
      for (const cx of [left + radius, right - radius + 1]) {
        for (const cy of [top + radius, bottom - radius + 1]) image.drawCircle(cx, cy, radius, colour);
      }
    }
  }
}

function drawPlate(image: Image, { plate: [left, top, right, bottom], letter, scale }: Sign): void {
  box(image, left, top, right - left, bottom - top, Image.rgbToColor(plateGrey, plateGrey, plateGrey));
  const white = Image.rgbToColor(letterGrey, letterGrey, letterGrey);
  signFont[letter].forEach((row, y) => {
    for (const { index, 0: { length } } of row.matchAll(/1+/g)) {
      box(image, left + scale * (1 + index), top + scale * (1 + y), scale * length, scale, white);
    }
  });
}

/** Factors of the light along one side, in 1/65536. */
function lightTable(size: number): Int32Array {
  return Int32Array.from({ length: size }, (_, i) => Math.round(65536 * (1 + lighting * (2 * (i + 0.5) / size - 1))));
}

/**
 * Lights the picture in place: red by column, blue by row; what becomes too bright stays at 255. A pixel is one
 * little-endian word, red lowest. Blue's factor is the same along a row, so it is looked up by value.
 */
function light(image: Image, size: number): void {
  const pixels = new Int32Array(image.bitmap.buffer), table = lightTable(size), blues = new Int32Array(256);
  for (let y = 0, i = 0; y < size; y++) {
    for (let v = 0; v < 256; v++) blues[v] = Math.min(255, v * table[y] + 32768 >> 16) << 16;
    for (let x = 0; x < size; x++, i++) {
      const pixel = pixels[i], red = Math.min(255, Math.imul(pixel & 255, table[x]) + 32768 >> 16);
      pixels[i] = pixel & 0xff00ff00 | blues[pixel >> 16 & 255] | red;
    }
  }
}

/** Draws a scene. The light stays with the place: a crop carries the tint of where it was cut. */
export function drawScene(scene: Scene): Picture {
  const image = new Image(scene.size, scene.size);
  drawBackground(image, scene);
  for (const sign of scene.signs) {
    drawShape(image, sign);
    drawPlate(image, sign);
  }
  light(image, scene.size);
  return Picture.fromImage(image);
}
