/**
 * A folder of one's own pictures: a JSONL file with one question a line, and the pictures that it names.
 *
 * ```json
 * {"image": "street.jpg", "question": "What does the sign say?", "choices": ["Stop", "Yield"], "answer": "Stop"}
 * {"image": "hall.png", "question": "How many chairs?", "answer": 12, "boxes": [[120, 80, 460, 300]], "id": "hall-1"}
 * ```
 *
 * `answer` is a choice's text or its letter (`A`, `(A)`). `boxes` are `[x1, y1, x2, y2]` in pixels of the upright original;
 * they only measure, nothing is trained on them. The rows are in `train.jsonl` and `test.jsonl`, or in `data.jsonl`, or in
 * the only `*.jsonl` file there is; one file is split by picture.
 *
 * A wrong row is left out and listed in {@linkcode FolderDataset.problems}. A picture is read when it is asked for.
 *
 * @module
 */
import { join } from "node:path";
import { Picture } from "../policy/picture.ts";
import { RandomStream } from "../random.ts";
import { InputError } from "../run/errors.ts";
import type { Box, Dataset, Sample } from "./dataset.ts";
import { type FolderRow, parseRow } from "./folder_row.ts";

/** What was wrong with a row that was left out. */
export interface RowProblem {
  /** The line in the file, from 1. */
  readonly row: number;
  /** One line: file, row, what is wrong, what to do. */
  readonly message: string;
}

/** A split of a folder. */
export interface FolderDataset extends Dataset {
  /** Rows of the split's file that were left out. */
  readonly problems: readonly RowProblem[];
  /** How the rows came into this split, in words. */
  readonly source: string;
}

/** Options of {@linkcode openFolder}. */
export interface FolderOptions {
  /**
   * The share of the pictures that a single file gives to the held-out split, 0..1. Questions on the same picture stay
   * together. 1: every row is held out, for evaluation alone. Unused when there are `train.jsonl` and `test.jsonl`.
   *
   * @default {0.2}
   */
  heldoutShare?: number;
  /** The seed of the split of a single file; the order of the rows is never changed. @default {0} */
  splitSeed?: number;
}

/** The largest JSONL file that is read, in bytes. */
const maxFileBytes = 256 * 2 ** 20;

/**
 * Opens a split of a folder. All rows are checked now, pictures only for being there.
 *
 * @throws {InputError} There is no such folder or no JSONL file, several compete, or no row of the split can be used.
 * @throws {RangeError} For an option out of range.
 */
export async function openFolder(
  dir: string,
  split: "train" | "heldout",
  options: FolderOptions = {},
): Promise<FolderDataset> {
  const { heldoutShare = 0.2, splitSeed = 0 } = options;
  if (!(heldoutShare >= 0 && heldoutShare <= 1)) {
    throw new RangeError(`heldoutShare must be from 0 to 1, got ${heldoutShare}`);
  }
  const { name, whole } = await findRows(dir, split);
  const path = join(dir, name);
  const { rows, problems } = await readRows(dir, path);
  if (rows.length === 0) {
    throw new InputError(
      problems.length === 0
        ? `${path}: no rows; write one JSON object a line with image, question and answer`
        : `${path}: none of ${problems.length} rows can be used; the first: ${problems[0].message}`,
    );
  }
  const chosen = whole ? rows : rowsOfSplit(rows, split, heldoutShare, splitSeed);
  if (chosen.length === 0) {
    throw new InputError(
      `${path}: heldoutShare ${heldoutShare} leaves no row for the ${split} split; change it, or add train.jsonl and test.jsonl`,
    );
  }
  return {
    name: `${dir}/${split}`,
    size: chosen.length,
    problems,
    source: `${chosen.length} of ${rows.length + problems.length} rows of ${path}`,
    fingerprint: `sha256:${await sha256(chosen.map((row) => row.line).join("\n"))}`,
    get: async (index) => {
      if (!Number.isInteger(index) || index < 0 || index >= chosen.length) {
        throw new RangeError(`${path}: index must be an integer from 0 to ${chosen.length - 1}, got ${index}`);
      }
      return await rowSample(chosen[index]);
    },
  };
}

/** Which file holds a split's rows, and whether all of them belong to it. */
async function findRows(dir: string, split: "train" | "heldout"): Promise<{ name: string; whole: boolean }> {
  const names: string[] = [];
  try {
    for await (const entry of Deno.readDir(dir)) if (entry.name.endsWith(".jsonl")) names.push(entry.name);
  } catch (error) {
    throw new InputError(
      `${dir}: cannot be read as a folder (${reason(error)}); name a folder with a JSONL file in it`,
    );
  }
  names.sort();
  if (names.includes("train.jsonl") && names.includes("test.jsonl")) {
    return { name: split === "train" ? "train.jsonl" : "test.jsonl", whole: true };
  }
  if (names.includes("data.jsonl")) return { name: "data.jsonl", whole: false };
  if (names.length === 1) return { name: names[0], whole: false };
  throw new InputError(
    names.length === 0
      ? `${dir}: no JSONL file there; write data.jsonl with one {"image": …, "question": …, "answer": …} a line`
      : `${dir}: several JSONL files (${
        names.join(", ")
      }); keep one, name one data.jsonl, or have train.jsonl and test.jsonl`,
  );
}

interface CheckedRow extends FolderRow {
  /** The line as it stands in the file. */
  readonly line: string;
  /** File and line, for messages. */
  readonly where: string;
  /** The picture's path with links followed; equal paths mean the same picture. */
  readonly path: string;
  readonly id: string;
}

