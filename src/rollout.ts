/**
 * The conversation of MGPO: the model is asked where to look, the area that it names is cut out of the original picture,
 * and it answers with both in sight. This file holds all of it: the words, the box, the crop, the turns, the metrics.
 *
 * - Tokens in, tokens out: a trajectory grows by the very ids that were sampled; no reply is ever encoded again.
 * - A box is in pixels of the resized picture (gridW·14 × gridH·14), a crop in pixels of the original one.
 * - `turns: 1` is the one-turn baseline (GRPO), 2 is MGPO; with more, all but the last are grounding turns.
 * - `form: "fixed"` asks for a box in every turn but the last. `"free"`, the control of the ablation, lets the model choose in
 *   those turns: a reply with a boxed answer ends the conversation, else it goes on as in the fixed form.
 *
 * @module
 */
import type { Box, Demonstration, Sample } from "./data/dataset.ts";
import type { Picture } from "./policy/picture.ts";
import type { Completion, ImageInput, Message, MessagePart, Policy, PrefixCache } from "./policy/policy.ts";
import { InputError } from "./run/errors.ts";

/** Side of a vision patch in pixels of the resized picture. */
const PATCH = 14;

/**
 * The words of the conversation, as data. The user content of a turn is a list of parts: `"{image}"` is the turn's picture;
 * any other part is text, in which `{question}` and `{choices}` are filled in. JSON-serialisable.
 */
export interface PromptTemplate {
  /** System message of conversations with grounding; `""` leaves it out (a chat template may then add its own). */
  system: string;
  /** System message of one-turn conversations; `""` leaves it out. */
  singleSystem: string;
  /** First turn: the picture, and where to look. Shows no choices, so that they cannot be guessed from. */
  ground: readonly string[];
  /** A later grounding turn after a valid box: the crop, and where to look next in the first picture. */
  refine: readonly string[];
  /** A later grounding turn after an invalid box: the first picture again. */
  retry: readonly string[];
  /** Last turn after a valid box: the crop. */
  valid: readonly string[];
  /** Last turn after an invalid box: the first picture again. */
  invalid: readonly string[];
  /** The only turn of a one-turn conversation. */
  single: readonly string[];
  /** First turn of the free form: the picture, the choices, and where to look or what the answer is. */
  free: readonly string[];
  /** A later turn of the free form but the last, after a valid box: the crop. */
  freeValid: readonly string[];
  /** A later turn of the free form but the last, after neither a valid box nor an answer: the first picture again. */
  freeInvalid: readonly string[];
  /** One choice of `choiceStyle` `lettered`, with `{letter}` and `{choice}`. */
  lettered: string;
  /** One choice of `choiceStyle` `listed`, with `{choice}`. */
  listed: string;
}

const cropShown = "The key area, cut out of the full-size picture:\n";
const shownAgain = "No usable key area was given. Here is the whole picture again:\n";
const groundRequest = "\nWhich area of the picture must be seen closely to answer this? " +
  'End with that key area as JSON, [{"bbox_2d": [x1, y1, x2, y2], "label": "what it shows"}] ' +
  "in pixels of the first picture, and stop there.";
const answerRequest = "\nLook at everything shown so far and think it through. " +
  "Then put the final answer in \\boxed{}: the letter if the choices have letters, else the answer itself.";

// The two requests of the fixed form, because a small policy may know no other words. So joined, the embedded one starts with
// as many valid boxes as in the fixed form, and answers at once now and then.
const freeRequest = "{question}{choices}" + answerRequest + "\n\nor\n\n{question}" + groundRequest;

/** The project's own wording. */
export const defaultTemplate: Readonly<PromptTemplate> = {
  system:
    "You answer questions about a large picture that is shown to you reduced in size, so small things may be unreadable. " +
    "When asked for the key area, give its coordinates as JSON at the end of your reply and stop: " +
    "that area is then cut out of the full-size picture and shown to you enlarged. " +
    "When asked for the answer, use all that you have seen and put it in \\boxed{}.",
  singleSystem: "You answer questions about a picture. Put the final answer in \\boxed{}.",
  ground: ["{image}", "{question}", groundRequest],
  refine: [cropShown, "{image}", "{question}", groundRequest],
  retry: [shownAgain, "{image}", "{question}", groundRequest],
  valid: [cropShown, "{image}", "{question}{choices}", answerRequest],
  invalid: [shownAgain, "{image}", "{question}{choices}", answerRequest],
  single: ["{image}", "{question}{choices}", answerRequest],
  free: ["{image}", freeRequest],
  freeValid: [cropShown, "{image}", freeRequest],
  freeInvalid: [shownAgain, "{image}", freeRequest],
  lettered: "\n({letter}) {choice}",
  listed: " {choice}",
};

