/**
 * Evaluation: how often a policy answers right and looks in the right place, with 95 % Wilson intervals. The draws of an item
 * depend on the seed and its place only, so two policies are compared on the same items and draws, and the batch size
 * changes nothing.
 *
 * @module
 */
import type { Box, Dataset, Sample } from "./data/dataset.ts";
import { Picture } from "./policy/picture.ts";
import type { Policy } from "./policy/policy.ts";
import { RandomStream } from "./random.ts";
import { boxedAnswer, isCorrect } from "./reward.ts";
import { boxAround, cropBox, mayGround, rollout, rolloutDefaults } from "./rollout.ts";
import type { PromptTemplate, RolloutBatch, RolloutOptions, Trajectory } from "./rollout.ts";
import { InputError } from "./run/errors.ts";
import { resolveOptions } from "./run/options.ts";
import { evaluationPositions, readSamples, yieldToEvents } from "./samples.ts";
import { type EvaluateOptions, evaluateTable, maxNewTokensFor, withHints } from "./settings.ts";

/** What {@linkcode evaluate} takes beside its settings. */
export interface EvaluateParts {
  /** Wording that replaces parts of the default template. @default {{}} */
  template?: Partial<PromptTemplate>;
  /** Called after each batch with the items done and the right answers among them. */
  onProgress?: (done: number, items: number, correct: number) => void;
  /** Called after each batch with its items and their conversations; a trajectory's `prompt` is its item, `from` the first one's. */
  onBatch?: (batch: RolloutBatch, samples: readonly Sample[], from: number) => void;
}

/** A share of a number of trials. */
export interface Proportion {
  /** Trials that turned out as the field says. */
  count: number;
  /** All trials. */
  of: number;
  /** count / of; NaN without trials. */
  value: number;
  /** Lower end of the 95 % Wilson interval; 0 without trials. */
  low: number;
  /** Its upper end; 1 without trials. */
  high: number;
}

/** A difference of two proportions, with its 95 % Newcombe interval. */
export interface Difference {
  /** −1..1; NaN if one of the two has no trials. */
  value: number;
  /** Lower end of the interval. */
  low: number;
  /** Its upper end. */
  high: number;
}

/** One item as it went. */
export interface EvaluationItem {
  /** The `id` of the sample. */
  sampleId: string;
  /** Whether the last reply's boxed answer is right. */
  correct: boolean;
  /** What stood in the box; absent without one. */
  answer?: string;
  /** The sample's right answer. */
  expected: string;
  /** Grounding runs: whether the first turn gave a valid box, whatever was cut out. */
  valid?: boolean;
  /** Why not; absent where it answered at once (free form). */
  invalid?: string;
  /** Whether its crop contains all boxes of the sample. */
  hit?: boolean;
  /** The same for each of the sample's named regions. */
  regions?: Record<string, boolean>;
}

/** The result of {@linkcode evaluate}; plain JSON. */
export interface Evaluation {
  /** The policy's `name`. */
  policy: string;
  /** The dataset's `name`. */
  dataset: string;
  /** The dataset's `fingerprint`: equal ones asked the same questions. */
  fingerprint: string;
  /** Assistant turns of a conversation. */
  turns: number;
  /** Softmax temperature; 0 was greedy. */
  temperature: number;
  /** Seed of the draws and of the choice of items. */
  seed: number;
  /** Right answers. */
  accuracy: Proportion;
  /** Replies that put an answer into the box, right or wrong. */
  boxed: Proportion;
  /** Grounding runs: items with a valid box. */
  valid?: Proportion;
  /** Grounding runs with `boxes` in the data: crops that contain them; without a valid box it is a miss. */
  hit?: Proportion;
  /** The same for the data's named regions. */
  regions: Record<string, Proportion>;
  /** Items without a valid box, by reason. */
  invalid: Record<string, number>;
  /** Grounding runs: accuracy with a valid box and without, and the difference, which is what MGPO can learn from. */
  gap?: { valid: Proportion; invalid: Proportion; difference: Difference };
  /** Replies that the length limit cut off. */
  clipped: Proportion;
  /** Samples that could not be read. */
  skipped: { sampleId: string; error: string }[];
  /** Every item that could be read, in the order of the evaluation. */
  items: EvaluationItem[];
}

const Z95 = 1.959963984540054;

