import assert from "node:assert/strict";
import { InputError } from "../run/errors.ts";
import { ImageProcessor, smartResize } from "./image_processor.ts";
import { Picture } from "./picture.ts";
import { readSafetensors } from "./safetensors.ts";

const goldens = new URL("../../fixtures/goldens/", import.meta.url);
const read = (name: string) => Deno.readFile(new URL(name, goldens));
const readJson = async (name: string) => JSON.parse(await Deno.readTextFile(new URL(name, goldens)));
const decode = async (name: string) => await Picture.decode(await read(name), name);

interface GoldenImage {
  file: string;
  decoded: string | null;
  resized: string;
  min_pixels: number;
  max_pixels: number;
  resized_hw: number[];
  image_grid_thw: number[];
  pixel_values_key: string | null;
  pixel_values_first_row_8: number[];
  pixel_values_last_row_8: number[];
}

Deno.test("smartResize gives every golden size and error", async () => {
  const { rows } = await readJson("images/smart_resize.json");
  assert.ok(rows.length > 40);
  for (const { h, w, factor, min_pixels: minPixels, max_pixels: maxPixels, out, error } of rows) {
    const call = () => smartResize(h, w, { factor, minPixels, maxPixels });
    if (error) assert.throws(call, { name: "RangeError", message: error });
    else assert.deepEqual(call(), out, `${h}x${w}`);
  }
  assert.throws(() => smartResize(0, 5), RangeError);
});

Deno.test("pictures are resized exactly and normalised as in the goldens", async () => {
  const { images } = await readJson("images/images.json") as { images: GoldenImage[] };
  const tensors = await readSafetensors(await read("images/pixel_values.safetensors"), "pixel_values");
  let compared = 0;
  for (const golden of images) {
    const processor = new ImageProcessor({}, { minPixels: golden.min_pixels, maxPixels: golden.max_pixels });
    const picture = await decode(golden.decoded ?? golden.file);
    const resized = processor.resize(picture);
    assert.deepEqual([resized.height, resized.width], golden.resized_hw);
    assert.deepEqual(resized.data, (await decode(golden.resized)).data, golden.file);
    const { grid_thw, pixel_values } = processor.prepare(picture);
    assert.deepEqual(grid_thw, golden.image_grid_thw);
    const near = (got: ArrayLike<number>, want: ArrayLike<number>) => {
      assert.equal(got.length, want.length);
      for (let i = 0; i < want.length; i++) assert.ok(Math.abs(got[i] - want[i]) <= 1e-6, `${golden.file} at ${i}`);
    };
    near(pixel_values.subarray(0, 8), golden.pixel_values_first_row_8);
    near(pixel_values.subarray(-8), golden.pixel_values_last_row_8);
    const key = golden.pixel_values_key;
    if (key && ++compared) near(pixel_values, tensors.get(key)!.data);
  }
  assert.ok(images.length >= 4 && compared >= 1);
});

Deno.test("patches lie in merge-block order, colour first, frames repeated", () => {
  // Red is the row, green the column: a value then says which pixel it came from.
  const data = new Uint8Array(56 * 84 * 3);
  for (let y = 0, at = 0; y < 56; y++) for (let x = 0; x < 84; x++, at += 3) data.set([y, x, 0], at);
  const identity = { image_mean: [0, 0, 0], image_std: [1 / 255, 1 / 255, 1 / 255] };
  const { pixel_values: values, grid_thw } = new ImageProcessor(identity).prepare(Picture.fromRgb(data, 84, 56));
  assert.deepEqual(grid_thw, [1, 4, 6]);
  let at = 0;
  for (let by = 0; by < 2; by++) {
    for (let bx = 0; bx < 3; bx++) {
      for (const [dy, dx] of [[0, 0], [0, 1], [1, 0], [1, 1]]) {
        for (let c = 0; c < 3; c++) {
          for (let t = 0; t < 2; t++) {
            for (let y = 0; y < 14; y++) {
              for (let x = 0; x < 14; x++) {
                const want = [(2 * by + dy) * 14 + y, (2 * bx + dx) * 14 + x, 0][c];
                if (Math.round(values[at++]) !== want) {
                  assert.fail(`value ${at - 1} is ${values[at - 1]}, expected ${want}`);
                }
              }
            }
          }
        }
      }
    }
  }
  assert.equal(at, values.length);
});

Deno.test("the key tells content and size apart", () => {
  const processor = new ImageProcessor();
  const key = (w: number, h: number, value: number) =>
    processor.prepare(Picture.fromRgb(new Uint8Array(w * h * 3).fill(value), w, h)).key;
  assert.equal(key(56, 56, 7), key(56, 56, 7));
  assert.equal(new Set([key(56, 56, 7), key(56, 56, 8), key(56, 84, 7), key(84, 56, 7)]).size, 4);
});

Deno.test("both layouts of the limits are read, and options go before them", () => {
  assert.equal(new ImageProcessor({ min_pixels: 784, max_pixels: 5000 }).config.maxPixels, 5000);
  const processor = new ImageProcessor({ size: { shortest_edge: 784, longest_edge: 6000 } }, { maxPixels: 7000 });
  assert.deepEqual([processor.config.minPixels, processor.config.maxPixels], [784, 7000]);
});

Deno.test("wrong settings and impossible pictures name what is wrong", () => {
  const where = "f.json";
  assert.throws(() => new ImageProcessor([], { where }), /^InputError: f\.json: the file must be a JSON object/);
  assert.throws(() => new ImageProcessor({ patch_size: "14" }, { where }), /f\.json: patch_size .* got "14"/);
  assert.throws(() => new ImageProcessor({ image_std: [1, 1, 0] }), /image_std must be three numbers/);
  assert.throws(() => new ImageProcessor({ min_pixels: 9, max_pixels: 4 }), /min_pixels = 9 .* max_pixels = 4/);
  const long = Picture.fromRgb(new Uint8Array(3 * 201), 201, 1);
  assert.throws(
    () => new ImageProcessor().prepare(long),
    (error: Error) =>
      error instanceof InputError && /201x1 cannot be prepared: absolute aspect ratio/.test(error.message),
  );
});
