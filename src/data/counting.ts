/**
 * A seeded world of counting (paper's appendix): how many signs of one colour does the picture show? Signs are those of signs.ts,
 * but several share a colour. Reference points are the middles of the counted signs.
 *
 * @module
 */
import { RandomStream } from "../random.ts";
import { isCorrect } from "../reward.ts";
import type { Dataset, Sample } from "./dataset.ts";
import { makeSign, placeCentres, type Scene, type SignColour, signColourNames } from "./signs.ts";
import { signGrid, signPhrases } from "./signs_words.ts";
import { drawScene, textureCount, textureSide } from "./signs_draw.ts";

/** Changes whenever the same (seed, split, index) would give another picture or question. */
const worldVersion = 1;
/** Signs of the colour asked for, and others. */
const counted = [1, 6] as const, others = [2, 3] as const;
const size = 672, halfSide = [26, 40] as const, distance = 90;
/** Half the largest sign: a point on the sign counts. */
const pointTolerance = 40;
const splitCode = { train: 0, heldout: 1 } as const;

/** A picture of the counting world, described. */
export interface CountingScene extends Scene {
  /** The colour asked for. */
  readonly colour: SignColour;
  /** Middles of its signs in reading order (top to bottom, then left to right), in pixels of the original. */
  readonly points: readonly (readonly [number, number])[];
}

/**
 * Describes the scene at a place of a split.
 *
 * @param seed An integer, 0 ≤ seed < 2⁵³.
 * @param index An integer, 0 ≤ index < 2³².
 */
export function makeCountingScene(seed: number, index: number, split: "train" | "heldout" = "train"): CountingScene {
  const random = new RandomStream(seed, "counting", index, splitCode[split]);
  const between = ([low, high]: readonly [number, number]) => low + random.int(high - low + 1);
  const texture = random.int(textureCount);
  const window = [random.int(textureSide), random.int(textureSide)] as const;
  const [colour, ...rest] = random.shuffle(signColourNames);
  const colours = [
    ...Array.from({ length: between(counted) }, () => colour),
    ...Array.from({ length: between(others) }, () => random.choice(rest)),
  ];
  const halves = colours.map(() => between(halfSide));
  const centres = placeCentres(random, size, halves, distance);
  const signs = colours.map((name, i) => makeSign(random, name, 3, halves[i], centres[i]));
  const points = signs.filter((sign) => sign.colour === colour).map(({ centre }) => centre)
    .sort(([ax, ay], [bx, by]) => ay - by || ax - bx);
  const question = `how many ${colour} signs? Point (x, y) at each.`;
  return { size, texture, window, signs, target: 0, question, choices: [], answer: signs[0].letter, colour, points };
}

/** The sample that asks how many; the picture is drawn when it is asked for. */
export function countingSample(scene: CountingScene, id: string): Sample {
  return {
    id,
    picture: () => Promise.resolve(drawScene(scene)),
    question: scene.question,
    answer: String(scene.points.length),
    points: scene.points,
    pointTolerance,
    demonstration: { answer: (inputSize) => countingReply(scene, inputSize) },
  };
}

/** A right reply: the points in reading order, in pixels of the resized picture on the grid of the tiny policy, then the number. */
function countingReply({ points }: CountingScene, inputSize: readonly [number, number]): string {
  const at = (value: number, axis: 0 | 1) => signGrid * Math.round(value * inputSize[axis] / size / signGrid);
  const named = points.map(([x, y]) => `\n(${at(x, 0)}, ${at(y, 1)}) `);
  return `${named.join("")}${signPhrases.box}${points.length}${signPhrases.boxEnd}`;
}

/**
 * The world as a dataset of endless size; counts from 1 to 6 are equally likely.
 *
 * @param options.seed Seed of all scenes. @default {0}
 * @param options.split Which of two disjoint families of scenes. @default {"train"}
 */
export function counting(options: { seed?: number; split?: "train" | "heldout" } = {}): Dataset {
  const { seed = 0, split = "train" } = options;
  new RandomStream(seed, "counting"); // refuses a bad seed here rather than at the first sample
  if (!Object.hasOwn(splitCode, split)) throw new RangeError(`split must be "train" or "heldout", got "${split}"`);
  return {
    name: `counting/${split}`,
    size: Infinity,
    fingerprint: `counting v${worldVersion} split=${split} seed=${seed}`,
    get: async (index) =>
      await countingSample(makeCountingScene(seed, index, split), `counting-${split}-${seed}-${index}`),
  };
}

/** How well a policy counts. */
export interface CountingMetrics {
  /** Share of items whose boxed answer is the right number, 0..1. */
  exact: number;
  /** Share of items whose boxed answer is a number at all, 0..1. */
  answered: number;
  /** Mean absolute error; an item without a number counts as if 0 had been said. */
  mae: number;
  /** Root of the mean squared error, likewise. */
  rmse: number;
}

/** The number that an answer is; undefined for anything else. */
function countOf(answer: string | undefined): number | undefined {
  return /^\s*\d{1,9}(?:\.0*)?\s*$/.test(answer ?? "") ? Number(answer) : undefined;
}

/**
 * How far an answer is from the right number: positive if too many. An answer that is no number counts as 0.
 *
 * @throws {RangeError} If the expected answer is not a number.
 */
export function countingError({ answer, expected }: { answer?: string; expected: string }): number {
  const right = Number(expected);
  if (expected.trim() === "" || !Number.isFinite(right)) throw new RangeError(`"${expected}" is not a count`);
  return (countOf(answer) ?? 0) - right;
}

/**
 * Exact match, MAE and RMSE over evaluated items.
 *
 * @param items The boxed answer of each, if there was one, and the right number.
 * @throws {RangeError} If there are no items, or an expected answer is not a number.
 */
export function countingMetrics(items: readonly { answer?: string; expected: string }[]): CountingMetrics {
  if (items.length === 0) throw new RangeError("counting metrics of no items");
  const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;
  const errors = items.map(countingError);
  return {
    exact: mean(
      items.map(({ answer, expected }) =>
        Number(answer !== undefined && isCorrect({ answer: expected }, `\\boxed{${answer}}`))
      ),
    ),
    answered: mean(items.map(({ answer }) => Number(countOf(answer) !== undefined))),
    mae: mean(errors.map(Math.abs)),
    rmse: Math.sqrt(mean(errors.map((error) => error * error))),
  };
}
