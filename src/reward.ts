/**
 * Rewards: plain functions of a sample and a trajectory. MGPO's only reward is {@linkcode binaryReward}; the others are for
 * ablations and are added by name and weight with {@linkcode combineRewards}.
 *
 * Scoring is strict: only what stands in the last `\boxed{…}` of the last reply counts, and it must name one choice, or be
 * the short answer, without guessing. No box means wrong.
 *
 * @module
 */
import type { Box, Sample } from "./data/dataset.ts";
import { linearSumAssignment } from "./deps.ts";
import { boxedAnswer, toOriginal, type Trajectory, type TurnRecord } from "./rollout.ts";

export { boxedAnswer } from "./rollout.ts";

/** A reward of one trajectory, a finite number. */
export type RewardFunction = (sample: Sample, trajectory: Trajectory) => number;

// ---- Reading an answer ---------------------------------------------------------------------------------------------

/**
 * The form in which answers are compared: no LaTeX wrappers (`\text{…}`, `$…$`) or escapes, plain quotes and dashes, lower case,
 * single spaces, no punctuation at either end. Punctuation inside stays: 3.5 is not 35.
 */
export function normalizeAnswer(text: string): string {
  let out = text.normalize("NFKC");
  for (let before = ""; before !== out;) {
    before = out;
    out = out.replace(/\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}/g, "$1");
  }
  return out
    .replace(/^\s*(\$+|\\\(|\\\[)([^]*?)(\$+|\\\)|\\\])\s*$/, "$2")
    .replace(/\\[ ,;!]/g, " ")
    .replace(/\\([%$#&_{}])/g, "$1")
    .replace(/[‘’‚‛]/g, "'")
    .replace(/[“”„‟]/g, '"')
    .replace(/[‐‑‒–—−]/g, "-")
    .toLowerCase()
    .replace(/\s+/g, " ")
    .replace(/^[\s"'`([{*:;,!?]+|[\s"'`)\]}*:;,.!?]+$/g, "");
}

/**
 * A plain decimal number, thousands separated by commas or not; `undefined` for anything else, for codes with leading zeros
 * (007 is not 7), and for more digits than a double tells apart.
 */
function numberOf(normalized: string): number | undefined {
  if (!/^[+-]?(?:0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+)?(?:\.\d+)?$/.test(normalized)) return undefined;
  const digits = normalized.replace(/\D/g, "").length;
  return digits >= 1 && digits <= 15 ? Number(normalized.replaceAll(",", "")) : undefined;
}

/** Whether two answers are the same after {@linkcode normalizeAnswer}, or are equal numbers ("3.0" and "3"). */
export function sameAnswer(a: string, b: string): boolean {
  const x = normalizeAnswer(a), y = normalizeAnswer(b);
  if (x === y) return x !== "";
  const n = numberOf(x);
  return n !== undefined && n === numberOf(y);
}

/**
 * Which choice an answer names. Lettered choices: `B`, `(B)`, `B.`, `(B) blue` if B is blue, or the text of exactly one
 * choice. Listed choices: the text of exactly one choice.
 *
 * @param answer The inside of the box.
 * @returns Its index; `undefined` if it names none, several, or contradicts itself.
 */
export function chosenIndex(sample: Pick<Sample, "choices" | "choiceStyle">, answer: string): number | undefined {
  const choices = sample.choices ?? [];
  const only = (matches: number[]) => matches.length === 1 ? matches[0] : undefined;
  const named = (test: (choice: string) => boolean) => choices.flatMap((choice, i) => test(choice) ? [i] : []);
  if ((sample.choiceStyle ?? "lettered") === "lettered") {
    const plain = normalizeAnswer(answer);
    const letter = /^[a-z]$/.test(plain) ? plain.charCodeAt(0) - 97 : -1;
    if (letter >= 0 && letter < choices.length) return letter;
    const [, head, rest] = /^([a-z])\s*[).:,\]-]+\s*(.+)$/.exec(plain) ?? [];
    const index = head ? head.charCodeAt(0) - 97 : -1;
    if (index >= 0 && index < choices.length && sameAnswer(rest, choices[index])) return index;
  }
  return only(named((choice) => choice.trim() === answer.trim())) ??
    only(named((choice) => sameAnswer(choice, answer)));
}

/** Whether the last boxed answer of a reply is right: the right choice, or the short answer itself. */
export function isCorrect(sample: Pick<Sample, "choices" | "choiceStyle" | "answer">, text: string): boolean {
  const answer = boxedAnswer(text);
  if (answer === undefined) return false;
  if (!sample.choices?.length) return sameAnswer(answer, sample.answer);
  const index = chosenIndex(sample, answer);
  if (index === undefined) return false;
  // Choices may differ by case or punctuation alone, so an exact match goes first.
  const right = sample.choices.indexOf(sample.answer);
  return right >= 0 ? sample.choices[index] === sample.answer : sameAnswer(sample.choices[index], sample.answer);
}

// ---- Rewards -------------------------------------------------------------------------------------------------------

function lastText(trajectory: Trajectory): string {
  return trajectory.turns[trajectory.turns.length - 1]?.text ?? "";
}

/** The first turn, if it is a grounding turn. */
function grounding(trajectory: Trajectory): TurnRecord | undefined {
  return trajectory.turns.length > 1 ? trajectory.turns[0] : undefined;
}

/** 1 if the last reply's boxed answer is right, else 0. MGPO's reward. */
export const binaryReward: RewardFunction = (sample, trajectory): number =>
  Number(isCorrect(sample, lastText(trajectory)));

/** 1 if the last reply has a non-empty boxed answer, right or wrong, else 0. */
export const formatReward: RewardFunction = (_, trajectory): number => Number(!!boxedAnswer(lastText(trajectory)));

/** 1 if the first grounding turn gave a valid box, else 0. */
export const validBoxReward: RewardFunction = (_, trajectory): number =>
  Number(grounding(trajectory)?.box !== undefined);

/** 1 if the first crop contains all boxes of the sample, else 0 (also for samples without boxes). */
export const hitReward: RewardFunction = (_, trajectory): number => Number(grounding(trajectory)?.hit === true);

/**
 * Intersection over union, 0..1, of the first box (before the crop is grown) and the smallest rectangle around the sample's
 * boxes, in original pixels; 0 without either.
 */
export const iouReward: RewardFunction = (sample, trajectory): number => {
  const box = grounding(trajectory)?.box;
  if (!box || !sample.boxes?.length) return 0;
  const around: Box = [
    Math.min(...sample.boxes.map((b) => b[0])),
    Math.min(...sample.boxes.map((b) => b[1])),
    Math.max(...sample.boxes.map((b) => b[2])),
    Math.max(...sample.boxes.map((b) => b[3])),
  ];
  return intersectionOverUnion(toOriginal(box, trajectory.inputSize, trajectory.pictureSize), around);
};

/** Intersection over union of two rectangles in the same unit, 0..1. */
export function intersectionOverUnion(a: Box, b: Box): number {
  const area = ([x1, y1, x2, y2]: Box) => Math.max(0, x2 - x1) * Math.max(0, y2 - y1);
  const both = area([Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3])]);
  const either = area(a) + area(b) - both;
  return either > 0 ? both / either : 0;
}

