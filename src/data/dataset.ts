/**
 * The contract of a dataset: an ordered source of samples that are drawn by index, so that order and content come from a
 * seed and a counter alone.
 *
 * @module
 */
import type { Picture } from "../policy/picture.ts";

/** A rectangle `[x1, y1, x2, y2]`, x to the right, y down, x2 and y2 exclusive. The unit is stated where it is used. */
export type Box = readonly [number, number, number, number];

/** A question about a picture. */
export interface Sample {
  /** Unique within its dataset split and stable between runs. */
  readonly id: string;
  /** Draws or decodes the original picture. May reject: the sample is then skipped and counted. */
  picture(): Promise<Picture>;
  /** Plain text; what a policy is asked, without the choices. */
  readonly question: string;
  /** The offered answers, in the order in which they are shown. */
  readonly choices?: readonly string[];
  /**
   * `lettered`: shown as `(A) …` lines and answered by the letter. `listed`: shown as they are, in one line, and answered by
   * the choice itself. @default {"lettered"}
   */
  readonly choiceStyle?: "lettered" | "listed";
  /** The right answer as text: the choice itself (not its letter), or a short free answer. */
  readonly answer: string;
  /** What the picture must show for the question to be answerable, in pixels of the original; for the hit ratio only. */
  readonly boxes?: readonly Box[];
  /** Questions of counting: where the counted things are, `[x, y]` in pixels of the original; for the point reward only. */
  readonly points?: readonly (readonly [number, number])[];
  /** How far from a reference point a predicted one may lie, in pixels of the original. @default {5 % of the diagonal} */
  readonly pointTolerance?: number;
  /** Further named regions, measured like `boxes` and logged as `grounding/<name>_ratio`. */
  readonly regions?: Readonly<Record<string, readonly Box[]>>;
  /** How good replies are worded, for supervised training. @default {a fenced JSON list; the short answer in `\boxed{}`} */
  readonly demonstration?: Demonstration;
}

/** The replies of a policy that knows where to look and what to answer. */
export interface Demonstration {
  /**
   * The last reply, the right answer in its `\boxed{}`; a function of the resized picture's `[width, height]` where it names places.
   */
  readonly answer: string | ((inputSize: readonly [width: number, height: number]) => string);
  /**
   * A grounding reply, whose box counts as one that a model wrote: it must be valid.
   *
   * @param box The smallest valid box around the sample's boxes, in whole pixels of the resized picture.
   * @param inputSize `[width, height]` of the resized picture.
   * @default {a fenced JSON list with that box}
   */
  ground?(box: Box, inputSize: readonly [width: number, height: number]): string;
}

/** Rollout settings that a dataset asks for; a user's own settings go before them. See `RolloutOptions` in rollout.ts. */
export interface DatasetHints {
  /** Smallest side of a valid box, in pixels of the resized image. */
  minBoxSide?: number;
  /** Smallest side of a crop, in pixels of the original picture. */
  minCropSide?: number;
  /** Whether a crop's short side is grown to a square with context. */
  squareCrop?: boolean;
}

/** A split of a dataset. */
export interface Dataset {
  /** For messages and run files, e.g. `signs/train`. */
  readonly name: string;
  /** How many samples there are; `Infinity` for a generated world. */
  readonly size: number;
  /** The sample at a position, 0 ≤ index < size. May reject: the sample is then skipped and counted. */
  get(index: number): Promise<Sample>;
  /** Where its pictures call for other settings than a rollout's own defaults. @default {none} */
  readonly hints?: DatasetHints;
  /** What names the data exactly (a version of the generator, a hash of the rows), for run.json. */
  readonly fingerprint: string;
}