async function readRows(dir: string, path: string): Promise<{ rows: CheckedRow[]; problems: RowProblem[] }> {
  const text = await readText(path);
  const root = await Deno.realPath(dir);
  const rows: CheckedRow[] = [], problems: RowProblem[] = [];
  const rowOfId = new Map<string, number>();
  const pictures = new Map<string, Promise<string>>();
  for (const [at, line] of text.split(/\r?\n/).entries()) {
    const row = at + 1;
    if (line.trim() === "") continue;
    const where = `${path}:${row}`;
    try {
      const parsed = parseRow(line, where);
      const id = parsed.id ?? `row-${row}`;
      const before = rowOfId.get(id);
      if (before !== undefined) {
        throw new InputError(`${where}: id "${id}" is taken by row ${before}; give each row its own or none`);
      }
      let found = pictures.get(parsed.image);
      if (!found) pictures.set(parsed.image, found = findPicture(dir, root, parsed.image));
      rows.push({ ...parsed, id, line, where, path: await explain(found, where) });
      rowOfId.set(id, row);
    } catch (error) {
      if (!(error instanceof InputError)) throw error;
      problems.push({ row, message: error.message });
    }
  }
  return { rows, problems };
}

async function readText(path: string): Promise<string> {
  try {
    const { size } = await Deno.stat(path);
    if (size > maxFileBytes) {
      throw new InputError(`${path}: ${size} bytes are more than the limit of ${maxFileBytes}; split the file`);
    }
    // TextDecoder drops a byte order mark and, when fatal, refuses what is not UTF-8.
    return new TextDecoder("utf-8", { fatal: true }).decode(await Deno.readFile(path));
  } catch (error) {
    if (error instanceof InputError) throw error;
    if (error instanceof TypeError) throw new InputError(`${path}: not UTF-8 text; save the file as UTF-8`);
    throw new InputError(`${path}: cannot be read (${reason(error)})`);
  }
}

/** Puts the row in front of what is wrong with its picture. */
async function explain(found: Promise<string>, where: string): Promise<string> {
  try {
    return await found;
  } catch (error) {
    if (error instanceof InputError) throw new InputError(`${where}: ${error.message}`);
    throw error;
  }
}

/** The real path of a picture that a row names, which must be a file inside the folder with all links followed. */
async function findPicture(dir: string, root: string, image: string): Promise<string> {
  const outside = () =>
    new InputError(
      `image "${image}" lies outside the folder; put the picture into ${dir} and give its path from there`,
    );
  if (/^([/\\]|[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*:\/\/)/.test(image)) throw outside();
  let depth = 0;
  for (const part of image.split(/[/\\]/)) {
    depth += part === ".." ? -1 : part === "" || part === "." ? 0 : 1;
    if (depth < 0) throw outside();
  }
  let real: string;
  try {
    real = await Deno.realPath(join(dir, image));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) {
      throw new InputError(`image "${image}" is not in ${dir}; add the file or correct the name`);
    }
    throw new InputError(`image "${image}" cannot be read (${reason(error)}); it must be a file inside ${dir}`);
  }
  const separator = Deno.build.os === "windows" ? "\\" : "/";
  if (!real.startsWith(root.endsWith(separator) ? root : root + separator)) throw outside();
  let isFile: boolean;
  try {
    isFile = (await Deno.stat(real)).isFile;
  } catch (error) {
    throw new InputError(`image "${image}" cannot be read (${reason(error)}); it must be a file inside ${dir}`);
  }
  if (!isFile) throw new InputError(`image "${image}" is not a file; name a PNG or JPEG file`);
  return real;
}

/**
 * The rows of one split, in file order. Pictures are shuffled by the seed and the first share of them is held out, at
 * least one and not all; with a single picture, its rows are split instead, and a single row is in both.
 */
function rowsOfSplit(rows: CheckedRow[], split: "train" | "heldout", share: number, seed: number): CheckedRow[] {
  if (share === 0 || share === 1) return (share === 1) === (split === "heldout") ? rows : [];
  if (rows.length === 1) return rows;
  const pictures = [...new Set(rows.map((row) => row.path))];
  const unit = pictures.length > 1 ? (row: CheckedRow) => row.path : (row: CheckedRow) => row.id;
  const units = [...new Set(rows.map(unit))];
  const count = Math.min(units.length - 1, Math.max(1, Math.round(share * units.length)));
  const heldout = new Set(new RandomStream(seed, "folder split").shuffle(units).slice(0, count));
  return rows.filter((row) => heldout.has(unit(row)) === (split === "heldout"));
}

function rowSample(row: CheckedRow): Sample {
  return {
    id: row.id,
    picture: async () => {
      let bytes: Uint8Array;
      try {
        bytes = await Deno.readFile(row.path);
      } catch (error) {
        throw new InputError(`${row.where}: image "${row.image}" cannot be read (${reason(error)})`);
      }
      const picture = await Picture.decode(bytes, `${row.path} (${row.where})`);
      checkBoxes(row.boxes ?? [], picture, row.where);
      return picture;
    },
    question: row.question,
    choices: row.choices,
    answer: row.answer,
    boxes: row.boxes,
  };
}

/** Only now is the picture's size known. */
function checkBoxes(boxes: readonly Box[], { width, height }: Picture, where: string): void {
  for (const box of boxes) {
    if (box[2] > width || box[3] > height) {
      throw new InputError(
        `${where}: box [${box.join(", ")}] reaches outside the picture of ${width}x${height}; ` +
          "boxes are [x1, y1, x2, y2] in pixels of the original",
      );
    }
  }
}

async function sha256(text: string): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message.split("\n")[0] : String(error);
}
