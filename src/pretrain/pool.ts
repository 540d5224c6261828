/**
 * Pictures for pretraining: far views and crops of the signs world at the policy's input size, with what each shows, drawn on
 * first use and kept as bytes.
 *
 * @module
 */
import type { Box } from "../data/dataset.ts";
import { drawScene } from "../data/signs_draw.ts";
import { makeScene, type Scene, type Sign, signColourNames, signLetters } from "../data/signs.ts";
import { signGrid, taughtSignBox } from "../data/signs_words.ts";
import { Picture } from "../policy/picture.ts";
import type { ImageInput, Policy } from "../policy/policy.ts";
import { resizeBicubic } from "../policy/resize.ts";
import type { RandomStream } from "../random.ts";
import { cropBox } from "../rollout.ts";

/** Side of the policy's input in pixels. */
export const inputSide = 112;
/** Coordinates are said in steps of this many input pixels. */
export const gridStep = signGrid;
/** Highest coordinate of a valid box in grid steps. */
export const gridEnd = inputSide / gridStep;
/** How crops are cut; as the signs world hints. */
const cropOptions = { minCropSide: 48, squareCrop: true };
/** Draws of pretraining come from this seed's training split; reinforcement learning uses small seeds. */
const worldSeed = 4_000_000_007;

/** How well a grounding box fits its sign. */
export type BoxKind = "exact" | "good" | "loose" | "miss";

/** A sign as seen in an input picture; lengths in input pixels. */
export interface SeenSign {
  colour: number;
  letter: number;
  centre: readonly [number, number];
  side: number;
  plate: Box;
  large: boolean;
}

/** An input picture and what it shows. */
export interface View {
  input: ImageInput;
  signs: SeenSign[];
  far: boolean;
}

const quantize = (v: number) => Math.min(gridEnd, Math.max(0, Math.round(v / gridStep)));

/** The grounding box that is taught, in grid steps: the sign and .35 of its side around it. */
export function taughtBox(sign: Pick<Sign, "centre" | "side">, size: number): [number, number, number, number] {
  const [x1, y1, x2, y2] = taughtSignBox(sign, size, [inputSide, inputSide]).map((v) => v / gridStep);
  return [x1, y1, x2, y2];
}

/** A box of the given kind in grid steps, at least two steps a side. */
export function drawBox(
  scene: Scene,
  target: number,
  kind: BoxKind,
  random: RandomStream,
): [number, number, number, number] {
  const sign = scene.signs[target], scale = inputSide / scene.size;
  if (kind === "exact") return taughtBox(sign, scene.size);
  let [x, y] = sign.centre.map((c) => c * scale);
  let reach = sign.side * scale;
  if (kind === "good") {
    reach *= random.uniform(0.7, 1.05);
    x += random.uniform(-0.2, 0.2) * reach;
    y += random.uniform(-0.2, 0.2) * reach;
  } else if (kind === "loose") {
    reach *= random.uniform(1.2, 1.8);
    x += random.uniform(-0.3, 0.3) * reach;
    y += random.uniform(-0.3, 0.3) * reach;
  } else {
    reach *= random.uniform(0.7, 1.1);
    for (let tries = 0; tries < 50; tries++) {
      [x, y] = [random.uniform(reach, inputSide - reach), random.uniform(reach, inputSide - reach)];
      if (Math.max(Math.abs(x - sign.centre[0] * scale), Math.abs(y - sign.centre[1] * scale)) > 1.6 * reach) break;
    }
  }
  const box: [number, number, number, number] = [
    quantize(x - reach),
    quantize(y - reach),
    quantize(x + reach),
    quantize(y + reach),
  ];
  for (const axis of [0, 1]) {
    if (box[axis + 2] - box[axis] >= 2) continue;
    box[axis] = Math.min(box[axis], gridEnd - 2);
    box[axis + 2] = box[axis] + 2;
  }
  return box;
}

function seen(scene: Scene, window: Box, far: boolean): SeenSign[] {
  const [x0, y0, x1, y1] = window, sx = inputSide / (x1 - x0), sy = inputSide / (y1 - y0);
  const place = (x: number, y: number): [number, number] => [(x - x0) * sx, (y - y0) * sy];
  return scene.signs.flatMap((sign) => {
    const centre = place(...sign.centre);
    if (centre.some((c) => c < 0 || c >= inputSide)) return [];
    const [px0, py0] = place(sign.plate[0], sign.plate[1]), [px1, py1] = place(sign.plate[2], sign.plate[3]);
    return [{
      colour: signColourNames.indexOf(sign.colour),
      letter: signLetters.indexOf(sign.letter),
      centre,
      side: sign.side * sx,
      plate: [px0, py0, px1, py1] as Box,
      large: far ? sign.scale > 3 : true,
    }];
  });
}

/** The pool. Scenes come by index; drawn pictures are kept, resized, while there is room. */
export class Pool {
  #originals = new Map<number, Picture>();
  #inputs = new Map<string, Uint8Array>();
  #policy: Policy;

  /**
   * @param largeShare The share of large signs; more than the world's, so that their letters are learnt from afar.
   * @param keep How many resized pictures are kept (37 KB each).
   */
  constructor(policy: Policy, readonly largeShare = 0.45, readonly keep = 24_000) {
    this.#policy = policy;
  }

  scene(index: number): Scene {
    return makeScene(worldSeed, index, { split: "train", largeShare: this.largeShare });
  }

  #original(index: number, scene: Scene): Picture {
    let picture = this.#originals.get(index);
    if (!picture) {
      picture = drawScene(scene);
      // Only neighbours in time ask for the same scene again: keep few originals (1.4 MB each).
      if (this.#originals.size >= 64) this.#originals.delete(this.#originals.keys().next().value!);
      this.#originals.set(index, picture);
    }
    return picture;
  }

  #input(key: string, make: () => Picture): ImageInput {
    let rgb = this.#inputs.get(key);
    if (!rgb) {
      const { rgba, width, height } = make();
      rgb = resizeBicubic(rgba, 4, width, height, inputSide, inputSide);
      if (this.#inputs.size >= this.keep) this.#inputs.delete(this.#inputs.keys().next().value!);
      this.#inputs.set(key, rgb);
    }
    return this.#policy.prepareImage(Picture.fromRgb(rgb, inputSide, inputSide));
  }

  /** The whole scene from far away. */
  far(index: number): View {
    const scene = this.scene(index);
    const input = this.#input(`${index}`, () => this.#original(index, scene));
    return { input, far: true, signs: seen(scene, [0, 0, scene.size, scene.size], true) };
  }

  /** What a box (in grid steps) shows, cut from the original as in a rollout. */
  crop(index: number, box: readonly [number, number, number, number]): View {
    const scene = this.scene(index), size = scene.size;
    const inPixels = box.map((v) => v * gridStep) as unknown as Box;
    const cut = cropBox(inPixels, [inputSide, inputSide], [size, size], cropOptions);
    const input = this.#input(`${index}:${box}`, () => this.#original(index, scene).crop(cut));
    return { input, far: false, signs: seen(scene, cut, false) };
  }
}
