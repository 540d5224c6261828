/**
 * The model inputs of a golden folder: named images with their pixels, and image grids.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { ImageProcessor } from "../policy/image_processor.ts";
import type { ImageInput, Message } from "../policy/policy.ts";
import { type Golden, rowsOf, tensor, type Tensors } from "./golden.ts";

/** A rectangle of another image: `[left, top, right, bottom]`. */
export interface CropOf {
  of: string;
  box_ltrb: [number, number, number, number];
}

/** `parity/two_turn.json`. */
export interface TwoTurnJson {
  messages: Message[];
  images: string[];
  text: string;
  length: number;
  image_files: Record<string, string>;
  crops?: Record<string, CropOf>;
  processor: { min_pixels: number; max_pixels: number };
}

/** The part of `grads/grads.json` that names images. */
export interface SubImagesJson {
  sub_images?: Record<string, CropOf & { file: string }>;
}

const pixelFiles = ["parity/pixel_values.safetensors", "grads/pixel_values.safetensors"];

/** The image processor with the settings of the parity images. */
export async function parityProcessor(golden: Golden): Promise<ImageProcessor> {
  const { processor } = await golden.json<TwoTurnJson>("parity/two_turn.json");
  const shared = await golden.has("images/images.json") ? await golden.json<object>("images/images.json") : {};
  return new ImageProcessor({ ...shared, ...processor });
}

/** The file of a named image, relative to the golden folder. */
async function imageFile(golden: Golden, key: string): Promise<string> {
  const { image_files } = await golden.json<TwoTurnJson>("parity/two_turn.json");
  if (image_files?.[key]) return image_files[key];
  const grads = "grads/grads.json";
  const { sub_images } = await golden.has(grads) ? await golden.json<SubImagesJson>(grads) : {};
  const file = sub_images?.[key]?.file;
  if (file === undefined) throw new InputError(`image ${key}: neither recorded pixel values nor a picture file`);
  return file;
}

/**
 * A named image: its recorded pixel values, or, in a set that was trimmed, those made from its picture.
 *
 * @param grid The grid that the golden file states.
 */
async function namedImage(golden: Golden, key: string, grid: readonly number[]): Promise<ImageInput> {
  const grid_thw = [grid[0], grid[1], grid[2]] as const;
  for (const file of pixelFiles) {
    const found = await golden.has(file) ? (await golden.tensors(file)).get(key) : undefined;
    if (!found) continue;
    if (found.shape[0] !== grid[0] * grid[1] * grid[2]) {
      throw new InputError(`${file}: image ${key} has ${found.shape[0]} patches, but its grid is ${grid.join("×")}`);
    }
    return { grid_thw, pixel_values: Float32Array.from(found.data), key };
  }
  const made = (await parityProcessor(golden)).prepare(await golden.picture(await imageFile(golden, key)));
  if (made.grid_thw.join() !== grid.join()) {
    throw new InputError(`image ${key} was prepared to a grid of ${made.grid_thw.join("×")}, not ${grid.join("×")}`);
  }
  return { ...made, key };
}

/** Named images with the rows of a file's `image_grid_thw`, in order. */
export async function namedImages(
  golden: Golden,
  keys: readonly string[],
  tensors: Tensors,
  file: string,
): Promise<ImageInput[]> {
  const grids = keys.length === 0 ? [] : rowsOf(tensor(tensors, "image_grid_thw", file));
  if (grids.length !== keys.length) {
    throw new InputError(`${file}: image_grid_thw has ${grids.length} rows for the ${keys.length} images named`);
  }
  return await Promise.all(keys.map((key, i) => namedImage(golden, key, grids[i])));
}