/** Why a grounding reply gave no usable box, in the order of the checks. */
// deno-fmt-ignore
export const invalidReasons =
  ["no_json", "wrong_shape", "not_numbers", "out_of_range", "degenerate", "too_small", "aspect"] as const;
/** One of {@linkcode invalidReasons}. */
export type InvalidReason = typeof invalidReasons[number];

/** Options of {@linkcode rollout}. */
export interface RolloutOptions {
  /** Assistant turns: 1 answers at once (GRPO), 2 grounds then answers (MGPO), more ground repeatedly. @default {2} */
  turns?: number;
  /** `fixed`: all turns but the last must ground; `free`: they may also answer, which ends them. @default {"fixed"} */
  form?: "fixed" | "free";
  /** Rollouts per sample (G). @default {8} */
  groupSize?: number;
  /** The most tokens of a reply, for all turns or turn by turn (the last entry serves later turns). @default {512} */
  maxNewTokens?: number | readonly number[];
  /** Softmax temperature; 0 is greedy. @default {1} */
  temperature?: number;
  /** Nucleus mass, 0 < topP ≤ 1. @default {1} */
  topP?: number;
  /** Seed of all draws. @default {0} */
  seed?: number;
  /** Counter that names this call's draws beside the seed: the training step. @default {0} */
  step?: number;
  /** Number of the first sample, so that a step may be split into several calls without changing a draw. @default {0} */
  firstPrompt?: number;
  /** Both sides of a box must be longer than this, in pixels of the resized picture. @default {28} */
  minBoxSide?: number;
  /** Long side : short side of a box must be less than this, at most 200. @default {100} */
  maxAspect?: number;
  /** Smallest side of a crop, in pixels of the original picture. @default {0} */
  minCropSide?: number;
  /** Whether a crop's short side is grown to a square with context. @default {false} */
  squareCrop?: boolean;
  /** Wording that replaces parts of {@linkcode defaultTemplate}. @default {{}} */
  template?: Partial<PromptTemplate>;
  /**
   * What is cut out after a grounding turn whatever the model asked for, valid or not: a control of evaluations. Gets the
   * conversation so far; returns a rectangle in pixels of the original picture. @default {what the model asked for}
   */
  cropInstead?: (sample: Sample, trajectory: Trajectory) => Box;
  /** Called after each decoding step. Turns count from 1. */
  onProgress?: (progress: { turn: number; turns: number; tokens: number; running: number }) => void;
}

/** Defaults of {@linkcode RolloutOptions}. */
// deno-fmt-ignore
export const rolloutDefaults = {
  turns: 2, form: "fixed" as "fixed" | "free", groupSize: 8, maxNewTokens: 512 as number | readonly number[], temperature: 1, topP: 1, seed: 0, step: 0,
  firstPrompt: 0, minBoxSide: 28, maxAspect: 100, minCropSide: 0, squareCrop: false,
};

/** One user message and the model's reply to it: ids as sampled (the stop token included), their ln p, how it ended. */
export interface TurnRecord extends Completion {
  /** The user's text, `{image}` where a picture stood. */
  prompt: string;
  /** The reply, decoded without special tokens. */
  text: string;
  /** Grounding turns: the valid box, in pixels of the resized picture. */
  box?: Box;
  /** Grounding turns: why there is no valid box. */
  invalid?: InvalidReason;
  /** Grounding turns with a valid box: what was cut out, in pixels of the original picture. */
  crop?: Box;
  /** What was cut out by `cropInstead`, whatever the model asked for. */
  shown?: Box;
  /** Turns of the free form that could have grounded: whether the reply answered instead, which ended the conversation. */
  answered?: boolean;
  /** Grounding turns of samples with `boxes`: whether the crop contains all of them (false without a crop). */
  hit?: boolean;
  /** Grounding turns of samples with `regions`: the same by region. */
  regions?: Record<string, boolean>;
}

