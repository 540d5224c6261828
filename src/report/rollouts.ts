/**
 * Rollouts for the page's browser: each line of a run's files checked, boxes as shares of the picture, texts by number.
 *
 * @module
 */
import { asCount, asList, asNumber, asNumbers, asObject, asText, type Json } from "./checked.ts";
import type { ReportRun, RolloutLine } from "./run_reader.ts";

/** A rectangle in shares of the picture's width and height. */
type Share = [x1: number, y1: number, x2: number, y2: number];

/** A turn as the page shows it. */
export interface PageTurn {
  text: string;
  /** What the user said before. */
  prompt: string;
  /** The valid box, what was cut out, and why there was neither. */
  box?: Share;
  crop?: Share;
  invalid?: string;
  /** Whether the crop shows what was asked for. */
  hit?: boolean;
  /** Whether the length limit cut it off. */
  isCut?: boolean;
}

/** A rollout as the page shows it. */
export interface PageRollout {
  /** A position in the page's runs. */
  run: number;
  step: number;
  split: "train" | "heldout";
  /** The sample's id, and the number of the rollout in its group. */
  item: string;
  rollout: number;
  question: string;
  choices: string[];
  answer: string;
  said?: string;
  correct: boolean;
  /** Undefined where it isn't known. */
  reward?: number;
  parts?: Record<string, number>;
  /** Reward minus the mean of the group's. */
  advantage?: number;
  /** `valid`; `hit` and `miss` where it is known; a reason; `answered` at once; `one turn`. */
  grounding: string;
  /** `[width, height]` of the original. */
  size: [number, number];
  /** What the picture must show, and counted things as points. */
  targets: Share[];
  points: [x: number, y: number][];
  found: [x: number, y: number][];
  turns: PageTurn[];
  /** Names of pictures; those that are missing begin with `!`. */
  pictures: string[];
  /** Positions in the page's texts, with a count where one is repeated. */
  tokens: (number | [text: number, count: number])[];
  /** A digit a token: 0 given, 1 written by the model, 2 written and trained on, 3 given and trained on. */
  marks: string;
  /** ln p of the written tokens, in order. */
  logprobs: number[];
}

/** Everything that the page's browser shows. */
export interface PageRollouts {
  rollouts: PageRollout[];
  texts: string[];
  /** Base64 by name. */
  pictures: Map<string, { type: string; base64: string }>;
  /** Rollouts that there are but that were left out, because there are too many. */
  left: number;
}

/**
 * Reads the rollouts of all runs with their pictures. What can't be shown is noted as a problem of its run.
 *
 * @param most How many; the held-out ones go first, then those of the latest steps.
 */
export async function collectRollouts(runs: readonly ReportRun[], most: number): Promise<PageRollouts> {
  const texts = new TextTable(), rollouts: PageRollout[] = [];
  for (const [index, run] of runs.entries()) {
    const read: PageRollout[] = [], unreadable: string[] = [];
    for (const line of run.rollouts) {
      const rollout = pageRollout(line, index, run.settings, texts);
      if (rollout) read.push(rollout);
      else unreadable.push(line.where);
    }
    if (unreadable.length > 0) {
      const shown = unreadable.slice(0, 3).join(", ") + (unreadable.length > 3 ? ", …" : "");
      run.problems.push(`${unreadable.length} rollouts lack a conversation and are left out (${shown})`);
    }
    addAdvantages(read);
    rollouts.push(...read);
  }
  const kept = choose(rollouts, most), pictures: PageRollouts["pictures"] = new Map();
  for (const [index, run] of runs.entries()) {
    const missing = await readPictures(run, kept.filter((rollout) => rollout.run === index), pictures);
    if (missing.length > 0) {
      const shown = missing.slice(0, 3).join(", ") + (missing.length > 3 ? ", …" : "");
      run.problems.push(
        `${missing.length} picture${missing.length === 1 ? " is" : "s are"} missing or damaged: ${shown}`,
      );
    }
  }
  return { rollouts: kept, texts: texts.all, pictures, left: rollouts.length - kept.length };
}

