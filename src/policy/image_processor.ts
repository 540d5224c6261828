/**
 * From a picture to what the vision tower takes: resized into the pixel budget, normalised, cut into patches. The numbers
 * are those of transformers' Qwen2-VL image processor with its Pillow backend.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { hashPixels, type Picture } from "./picture.ts";
import type { ImageInput } from "./policy.ts";
import { resizeBicubic } from "./resize.ts";

/** Settings of an {@linkcode ImageProcessor}. */
export interface ImageProcessorConfig {
  /** Pictures are enlarged until they have at least this many pixels. */
  minPixels: number;
  /** Pictures are shrunk until they have at most this many pixels. */
  maxPixels: number;
  /** By channel, on a scale of 0 to 1. */
  mean: readonly [number, number, number];
  /** By channel, on a scale of 0 to 1. */
  std: readonly [number, number, number];
  /** Side of a patch in pixels. */
  patchSize: number;
  /** Patches a side that become one token. */
  mergeSize: number;
  /** Frames in a patch; a still picture is repeated. */
  temporalPatchSize: number;
}

/** The settings of the published checkpoints, for whatever the file leaves out. */
const fallback: Readonly<ImageProcessorConfig> = {
  minPixels: 56 * 56,
  maxPixels: 28 * 28 * 1280,
  mean: [0.48145466, 0.4578275, 0.40821073],
  std: [0.26862954, 0.26130258, 0.27577711],
  patchSize: 14,
  mergeSize: 2,
  temporalPatchSize: 2,
};

/** Options of {@linkcode ImageProcessor}. */
export interface ImageProcessorOptions {
  /** Takes the place of the file's limit. @default {the file's} */
  minPixels?: number;
  /** Takes the place of the file's limit. @default {the file's} */
  maxPixels?: number;
  /** Names the file in errors. @default {"preprocessor_config.json"} */
  where?: string;
}

function parseConfig(json: unknown, options: ImageProcessorOptions): ImageProcessorConfig {
  const { where = "preprocessor_config.json" } = options;
  const fields = asRecord(json) ?? fail(where, "the file", "must be a JSON object", json);
  const size = asRecord(fields.size ?? {}) ?? fail(where, "size", "must be an object", fields.size);
  const int = (key: string, value: unknown, otherwise: number): number => {
    if (value === undefined || value === null) return otherwise;
    return typeof value === "number" && Number.isSafeInteger(value) && value > 0
      ? value
      : fail(where, key, "must be a positive integer", value);
  };
  const triple = (key: string, otherwise: readonly [number, number, number]): readonly [number, number, number] => {
    const value = fields[key] ?? otherwise;
    const isTriple = Array.isArray(value) && value.length === 3 && value.every((v) => Number.isFinite(v));
    if (!isTriple || (key === "image_std" && value.includes(0))) fail(where, key, "must be three numbers", value);
    return value as [number, number, number];
  };
  const config = {
    minPixels: int("min_pixels", options.minPixels ?? fields.min_pixels ?? size.shortest_edge, fallback.minPixels),
    maxPixels: int("max_pixels", options.maxPixels ?? fields.max_pixels ?? size.longest_edge, fallback.maxPixels),
    mean: triple("image_mean", fallback.mean),
    std: triple("image_std", fallback.std),
    patchSize: int("patch_size", fields.patch_size, fallback.patchSize),
    mergeSize: int("merge_size", fields.merge_size, fallback.mergeSize),
    temporalPatchSize: int("temporal_patch_size", fields.temporal_patch_size, fallback.temporalPatchSize),
  };
  if (!(config.minPixels >= 1 && config.minPixels <= config.maxPixels)) {
    throw new InputError(
      `${where}: min_pixels = ${config.minPixels} must be from 1 to max_pixels = ${config.maxPixels}`,
    );
  }
  return config;
}

function asRecord(value: unknown): Readonly<Record<string, unknown>> | undefined {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? value as Record<string, unknown>
    : undefined;
}

function fail(where: string, key: string, what: string, value: unknown): never {
  throw new InputError(`${where}: ${key} ${what}, got ${JSON.stringify(value)}`);
}

/** Rounds to the nearest integer, halves to the even one. */
function roundHalfEven(x: number): number {
  const down = Math.floor(x), rest = x - down;
  return rest < 0.5 || (rest === 0.5 && down % 2 === 0) ? down : down + 1;
}

/** Limits for {@linkcode smartResize}. */
export interface SmartResizeOptions {
  /** Both sides become multiples of it. @default {28} */
  factor?: number;
  /** @default {3136} */
  minPixels?: number;
  /** @default {1_003_520} */
  maxPixels?: number;
}

/**
 * The size to which a picture is resized: multiples of the factor, about the same aspect, an area within the limits.
 *
 * @returns `[height, width]`
 * @throws {RangeError} A side is not positive, or one is more than 200 times the other.
 */
