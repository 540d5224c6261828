/**
 * Rollouts of a run with the pictures that they saw, so that a person can look at what the policy does.
 *
 * ```
 * rollouts/step-N.jsonl          all rollouts of the first samples of a training step at which there is an evaluation
 * rollouts/heldout-step-N.jsonl  the first items of the held-out evaluation after step N, the same ones each time; 0 is the base
 * rollouts/pictures/HASH.jpg     what they saw: originals and crops, named by their content
 * ```
 *
 * A line is a {@linkcode SavedRollout}. Everything in it follows from the weights and the draws, so a run that is done again writes
 * the same bytes.
 *
 * @module
 */
import type { Sample } from "../data/dataset.ts";
import type { EvaluateParts } from "../evaluate.ts";
import { Picture } from "../policy/picture.ts";
import type { Policy } from "../policy/policy.ts";
import { resizeBicubic } from "../policy/resize.ts";
import { isCorrect, parsePoints, type Point, type RewardValue } from "../reward.ts";
import { boxedAnswer, type Trajectory } from "../rollout.ts";
import type { RunFolder } from "./run_folder.ts";

/** Version of the lines; raised when a reader of the old ones would misread them. */
export const ROLLOUT_FORMAT = 2;
/** The longer side of a saved picture is at most this many pixels. */
const MAX_SIDE = 448;
const JPEG_QUALITY = 85;

/** Tokens as text: one, or so many equal ones in a row (the places of a picture). */
export type SavedToken = string | [text: string, count: number];

/** A line of a rollout file: what was asked, what came of it, and the trajectory with its images named. */
export interface SavedRollout extends Omit<Trajectory, "images"> {
  format: typeof ROLLOUT_FORMAT;
  /** Training steps done before this was sampled, this one counted where the split is `train`; 0 is the base. */
  step: number;
  /** What the weights are trained on, or asked in an evaluation. */
  split: "train" | "heldout";
  question: string;
  choices?: readonly string[];
  /** The right answer. */
  answer: string;
  /** What the picture must show for it, in pixels of the original; likewise `points`. */
  boxes?: Sample["boxes"];
  points?: Sample["points"];
  /** What stood in the last box of the last reply; absent without one. */
  said?: string;
  /** Whether that is right. */
  correct: boolean;
  /** Questions of counting: the points that the last reply names, in pixels of the resized picture. */
  found?: Point[];
  /** Weighted sum of the rewards. */
  reward: number;
  /** The rewards by name, unweighted. */
  parts: Record<string, number>;
  /** Files below `rollouts/`: the input, then what was cut out, in order. */
  pictures: string[];
  /**
   * The text of `ids`, as many tokens. Where a character has several tokens, the first holds it and the others are `""`. Decoded
   * by itself, so the texts together need not be exactly a turn's `text`.
   */
  tokens: SavedToken[];
}

/** Rollouts that are to be kept. */
export interface RolloutsToSave {
  step: number;
  split: SavedRollout["split"];
  /** With what it is about, one for each trajectory. */
  rollouts: readonly { sample: Sample; trajectory: Trajectory; reward: RewardValue }[];
}

/** Keeps the conversations about the first items of an evaluation until they are taken. */
export class WatchedItems {
  readonly #count: number;
  readonly #score: (sample: Sample, trajectory: Trajectory) => RewardValue;
  #rollouts: RolloutsToSave["rollouts"][number][] = [];

  /** @param count How many items. */
  constructor(count: number, score: (sample: Sample, trajectory: Trajectory) => RewardValue) {
    this.#count = count;
    this.#score = score;
  }