/** Texts by number. */
class TextTable {
  readonly all: string[] = [];
  readonly #numbers = new Map<string, number>();

  add(text: string): number {
    const number = this.#numbers.get(text) ?? this.all.push(text) - 1;
    this.#numbers.set(text, number);
    return number;
  }
}

/** A line as the page wants it; undefined if there is no conversation in it. */
export function pageRollout(
  { step, split, value }: RolloutLine,
  run: number,
  settings: Json,
  texts: { add(text: string): number },
): PageRollout | undefined {
  const turns = asList(value.turns).map(asObject).filter((turn) =>
    turn !== undefined && asText(turn.text) !== undefined
  );
  if (turns.length === 0) return undefined;
  const size = asSize(value.pictureSize), input = asSize(value.inputSize);
  const said = asText(value.said), answer = asText(value.answer) ?? "";
  const reward = asNumber(value.reward);
  const pageTurns = (turns as Json[]).map((turn) => pageTurn(turn, size, input));
  return {
    ...{ run, step, split, item: asText(value.sampleId) ?? "?", rollout: asCount(value.rollout) ?? 0 },
    ...{ question: asText(value.question) ?? "", choices: textsOf(value.choices), answer, said },
    // Older files say the reward only.
    correct: typeof value.correct === "boolean" ? value.correct : reward === 1,
    ...{ reward, parts: numbersOf(value.parts), grounding: groundingOf(turns as Json[]), size },
    targets: asList(value.boxes).map((box) => shareOf(box, size)).filter((box) => box !== undefined),
    points: asList(value.points).flatMap((point) => pointOf(point, size)),
    found: asList(value.found).flatMap((point) => pointOf(point, input)),
    ...{ turns: pageTurns, pictures: textsOf(value.pictures), ...markedTokens(value, settings, texts) },
  };
}

function pageTurn(turn: Json, size: [number, number], input: [number, number]): PageTurn {
  return {
    text: asText(turn.text) ?? "",
    prompt: asText(turn.prompt) ?? "",
    box: shareOf(turn.box, input),
    crop: shareOf(turn.shown ?? turn.crop, size),
    invalid: asText(turn.invalid),
    hit: typeof turn.hit === "boolean" ? turn.hit : undefined,
    isCut: turn.finish === "length" || undefined,
  };
}

function groundingOf([first, ...more]: readonly Json[]): string {
  if (first.answered === true) return "answered";
  if (typeof first.invalid === "string") return first.invalid;
  if (first.box === undefined && first.crop === undefined) return more.length > 0 ? "no box" : "one turn";
  return typeof first.hit !== "boolean" ? "valid" : first.hit ? "hit" : "miss";
}

/** The tokens with what they are: marks need `tokens` and `assistantMask` of the same length. */
function markedTokens(value: Json, settings: Json, texts: { add(text: string): number }) {
  const tokens: PageRollout["tokens"] = [], logprobs: number[] = [];
  const mask = asList(value.assistantMask), recorded = asList(value.logprobs);
  const lastStart = mask.lastIndexOf(0, mask.lastIndexOf(1)) + 1, lossOn = settings.lossOn ?? "all";
  let marks = "", at = 0;
  for (const token of asList(value.tokens)) {
    const [text, count] = Array.isArray(token) ? [asText(token[0]), asCount(token[1])] : [asText(token), 1];
    if (text === undefined || !count) return { tokens: [], marks: "", logprobs: [] };
    const written = mask[at] === 1, isPlain = !Array.isArray(token);
    tokens.push(isPlain ? texts.add(text) : [texts.add(text), count]);
    if (written) {
      marks += lossOn !== "last" || at >= lastStart ? "2" : "1";
      logprobs.push(Math.round((asNumber(recorded[at]) ?? 0) * 1000) / 1000);
    } else marks += lossOn === "every" && isPlain && at > 0 ? "3" : "0";
    at += count;
  }
  return at === mask.length ? { tokens, marks, logprobs } : { tokens: [], marks: "", logprobs: [] };
}