export function smartResize(height: number, width: number, options: SmartResizeOptions = {}): [number, number] {
  const { factor = 28, minPixels = 56 * 56, maxPixels = 28 * 28 * 1280 } = options;
  if (!(height > 0 && width > 0)) throw new RangeError(`a picture's sides must be positive, got ${width}x${height}`);
  const aspect = Math.max(height, width) / Math.min(height, width);
  if (aspect > 200) {
    // Worded and printed as in transformers, so that a log can be searched for it.
    const shown = Number.isInteger(aspect) ? `${aspect}.0` : `${aspect}`;
    throw new RangeError(`absolute aspect ratio must be smaller than 200, got ${shown}`);
  }
  const h = roundHalfEven(height / factor) * factor, w = roundHalfEven(width / factor) * factor;
  if (h * w > maxPixels) {
    const beta = Math.sqrt(height * width / maxPixels);
    return [
      Math.max(factor, Math.floor(height / beta / factor) * factor),
      Math.max(factor, Math.floor(width / beta / factor) * factor),
    ];
  }
  if (h * w < minPixels) {
    const beta = Math.sqrt(minPixels / (height * width));
    return [Math.ceil(height * beta / factor) * factor, Math.ceil(width * beta / factor) * factor];
  }
  return [h, w];
}

/** Prepares pictures for the vision tower. */
export class ImageProcessor {
  /** The settings in force: the options, else the file's, else those of the published checkpoints. */
  readonly config: Readonly<ImageProcessorConfig>;
  /** Normalised value by channel and byte, `[3, 256]`. */
  readonly #normalised: Float32Array;

  /**
   * Checks the settings and tabulates the normalisation.
   *
   * @param json The parsed `preprocessor_config.json`: limits as `min_pixels` and `max_pixels`, or as `size.shortest_edge`
   * and `size.longest_edge`. What it leaves out is as in the published checkpoints.
   * @throws {InputError} A field has the wrong type or range.
   */
  constructor(json: unknown = {}, options: ImageProcessorOptions = {}) {
    this.config = parseConfig(json, options);
    const { mean, std } = this.config;
    this.#normalised = Float32Array.from({ length: 768 }, (_, i) => ((i & 255) / 255 - mean[i >> 8]) / std[i >> 8]);
  }

  /**
   * The size of a picture after resizing.
   *
   * @returns `[height, width]`
   * @throws {InputError} The picture is more than 200 times as long as wide.
   */
  resizedSize(height: number, width: number): [number, number] {
    const { patchSize, mergeSize, minPixels, maxPixels } = this.config;
    try {
      return smartResize(height, width, { factor: patchSize * mergeSize, minPixels, maxPixels });
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      throw new InputError(`a picture of ${width}x${height} cannot be prepared: ${error.message}; crop it first`);
    }
  }

  /**
   * Resizes, RGB bytes `[height, width, 3]`.
   *
   * @throws {InputError} As {@linkcode resizedSize}.
   */
  resize(picture: Picture): { data: Uint8Array; height: number; width: number } {
    const [height, width] = this.resizedSize(picture.height, picture.width);
    return { data: resizeBicubic(picture.rgba, 4, picture.width, picture.height, width, height), height, width };
  }

  /**
   * Resizes, normalises and cuts into patches. The key names the resized pixels and the normalisation.
   *
   * @throws {InputError} As {@linkcode resizedSize}.
   */
  prepare(picture: Picture): ImageInput {
    const { data, height, width } = this.resize(picture);
    const { patchSize } = this.config;
    return {
      grid_thw: [1, height / patchSize, width / patchSize],
      pixel_values: this.#patches(data, height, width),
      key: `${hashPixels(data, 3, width, height)}-${width}x${height}`,
    };
  }

  /** RGB bytes `[height, width, 3]` → `[rows·columns of patches, 3·T·P·P]`, patches in merge-block order. */
  #patches(data: Uint8Array, height: number, width: number): Float32Array {
    const { patchSize: p, mergeSize: m, temporalPatchSize: frames } = this.config;
    const rows = height / p, columns = width / p, plane = p * p;
    const out = new Float32Array(rows * columns * 3 * frames * plane);
    let at = 0;
    for (let blockY = 0; blockY < rows; blockY += m) {
      for (let blockX = 0; blockX < columns; blockX += m) {
        for (let i = 0; i < m * m; i++) {
          const y = blockY + Math.floor(i / m), x = blockX + i % m;
          this.#patch(data, (y * p * width + x * p) * 3, width * 3, out, at);
          at += 3 * frames * plane;
        }
      }
    }
    return out;
  }

  /** One patch, `[3, T, P, P]`: each colour's plane is computed once and repeated for the other frames. */
  #patch(data: Uint8Array, corner: number, stride: number, out: Float32Array, at: number): void {
    const { patchSize: p, temporalPatchSize: frames } = this.config;
    const plane = p * p, table = this.#normalised;
    for (let c = 0; c < 3; c++) {
      const start = at + c * frames * plane;
      for (let y = 0, to = start; y < p; y++) {
        let from = corner + y * stride + c;
        for (let x = 0; x < p; x++, from += 3) out[to++] = table[c << 8 | data[from]];
      }
      for (let t = 1; t < frames; t++) out.copyWithin(start + t * plane, start, start + plane);
    }
  }
}
