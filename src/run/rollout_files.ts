/**
 * A few trajectories of a step with the pictures that they saw, so that a person can look at what the policy does.
 *
 * @module
 */
import type { Sample } from "../data/dataset.ts";
import { Picture } from "../policy/picture.ts";
import { resizeBicubic } from "../policy/resize.ts";
import { type Trajectory, trajectoryToJson } from "../rollout.ts";
import type { StepRollouts } from "../train.ts";
import type { RunFolder } from "./run_folder.ts";

/** Saved pictures are scaled down to this many pixels. */
const MAX_PIXELS = 1_003_520;

/**
 * Writes `rollouts/step-N.jsonl`, a line a trajectory: the trajectory, its question, right answer and reward, and the names of
 * its pictures in `rollouts/pictures/`. One trajectory of each of the first samples is taken.
 *
 * @param count How many.
 */
export async function saveRollouts(folder: RunFolder, rollouts: StepRollouts, count: number): Promise<void> {
  const { step, samples, trajectories, rewards } = rollouts;
  const lines: string[] = [];
  for (const [i, trajectory] of trajectories.entries()) {
    if (trajectory.rollout !== 0 || lines.length >= count) continue;
    const sample = samples[trajectory.prompt];
    lines.push(JSON.stringify({
      question: sample.question,
      choices: sample.choices,
      answer: sample.answer,
      boxes: sample.boxes,
      reward: rewards[i].total,
      pictures: await savePictures(folder, `step-${step}-sample-${trajectory.prompt}`, sample, trajectory),
      ...JSON.parse(trajectoryToJson(trajectory)),
    }));
  }
  await folder.writeFile(`rollouts/step-${step}.jsonl`, lines.map((line) => line + "\n").join(""));
}

/** Names of the pictures of a trajectory in order: the input, then the crops. */
async function savePictures(
  folder: RunFolder,
  name: string,
  sample: Sample,
  trajectory: Trajectory,
): Promise<string[]> {
  const original = await sample.picture();
  const pictures = [original, ...trajectory.turns.flatMap(({ crop }) => crop ? [original.crop(crop)] : [])];
  const names: string[] = [];
  for (const [i, picture] of pictures.entries()) {
    names.push(`pictures/${name}${i === 0 ? "" : `-crop-${i}`}.png`);
    await folder.writeFile(`rollouts/${names[i]}`, await shrink(picture).encodePng());
  }
  return names;
}

function shrink(picture: Picture): Picture {
  const { width, height } = picture, factor = Math.sqrt(MAX_PIXELS / (width * height));
  if (factor >= 1) return picture;
  const w = Math.max(1, Math.floor(width * factor)), h = Math.max(1, Math.floor(height * factor));
  return Picture.fromRgb(resizeBicubic(picture.data, 3, width, height, w, h), w, h);
}