  /** An `onBatch` of `evaluate`. */
  readonly add: NonNullable<EvaluateParts["onBatch"]> = ({ trajectories }, samples, from) => {
    if (from === 0) this.#rollouts = [];
    for (const trajectory of trajectories) {
      const sample = samples[trajectory.prompt - from];
      if (trajectory.prompt >= this.#count) continue;
      this.#rollouts.push({ sample, trajectory, reward: this.#score(sample, trajectory) });
    }
  };

  /** What was added since the evaluation began; it is then forgotten. */
  take(): RolloutsToSave["rollouts"] {
    const rollouts = this.#rollouts;
    this.#rollouts = [];
    return rollouts;
  }
}

/**
 * Writes `rollouts/step-N.jsonl` or `rollouts/heldout-step-N.jsonl`, a line a rollout, and the pictures that aren't there yet.
 *
 * @param policy Turns tokens into text.
 */
export async function saveRollouts(
  folder: RunFolder,
  policy: Pick<Policy, "decode" | "suppressTokens">,
  { step, split, rollouts }: RolloutsToSave,
): Promise<void> {
  const lines: string[] = [], texts = new Map<number, string>();
  for (const { sample, trajectory, reward } of rollouts) {
    const { images: _images, ...kept } = trajectory, last = trajectory.turns.at(-1)?.text ?? "";
    const found = sample.points ? parsePoints(last) : undefined;
    const { question, choices, answer, boxes, points } = sample;
    const line: SavedRollout = {
      ...{ format: ROLLOUT_FORMAT, step, split, question, choices, answer, boxes, points },
      ...{ said: boxedAnswer(last), correct: isCorrect(sample, last), found },
      ...{ reward: reward.total, parts: reward.parts },
      pictures: await savePictures(folder, sample, trajectory),
      tokens: tokenTexts(policy, trajectory.ids, texts),
      ...kept,
    };
    lines.push(JSON.stringify(line) + "\n");
  }
  await folder.writeFile(`rollouts/${split === "heldout" ? "heldout-" : ""}step-${step}.jsonl`, lines.join(""));
}

/**
 * The text of each token, special ones included.
 *
 * @param known Texts of tokens so far, to be used again.
 */
export function tokenTexts(
  policy: Pick<Policy, "decode" | "suppressTokens">,
  ids: readonly number[],
  known = new Map<number, string>(),
): SavedToken[] {
  const textOf = (id: number) => {
    const text = known.get(id) ?? policy.decode([id], false);
    known.set(id, text);
    return text;
  };
  const never = new Set(policy.suppressTokens), tokens: SavedToken[] = [];
  for (let at = 0; at < ids.length;) {
    const id = ids[at], text = textOf(id);
    let end = at + 1;
    if (never.has(id)) {
      while (ids[end] === id) end++;
      tokens.push([text, end - at]);
    } else {
      // A part of a character decodes to U+FFFD until its last byte has come; none has more than four.
      let whole = text;
      while (whole.includes("\ufffd") && end < ids.length && end - at < 4 && !never.has(ids[end])) {
        whole = policy.decode(ids.slice(at, ++end), false);
      }
      if (whole.includes("\ufffd")) end = at + 1, whole = text;
      tokens.push(whole, ...new Array<string>(end - at - 1).fill(""));
    }
    at = end;
  }
  return tokens;
}

/** Names of the pictures of a trajectory in order: the input, then the crops. */
async function savePictures(folder: RunFolder, sample: Sample, { turns }: Trajectory): Promise<string[]> {
  const original = await sample.picture();
  const crops = turns.flatMap(({ crop, shown = crop }) => shown ? [original.crop(shown)] : []);
  const names: string[] = [];
  for (const picture of [original, ...crops]) {
    const name = `pictures/${picture.fingerprint}.jpg`;
    names.push(name);
    await folder.writeNewFile(`rollouts/${name}`, () => encode(shrink(picture)));
  }
  return names;
}

async function encode({ rgba, width, height }: Picture): Promise<Uint8Array> {
  // Loaded when the first picture is kept: scripts that keep none don't need it.
  const { encodeJpeg } = await import("../deps_jpeg.ts");
  const image = new ImageData(new Uint8ClampedArray(rgba), width, height);
  return new Uint8Array(await encodeJpeg(image, { quality: JPEG_QUALITY }));
}

function shrink(picture: Picture): Picture {
  const { width, height } = picture, factor = MAX_SIDE / Math.max(width, height);
  if (factor >= 1) return picture;
  const w = Math.max(1, Math.round(width * factor)), h = Math.max(1, Math.round(height * factor));
  return Picture.fromRgb(resizeBicubic(picture.data, 3, width, height, w, h), w, h);
}
