/**
 * A seeded visual-search world: signs with letters, seen from far away. A picture of 672 × 672 pixels holds four to six
 * coloured signs; each carries a small dark plate with a white letter. Resized six times smaller, colours can still be told
 * and letters mostly cannot, so answering takes a closer look at the right place.
 *
 * Everything is a pure function of (seed, split, index): {@linkcode makeScene} describes a scene, `drawScene` in
 * signs_draw.ts draws it, {@linkcode signs} offers both as a {@linkcode Dataset}.
 *
 * @module
 */
import { RandomStream } from "../random.ts";
import type { Box, Dataset, Sample } from "./dataset.ts";
import { drawScene, shiftedTextureCount, textureCount, textureSide } from "./signs_draw.ts";
import { answerReply, groundingReply, taughtSignBox } from "./signs_words.ts";

/** Changes whenever the same (seed, split, index) would give another picture or question. */
const worldVersion = 1;

/** Red, green, blue, 0..255. */
export type Rgb = readonly [number, number, number];

/** The colours that signs have, before jitter. */
export const signColours = {
  red: [214, 40, 40],
  green: [40, 160, 60],
  blue: [40, 80, 210],
  yellow: [235, 205, 40],
  purple: [140, 50, 170],
  orange: [240, 130, 30],
  cyan: [50, 190, 205],
  pink: [240, 130, 180],
} as const satisfies Record<string, Rgb>;

/** The name of a sign's colour. */
export type SignColour = keyof typeof signColours;

/** Colour names in their fixed order. */
export const signColourNames = Object.keys(signColours) as readonly SignColour[];

/** The letters that plates show. */
export const signLetters = ["E", "H", "K", "L", "P", "S", "T", "X"] as const;

/** A letter on a plate. */
export type SignLetter = typeof signLetters[number];

/** The outlines that signs have; decoration only. */
export const signShapes = ["square", "circle", "diamond", "rounded"] as const;

/** An outline. */
export type SignShape = typeof signShapes[number];

/** The question, with the place of the colour. */
export const signQuestion = "which letter is on the {colour} sign?";

/** One sign. All lengths are pixels of the original picture. */
export interface Sign {
  /** The name by which the question asks for it; no two signs of a scene share one. */
  readonly colour: SignColour;
  /** The colour as painted, jitter included, before lighting. */
  readonly rgb: Rgb;
  /** Outline of the coloured area; says nothing about the answer. */
  readonly shape: SignShape;
  /** Middle of the sign. */
  readonly centre: readonly [x: number, y: number];
  /** Width and height; even. */
  readonly side: number;
  /** The sign's bounding box. */
  readonly box: Box;
  /** The dark plate: the letter's 5 × 7 font pixels and a rim of one font pixel. */
  readonly plate: Box;
  /** What the plate shows. */
  readonly letter: SignLetter;
  /** Width and height of a font pixel: 3 (small) or 7 (large); 4 or 6 in the shifted world. */
  readonly scale: number;
}

/** A picture and its question, described. */
export interface Scene {
  /** Width and height of the picture in pixels. */
  readonly size: number;
  /** Which background, 0 ≤ texture < 12; 12 ≤ texture < 18 in the shifted world. */
  readonly texture: number;
  /** Where the background's window starts in the (endlessly repeated) texture. */
  readonly window: readonly [x: number, y: number];
  /** Four to six (seven or eight in the shifted world), none touching another. */
  readonly signs: readonly Sign[];
  /** Index into `signs` of the sign that is asked about. */
  readonly target: number;
  /** `which letter is on the … sign?`, with the target's colour. */
  readonly question: string;
  /** Four distinct letters in alphabetical order, the right one among them. */
  readonly choices: readonly SignLetter[];
  /** The letter of the target. */
  readonly answer: SignLetter;
}