/**
 * A soft penalty on long conversations: with n sampled tokens in all turns, 0 up to `limit − margin`, then falling linearly
 * to −1 at `limit` and beyond.
 *
 * @param limit Tokens at which the penalty is whole.
 * @param margin Tokens over which it builds up, 0 < margin ≤ limit.
 * @throws {RangeError} If the margin is not in that range.
 */
export function lengthPenalty(limit: number, margin: number): RewardFunction {
  if (!(margin > 0 && margin <= limit)) {
    throw new RangeError(`margin must be more than 0 and at most limit (${limit}), got ${margin}`);
  }
  return (_, trajectory) => {
    const n = trajectory.turns.reduce((sum, turn) => sum + turn.ids.length, 0);
    return n <= limit - margin ? 0 : Math.max(-1, (limit - margin - n) / margin);
  };
}

// ---- Points --------------------------------------------------------------------------------------------------------

/** A place in a picture. */
export type Point = readonly [x: number, y: number];

/**
 * Every point that a reply names, in its order: `{"point_2d": [x, y]}` and plain `(x, y)`, numbers of any sign, in pixels of the
 * resized picture.
 */
export function parsePoints(text: string): Point[] {
  const number = String.raw`([+-]?\d+(?:\.\d+)?)`, pair = String.raw`${number}\s*,\s*${number}`;
  const pattern = new RegExp(String.raw`"point_2d"\s*:\s*\[\s*${pair}\s*\]|\(\s*${pair}\s*\)`, "g");
  return Array.from(text.matchAll(pattern), ([, a, b, c, d]) => [Number(a ?? c), Number(b ?? d)]);
}