/** What each rollout of a group of several earned beyond the others. */
function addAdvantages(rollouts: readonly PageRollout[]): void {
  const groups = new Map<string, PageRollout[]>();
  for (const rollout of rollouts) {
    if (rollout.split !== "train" || rollout.reward === undefined) continue;
    const key = JSON.stringify([rollout.step, rollout.item]);
    groups.set(key, [...groups.get(key) ?? [], rollout]);
  }
  for (const group of groups.values()) {
    if (group.length < 2) continue;
    const mean = group.reduce((sum, { reward }) => sum + reward!, 0) / group.length;
    for (const rollout of group) rollout.advantage = Math.round((rollout.reward! - mean) * 1000) / 1000;
  }
}

/** As many as may be shown, in the order in which they came. */
function choose(rollouts: readonly PageRollout[], most: number): PageRollout[] {
  if (rollouts.length <= most) return [...rollouts];
  const first = (rollout: PageRollout) => (rollout.split === "heldout" ? 1e9 : 0) + rollout.step;
  const chosen = new Set([...rollouts].sort((a, b) => first(b) - first(a)).slice(0, most));
  return rollouts.filter((rollout) => chosen.has(rollout));
}

/** Reads the pictures of a run's rollouts that aren't known yet; marks names of those that are missing and returns them. */
async function readPictures(
  run: ReportRun,
  rollouts: readonly PageRollout[],
  pictures: PageRollouts["pictures"],
): Promise<string[]> {
  const missing = new Set<string>();
  for (const rollout of rollouts) {
    for (const [i, name] of rollout.pictures.entries()) {
      // Names that aren't hashes mean other pictures in other runs.
      const isHash = /^pictures\/[0-9a-f]{16}\.jpg$/.test(name), key = isHash ? name : `${rollout.run}:${name}`;
      if (!pictures.has(key) && !missing.has(name)) {
        const picture = await readPicture(`${run.path}/rollouts`, name);
        if (picture) pictures.set(key, picture);
        else missing.add(name);
      }
      rollout.pictures[i] = missing.has(name) ? `!${name}` : key;
    }
  }
  return [...missing];
}

/** The bytes of a PNG or JPEG file; nothing outside the folder is read. */
async function readPicture(folder: string, name: string): Promise<{ type: string; base64: string } | undefined> {
  if (!/^pictures\/[\w.+-]+$/.test(name)) return undefined;
  try {
    const bytes = await Deno.readFile(`${folder}/${name}`);
    const type = bytes[0] === 0xff && bytes[1] === 0xd8
      ? "image/jpeg"
      : bytes[0] === 0x89 && bytes[1] === 0x50
      ? "image/png"
      : "";
    return type ? { type, base64: bytes.toBase64() } : undefined;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) throw error;
    return undefined;
  }
}

function asSize(value: unknown): [number, number] {
  const size = asNumbers(value, 2);
  return size && size[0] > 0 && size[1] > 0 ? [size[0], size[1]] : [1, 1];
}

function shareOf(box: unknown, [width, height]: readonly [number, number]): Share | undefined {
  const numbers = asNumbers(box, 4);
  if (!numbers) return undefined;
  const [x1, y1, x2, y2] = numbers;
  return [x1 / width, y1 / height, x2 / width, y2 / height].map(share) as Share;
}

function pointOf(point: unknown, [width, height]: readonly [number, number]): [number, number][] {
  const numbers = asNumbers(point, 2);
  return numbers ? [[share(numbers[0] / width), share(numbers[1] / height)]] : [];
}

function share(value: number): number {
  return Math.round(value * 1e4) / 1e4;
}

function textsOf(value: unknown): string[] {
  return asList(value).flatMap((item) => asText(item) ?? []);
}

function numbersOf(value: unknown): Record<string, number> | undefined {
  const entries = Object.entries(asObject(value) ?? {}).filter(([, x]) => asNumber(x) !== undefined);
  return entries.length > 1 ? Object.fromEntries(entries) as Record<string, number> : undefined;
}
