/**
 * A decoded picture: RGB, upright, in the pixels of the original file. Decoding, cropping and encoding are ImageScript's;
 * EXIF orientation and the checks on the file are ours (see picture_file.ts).
 *
 * @module
 */
import { Image } from "../deps.ts";
import { InputError } from "../run/errors.ts";
import { inspectPicture } from "./picture_file.ts";

/** Options of {@linkcode Picture.decode}. */
export interface DecodeOptions {
  /** Pictures with more pixels are refused before anything is allocated. @default {178_956_970} */
  maxPixels?: number;
}

/** The most pixels that are decoded unless told otherwise: the limit at which Pillow refuses too. */
export const defaultMaxPixels = 178_956_970;

/** An RGB picture in memory. Treat its pixels as read-only. */
export class Picture {
  /** Columns of pixels, at least 1. */
  readonly width: number;
  /** Rows of pixels, at least 1. */
  readonly height: number;
  /** RGBA bytes `[height, width, 4]`; alpha carries no meaning. What {@linkcode data} is made from, without a copy. */
  readonly rgba: Uint8Array;
  #data?: Uint8Array;
  #fingerprint?: string;

  private constructor(rgba: Uint8Array, width: number, height: number) {
    this.rgba = rgba;
    this.width = width;
    this.height = height;
  }

  /** RGB bytes `[height, width, 3]`, made on first use and kept. */
  get data(): Uint8Array {
    return this.#data ??= packRgb(this.rgba);
  }

  /** Names the content: equal for equal size and RGB bytes; 64 bits, not cryptographic. */
  get fingerprint(): string {
    return this.#fingerprint ??= hashPixels(this.rgba, 4, this.width, this.height);
  }

  /**
   * Wraps an ImageScript image; alpha is dropped, not blended. The pixels are shared: don't draw on the image afterwards.
   */
  static fromImage(image: Image): Picture {
    const { buffer, byteOffset, byteLength } = image.bitmap;
    return new Picture(new Uint8Array(buffer, byteOffset, byteLength), image.width, image.height);
  }

  /**
   * Makes a picture from RGB bytes.
   *
   * @param data `[height, width, 3]`; kept, not copied.
   * @throws {RangeError} The number of bytes is not width · height · 3.
   */
  static fromRgb(data: Uint8Array, width: number, height: number): Picture {
    if (!(width >= 1) || !(height >= 1) || data.length !== width * height * 3) {
      throw new RangeError(
        `an RGB picture of ${width}x${height} needs ${width * height * 3} bytes, got ${data.length}`,
      );
    }
    const rgba = new Uint8Array(width * height * 4);
    for (let from = 0, to = 0; from < data.length; from += 3, to += 4) {
      rgba[to] = data[from];
      rgba[to + 1] = data[from + 1];
      rgba[to + 2] = data[from + 2];
      rgba[to + 3] = 255;
    }
    const picture = new Picture(rgba, width, height);
    picture.#data = data;
    return picture;
  }

  /**
   * Decodes a PNG or JPEG file: EXIF orientation applied, grey and palettes expanded, alpha dropped.
   *
   * @param bytes The whole file.
   * @param where Names the file in errors, e.g. its path.
   * @throws {InputError} Empty, truncated, damaged, too large, or neither PNG nor JPEG.
   */
  static async decode(bytes: Uint8Array, where: string, options: DecodeOptions = {}): Promise<Picture> {
    const file = inspectPicture(bytes, where);
    const limit = options.maxPixels ?? defaultMaxPixels;
    if (file.width * file.height > limit) {
      throw new InputError(
        `${where}: ${file.width}x${file.height} = ${
          file.width * file.height
        } pixels are more than the limit of ${limit}; ` +
          "scale the picture down or raise the limit",
      );
    }
    const image = await decodeImage(bytes, where, file.format);
    if (image.width !== file.width || image.height !== file.height) {
      throw new InputError(
        `${where}: decoded to ${image.width}x${image.height} where the header says ${file.width}x${file.height}; the file is damaged`,
      );
    }
    return Picture.fromImage(upright(image, file.orientation));
  }

