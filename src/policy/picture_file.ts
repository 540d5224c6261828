/**
 * What can be learnt from an image file without decoding it: format, dimensions, EXIF orientation, and whether it is whole.
 * The decoder neither honours the orientation nor always refuses a truncated file, and it allocates before one can ask how
 * large the picture is.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";

/** What the header of an image file says. */
export interface PictureFile {
  format: "PNG" | "JPEG";
  /** Columns as stored, before the orientation is applied. */
  width: number;
  /** Rows as stored, before the orientation is applied. */
  height: number;
  /** EXIF orientation, 1 to 8; 1 is upright. */
  orientation: number;
}

/** Magic bytes of formats that are recognised only to be refused by name. */
const foreign: readonly (readonly [name: string, at: number, magic: string])[] = [
  ["a GIF (possibly animated)", 0, "GIF8"],
  ["a WebP picture", 8, "WEBP"],
  ["a BMP picture", 0, "BM"],
  ["a TIFF picture", 0, "II*\0"],
  ["a TIFF picture", 0, "MM\0*"],
  ["an AVIF or HEIF picture", 4, "ftyp"],
  ["a JPEG XL picture", 0, "\xff\x0a"],
  ["a PDF document", 0, "%PDF"],
  ["an SVG drawing", 0, "<svg"],
  ["an XML or SVG text", 0, "<?xml"],
  ["an HTML page", 0, "<!"],
  ["a Git LFS pointer, not the picture itself", 0, "version https://git-lfs"],
];

function hasText(bytes: Uint8Array, at: number, text: string): boolean {
  if (at < 0 || at + text.length > bytes.length) return false;
  for (let i = 0; i < text.length; i++) if (bytes[at + i] !== text.charCodeAt(i)) return false;
  return true;
}

/**
 * Reads format, dimensions and orientation, and checks that the file runs to its end.
 *
 * @param bytes The whole file.
 * @param where Names the file in errors.
 * @throws {InputError} The file is empty, of another format, or cut short.
 */
export function inspectPicture(bytes: Uint8Array, where: string): PictureFile {
  if (bytes.length === 0) throw new InputError(`${where}: the file is empty; expected a PNG or JPEG picture`);
  let file: PictureFile;
  if (hasText(bytes, 0, "\x89PNG\r\n\x1a\n")) file = inspectPng(bytes, where);
  else if (hasText(bytes, 0, "\xff\xd8\xff")) file = inspectJpeg(bytes, where);
  else {
    const known = foreign.find(([, at, magic]) => hasText(bytes, at, magic));
    throw new InputError(
      `${where}: ${known ? `this is ${known[0]}` : "not a picture"}; only PNG and JPEG are read, so convert it first`,
    );
  }
  if (file.width < 1 || file.height < 1) {
    throw new InputError(
      `${where}: the ${file.format} header says ${file.width}x${file.height} pixels; the file is damaged`,
    );
  }
  return file;
}

function truncated(where: string, format: string, what: string): InputError {
  return new InputError(`${where}: the ${format} file is truncated (${what}); copy or download it again`);
}

function inspectPng(bytes: Uint8Array, where: string): PictureFile {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 33 || !hasText(bytes, 12, "IHDR")) throw truncated(where, "PNG", "no IHDR chunk");
  const file: PictureFile = { format: "PNG", width: view.getUint32(16), height: view.getUint32(20), orientation: 1 };
  let exif = 0, xmp = 0;
  for (let at = 8;;) {
    if (at + 12 > bytes.length) throw truncated(where, "PNG", "no IEND chunk");
    const length = view.getUint32(at);
    const body = bytes.subarray(at + 8, at + 8 + length);
    if (hasText(bytes, at + 4, "IEND")) break;
    if (hasText(bytes, at + 4, "eXIf")) exif = exifOrientation(body);
    else if (hasText(bytes, at + 4, "iTXt") && hasText(body, 0, "XML:com.adobe.xmp\0")) xmp = xmpOrientation(body);
    at += 12 + length;
  }
  file.orientation = exif || xmp || 1;
  return file;
}