/** One whole conversation, as sampled: what the optimizer trains on. */
export interface Trajectory {
  /** The `id` of the sample that it is about. */
  sampleId: string;
  /** Position of the sample in the step (`firstPrompt` + its index in the call). */
  prompt: number;
  /** Number of the rollout within its group, from 0. */
  rollout: number;
  /** All token ids, prompts and replies, image tokens expanded. */
  ids: number[];
  /** 1 where the model wrote the token (its own end-of-turn token too), else 0. As long as `ids`. */
  assistantMask: number[];
  /** ln p as sampled where the mask is 1, else 0. As long as `ids`. */
  logprobs: number[];
  /** The images that the image tokens stand for, in order. */
  images: ImageInput[];
  /** The turns in order; the last one holds the answer, those before it ground. Fewer than asked for after an early answer. */
  turns: TurnRecord[];
  /** `[width, height]` of the resized first picture: the unit of boxes. */
  inputSize: [number, number];
  /** `[width, height]` of the original picture: the unit of crops. */
  pictureSize: [number, number];
}

/** What {@linkcode rollout} returns. */
export interface RolloutBatch {
  /** Sample by sample, G each; skipped samples have none. */
  trajectories: Trajectory[];
  /** Samples whose picture or question could not be prepared, with the reason. */
  skipped: { sampleId: string; prompt: number; error: string }[];
}

// ---- Words ---------------------------------------------------------------------------------------------------------

const turnNames = [
  ...["ground", "refine", "retry", "valid", "invalid", "single", "free", "freeValid", "freeInvalid"] as const,
];

/**
 * The default wording with parts replaced.
 *
 * @throws {RangeError} If a key is unknown, or if a turn has not exactly one `"{image}"` part.
 */
export function resolveTemplate(replaced: Partial<PromptTemplate> = {}): PromptTemplate {
  for (const key of Object.keys(replaced)) {
    if (!(key in defaultTemplate)) {
      throw new RangeError(`template has no "${key}"; it has ${Object.keys(defaultTemplate).join(", ")}`);
    }
  }
  const template = { ...defaultTemplate, ...replaced };
  for (const turn of turnNames) {
    const parts = template[turn];
    const whole = parts.filter((part) => part === "{image}").length;
    if (whole !== 1 || parts.some((part) => part !== "{image}" && part.includes("{image}"))) {
      throw new RangeError(`template.${turn} must have "{image}" exactly once and as a part of its own`);
    }
  }
  return template;
}

/** Text from outside, with the marks of special tokens broken up: a question must not smuggle in an image token. */
function plain(text: string): string {
  return text.replaceAll("<|", "< |");
}

/**
 * The offered answers as the template shows them; `""` without choices.
 *
 * @throws {RangeError} If there are more lettered choices than letters.
 */
export function renderChoices(
  sample: Pick<Sample, "choices" | "choiceStyle">,
  template: Pick<PromptTemplate, "lettered" | "listed"> = defaultTemplate,
): string {
  const choices = sample.choices ?? [];
  const style = sample.choiceStyle ?? "lettered";
  if (style === "lettered" && choices.length > 26) {
    throw new RangeError(`a question can have at most 26 lettered choices, got ${choices.length}`);
  }
  return choices.map((choice, i) =>
    fill(template[style], { letter: String.fromCharCode(65 + i), choice: plain(choice) })
  ).join("");
}

/** Fills placeholders in one pass, so that a value that looks like a placeholder stays as it is. */
function fill(text: string, values: Record<string, string>): string {
  return text.replace(/\{(\w+)\}/g, (whole, name: string) => Object.hasOwn(values, name) ? values[name] : whole);
}

/** The user message of a turn. */
export function renderTurn(parts: readonly string[], question: string, choices: string): Message {
  const content: MessagePart[] = parts.map((part) =>
    part === "{image}" ? { type: "image" } : { type: "text", text: fill(part, { question: plain(question), choices }) }
  );
  return { role: "user", content };
}

function shown(message: Message): string {
  if (typeof message.content === "string") return message.content;
  return message.content.map((part) => part.type === "image" ? "{image}" : part.text).join("");
}

// ---- Box -----------------------------------------------------------------------------------------------------------

/**
 * Reads the box of a grounding reply: the last JSON value in it (fenced or bare, an object or a list of them) whose first
 * entry has `bbox_2d`. Valid is: a string label; four integers with 0 ≤ x1 < x2 ≤ width and 0 ≤ y1 < y2 ≤ height; both
 * sides > minBoxSide; long side / short side < maxAspect.
 *
 * @param width Width of the resized picture in pixels; the box is in the same unit.
 * @param height Its height.
 */