  /**
   * Cuts out a rectangle.
   *
   * @param box `[x1, y1, x2, y2]` in pixels of this picture, integers, x2 and y2 exclusive.
   * @throws {RangeError} The box is empty, not integral, or not inside the picture.
   */
  crop(box: readonly [number, number, number, number]): Picture {
    const [x1, y1, x2, y2] = box;
    const inside = x1 >= 0 && y1 >= 0 && x1 < x2 && y1 < y2 && x2 <= this.width && y2 <= this.height;
    if (!inside || !box.every(Number.isInteger)) {
      throw new RangeError(
        `a crop must be whole pixels inside ${this.width}x${this.height} and not empty, got [${box.join(", ")}]`,
      );
    }
    // Image.crop works in place, so it is given a copy, and only of the rows it keeps.
    const band = new Image(this.width, y2 - y1);
    band.bitmap.set(this.rgba.subarray(y1 * this.width * 4, y2 * this.width * 4));
    return Picture.fromImage(band.crop(x1, 0, x2 - x1, y2 - y1));
  }

  /** Encodes as PNG, opaque. The same pixels give the same bytes. */
  async encodePng(): Promise<Uint8Array> {
    const image = new Image(this.width, this.height);
    image.bitmap.set(this.rgba);
    for (let i = 3; i < image.bitmap.length; i += 4) image.bitmap[i] = 255;
    // The encoder writes the time of day unless given one.
    return await image.encode(3, { creationTime: 0 });
  }
}

async function decodeImage(bytes: Uint8Array, where: string, format: string): Promise<Image> {
  try {
    return await Image.decode(bytes);
  } catch (error) {
    // ImageScript reads its codecs from the package cache: a permission is missing, nothing is wrong with the picture.
    if (error instanceof Deno.errors.NotCapable) throw error;
    const reason = error instanceof Error ? error.message : String(error);
    throw new InputError(
      `${where}: the ${format} data cannot be decoded (${reason}); the file is damaged, of a rare kind, or too large for memory`,
    );
  }
}

/**
 * Undoes an EXIF orientation. Each case says where the upright picture's first pixel lies in the stored one, and how far
 * apart in it are horizontal and vertical neighbours.
 */
function upright(image: Image, orientation: number): Image {
  if (orientation === 1) return image;
  const w = image.width, h = image.height, last = w * h - 1;
  const [start, dx, dy]: [number, number, number] = [
    [0, 1, w],
    [w - 1, -1, w], // 2: mirrored left to right
    [last, -1, -w], // 3: upside down
    [last - (w - 1), 1, -w], // 4: mirrored top to bottom
    [0, w, 1], // 5: transposed
    [last - (w - 1), -w, 1], // 6: turn clockwise
    [last, -w, -1], // 7: transposed over the other diagonal
    [w - 1, w, -1], // 8: turn counter-clockwise
  ][orientation - 1] as [number, number, number];
  const turned = orientation >= 5;
  const out = new Image(turned ? h : w, turned ? w : h);
  const from = new Uint32Array(image.bitmap.buffer), to = new Uint32Array(out.bitmap.buffer);
  for (let y = 0, at = 0; y < out.height; y++) {
    for (let x = 0, source = start + y * dy; x < out.width; x++, source += dx) to[at++] = from[source];
  }
  return out;
}

function packRgb(rgba: Uint8Array): Uint8Array {
  const rgb = new Uint8Array(rgba.length / 4 * 3);
  for (let from = 0, to = 0; to < rgb.length; from += 4, to += 3) {
    rgb[to] = rgba[from];
    rgb[to + 1] = rgba[from + 1];
    rgb[to + 2] = rgba[from + 2];
  }
  return rgb;
}

/**
 * A 64-bit hash of size and colours, as 16 hexadecimal digits: two multiplicative 32-bit lanes over one word a pixel.
 *
 * @param pixels `[height, width, channels]`; channels beyond the third are left out.
 */
export function hashPixels(pixels: Uint8Array, channels: 3 | 4, width: number, height: number): string {
  let a = Math.imul(width ^ 0x9e3779b9, 0x85ebca6b) ^ height;
  let b = Math.imul(height ^ 0x7f4a7c15, 0xc2b2ae35) ^ width;
  for (let i = 0; i < pixels.length; i += channels) {
    const word = pixels[i] | pixels[i + 1] << 8 | pixels[i + 2] << 16;
    a = Math.imul(a ^ word, 0x01000193);
    a ^= a >>> 15;
    b = Math.imul(b ^ word, 0x5bd1e995);
    b ^= b >>> 13;
  }
  return finish(a, b) + finish(b, a);
}

/** Murmur-style finaliser, so that the last pixel reaches every digit. */
function finish(h: number, other: number): string {
  h ^= Math.imul(other, 0x27d4eb2f);
  h = Math.imul(h ^ h >>> 16, 0x85ebca6b);
  h = Math.imul(h ^ h >>> 13, 0xc2b2ae35);
  return ((h ^ h >>> 16) >>> 0).toString(16).padStart(8, "0");
}
