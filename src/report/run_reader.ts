/**
 * Reads run folders for a report. A report is also made of what broke: whatever is missing, damaged or of another version is noted
 * as a problem of its run, and the rest is read.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import type { ROLLOUT_FORMAT } from "../run/rollout_files.ts";
import { asCount, asNumber, asObject, asText, type Json } from "./checked.ts";

/** A line of a rollout file, not looked into yet. */
export interface RolloutLine {
  /** Training steps done before. */
  step: number;
  split: "train" | "heldout";
  value: Json;
  /** For messages: file and line. */
  where: string;
}

/** A run as far as it could be read. */
export interface ReportRun {
  /** Its folder. */
  path: string;
  /** The folder's own name, with as much of what stands before it as tells the runs apart. */
  name: string;
  /** Every setting of `run.json`; empty without one. */
  settings: Json;
  /** What `run.json` says of program and machine. */
  environment: Json;
  /** Metrics by step, in order; evaluations of their own files are among them, so step 0 may be the base's. */
  records: ReadonlyMap<number, Readonly<Record<string, number>>>;
  /** Steps done: the last line of `metrics.jsonl`. */
  steps: number;
  /** Base against trained, if the run came to its end. */
  result?: Json;
  rollouts: RolloutLine[];
  /** What is missing or damaged, a sentence each. */
  problems: string[];
}

/** The version of rollout files that is read whole; a type alone is imported, so that a report loads no tensors. */
const FORMAT: typeof ROLLOUT_FORMAT = 2;
/** Problems that time puts right. */
const YET = /^(metrics\.jsonl is missing|not finished: .*|no rollouts were kept)$/;
/** Problems of one kind that are told one by one; the others are counted. */
const TOLD = 3;

/**
 * Reads runs.
 *
 * @param paths Run folders, or folders of run folders.
 * @param isGoingOn Whether the runs may have written little so far: what isn't there yet is then no problem. @default {false}
 * @throws {InputError} if not a single one can be read.
 */
export async function readRuns(
  paths: readonly string[],
  isGoingOn = false,
): Promise<{ runs: ReportRun[]; problems: string[] }> {
  const runs: ReportRun[] = [], problems: string[] = [];
  for (const path of await expand(paths)) {
    const run = await readRun(path);
    if (typeof run === "string") problems.push(run);
    else runs.push(run);
  }
  if (runs.length === 0) {
    throw new InputError(`no run can be read: ${problems.join("; ")}; give folders that \`deno task train\` wrote`);
  }
  if (isGoingOn) { for (const run of runs) run.problems = run.problems.filter((problem) => !YET.test(problem)); }
  nameApart(runs);
  return { runs, problems };
}

/** Run folders in the place of folders that hold some; each once. */
async function expand(paths: readonly string[]): Promise<string[]> {
  const out: string[] = [];
  for (const given of paths) {
    const path = given.length > 1 ? given.replace(/[/\\]+$/, "") : given, names = await namesIn(path);
    const isRun = names.some((name) => name === "run.json" || name === "metrics.jsonl" || name === "rollouts");
    const inside: string[] = [];
    if (!isRun) {
      for (const name of names.sort(byNumber)) {
        if ((await namesIn(`${path}/${name}`)).includes("run.json")) inside.push(`${path}/${name}`);
      }
    }
    out.push(...inside.length > 0 ? inside : [path]);
  }
  return [...new Set(out)];
}

/** One run; a sentence if there is nothing to read. */
async function readRun(path: string): Promise<ReportRun | string> {
  const names = await namesIn(path);
  if (names.length === 0) return `${path} is not there or is empty`;
  if (!names.includes("run.json") && !names.includes("metrics.jsonl") && !names.includes("rollouts")) {
    return `${path} is not a run folder (no run.json, metrics.jsonl or rollouts)`;
  }
  const problems: string[] = [];
  const manifest = await readJson(`${path}/run.json`, "run.json", problems, "its settings are not known");
  const settings = asObject(manifest?.settings) ?? {};
  if (manifest && asText(settings.method) === undefined) {
    problems.push("run.json names no method: it is of another version");
  }
  const { records, steps } = await readMetrics(path, problems);
  await addEvaluations(path, records, problems);
  const planned = asCount(settings.steps);
  if (planned !== undefined && steps < planned) problems.push(`not finished: ${steps} of ${planned} steps are there`);
  const result = names.includes("result.json")
    ? await readJson(`${path}/result.json`, "result.json", problems, "the final comparison is left out")
    : undefined;
  const rollouts = await readRollouts(path, problems);
  const environment = asObject(manifest?.environment) ?? {};
  const sorted = new Map([...records].sort(([a], [b]) => a - b));
  return { path, name: path, settings, environment, records: sorted, steps, result, rollouts, problems };
}

/** The metrics of a run by step, those of the base's evaluation at step 0; what can't be read is left out. */
export async function readRecords(path: string): Promise<ReportRun["records"]> {
  const { records } = await readMetrics(path, []);
  await addEvaluations(path, records, []);
  return records;
}

type Records = Map<number, Record<string, number>>;