/** Options of {@linkcode makeScene} and {@linkcode signs}. */
export interface SignsOptions {
  /** Which of two disjoint families of scenes. @default {"train"} */
  split?: "train" | "heldout";
  /**
   * Width and height of the picture in pixels: a multiple of 28 from 504 to 4032. Signs keep their size in pixels, so a larger
   * picture is a wider search.
   *
   * @default {672}
   */
  size?: number;
  /** The share of large signs, 0..1, whose letters can be read from far away. @default {0.3} */
  largeShare?: number;
  /**
   * `shifted` is for measuring out of distribution: the same question about seven or eight signs instead of four to six, of sizes
   * and letter sizes that the standard world never shows, on striped and coloured backgrounds.
   *
   * @default {"standard"}
   */
  world?: "standard" | "shifted";
}

/** How the worlds differ. Two centres are further apart than `distance` along x or along y, so that no two signs touch. */
const worlds = {
  standard: {
    purpose: "signs",
    kinds: { small: { scale: 3, halfSide: [22, 28] }, large: { scale: 7, halfSide: [40, 48] } },
    count: [4, 6],
    distance: 100,
    textures: [0, textureCount],
  },
  shifted: {
    purpose: "signs shifted",
    kinds: { small: { scale: 4, halfSide: [30, 36] }, large: { scale: 6, halfSide: [52, 60] } },
    count: [7, 8],
    distance: 124,
    textures: [textureCount, shiftedTextureCount],
  },
} as const;
const colourJitter = 14;
const letterJitter = 3;
const splitCode = { train: 0, heldout: 1 } as const;

function checked(options: SignsOptions): Required<SignsOptions> {
  const { split = "train", size = 672, largeShare = 0.3, world = "standard" } = options;
  if (!Object.hasOwn(splitCode, split)) throw new RangeError(`split must be "train" or "heldout", got "${split}"`);
  if (!Object.hasOwn(worlds, world)) throw new RangeError(`world must be "standard" or "shifted", got "${world}"`);
  if (!Number.isInteger(size) || size % 28 !== 0 || size < 504 || size > 4032) {
    throw new RangeError(`size of a signs picture must be a multiple of 28 from 504 to 4032, got ${size}`);
  }
  if (!(largeShare >= 0 && largeShare <= 1)) throw new RangeError(`largeShare must be from 0 to 1, got ${largeShare}`);
  return { split, size, largeShare, world };
}

/** An integer in [low, high], both included. */
function between(random: RandomStream, low: number, high: number): number {
  return low + random.int(high - low + 1);
}

/**
 * Places the centres of signs one after another; starts over when the last ones no longer find room.
 *
 * @param size Width and height of the picture in pixels.
 * @param halves Half the side of each sign in pixels.
 * @param distance Two centres are further apart than this along x or along y.
 */
export function placeCentres(
  random: RandomStream,
  size: number,
  halves: readonly number[],
  distance: number,
): [number, number][] {
  for (;;) {
    const centres: [number, number][] = [];
    for (let tries = 0; centres.length < halves.length && tries < 400; tries++) {
      const half = halves[centres.length];
      const x = between(random, half, size - half), y = between(random, half, size - half);
      if (centres.every(([a, b]) => Math.max(Math.abs(a - x), Math.abs(b - y)) > distance)) centres.push([x, y]);
    }
    if (centres.length === halves.length) return centres;
  }
}

/** Draws what is left to chance of a sign: its exact colour, its shape, its letter and where the plate hangs. */
export function makeSign(
  random: RandomStream,
  colour: SignColour,
  scale: number,
  half: number,
  centre: readonly [number, number],
): Sign {
  const [x, y] = centre;
  const jitter = (value: number) => Math.min(255, Math.max(0, value + between(random, -colourJitter, colourJitter)));
  const [r, g, b] = signColours[colour];
  const left = x + between(random, -letterJitter, letterJitter) - (7 * scale >> 1);
  const top = y + between(random, -letterJitter, letterJitter) - (9 * scale >> 1);
  return {
    colour,
    rgb: [jitter(r), jitter(g), jitter(b)],
    shape: random.choice(signShapes),
    centre,
    side: 2 * half,
    box: [x - half, y - half, x + half, y + half],
    plate: [left, top, left + 7 * scale, top + 9 * scale],
    letter: random.choice(signLetters),
    scale,
  };
}