export function parseBox(
  text: string,
  width: number,
  height: number,
  { minBoxSide = rolloutDefaults.minBoxSide, maxAspect = rolloutDefaults.maxAspect }: RolloutOptions = {},
): { box: Box } | { invalid: InvalidReason } {
  const entries = jsonValues(text).map((value) => Array.isArray(value) ? value[0] : value);
  if (entries.length === 0) return { invalid: "no_json" };
  const entry = entries.findLast((e): e is { bbox_2d: unknown; label?: unknown } =>
    typeof e === "object" && e !== null && "bbox_2d" in e
  );
  const corners = entry?.bbox_2d;
  if (typeof entry?.label !== "string" || !Array.isArray(corners) || corners.length !== 4) {
    return { invalid: "wrong_shape" };
  }
  if (!corners.every((c) => Number.isInteger(c))) return { invalid: "not_numbers" };
  const [x1, y1, x2, y2] = corners as [number, number, number, number];
  if (Math.min(x1, y1, x2, y2) < 0 || Math.max(x1, x2) > width || Math.max(y1, y2) > height) {
    return { invalid: "out_of_range" };
  }
  if (x1 >= x2 || y1 >= y2) return { invalid: "degenerate" };
  if (Math.min(x2 - x1, y2 - y1) <= minBoxSide) return { invalid: "too_small" };
  if (aspect([x1, y1, x2, y2]) >= maxAspect) return { invalid: "aspect" };
  return { box: [x1, y1, x2, y2] };
}

/**
 * What stands in the last complete `\boxed{…}`, trimmed; braces inside may nest.
 *
 * @returns `undefined` without one; `""` for an empty one.
 *
 * @example
 * ```ts
 * import { boxedAnswer } from "./rollout.ts";
 * if (boxedAnswer("so \\boxed{\\text{B}}") !== "\\text{B}") throw new Error("not found");
 * ```
 */