async function readMetrics(path: string, problems: string[]): Promise<{ records: Records; steps: number }> {
  const records: Records = new Map(), bad: string[] = [];
  let steps = 0;
  for (const { value, where } of await readLines(path, "metrics.jsonl", problems, bad)) {
    const step = asCount(value.step);
    if (!step) {
      bad.push(`${where} has no step`);
      continue;
    }
    const numbers = Object.entries(value).filter(([name, x]) => name !== "step" && asNumber(x) !== undefined);
    records.set(step, Object.fromEntries(numbers) as Record<string, number>);
    steps = Math.max(steps, step);
  }
  tell(bad, problems);
  const gaps = Array.from({ length: steps }, (_, i) => i + 1).filter((step) => !records.has(step));
  if (gaps.length > 0) problems.push(`metrics.jsonl has no line for ${countOf(gaps.length, "step")} (${listOf(gaps)})`);
  return { records, steps };
}

/** The metrics that evaluation files hold, by their names in `metrics.jsonl`. */
const evaluationMetrics = { accuracy: "eval/accuracy", valid: "eval/valid_ratio", hit: "eval/hit_ratio" } as const;

/** Evaluations stand in the lines of their steps already; that of the base only has its file. */
async function addEvaluations(path: string, records: Records, problems: string[]): Promise<void> {
  for (const name of (await namesIn(`${path}/evaluations`)).sort(byNumber)) {
    const [, digits = NaN, turns] = /^step-(\d+)(?:-(\d+)-turns)?\.json$/.exec(name) ?? [];
    const step = Number(digits), suffix = turns === undefined ? "" : `/${turns}_turns`;
    if (!Number.isSafeInteger(step)) continue;
    const file = await readJson(`${path}/evaluations/${name}`, `evaluations/${name}`, problems, "it is left out");
    const record = records.get(step) ?? {};
    for (const [from, to] of Object.entries(evaluationMetrics)) {
      const value = asNumber(asObject(file?.[from])?.value);
      if (value !== undefined) record[to + suffix] = value;
    }
    if (Object.keys(record).length > 0) records.set(step, record);
  }
}

async function readRollouts(path: string, problems: string[]): Promise<RolloutLine[]> {
  const rollouts: RolloutLine[] = [], bad: string[] = [], old = new Set<string>();
  for (const name of (await namesIn(`${path}/rollouts`)).sort(byNumber)) {
    const [, heldout, number] = /^(heldout-)?step-(\d+)\.jsonl$/.exec(name) ?? [];
    if (number === undefined) continue;
    for (const { value, where } of await readLines(path, `rollouts/${name}`, problems, bad)) {
      if (value.format !== FORMAT) old.add(name);
      rollouts.push({ step: Number(number), split: heldout ? "heldout" : "train", value, where });
    }
  }
  tell(bad, problems);
  if (old.size > 0) {
    problems.push(
      `rollouts of another version (${listOf([...old])}; expected format ${FORMAT}): what they lack is left out`,
    );
  }
  if (rollouts.length === 0) problems.push("no rollouts were kept");
  return rollouts;
}

/** Lines of a file that are JSON objects; what isn't goes to `bad`. */
async function readLines(
  path: string,
  name: string,
  problems: string[],
  bad: string[],
): Promise<{ value: Json; where: string }[]> {
  const text = await readText(`${path}/${name}`, name, problems);
  const out: { value: Json; where: string }[] = [];
  for (const [i, line] of (text ?? "").split("\n").entries()) {
    if (line.trim() === "") continue;
    const where = `${name}:${i + 1}`, value = asObject(parse(line));
    if (value) out.push({ value, where });
    else bad.push(`${where} is not a JSON object`);
  }
  return out;
}

async function readJson(path: string, name: string, problems: string[], so: string): Promise<Json | undefined> {
  const text = await readText(path, name, problems);
  if (text === undefined) return undefined;
  const value = asObject(parse(text));
  if (!value) problems.push(`${name} is not a JSON object; ${so}`);
  return value;
}

async function readText(path: string, name: string, problems: string[]): Promise<string | undefined> {
  try {
    return await Deno.readTextFile(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) throw error;
    problems.push(
      error instanceof Deno.errors.NotFound ? `${name} is missing` : `${name} cannot be read (${reason(error)})`,
    );
    return undefined;
  }
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Names in a folder; none if it can't be read. */
async function namesIn(path: string): Promise<string[]> {
  try {
    return (await Array.fromAsync(Deno.readDir(path))).map((entry) => entry.name);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) throw error;
    return [];
  }
}

/** Shortens names to the last part of the path, and more of it where two runs would have the same. */
function nameApart(runs: ReportRun[]): void {
  const parts = runs.map((run) => run.path.split(/[/\\]/));
  const tail = (i: number, count: number) => parts[i].slice(-count).join("/");
  for (const [i, run] of runs.entries()) {
    let count = 1;
    while (count < parts[i].length && runs.some((_, j) => j !== i && tail(j, count) === tail(i, count))) count++;
    run.name = tail(i, count) || run.path;
  }
}

function tell(bad: readonly string[], problems: string[]): void {
  problems.push(...bad.slice(0, TOLD));
  if (bad.length > TOLD) problems.push(`${countOf(bad.length - TOLD, "more line")} of that kind`);
}

function listOf(values: readonly (string | number)[]): string {
  return values.slice(0, TOLD).join(", ") + (values.length > TOLD ? ", …" : "");
}

function countOf(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function byNumber(a: string, b: string): number {
  return a.localeCompare(b, "en", { numeric: true });
}
