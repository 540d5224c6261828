/**
 * How replies about the signs world are worded. The tiny base policy was pretrained in these words, each phrase is one of its
 * tokens; supervised demonstrations use them too.
 *
 * @module
 */
import type { Box } from "./dataset.ts";

/** Coordinates are said in steps of this many pixels of the resized picture. */
export const signGrid = 4;

/** The pieces that good replies are made of. */
export const signPhrases = {
  /** A grounding reply: open, colour, middle, x1, comma, y1, comma, x2, comma, y2, close. */
  open: '```json\n[{"label": "',
  middle: '", "bbox_2d": [',
  comma: ", ",
  close: "]}]\n```",
  /** An answer: colour, box, letter, boxEnd. */
  box: " \\boxed{",
  boxEnd: "}",
} as const;

/** The grounding reply in its usual form: 11 tokens, 12 with `<|im_end|>`. @param box multiples of 4, 0 to 140 */
export function groundingReply(colour: string, box: Box): string {
  const { open, middle, comma, close } = signPhrases;
  return open + colour + middle + box.join(comma) + close;
}

/** The answer in its usual form: 4 tokens, 5 with `<|im_end|>`. */
export function answerReply(colour: string, letter: string): string {
  return colour + signPhrases.box + letter + signPhrases.boxEnd;
}

/**
 * The grounding box that is taught: the sign and .35 of its side around it, on the grid, inside the picture.
 *
 * @param sign Its middle and side in pixels of the original picture.
 * @param size Width and height of the original picture.
 * @param inputSize `[width, height]` of the resized picture; the box is in its pixels.
 * @param least The smallest side, a multiple of the grid. @default {0}
 */
export function taughtSignBox(
  { centre, side }: { readonly centre: readonly [number, number]; readonly side: number },
  size: number,
  inputSize: readonly [number, number],
  least = 0,
): [number, number, number, number] {
  const ends = ([0, 1] as const).map((axis) => {
    const scale = inputSize[axis] / size, limit = inputSize[axis] - inputSize[axis] % signGrid;
    const middle = centre[axis] * scale, reach = 0.85 * side * scale;
    const snap = (v: number) => Math.min(limit, Math.max(0, signGrid * Math.round(v / signGrid)));
    const from = snap(middle - reach), to = snap(middle + reach);
    return to - from >= least ? [from, to] : [Math.min(from, limit - least), Math.min(from, limit - least) + least];
  });
  return [ends[0][0], ends[1][0], ends[0][1], ends[1][1]];
}