export function boxedAnswer(text: string): string | undefined {
  for (let at = text.lastIndexOf("\\boxed"); at >= 0; at = at > 0 ? text.lastIndexOf("\\boxed", at - 1) : -1) {
    const start = at + (/^\\boxed\s*\{/.exec(text.slice(at))?.[0].length ?? 0);
    if (start === at) continue;
    let depth = 1;
    for (let i = start; i < text.length; i++) {
      if (text[i] === "\\") i++;
      else if (text[i] === "{") depth++;
      else if (text[i] === "}" && --depth === 0) return text.slice(start, i).trim();
    }
  }
  return undefined;
}

/** Long side over short side. */
function aspect([x1, y1, x2, y2]: Box): number {
  return Math.max(x2 - x1, y2 - y1) / Math.min(x2 - x1, y2 - y1);
}

/** Every outermost JSON list or object in a text, in order. */
function jsonValues(text: string): unknown[] {
  const values: unknown[] = [];
  for (let at = 0; at < text.length; at++) {
    if (text[at] !== "[" && text[at] !== "{") continue;
    const end = closingBracket(text, at);
    if (end < 0) continue;
    try {
      values.push(JSON.parse(text.slice(at, end + 1)));
      at = end;
    } catch {
      // Prose in brackets; what stands inside it may still be JSON.
    }
  }
  return values;
}

/** Where the bracket at `start` closes, brackets in strings aside; -1 if it doesn't or if brackets cross. */
function closingBracket(text: string, start: number): number {
  const open: string[] = [];
  let quoted = false;
  for (let i = start; i < text.length; i++) {
    const c = text[i];
    if (quoted) {
      if (c === "\\") i++;
      else if (c === '"') quoted = false;
    } else if (c === '"') quoted = true;
    else if (c === "[" || c === "{") open.push(c === "[" ? "]" : "}");
    else if (c === "]" || c === "}") {
      if (open.pop() !== c) return -1;
      if (open.length === 0) return i;
    }
  }
  return -1;
}

// ---- Crop ----------------------------------------------------------------------------------------------------------

/** `[width, height]` in pixels. */
export type Size = readonly [number, number];

/**
 * A box of the resized picture (w × h) in pixels of the original (W × H), grown outwards to whole pixels:
 * x1' = ⌊x1·W/w⌋, y1' = ⌊y1·H/h⌋, x2' = ⌈x2·W/w⌉, y2' = ⌈y2·H/h⌉, all clamped to the picture.
 */
export function toOriginal(box: Box, [w, h]: Size, [W, H]: Size): Box {
  const clamp = (value: number, most: number) => Math.min(Math.max(value, 0), most);
  return [
    clamp(Math.floor(box[0] * W / w), W),
    clamp(Math.floor(box[1] * H / h), H),
    clamp(Math.ceil(box[2] * W / w), W),
    clamp(Math.ceil(box[3] * H / h), H),
  ];
}

/**
 * The rectangle to cut out of the original: {@linkcode toOriginal}, then each side s of a W-long axis is grown about its
 * middle to s' = min(W, max(s, minCropSide, squareCrop ? the other side : 0)) and shifted inside the picture.
 */
export function cropBox(
  box: Box,
  inputSize: Size,
  pictureSize: Size,
  { minCropSide = rolloutDefaults.minCropSide, squareCrop = rolloutDefaults.squareCrop }: RolloutOptions = {},
): Box {
  const [x1, y1, x2, y2] = toOriginal(box, inputSize, pictureSize);
  const least = Math.max(minCropSide, squareCrop ? Math.max(x2 - x1, y2 - y1) : 0);
  const [left, right] = grow(x1, x2, least, pictureSize[0]);
  const [top, bottom] = grow(y1, y2, least, pictureSize[1]);
  return [left, top, right, bottom];
}

function grow(from: number, to: number, least: number, limit: number): [number, number] {
  const side = Math.min(limit, Math.max(to - from, least));
  const start = Math.min(Math.max(from - Math.floor((side - (to - from)) / 2), 0), limit - side);
  return [start, start + side];
}

/** Whether `outer` contains all of `inner` (same unit). */
export function containsAll(outer: Box, inner: readonly Box[]): boolean {
  return inner.every((b) => outer[0] <= b[0] && outer[1] <= b[1] && outer[2] >= b[2] && outer[3] >= b[3]);
}

// ---- Turns ---------------------------------------------------------------------------------------------------------

type Settings = ReturnType<typeof resolveOptions>;

function resolveOptions({ template, onProgress, cropInstead, ...given }: RolloutOptions) {
  const settings = { ...rolloutDefaults, template: resolveTemplate(template), onProgress, cropInstead };
  Object.assign(settings, Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)));
  const limits = [settings.maxNewTokens].flat();
  if (limits.length === 0) throw new RangeError("maxNewTokens must not be an empty list");
  const integers: [string, number, number][] = [
    ["turns", settings.turns, 1],
    ["groupSize", settings.groupSize, 1],
    ["minCropSide", settings.minCropSide, 0],
    ...limits.map((n): [string, number, number] => ["maxNewTokens", n, 1]),
  ];
  for (const [name, value, least] of integers) {
    if (!Number.isInteger(value) || value < least) {
      throw new RangeError(`${name} must be an integer from ${least} on, got ${value}`);
    }
  }
  if (!(settings.maxAspect > 1 && settings.maxAspect <= 200)) {
    throw new RangeError(`maxAspect must be more than 1 and at most 200, got ${settings.maxAspect}`);
  }
  if (settings.form !== "fixed" && settings.form !== "free") {
    throw new RangeError(`form must be "fixed" or "free", got ${JSON.stringify(settings.form)}`);
  }
  if (!(settings.minBoxSide >= 0)) throw new RangeError(`minBoxSide must be 0 or more, got ${settings.minBoxSide}`);
  return { ...settings, limits };
}

/** A sample with its picture in hand, shared by the G rows of its group. */
interface Scene {
  sample: Sample;
  picture: Picture;
  image: ImageInput;
  choices: string;
  opening: Message[];
  ids: number[];
  /** Crops by rectangle: rollouts of a group often ask for the same one. */
  crops: Map<string, ImageInput>;
}

/** A conversation under way. */
interface Row {
  scene: Scene;
  messages: Message[];
  trajectory: Trajectory;
}

async function openScene(policy: Policy, sample: Sample, settings: Settings): Promise<Scene> {
  const { template, turns, form } = settings;
  const picture = await sample.picture();
  const image = policy.prepareImage(picture);
  const choices = renderChoices(sample, template);
  const system = turns > 1 ? template.system : template.singleSystem;
  const name = turns === 1 ? "single" : form === "free" ? "free" : "ground";
  const user = renderTurn(template[name], sample.question, choices);
  const opening: Message[] = system === "" ? [user] : [{ role: "system", content: system }, user];
  return { sample, picture, image, choices, opening, ids: policy.encodeChat(opening, [image]), crops: new Map() };
}