/** A proportion with its 95 % Wilson score interval. */
export function proportion(count: number, of: number): Proportion {
  if (of === 0) return { count, of, value: NaN, low: 0, high: 1 };
  const p = count / of, z2 = Z95 * Z95;
  const centre = (p + z2 / (2 * of)) / (1 + z2 / of);
  const half = Z95 / (1 + z2 / of) * Math.sqrt(p * (1 - p) / of + z2 / (4 * of * of));
  // At the borders the interval ends there exactly, whatever rounding says.
  return { count, of, value: p, low: count === 0 ? 0 : centre - half, high: count === of ? 1 : centre + half };
}

/** a − b with its 95 % interval (Newcombe 1998, method 10: the two Wilson intervals combined). */
export function difference(a: Proportion, b: Proportion): Difference {
  const value = a.value - b.value;
  return {
    value,
    low: value - Math.hypot(a.value - a.low, b.high - b.value),
    high: value + Math.hypot(a.high - a.value, b.value - b.low),
  };
}

/**
 * Plays one conversation about each item and measures the outcome.
 *
 * @throws {InputError} if an option is unknown or impossible, or not a single item could be read.
 */
export async function evaluate(
  policy: Policy,
  dataset: Dataset,
  options: EvaluateOptions & EvaluateParts = {},
): Promise<Evaluation> {
  const { template, onProgress, onBatch, ...given } = options;
  const resolved = withHints(resolveOptions(evaluateTable, given), dataset.hints);
  const { items, batchSize, boxes, blank, ...settings } = resolved;
  const { turns, temperature, seed } = settings;
  if (boxes !== "own" && turns === 1) throw new InputError(`boxes = ${boxes}: needs turns that ground; got turns = 1`);
  const cropInstead = boxes === "own" ? undefined : otherCrop(boxes, settings);
  const maxNewTokens = maxNewTokensFor(policy, settings.maxNewTokens);
  const positions = evaluationPositions(dataset.size, items, seed);
  const records: EvaluationItem[] = [], skipped: Evaluation["skipped"] = [];
  let clipped = 0, replies = 0;
  for (let from = 0; from < positions.length; from += batchSize) {
    const read = await readSamples(dataset, positions.slice(from, from + batchSize));
    const samples = blank || boxes === "true"
      ? read.map((sample) => ({ ...sample, picture: () => pictureOf(sample, boxes, blank) }))
      : read;
    const place = { groupSize: 1, step: 0, firstPrompt: from };
    const batch = await rollout(policy, samples, { ...settings, maxNewTokens, template, cropInstead, ...place });
    for (const trajectory of batch.trajectories) {
      records.push(itemOf(samples[trajectory.prompt - from], trajectory));
      replies += trajectory.turns.length;
      clipped += trajectory.turns.filter((turn) => turn.finish === "length").length;
    }
    skipped.push(...batch.skipped.map(({ sampleId, error }) => ({ sampleId, error })));
    onBatch?.(batch, samples, from);
    policy.releaseFeatures?.();
    onProgress?.(
      Math.min(from + batchSize, positions.length),
      positions.length,
      records.filter((r) => r.correct).length,
    );
    await yieldToEvents();
  }
  if (records.length === 0) {
    throw new InputError(
      `${dataset.name}: none of the ${positions.length} items could be read; ${skipped[0]?.error ?? ""}`,
    );
  }
  return {
    policy: policy.name,
    dataset: dataset.name,
    fingerprint: dataset.fingerprint,
    turns,
    temperature,
    seed,
    ...summarizeItems(records),
    clipped: proportion(clipped, replies),
    skipped,
    items: records,
  };
}

type Boxes = NonNullable<EvaluateOptions["boxes"]>;

/** The picture of a sample under the controls of an evaluation. */
async function pictureOf(sample: Sample, boxes: Boxes, blank: boolean): Promise<Picture> {
  const picture = await sample.picture();
  if (boxes === "true" && !sample.boxes?.length) {
    throw new InputError(`sample ${sample.id} has no boxes, which boxes = true needs`);
  }
  if (!blank) return picture;
  const { width, height } = picture;
  return Picture.fromRgb(new Uint8Array(3 * width * height).fill(128), width, height);
}