/** Markers that stand alone, without a length: TEM, RST0..7, SOI. */
function isBare(marker: number): boolean {
  return marker === 0x01 || (marker >= 0xd0 && marker <= 0xd8);
}

/** SOF0..15 without DHT (C4), JPG (C8) and DAC (CC). */
function isFrame(marker: number): boolean {
  return marker >= 0xc0 && marker <= 0xcf && marker !== 0xc4 && marker !== 0xc8 && marker !== 0xcc;
}

function inspectJpeg(bytes: Uint8Array, where: string): PictureFile {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const file: PictureFile = { format: "JPEG", width: 0, height: 0, orientation: 1 };
  let exif = 0, xmp = 0, scans = 0;
  for (let at = 2;;) {
    // In entropy-coded data 0xFF is followed by 0 or a restart marker, so the next other marker ends the scan.
    at = bytes.indexOf(0xff, at);
    while (at >= 0 && bytes[at + 1] === 0xff) at++;
    if (at < 0 || at + 1 >= bytes.length) throw truncated(where, "JPEG", "no end-of-image marker");
    const marker = bytes[at + 1];
    at += 2;
    if (marker === 0 || isBare(marker)) continue;
    if (marker === 0xd9) break;
    if (at + 2 > bytes.length) throw truncated(where, "JPEG", "a segment is cut");
    const length = view.getUint16(at);
    const body = bytes.subarray(at + 2, at + length);
    if (isFrame(marker)) {
      if (body.length < 5) throw truncated(where, "JPEG", "the frame header is cut");
      file.height = view.getUint16(at + 3);
      file.width = view.getUint16(at + 5);
    } else if (marker === 0xe1 && hasText(body, 0, "Exif\0\0")) exif ||= exifOrientation(body.subarray(6));
    else if (marker === 0xe1 && hasText(body, 0, "http://ns.adobe.com/xap/1.0/\0")) xmp ||= xmpOrientation(body);
    else if (marker === 0xda) scans++;
    at += length;
  }
  if (scans === 0) throw truncated(where, "JPEG", "no image data");
  file.orientation = exif || xmp || 1;
  return file;
}

/** Collects the first value of every SHORT and LONG tag in the first directory of an EXIF block, as far as it goes. */
function readTags(bytes: Uint8Array): Map<number, number> {
  const tags = new Map<number, number>();
  if (bytes.length < 14) return tags;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const little = hasText(bytes, 0, "II");
  if (!little && !hasText(bytes, 0, "MM")) return tags;
  const at = view.getUint32(4, little);
  if (at + 2 > bytes.length) return tags;
  const entries = view.getUint16(at, little);
  for (let i = 0; i < entries; i++) {
    const entry = at + 2 + 12 * i;
    if (entry + 12 > bytes.length) return tags;
    const type = view.getUint16(entry + 2, little);
    if (type === 3) tags.set(view.getUint16(entry, little), view.getUint16(entry + 8, little));
    else if (type === 4) tags.set(view.getUint16(entry, little), view.getUint32(entry + 8, little));
  }
  return tags;
}

/** The orientation in an EXIF block, or 0. A damaged block is no reason to refuse the picture. */
function exifOrientation(block: Uint8Array): number {
  const value = readTags(hasText(block, 0, "Exif\0\0") ? block.subarray(6) : block).get(0x0112) ?? 0;
  return value >= 1 && value <= 8 ? value : 0;
}

/** Pillow falls back to the orientation in an XMP packet; so must whoever wants the same pixels. */
function xmpOrientation(packet: Uint8Array): number {
  const match = /tiff:Orientation(?:="|>)([1-8])/.exec(new TextDecoder("latin1").decode(packet));
  return match ? Number(match[1]) : 0;
}
