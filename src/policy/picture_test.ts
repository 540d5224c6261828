import assert from "node:assert/strict";
import { Image } from "../deps.ts";
import { InputError } from "../run/errors.ts";
import { Picture } from "./picture.ts";

const goldens = new URL("../../fixtures/goldens/images/", import.meta.url);
const read = (name: string) => Deno.readFile(new URL(name, goldens));
const decode = async (name: string) => await Picture.decode(await read(name), name);

/** A 3x2 picture whose pixels are all different. */
const small = Picture.fromRgb(Uint8Array.from({ length: 18 }, (_, i) => 10 * i + 3), 3, 2);

function crc32(bytes: Uint8Array): number {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = crc >>> 1 ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

/** A PNG chunk. */
function chunk(type: string, body: readonly number[]): number[] {
  const named = [...new TextEncoder().encode(type), ...body];
  const word = (n: number) => [n >>> 24, n >>> 16 & 255, n >>> 8 & 255, n & 255];
  return [...word(body.length), ...named, ...word(crc32(Uint8Array.from(named)))];
}

/** An EXIF block that holds nothing but an orientation. */
function exifBlock(orientation: number, little: boolean): number[] {
  return little
    ? [0x49, 0x49, 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, orientation, 0, 0, 0, 0, 0, 0, 0]
    : [0x4d, 0x4d, 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0, 0, 0, 0, 0];
}

/** The bytes of a PNG with a chunk put in after the header. */
function withChunk(png: Uint8Array, added: readonly number[]): Uint8Array {
  return Uint8Array.from([...png.subarray(0, 33), ...added, ...png.subarray(33)]);
}

Deno.test("a JPEG decodes to within 3 levels of the reference and is turned upright", async () => {
  const got = await decode("src/exif6.jpg"), want = await decode("decoded/exif6.png");
  assert.deepEqual([got.width, got.height], [want.width, want.height]);
  let worst = 0;
  got.data.forEach((value, i) => worst = Math.max(worst, Math.abs(value - want.data[i])));
  assert.ok(worst <= 3, `worst difference ${worst}`);
});

Deno.test("a greyscale PNG becomes the same RGB as the reference", async () => {
  assert.deepEqual((await decode("src/gray.png")).data, (await decode("decoded/gray.png")).data);
});

Deno.test("alpha is dropped, not blended", async () => {
  const image = new Image(2, 1);
  image.bitmap.set([200, 100, 50, 0, 7, 8, 9, 128]);
  const picture = await Picture.decode(await image.encode(), "alpha.png");
  assert.deepEqual([...picture.data], [200, 100, 50, 7, 8, 9]);
  assert.deepEqual([...Picture.fromImage(image).data], [200, 100, 50, 7, 8, 9]);
});

Deno.test("all eight orientations are undone, in either byte order and from XMP", async () => {
  const png = await small.encodePng();
  // Pixels of the 3x2 picture by number, as they lie after turning it upright: columns, then numbers row by row.
  const upright: Record<number, [width: number, order: number[]]> = {
    1: [3, [0, 1, 2, 3, 4, 5]],
    2: [3, [2, 1, 0, 5, 4, 3]],
    3: [3, [5, 4, 3, 2, 1, 0]],
    4: [3, [3, 4, 5, 0, 1, 2]],
    5: [2, [0, 3, 1, 4, 2, 5]],
    6: [2, [3, 0, 4, 1, 5, 2]],
    7: [2, [5, 2, 4, 1, 3, 0]],
    8: [2, [2, 5, 1, 4, 0, 3]],
  };
  for (const [orientation, [width, order]] of Object.entries(upright)) {
    const xmp = `XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="${orientation}"/>`;
    for (
      const added of [
        chunk("eXIf", exifBlock(Number(orientation), true)),
        chunk("eXIf", exifBlock(Number(orientation), false)),
        chunk("iTXt", [...new TextEncoder().encode(xmp)]),
      ]
    ) {
      const picture = await Picture.decode(withChunk(png, added), "turned.png");
      assert.equal(picture.width, width, `orientation ${orientation}`);
      assert.deepEqual([...picture.data], order.flatMap((i) => [...small.data.subarray(3 * i, 3 * i + 3)]));
    }
  }
});

Deno.test("PNG encoding is lossless and the same each time", async () => {
  const png = await small.encodePng();
  assert.deepEqual((await Picture.decode(png, "small.png")).data, small.data);
  assert.deepEqual(await small.encodePng(), png);
});

Deno.test("a crop holds the pixels of its box and leaves the picture alone", async () => {
  const picture = await decode("src/wide.png"), before = picture.fingerprint;
  const [x1, y1, x2, y2] = [17, 5, 120, 31];
  const crop = picture.crop([x1, y1, x2, y2]);
  assert.deepEqual([crop.width, crop.height], [x2 - x1, y2 - y1]);
  const want: number[] = [];
  for (let y = y1; y < y2; y++) {
    want.push(...picture.data.subarray((y * picture.width + x1) * 3, (y * picture.width + x2) * 3));
  }
  assert.deepEqual([...crop.data], want);
  assert.equal(Picture.fromRgb(picture.data, picture.width, picture.height).fingerprint, before);
  assert.throws(() => picture.crop([0, 0, picture.width + 1, 5]), /inside 403x31 and not empty/);
  assert.throws(() => picture.crop([5, 5, 5, 9]), RangeError);
  assert.throws(() => picture.crop([0.5, 0, 5, 9]), RangeError);
});

Deno.test("the fingerprint tells size and every byte of colour apart, and ignores alpha", () => {
  const seen = new Set([small.fingerprint, Picture.fromRgb(small.data, 2, 3).fingerprint]);
  for (let i = 0; i < small.data.length; i++) {
    const changed = small.data.slice();
    changed[i] ^= 1;
    seen.add(Picture.fromRgb(changed, 3, 2).fingerprint);
  }
  assert.equal(seen.size, 2 + small.data.length);
  const image = new Image(3, 2);
  image.bitmap.set(small.rgba.map((value, i) => i % 4 === 3 ? 9 : value));
  assert.equal(Picture.fromImage(image).fingerprint, small.fingerprint);
});

Deno.test("truncated files are refused wherever the cut is", async () => {
  for (const name of ["src/tiny.png", "src/exif6.jpg"]) {
    const bytes = await read(name);
    for (const share of [0.01, 0.1, 0.5, 0.9]) {
      await assert.rejects(
        Picture.decode(bytes.subarray(0, Math.ceil(bytes.length * share)), "cut.file"),
        (error: Error) => error instanceof InputError && /^cut\.file: .*(truncated|not a picture)/.test(error.message),
        `${name} cut to ${share}`,
      );
    }
    await assert.rejects(Picture.decode(bytes.subarray(0, bytes.length - 1), name), InputError);
  }
});

Deno.test("damaged, foreign and empty files each give one clear line", async () => {
  const text = (s: string) => Uint8Array.from(s, (c) => c.charCodeAt(0));
  const damaged = await read("src/gray.png");
  damaged.fill(0x55, 200, 400);
  const cases: [Uint8Array, RegExp][] = [
    [new Uint8Array(), /^InputError: p: the file is empty/],
    [
      text("GIF89a.............................."),
      /^InputError: p: this is a GIF \(possibly animated\); only PNG and JPEG/,
    ],
    [text("RIFF....WEBPVP8 ...................."), /^InputError: p: this is a WebP picture/],
    [text("hello, this is no picture"), /^InputError: p: not a picture; only PNG and JPEG/],
    [damaged, /^InputError: p: the PNG data cannot be decoded/],
  ];
  for (const [bytes, message] of cases) await assert.rejects(Picture.decode(bytes, "p"), message);
});

Deno.test("a picture beyond the limit is refused by its header alone", async () => {
  const png = await small.encodePng();
  const view = new DataView(png.buffer, png.byteOffset);
  view.setUint32(16, 60000);
  view.setUint32(20, 60000);
  await assert.rejects(
    Picture.decode(png, "huge.png"),
    /^InputError: huge\.png: 60000x60000 = 3600000000 pixels are more than the limit of 178956970/,
  );
  await assert.rejects(Picture.decode(await small.encodePng(), "p", { maxPixels: 5 }), /3x2 = 6 pixels .* limit of 5/);
});
