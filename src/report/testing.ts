/**
 * Run folders for the report's tests, in the form in which runs write them.
 *
 * @module
 */
import { encodeJpeg } from "../deps_jpeg.ts";
import type { SavedRollout, SavedToken } from "../run/rollout_files.ts";

/** The name of the picture that all rollouts of {@linkcode writeRun} show, and of its crop. */
export const PICTURE = "pictures/0123456789abcdef.jpg", CROP = "pictures/fedcba9876543210.jpg";

/** What a test wants to be different. */
export interface RunShape {
  seed?: number;
  method?: string;
  /** Steps done, and steps asked for. */
  steps?: number;
  planned?: number;
  settings?: Record<string, unknown>;
  /** Evaluation steps with rollouts. */
  evaluations?: readonly number[];
  /** Watched items at each of them. */
  watched?: number;
  /** Changes a rollout. */
  change?: (rollout: SavedRollout) => unknown;
}

/** Writes a run folder. */
export async function writeRun(path: string, shape: RunShape = {}): Promise<void> {
  const { seed = 0, method = "mgpo", steps = 4, planned = steps, evaluations = [0, 2, 4], watched = 3 } = shape;
  for (const folder of ["evaluations", "rollouts/pictures"]) await Deno.mkdir(`${path}/${folder}`, { recursive: true });
  const settings = { method, seed, steps: planned, turns: method === "mgpo" ? 2 : 1, lossOn: "all", ...shape.settings };
  await Deno.writeTextFile(`${path}/run.json`, JSON.stringify({ settings, environment: { deno: "2" } }));
  const lines = Array.from({ length: steps }, (_, i) => {
    const step = i + 1, value = (step + seed) / (steps + 2);
    const isEvaluated = evaluations.includes(step);
    return JSON.stringify({
      ...{ step, "reward/mean": value, "grounding/valid_ratio": value, "timing_s/rollout": 1, "timing_s/update": 2 },
      ...{ "timing_s/total": 3.5, ...isEvaluated ? { "eval/accuracy": value, "timing_s/eval": 0.25 } : {} },
    });
  });
  await Deno.writeTextFile(`${path}/metrics.jsonl`, lines.map((line) => line + "\n").join(""));
  for (const [name, side] of [[PICTURE, 64], [CROP, 16]] as const) {
    await Deno.writeFile(`${path}/rollouts/${name}`, await jpeg(side));
  }
  for (const step of evaluations) {
    const accuracy = { value: (step + seed) / (steps + 2) };
    await Deno.writeTextFile(`${path}/evaluations/step-${step}.json`, JSON.stringify({ step, accuracy }));
    const write = async (split: SavedRollout["split"], rollouts: SavedRollout[]) => {
      const text = rollouts.map((rollout) => JSON.stringify(shape.change?.(rollout) ?? rollout) + "\n").join("");
      await Deno.writeTextFile(`${path}/rollouts/${split === "heldout" ? "heldout-" : ""}step-${step}.jsonl`, text);
    };
    await write("heldout", Array.from({ length: watched }, (_, i) => savedRollout(step, "heldout", i, 0, step > i)));
    if (step > 0) await write("train", [0, 1].map((g) => savedRollout(step, "train", 0, g, g === 1)));
  }
}

/** A rollout of two turns; a right one has a valid box, a wrong one none. */
export function savedRollout(
  step: number,
  split: SavedRollout["split"],
  item: number,
  rollout: number,
  isRight: boolean,
): SavedRollout {
  const replies = isRight ? ["[0, 0, 16, 16]", "\\boxed{K}"] : ["I cannot see", "\\boxed{X}"];
  const given = (text: string): SavedToken[] => [["<|im_start|>", 1], text];
  const tokens: SavedToken[] = [
    ...[...given("user\n"), ["<|image_pad|>", 4] as [string, number], `question ${item}`, "<|im_end|>"],
    ...[...given("assistant\n"), replies[0], "<|im_end|>"],
    ...[...given("user\n"), ["<|image_pad|>", 2] as [string, number], "and now?", "<|im_end|>"],
    ...[...given("assistant\n"), replies[1], "<|im_end|>"],
  ];
  const written = [7, 8, 16, 17];
  const assistantMask = tokens.flatMap((token, i) =>
    new Array<number>(Array.isArray(token) ? token[1] : 1).fill(Number(written.includes(i)))
  );
  const turn = { logprobs: [-0.5, -0.1], finish: "stop" as const, ids: [0, 0] };
  const box = isRight ? { box: [0, 0, 16, 16] as const, crop: [0, 0, 16, 16] as const, hit: true } : {
    invalid: "no_json" as const,
    hit: false,
  };
  return {
    ...{ format: 2, step, split, question: `question ${item}`, choices: ["K", "X"], answer: "K" },
    ...{ boxes: [[2, 2, 10, 10]], said: isRight ? "K" : "X", correct: isRight, reward: Number(isRight) },
    ...{ parts: { binary: Number(isRight) }, pictures: isRight ? [PICTURE, CROP] : [PICTURE], tokens },
    ...{ sampleId: `${split}-${item}`, prompt: item, rollout, ids: assistantMask.map(() => 0), assistantMask },
    logprobs: assistantMask.map((mask) => -0.5 * mask),
    turns: [{ prompt: `{image}question ${item}`, text: replies[0], ...box, ...turn }, {
      ...{ prompt: "{image}and now?", text: replies[1], ...turn },
    }],
    ...{ inputSize: [64, 64], pictureSize: [64, 64] },
  };
}

async function jpeg(side: number): Promise<Uint8Array> {
  const pixels = Uint8ClampedArray.from({ length: side * side * 4 }, (_, i) => i % 4 === 3 ? 255 : (i * 7) % 256);
  return new Uint8Array(await encodeJpeg(new ImageData(pixels, side, side)));
}

/** A folder that is removed after the test. */
export async function withFolder(test: (path: string) => Promise<void>): Promise<void> {
  const path = await Deno.makeTempDir();
  try {
    await test(path);
  } finally {
    await Deno.remove(path, { recursive: true });
  }
}