/** What is cut out whatever the policy asked for. */
function otherCrop(boxes: Exclude<Boxes, "own">, options: RolloutOptions): RolloutOptions["cropInstead"] {
  return (sample, trajectory) => {
    const { inputSize, pictureSize } = trajectory;
    if (boxes === "whole") return [0, 0, ...pictureSize];
    const box = boxes === "true"
      ? boxAround(sample.boxes!, inputSize, pictureSize, options)
      : randomBox(trajectory, options);
    return cropBox(box, inputSize, pictureSize, options);
  };
}

/** A box as large as the policy's own, or with sides of a sixth of the picture's where it gave none, anywhere in the picture. */
function randomBox({ prompt, rollout, turns, inputSize }: Trajectory, options: RolloutOptions): Box {
  const { seed, minBoxSide = rolloutDefaults.minBoxSide } = options;
  const random = new RandomStream(seed ?? 0, "random box", prompt, rollout, turns.length);
  const own = turns[turns.length - 1].box;
  const ends = ([0, 1] as const).map((axis) => {
    const limit = inputSize[axis], typical = Math.max(Math.floor(minBoxSide) + 1, Math.round(limit / 6));
    const side = own ? own[axis + 2] - own[axis] : Math.min(limit, typical), from = random.int(limit - side + 1);
    return [from, from + side];
  });
  return [ends[0][0], ends[1][0], ends[0][1], ends[1][1]];
}

function itemOf(sample: Sample, { sampleId, turns }: Trajectory): EvaluationItem {
  const text = turns[turns.length - 1].text, answer = boxedAnswer(text);
  const item: EvaluationItem = { sampleId, correct: isCorrect(sample, text), expected: sample.answer };
  if (answer !== undefined) item.answer = answer;
  if (!mayGround(turns[0])) return item;
  const { box, invalid, hit, regions } = turns[0];
  item.valid = box !== undefined;
  if (invalid) item.invalid = invalid;
  if (hit !== undefined) item.hit = hit;
  if (regions) item.regions = regions;
  return item;
}

/** The proportions of an evaluation from its items. */
export function summarizeItems(
  items: readonly EvaluationItem[],
): Pick<Evaluation, "accuracy" | "boxed" | "valid" | "hit" | "regions" | "invalid" | "gap"> {
  const share = (values: readonly boolean[]) => proportion(values.filter((value) => value).length, values.length);
  const correct = (chosen: readonly EvaluationItem[]) => share(chosen.map((item) => item.correct));
  const regions: Record<string, Proportion> = {};
  for (const name of new Set(items.flatMap((item) => Object.keys(item.regions ?? {})))) {
    regions[name] = share(items.flatMap((item) => item.regions?.[name] ?? []));
  }
  const invalid: Record<string, number> = {};
  for (const { invalid: reason } of items) if (reason) invalid[reason] = (invalid[reason] ?? 0) + 1;
  const grounded = items.filter((item) => item.valid !== undefined),
    aimed = items.filter((item) => item.hit !== undefined);
  const a = correct(grounded.filter((item) => item.valid)), b = correct(grounded.filter((item) => !item.valid));
  return {
    accuracy: correct(items),
    boxed: share(items.map((item) => item.answer !== undefined)),
    ...(grounded.length > 0 ? { valid: share(grounded.map((item) => item.valid === true)) } : {}),
    ...(aimed.length > 0 ? { hit: share(aimed.map((item) => item.hit === true)) } : {}),
    regions,
    invalid,
    ...(a.of > 0 && b.of > 0 ? { gap: { valid: a, invalid: b, difference: difference(a, b) } } : {}),
  };
}

/**
 * An evaluation as metrics of a training step: `eval/accuracy`, `eval/valid_ratio`, `eval/hit_ratio`, …
 *
 * @param suffix Follows every name. @default {""}
 */
export function evaluationMetrics(evaluation: Evaluation, suffix = ""): Record<string, number> {
  const out: Record<string, number> = { "eval/accuracy": evaluation.accuracy.value };
  if (evaluation.valid) out["eval/valid_ratio"] = evaluation.valid.value;
  if (evaluation.hit) out["eval/hit_ratio"] = evaluation.hit.value;
  for (const [name, region] of Object.entries(evaluation.regions)) out[`eval/${name}_ratio`] = region.value;
  if (evaluation.gap) out["eval/gap"] = evaluation.gap.difference.value;
  out["eval/items"] = evaluation.items.length;
  return Object.fromEntries(Object.entries(out).map(([name, value]) => [name + suffix, value]));
}
