/**
 * Group `images`: decoding, resizing and normalising of pictures.
 *
 * @module
 */
import { ImageProcessor, smartResize } from "../policy/image_processor.ts";
import type { Picture } from "../policy/picture.ts";
import type { ImageInput } from "../policy/policy.ts";
import type { Golden } from "./golden.ts";
import { tensor } from "./golden.ts";
import type { Check, Report } from "./report.ts";
import { tolerances } from "./tolerances.ts";

interface ImageEntry {
  file: string;
  loaded_size_hw: [number, number];
  decoded: string | null;
  decoded_rgb_sha256: string;
  min_pixels: number;
  max_pixels: number;
  resized_hw: [number, number];
  resized: string;
  resized_rgb_sha256: string;
  image_grid_thw: [number, number, number];
  image_tokens: number;
  pixel_values_shape: [number, number];
  pixel_values_mean: number;
  pixel_values_std: number;
  pixel_values_key: string | null;
  pixel_values_first_row_8: number[];
  pixel_values_last_row_8: number[];
}
interface ImagesJson {
  merge_size: number;
  images: ImageEntry[];
}
interface ResizeRow {
  h: number;
  w: number;
  factor: number;
  min_pixels: number;
  max_pixels: number;
  out?: [number, number];
  error?: string;
}

const torchvisionFile = "images/pixel_values_torchvision.safetensors";

/** Runs the group. */
export async function checkImages(golden: Golden, report: Report): Promise<void> {
  await report.attempt("images.json", async () => {
    const settings = await golden.json<ImagesJson>("images/images.json");
    for (const entry of settings.images) await checkImage(golden, report, settings, entry);
    await report.attempt("torchvision", () => checkTorchvision(golden, report, settings));
  });
  await report.check("smart_resize.json", async (check) => {
    const { rows } = await golden.json<{ rows: ResizeRow[] }>("images/smart_resize.json");
    for (const row of rows) check.same(resizeOutcome(row), row.out ?? "error", `${row.h}×${row.w}`);
  });
}

function resizeOutcome({ h, w, factor, min_pixels, max_pixels }: ResizeRow): [number, number] | "error" {
  try {
    return smartResize(h, w, { factor, minPixels: min_pixels, maxPixels: max_pixels });
  } catch (error) {
    if (error instanceof RangeError) return "error";
    throw error;
  }
}

async function checkImage(golden: Golden, report: Report, settings: ImagesJson, entry: ImageEntry): Promise<void> {
  const { min_pixels, max_pixels } = entry, name = entry.file.split("/").at(-1)!;
  const processor = new ImageProcessor({ ...settings, min_pixels, max_pixels });
  await report.attempt(name, async () => {
    const source = await golden.picture(entry.file);
    const exact = entry.decoded ? await golden.picture(entry.decoded) : source;
    const isJpeg = /\.jpe?g$/i.test(entry.file);
    await report.check(`${name}: decoded${isJpeg ? " (levels)" : ""}`, async (check) => {
      check.same([source.height, source.width], entry.loaded_size_hw, "size");
      check.same(await sha256(exact.data), entry.decoded_rgb_sha256, "sha256");
      check.close(source.data, exact.data, isJpeg ? tolerances.jpeg : 0);
    });
    const resized = processor.resize(exact);
    await report.check(`${name}: resized`, async (check) => {
      check.same([resized.height, resized.width], entry.resized_hw, "size");
      check.close(resized.data, (await golden.picture(entry.resized)).data, 0);
      check.same(await sha256(resized.data), entry.resized_rgb_sha256, "sha256");
    });
    const input = processor.prepare(exact);
    await report.check(`${name}: grid and image tokens`, (check) => {
      const patches = input.grid_thw.reduce((a, b) => a * b);
      check.same(input.grid_thw, entry.image_grid_thw, "grid");
      check.same(patches / settings.merge_size ** 2, entry.image_tokens, "image tokens");
      check.same([patches, input.pixel_values.length / patches], entry.pixel_values_shape, "pixel_values");
    });
    await report.check(`${name}: pixel values`, (check) => comparePixels(golden, check, input, entry));
  });
}

async function comparePixels(golden: Golden, check: Check, input: ImageInput, entry: ImageEntry): Promise<void> {
  const { pixel_values: pixels } = input;
  const { mean, std } = meanAndStd(pixels);
  check.number(mean, entry.pixel_values_mean, tolerances.pixels, "mean");
  check.number(std, entry.pixel_values_std, tolerances.pixels, "std");
  const first = entry.pixel_values_first_row_8, last = entry.pixel_values_last_row_8;
  check.close(pixels.subarray(0, first.length), first, tolerances.pixels, "first row");
  check.close(pixels.subarray(pixels.length - last.length), last, tolerances.pixels, "last row");
  if (!entry.pixel_values_key) return;
  const file = "images/pixel_values.safetensors";
  const expected = tensor(await golden.tensors(file), entry.pixel_values_key, file);
  check.close(pixels, expected.data, tolerances.pixels, "all values");
}

/** Mean and standard deviation (divisor n − 1). */
function meanAndStd(values: Float32Array): { mean: number; std: number } {
  let sum = 0, squares = 0;
  for (const v of values) sum += v;
  const mean = sum / values.length;
  for (const v of values) squares += (v - mean) ** 2;
  return { mean, std: Math.sqrt(squares / (values.length - 1)) };
}

/** The other image backend resizes in its own way; given its resized pictures the pixel values are the same formula. */
async function checkTorchvision(golden: Golden, report: Report, settings: ImagesJson): Promise<void> {
  for (const [key, expected] of await golden.tensors(torchvisionFile)) {
    await report.check(`${key}: pixel values of torchvision's resized image`, async (check) => {
      const picture: Picture = await golden.picture(`images/resized_torchvision/${key}.png`);
      const area = picture.width * picture.height;
      const processor = new ImageProcessor({ ...settings, min_pixels: area, max_pixels: area });
      check.close(processor.prepare(picture).pixel_values, expected.data, tolerances.pixels);
    });
  }
}

async function sha256(bytes: Uint8Array): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", bytes.slice());
  return [...new Uint8Array(digest)].map((b) => b.toString(16).padStart(2, "0")).join("");
}