function openRow(scene: Scene, prompt: number, rollout: number): Row {
  const { image, ids, picture, sample } = scene;
  const trajectory: Trajectory = {
    sampleId: sample.id,
    prompt,
    rollout,
    ids: [...ids],
    assistantMask: ids.map(() => 0),
    logprobs: ids.map(() => 0),
    images: [image],
    turns: [],
    inputSize: [image.grid_thw[2] * PATCH, image.grid_thw[1] * PATCH],
    pictureSize: [picture.width, picture.height],
  };
  return { scene, messages: [...scene.opening], trajectory };
}

/** The next user message: after a crop or without one, for the last turn or before it. */
const nextTurn = {
  last: { crop: "valid", none: "invalid" },
  fixed: { crop: "refine", none: "retry" },
  free: { crop: "freeValid", none: "freeInvalid" },
} as const;

/** Appends the next user message: the crop that the last reply asked for, or the first picture again. */
function ask(policy: Policy, { scene, messages, trajectory }: Row, last: boolean, settings: Settings): void {
  const { template, form, cropInstead } = settings;
  const reply = trajectory.turns[trajectory.turns.length - 1], end = reply.ids[reply.ids.length - 1];
  if (cropInstead) reply.shown = cropInstead(scene.sample, trajectory);
  const crop = reply.shown ?? reply.crop;
  const name = nextTurn[last ? "last" : form][crop ? "crop" : "none"];
  const user = renderTurn(template[name], scene.sample.question, scene.choices);
  const image = crop ? cutOut(policy, scene, crop) : scene.image;
  // Unless told that the reply ended, the continuation opens with the end-of-turn token. A reply that another stop token or
  // the length limit cut off needs it; it is then the template's token, not the model's.
  const next = policy.encodeContinuation(messages, [user], [image], false);
  append(trajectory, end === next[0] ? next.slice(1) : next);
  trajectory.images.push(image);
  messages.push({ role: "assistant", content: reply.text }, user);
}

function cutOut(policy: Policy, { picture, crops }: Scene, crop: Box): ImageInput {
  const name = crop.join();
  const image = crops.get(name) ?? policy.prepareImage(picture.crop(crop));
  crops.set(name, image);
  return image;
}

function append(trajectory: Trajectory, ids: readonly number[], logprobs?: readonly number[]): void {
  ids.forEach((id, i) => {
    trajectory.ids.push(id);
    trajectory.assistantMask.push(logprobs ? 1 : 0);
    trajectory.logprobs.push(logprobs ? logprobs[i] : 0);
  });
}

/** Reads the box of a reply and works out its crop. */
function look(turn: TurnRecord, { inputSize, pictureSize }: Trajectory, settings: Settings): void {
  const parsed = parseBox(turn.text, ...inputSize, settings);
  if ("invalid" in parsed) {
    turn.invalid = parsed.invalid;
    return;
  }
  const crop = cropBox(parsed.box, inputSize, pictureSize, settings);
  // Resizing can change the proportions of very thin pictures, and no image processor takes a thread.
  if (aspect(crop) >= settings.maxAspect) turn.invalid = "aspect";
  else Object.assign(turn, { box: parsed.box, crop });
}

/** Appends a reply; that of a grounding turn is read for its box. */
function hear(policy: Policy, row: Row, completion: Completion, grounding: boolean, settings: Settings): void {
  const { scene: { sample }, messages, trajectory } = row;
  append(trajectory, completion.ids, completion.logprobs);
  const prompt = shown(messages[messages.length - 1]);
  const turn: TurnRecord = { prompt, text: policy.decode(completion.ids), ...completion };
  trajectory.turns.push(turn);
  if (!grounding) return;
  if (settings.form === "free") turn.answered = boxedAnswer(turn.text) !== undefined;
  if (!turn.answered) look(turn, trajectory, settings);
  const shows = (boxes: readonly Box[]) => turn.crop !== undefined && containsAll(turn.crop, boxes);
  if (sample.boxes?.length) turn.hit = shows(sample.boxes);
  if (sample.regions) {
    turn.regions = Object.fromEntries(Object.entries(sample.regions).map(([name, boxes]) => [name, shows(boxes)]));
  }
}

/** One reply of every row, in one batch. */
async function reply(
  policy: Policy,
  rows: readonly Row[],
  turn: number,
  settings: Settings,
  cache: PrefixCache | undefined,
): Promise<void> {
  const { turns, groupSize, limits, temperature, topP, seed, step, onProgress } = settings;
  const completions = await policy.generate(rows.map((row) => row.trajectory), {
    maxNewTokens: limits[Math.min(turn, limits.length - 1)],
    temperature,
    topP,
    seed,
    keys: rows.map(({ trajectory: t }) => [step, t.prompt * groupSize + t.rollout, turn] as const),
    onToken: onProgress && ((tokens, running) => onProgress({ turn: turn + 1, turns, tokens, running })),
    cache,
    keepCache: turn < turns - 1,
  });
  rows.forEach((row, i) => hear(policy, row, completions[i], turn < turns - 1, settings));
}