/**
 * Describes the scene at a place of a split.
 *
 * The split is one of the generator's counters, so no draw of a training scene can ever coincide with one of a held-out
 * scene, whatever the seeds.
 *
 * @param seed An integer, 0 ≤ seed < 2⁵³.
 * @param index An integer, 0 ≤ index < 2³².
 * @throws {RangeError} For a seed, index or option out of range.
 */
export function makeScene(seed: number, index: number, options: SignsOptions = {}): Scene {
  const { split, size, largeShare, world } = checked(options);
  const { purpose, kinds, count: [least, most], distance, textures: [texture0, texturesN] } = worlds[world];
  if (!Number.isInteger(index) || index < 0 || index >= 2 ** 32) {
    throw new RangeError(`index of a scene must be an integer from 0 to 2^32 - 1, got ${index}`);
  }
  const random = new RandomStream(seed, purpose, index, splitCode[split]);
  const texture = texture0 + random.int(texturesN);
  const window = [random.int(textureSide), random.int(textureSide)] as const;
  const count = between(random, least, most);
  const sizes = Array.from({ length: count }, () => {
    const kind = random.uniform() < largeShare ? kinds.large : kinds.small;
    return { scale: kind.scale, half: between(random, kind.halfSide[0], kind.halfSide[1]) };
  });
  const centres = placeCentres(random, size, sizes.map(({ half }) => half), distance);
  const colours = random.shuffle(signColourNames);
  const signs = sizes.map(({ scale, half }, i) => makeSign(random, colours[i], scale, half, centres[i]));
  const target = random.int(count);
  const { colour, letter: answer } = signs[target];
  const others = random.shuffle(signLetters.filter((letter) => letter !== answer)).slice(0, 3);
  return {
    size,
    texture,
    window,
    signs,
    target,
    question: signQuestion.replace("{colour}", colour),
    choices: [answer, ...others].sort(),
    answer,
  };
}

/** Sides of a valid box are longer than this many resized pixels, with coordinates on a grid of 4: two grid steps are valid. */
const minBoxSide = 7, leastSide = 8;

/** The sample that asks a scene's question; the picture is drawn when it is asked for. */
export function sceneSample(scene: Scene, id: string): Sample {
  const sign = scene.signs[scene.target], { box, plate, colour } = sign;
  return {
    id,
    picture: () => Promise.resolve(drawScene(scene)),
    question: scene.question,
    choices: scene.choices,
    choiceStyle: "listed",
    answer: scene.answer,
    boxes: [box],
    regions: { plate: [plate] },
    demonstration: {
      answer: answerReply(colour, scene.answer),
      ground: (_, inputSize) => groundingReply(colour, taughtSignBox(sign, scene.size, inputSize, leastSide)),
    },
  };
}

/**
 * The world as a dataset of endless size. Guessing is right in one of four cases.
 *
 * @param options Those of {@linkcode makeScene}, and the seed. @default {{ seed: 0 }}
 * @throws {RangeError} For an option out of range.
 *
 * @example
 * ```ts
 * import { signs } from "./signs.ts";
 * const sample = await signs({ split: "heldout", seed: 7 }).get(0);
 * const picture = await sample.picture();
 * if (picture.width !== 672 || sample.choices?.length !== 4) throw new Error("not a scene");
 * ```
 */
export function signs(options: SignsOptions & { seed?: number } = {}): Dataset {
  const { seed = 0 } = options;
  const settings = checked(options);
  const { split, size, largeShare, world } = settings;
  const name = world === "standard" ? "signs" : "signs-shifted";
  new RandomStream(seed, "signs"); // refuses a bad seed here rather than at the first sample
  return {
    name: size === 672 ? `${name}/${split}` : `${name}:${size}/${split}`,
    size: Infinity,
    // Two grid steps are 48 pixels of the original at the default sixfold reduction.
    hints: { minBoxSide, minCropSide: 48, squareCrop: true },
    fingerprint: `${name} v${worldVersion} split=${split} seed=${seed} size=${size} largeShare=${largeShare}`,
    get: async (index) => await sceneSample(makeScene(seed, index, settings), `${name}-${split}-${seed}-${index}`),
  };
}
