/**
 * The experiments by name.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { ablation } from "./ablation.ts";
import { counting } from "./counting.ts";
import type { Experiment } from "./experiment.ts";
import { hitRatio } from "./hit_ratio.ts";
import { main } from "./main.ts";
import { maxPixels } from "./max_pixels.ts";
import { rewardHacking } from "./reward_hacking.ts";
import { supervision } from "./supervision.ts";
import { turns } from "./turns.ts";

/** Every experiment, in the order in which `all` does them. */
export const experiments: readonly Experiment[] = [
  main,
  hitRatio,
  rewardHacking,
  ablation,
  turns,
  counting,
  supervision,
  maxPixels,
];

/**
 * Experiments by a name of the command line.
 *
 * @param name One of them, or `all`.
 * @throws {InputError} if there is none of that name.
 */
export function experimentsNamed(name: string, known = experiments): readonly Experiment[] {
  if (name === "all") return known;
  const found = known.filter((experiment) => experiment.name === name);
  if (found.length === 0) {
    throw new InputError(`no experiment "${name}"; there are: ${known.map((e) => e.name).join(", ")}, all`);
  }
  return found;
}