/**
 * Plays `groupSize` conversations about each sample. All rows of a turn are generated in one batch; a draw depends on seed,
 * step, sample position, rollout and turn only. A sample that cannot be prepared is skipped and reported.
 *
 * @throws {RangeError} If an option is impossible.
 */
export async function rollout(
  policy: Policy,
  samples: readonly Sample[],
  options: RolloutOptions = {},
): Promise<RolloutBatch> {
  const settings = resolveOptions(options);
  const rows: Row[] = [];
  const skipped: RolloutBatch["skipped"] = [];
  for (const [i, sample] of samples.entries()) {
    const prompt = settings.firstPrompt + i;
    try {
      const scene = await openScene(policy, sample, settings);
      for (let g = 0; g < settings.groupSize; g++) rows.push(openRow(scene, prompt, g));
    } catch (error) {
      skipped.push({ sampleId: sample.id, prompt, error: error instanceof Error ? error.message : String(error) });
    }
  }
  const cache = settings.turns > 1 ? policy.createPrefixCache?.() : undefined;
  try {
    for (let turn = 0; turn < settings.turns && rows.length > 0; turn++) {
      const open = rows.filter((row) => !row.trajectory.turns.at(-1)?.answered);
      if (open.length === 0) break;
      if (turn > 0) { for (const row of open) ask(policy, row, turn === settings.turns - 1, settings); }
      await reply(policy, open, turn, settings, cache);
    }
  } finally {
    cache?.dispose();
  }
  return { trajectories: rows.map((row) => row.trajectory), skipped };
}

/**
 * The smallest valid box around some boxes.
 *
 * @param boxes In pixels of the original picture, at least one.
 * @returns In whole pixels of the resized picture; not valid only where the picture itself is too small or too thin.
 */
export function boxAround(
  boxes: readonly Box[],
  inputSize: Size,
  pictureSize: Size,
  options: RolloutOptions = {},
): Box {
  const { minBoxSide = rolloutDefaults.minBoxSide, maxAspect = rolloutDefaults.maxAspect } = options;
  const [x1, y1] = ([0, 1] as const).map((axis) => Math.min(...boxes.map((box) => box[axis])));
  const [x2, y2] = ([2, 3] as const).map((axis) => Math.max(...boxes.map((box) => box[axis])));
  const around = toOriginal([x1, y1, x2, y2], pictureSize, inputSize);
  const long = Math.max(around[2] - around[0], around[3] - around[1]);
  const least = Math.max(Math.floor(minBoxSide), Math.floor(long / maxAspect)) + 1;
  const [left, right] = grow(around[0], around[2], least, inputSize[0]);
  const [top, bottom] = grow(around[1], around[3], least, inputSize[1]);
  return [left, top, right, bottom];
}

/**
 * The conversation of a policy that knows where to look and what to answer, for supervised training: as {@linkcode rollout}
 * would have it, had the replies been sampled. Every turn but the last names the box around the sample's boxes.
 *
 * @param demonstration The replies.
 * @returns Its `logprobs` are all 0.
 * @throws {InputError} If turns ground and the sample has no boxes, or the grounding reply names no valid box.
 */
export async function demonstrate(
  policy: Policy,
  sample: Sample,
  { answer, ground = fencedBox }: Demonstration,
  options: RolloutOptions = {},
): Promise<Trajectory> {
  const settings = resolveOptions(options), { turns } = settings;
  if (turns > 1 && !sample.boxes?.length) {
    throw new InputError(`sample ${sample.id} has no boxes, so there is no demonstration of where to look`);
  }
  const row = openRow(await openScene(policy, sample, settings), 0, 0), { trajectory } = row;
  for (let turn = 0; turn < turns; turn++) {
    const last = turn === turns - 1, { inputSize, pictureSize } = trajectory;
    if (turn > 0) ask(policy, row, last, settings);
    const text = last
      ? said(answer, inputSize)
      : ground(boxAround(sample.boxes!, inputSize, pictureSize, settings), inputSize);
    const ids = [...policy.encode(text), ...policy.stopTokens.slice(0, 1)];
    hear(policy, row, { ids, logprobs: ids.map(() => 0), finish: "stop" }, !last, settings);
    const { invalid, box } = trajectory.turns[turn];
    if (last || box) continue;
    throw new InputError(
      `sample ${sample.id}: the demonstration ${JSON.stringify(text)} has no valid box (${invalid})`,
    );
  }
  return trajectory;
}

