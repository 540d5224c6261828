/**
 * Datasets by name: the signs world, or a folder of one's own pictures.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { counting } from "./counting.ts";
import type { Dataset } from "./dataset.ts";
import { type FolderOptions, openFolder, type RowProblem } from "./folder.ts";
import { signs } from "./signs.ts";

/** Options of {@linkcode openDataset}. */
export interface OpenDatasetOptions extends FolderOptions {
  /** The seed of generated worlds; folders keep their rows' order. @default {0} */
  seed?: number;
}

/** The names that {@linkcode openDataset} knows, as a person would write them. */
export const datasetNames = [
  "signs",
  "signs:SIZE (e.g. signs:1344)",
  "signs-shifted (other sizes, counts and backgrounds)",
  "counting",
  "a folder with a JSONL file",
] as const;

/**
 * Opens a split of a dataset.
 *
 * @param nameOrDir `signs`, `signs:SIZE` with the side of the pictures in pixels, `signs-shifted`, `counting`, or the path of a folder. A name goes before
 * a folder; write `./signs` for a folder called that.
 * @throws {InputError} There is no such dataset or folder, or nothing in it can be used.
 */
export async function openDataset(
  nameOrDir: string,
  split: "train" | "heldout",
  options: OpenDatasetOptions = {},
): Promise<Dataset> {
  if (nameOrDir === "counting") return counting({ split, seed: options.seed });
  const [, world, size] = /^(signs|signs-shifted)(?::(.*))?$/.exec(nameOrDir) ?? [];
  if (world) return openSigns(nameOrDir, size, { split, seed: options.seed, world: signsWorlds[world] });
  let isDirectory: boolean;
  try {
    isDirectory = (await Deno.stat(nameOrDir)).isDirectory;
  } catch (error) {
    const why = error instanceof Deno.errors.NotFound || !(error instanceof Error) ? "" : ` (${error.message})`;
    throw new InputError(`no dataset or folder "${nameOrDir}"${why}; there are: ${datasetNames.join(", ")}`);
  }
  if (!isDirectory) {
    throw new InputError(
      `dataset "${nameOrDir}" is a file; name the folder that holds the JSONL file and the pictures`,
    );
  }
  return await openFolder(nameOrDir, split, options);
}

const signsWorlds: Record<string, "standard" | "shifted"> = { signs: "standard", "signs-shifted": "shifted" };

function openSigns(name: string, size: string | undefined, options: Parameters<typeof signs>[0]): Dataset {
  if (size !== undefined && !/^\d+$/.test(size)) {
    throw new InputError(`dataset "${name}": what follows the colon must be a size in pixels, e.g. signs:1344`);
  }
  try {
    return signs({ ...options, ...size === undefined ? {} : { size: Number(size) } });
  } catch (error) {
    if (error instanceof RangeError) throw new InputError(`dataset "${name}": ${error.message}`);
    throw error;
  }
}

/** The rows that a dataset left out because they were wrong; none for generated worlds. */
export function datasetProblems(dataset: Dataset): readonly RowProblem[] {
  return "problems" in dataset && Array.isArray(dataset.problems) ? dataset.problems : [];
}