/**
 * One-to-one matching of two sets of points, of which as many pairs as can be are within the tolerance and, among such
 * matchings, the sum of distances is least (the Hungarian assignment of the paper's appendix).
 *
 * @returns Pairs of indices `[predicted, reference]` within the tolerance.
 */
export function matchPoints(
  predicted: readonly Point[],
  reference: readonly Point[],
  tolerance: number,
): [predicted: number, reference: number][] {
  if (predicted.length === 0 || reference.length === 0) return [];
  // A pair out of reach costs more than all pairs within reach together, so the number of pairs goes before their distances.
  const far = 1 + Math.min(predicted.length, reference.length);
  const cost = predicted.map(([x, y]) =>
    reference.map(([a, b]) => {
      const distance = Math.hypot(x - a, y - b) / tolerance;
      return distance <= 1 ? distance : far;
    })
  );
  const { rowAssignments } = linearSumAssignment(cost, { maximaze: false });
  return Array.from(rowAssignments).flatMap((to, from): [number, number][] =>
    to >= 0 && cost[from][to] < far ? [[from, to]] : []
  );
}

/**
 * The point reward of counting (paper's appendix): the share of points of the last reply that match reference points one to one,
 * matched / max(predicted, reference), 0..1; 0 for samples without points.
 */
export const pointReward: RewardFunction = (sample, trajectory): number => {
  const { inputSize: [w, h], pictureSize: [W, H] } = trajectory;
  if (!sample.points?.length) return 0;
  const points = parsePoints(lastText(trajectory)).map(([x, y]): Point => [x * W / w, y * H / h]);
  const { pointTolerance = 0.05 * Math.hypot(W, H) } = sample;
  return matchPoints(points, sample.points, pointTolerance).length / Math.max(points.length, sample.points.length);
};

/** One part of a combined reward. */
export interface RewardPart {
  /** Scores the conversation; must return a finite number. */
  reward: RewardFunction;
  /** Factor of this part in the total. */
  weight: number;
}

/** A reward with the values that it was made of. */
export interface RewardValue {
  /** Σ weight · part. */
  total: number;
  /** Each part by name, before its weight. */
  parts: Record<string, number>;
}

/**
 * Weighs named rewards into one.
 *
 * @throws {RangeError} If there are no parts or a weight is not finite; when called, if a part's value is not finite.
 */
export function combineRewards(
  parts: Readonly<Record<string, RewardPart>>,
): (sample: Sample, trajectory: Trajectory) => RewardValue {
  const entries = Object.entries(parts);
  if (entries.length === 0) throw new RangeError("combineRewards needs at least one part");
  for (const [name, { weight }] of entries) {
    if (!Number.isFinite(weight)) throw new RangeError(`the weight of reward "${name}" must be finite, got ${weight}`);
  }
  return (sample, trajectory) => {
    const values: Record<string, number> = {};
    let total = 0;
    for (const [name, { reward, weight }] of entries) {
      values[name] = reward(sample, trajectory);
      if (!Number.isFinite(values[name])) {
        throw new RangeError(`reward "${name}" of sample ${sample.id} must be finite, got ${values[name]}`);
      }
      total += weight * values[name];
    }
    return { total, parts: values };
  };
}