const said = (answer: Demonstration["answer"], inputSize: Size) =>
  typeof answer === "string" ? answer : answer(inputSize);

function fencedBox(box: Box): string {
  return `\`\`\`json\n[{"bbox_2d": [${box.join(", ")}], "label": "key area"}]\n\`\`\``;
}

/** A trajectory as one line of JSON, without a line break; images are named by their keys. */
export function trajectoryToJson(trajectory: Trajectory): string {
  return JSON.stringify({ ...trajectory, images: trajectory.images.map((image) => image.key) });
}

/** Whether a turn was one that could ground: all but the last turn that was allowed. */
export function mayGround(turn: TurnRecord): boolean {
  return turn.crop !== undefined || turn.invalid !== undefined || turn.answered === true;
}

/** Whether a conversation used all its turns without any boxed answer. */
export function isOver(trajectory: Trajectory): boolean {
  return trajectory.turns.every((turn) => boxedAnswer(turn.text) === undefined);
}

// ---- Metrics -------------------------------------------------------------------------------------------------------

/**
 * The metrics that rollouts alone tell, as a flat record. Grounding shares are over all trajectories and look at the first
 * grounding turn; a trajectory without a valid box counts as a miss.
 *
 * - `grounding/valid_ratio`: a valid box. `grounding/invalid/<reason>`: none, for this reason (they add up to 1 together with
 *   the first replies of the free form that answer at once).
 * - `grounding/hit_ratio`: a crop that contains all of the sample's boxes; over samples with boxes.
 *   `grounding/<region>_ratio`: the same for a named region.
 * - `crop/area_ratio`: mean area of a crop over that of its picture; over all crops.
 * - `turns/mean`: turns of a conversation. `turns/over_ratio`: all turns used without any boxed answer.
 *   `turns/answered_early_ratio`: ended by an answer before the last turn (free form).
 * - `completions/mean_length`, and `…/turn_<n>`: tokens of a reply. `completions/clipped_ratio`: replies cut by the limit.
 * - `num_tokens`: tokens of all trajectories, prompts and image tokens included.
 *
 * Keys that nothing was measured for are left out.
 */
export function summarize(trajectories: readonly Trajectory[]): Record<string, number> {
  const out: Record<string, number> = {};
  const mean = (name: string, values: readonly number[]) => {
    if (values.length > 0) out[name] = values.reduce((a, b) => a + b, 0) / values.length;
  };
  const share = (name: string, values: readonly boolean[]) => mean(name, values.map(Number));

  const first = trajectories.map((t) => t.turns[0]).filter((turn) => turn && mayGround(turn));
  share("grounding/valid_ratio", first.map((turn) => turn.box !== undefined));
  share("grounding/hit_ratio", first.flatMap((turn) => turn.hit ?? []));
  for (const name of new Set(first.flatMap((turn) => Object.keys(turn.regions ?? {})))) {
    share(`grounding/${name}_ratio`, first.flatMap((turn) => turn.regions?.[name] ?? []));
  }
  for (const reason of invalidReasons) share(`grounding/invalid/${reason}`, first.map((t) => t.invalid === reason));
  mean(
    "crop/area_ratio",
    trajectories.flatMap(({ turns, pictureSize: [W, H] }) =>
      turns.flatMap(({ crop }) => crop ? (crop[2] - crop[0]) * (crop[3] - crop[1]) / (W * H) : [])
    ),
  );

  mean("turns/mean", trajectories.map((t) => t.turns.length));
  if (first.length > 0) share("turns/answered_early_ratio", trajectories.map((t) => t.turns.at(-1)?.answered === true));
  share("turns/over_ratio", trajectories.map(isOver));

  const replies = trajectories.flatMap((t) => t.turns);
  mean("completions/mean_length", replies.map((turn) => turn.ids.length));
  for (let n = 0; trajectories.some((t) => t.turns.length > n); n++) {
    mean(`completions/mean_length/turn_${n + 1}`, trajectories.flatMap((t) => t.turns[n]?.ids.length ?? []));
  }
  share("completions/clipped_ratio", replies.map((turn) => turn.finish === "length"));
  out.num_tokens = trajectories.reduce((sum, t) => sum + t.ids.length, 0);
  return out;
}
