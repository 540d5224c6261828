/**
 * Does the work of an experiment: trains what isn't trained yet, through the same code as `deno task train`, and evaluates what
 * isn't evaluated yet. It may be stopped or killed at any moment and goes on from there; several processes may work in the
 * same folder.
 *
 * @module
 */
import { evaluate, type Evaluation } from "../evaluate.ts";
import { openDataset } from "../data/catalogue.ts";
import { loadPolicy } from "../policy/load.ts";
import { InputError } from "../run/errors.ts";
import type { StepRecord } from "../run/metrics.ts";
import { formatBar, formatDuration, Progress } from "../run/progress.ts";
import { newestCheckpoint, type RunManifest, writeAtomically } from "../run/run_folder.ts";
import { Interrupted } from "../run/tasks.ts";
import { readTemplate } from "../run/train_task.ts";
import { runTraining } from "../run/training_run.ts";
import { tryLock } from "./lock.ts";
import { type EvaluationPlan, isEvaluated, isTrained, type RunPlan, type Unit, type Workplace } from "./plan.ts";

/** What the file of an evaluation holds. */
export interface EvaluationFile {
  /** What was asked for. */
  readonly hash: string;
  /** How long it took. */
  readonly seconds: number;
  /** The outcome, item by item. */
  readonly evaluation: Evaluation;
}

/** How the runner talks. */
export interface RunnerParts {
  readonly place: Workplace;
  readonly progress: Progress;
  /** Whether Ctrl-C was pressed. */
  isInterrupted(): boolean;
  /** Called when something was done for a policy, which now has all its evaluations. */
  onUnit?(unit: Unit): Promise<void>;
}

/**
 * Does all units that aren't done. One that another process works on is left for later, and waited for at the end.
 *
 * @throws {Interrupted} after Ctrl-C, everything so far being kept.
 */
export async function runUnits(units: readonly Unit[], parts: RunnerParts): Promise<void> {
  const { progress } = parts, clock = await WorkClock.of(units);
  let waiting = [...units];
  while (waiting.length > 0) {
    const busy: Unit[] = [];
    let holder = "";
    for (const unit of waiting) {
      refuseIfStopping(parts);
      if (unit.after && !await isTrained(unit.after)) {
        busy.push(unit);
        holder ||= `${unit.name}: starts from ${unit.after.path}, which isn't finished`;
        continue;
      }
      const lock = await tryLock(`${parts.place.runs}/locks/${unit.name}`);
      if ("heldBy" in lock) {
        busy.push(unit);
        holder = `${unit.name}: ${lock.heldBy} works on it`;
        continue;
      }
      let isNew: boolean;
      try {
        isNew = await doUnit(unit, parts, clock);
      } finally {
        lock.release();
      }
      if (isNew) await parts.onUnit?.(unit);
    }
    if (busy.length > 0 && busy.length === waiting.length) {
      progress.status(`waiting: ${holder}`);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    waiting = busy;
  }
  progress.clear();
}

/** Returns whether there was anything to do. */
async function doUnit(unit: Unit, parts: RunnerParts, clock: WorkClock): Promise<boolean> {
  const isOpen = unit.run !== undefined && !await isTrained(unit.run);
  if (unit.run) await refuseOtherVersion(unit.run, isOpen, parts.progress);
  if (isOpen) await trainRun(unit, unit.run!, parts, clock);
  // Here, or meanwhile by another process.
  clock.done(unit.name);
  const open = [];
  for (const plan of unit.evaluations) {
    if (await isEvaluated(plan)) clock.done(plan.path);
    else open.push(plan);
  }
  if (open.length > 0) await evaluateUnit(unit, open, parts, clock);
  return isOpen || open.length > 0;
}

async function trainRun(unit: Unit, run: RunPlan, parts: RunnerParts, clock: WorkClock): Promise<void> {
  const { progress } = parts, begun = await newestCheckpoint(run.path), started = performance.now();
  progress.log(`${clock.label()} ${unit.name}: ${begun > 0 ? `going on after step ${begun}` : "training"}`);
  const status = await runTraining(
    [...run.args, "--resume"],
    new TrainingProgress(progress, `${clock.label()} ${unit.name}`),
  );
  if (status !== 0) throw new Interrupted();
  const seconds = (performance.now() - started) / 1000;
  progress.log(`${clock.label()} ${unit.name}: trained, ${run.settings.steps} steps in ${formatDuration(seconds)}`);
}

/**
 * Settings at their defaults aren't part of a run's name, so another version of the program, with other defaults, may have made it.
 * One that it only began is begun again.
 *
 * @throws {InputError} if it is finished: then there are results that rest on it.
 */
async function refuseOtherVersion(run: RunPlan, isOpen: boolean, progress: Progress): Promise<void> {
  const before = (await readManifest(run))?.settings;
  if (!before) return;
  const now: Record<string, unknown> = run.settings;
  // Its limit of tokens comes from the policy. What a finished run doesn't know had no effect then.
  const keys = Object.keys(now).filter((key) =>
    key !== "maxNewTokens" && (isOpen || key in before) && JSON.stringify(before[key]) !== JSON.stringify(now[key])
  );
  if (keys.length === 0) return;
  const what = `${run.path}: made by a version of the program with another ${keys.join(", ")}`;
  if (!isOpen) throw new InputError(`${what}; remove it and its files in evaluations/ to make it again`);
  progress.log(`${what}; begun again`);
  await Deno.remove(run.path, { recursive: true });
}

/** What a run's `run.json` says; undefined if it isn't begun. */
export async function readManifest(run: RunPlan): Promise<RunManifest | undefined> {
  try {
    return JSON.parse(await Deno.readTextFile(`${run.path}/run.json`));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

async function evaluateUnit(
  unit: Unit,
  plans: readonly EvaluationPlan[],
  parts: RunnerParts,
  clock: WorkClock,
): Promise<void> {
  const { progress } = parts, { minPixels, maxPixels, template, heldoutShare } = unit.source;
  await Deno.mkdir(`${parts.place.runs}/evaluations`, { recursive: true });
  const words = await readTemplate(template);
  const policy = await loadPolicy(unit.policy, { minPixels, maxPixels });
  try {
    for (const { hash, path, options, data, dataSplit } of plans) {
      const dataset = await openDataset(data, dataSplit, { heldoutShare }), started = performance.now();
      const what = `${unit.name}, ${dataset.name}, ${options.turns} turn${options.turns === 1 ? "" : "s"}`;
      const evaluation = await evaluate(policy, dataset, {
        ...options,
        template: words,
        onProgress: (done, items, correct) => {
          refuseIfStopping(parts);
          progress.status(`${clock.label()} ${what}: ${formatBar(done, items)} ${done}/${items}, ${correct} right`);
        },
      });
      const seconds = (performance.now() - started) / 1000;
      const file: EvaluationFile = { hash, seconds, evaluation: { ...evaluation, policy: unit.name } };
      await writeAtomically(path, JSON.stringify(file) + "\n");
      clock.done(path);
      progress.log(
        `${clock.label()} ${what}: accuracy ${evaluation.accuracy.value.toFixed(3)}, ${seconds.toFixed(0)} s`,
      );
    }
  } finally {
    policy.dispose();
  }
}

/** Reads the outcome of an evaluation; undefined if it isn't there yet. */
export async function readEvaluation(plan: EvaluationPlan): Promise<EvaluationFile | undefined> {
  try {
    return JSON.parse(await Deno.readTextFile(plan.path));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    if (error instanceof SyntaxError) throw new InputError(`${plan.path}: not JSON; remove it to evaluate again`);
    throw error;
  }
}

function refuseIfStopping(parts: RunnerParts): void {
  if (parts.isInterrupted()) throw new Interrupted();
}

/** What a training run shows within an experiment: its status behind what is being done, of its lines only the warnings. */
class TrainingProgress extends Progress {
  readonly #outer: Progress;
  readonly #label: string;

  constructor(outer: Progress, label: string) {
    super({ isTerminal: outer.isTerminal });
    this.#outer = outer;
    this.#label = label;
  }

  override log(line: string): void {
    if (/^(error|warning|skipped)/.test(line)) this.#outer.log(`${this.#label}: ${line}`);
  }

  override status(line: string): void {
    this.#outer.status(`${this.#label}: ${line}`);
  }

  override clear(): void {
    this.#outer.clear();
  }
}

/** Rough seconds of a run on one core; what matters is their relation, the rest is measured. */
export function trainingCost({ settings }: RunPlan): number {
  const { method, steps, prompts, groupSize, turns, evalEvery, evalItems, evalTurns = [turns] } = settings;
  const sequences = steps * prompts * (method === "sft" ? 1 : groupSize);
  const asked = evalEvery > 0 ? (1 + Math.floor(steps / evalEvery)) * evalItems * evalTurns.length : 0;
  return 3 + sequences * turns * (method === "sft" ? 0.006 : 0.0025) + asked * 0.01;
}

/** The same of an evaluation. */
export function evaluationCost({ options: { items = 1000, turns = 2 } }: EvaluationPlan): number {
  return 1 + items * (turns === 1 ? 0.006 : 0.0045 * turns);
}

/** How much is done and how long the rest takes, measured against rough costs. */
export class WorkClock {
  readonly #open: Map<string, number>;
  readonly #all: number;
  readonly #pace: number;
  readonly #started = performance.now();
  #done = 0;

  private constructor(open: Map<string, number>, all: number, pace: number) {
    this.#open = open;
    this.#all = all;
    this.#pace = pace;
  }

  /** Looks at what is there already, and at how long it took. */
  static async of(units: readonly Unit[]): Promise<WorkClock> {
    const open = new Map<string, number>();
    let all = 0, cost = 0, seconds = 0;
    const note = (key: string, rough: number, took: number | undefined) => {
      all++;
      if (took === undefined) open.set(key, rough);
      else [cost, seconds] = [cost + rough, seconds + took];
    };
    for (const { name, run, evaluations } of units) {
      if (run) note(name, trainingCost(run), await isTrained(run) ? await secondsOf(run.path) : undefined);
      for (const plan of evaluations) note(plan.path, evaluationCost(plan), (await readEvaluation(plan))?.seconds);
    }
    return new WorkClock(open, all, cost > 0 ? seconds / cost : 1);
  }

  /** Pieces of work, done and in all. */
  get pieces(): [done: number, all: number] {
    return [this.#all - this.#open.size, this.#all];
  }

  /** Notes that a run (by the unit's name) or an evaluation (by its path) is done. */
  done(key: string): void {
    this.#done += this.#open.get(key) ?? 0;
    this.#open.delete(key);
  }

  /** Seconds that the rest takes at the speed so far; before there is one, as what is cached took, or by the rough costs. */
  remaining(): number {
    const rest = [...this.#open.values()].reduce((a, b) => a + b, 0);
    const spent = (performance.now() - this.#started) / 1000;
    return rest * (this.#done > 0 ? spent / this.#done : this.#pace);
  }

  /** `[3/40, ETA 0:12:00]` */
  label(): string {
    const [done, all] = this.pieces;
    return `[${done}/${all}, ETA ${formatDuration(this.remaining())}]`;
  }
}

/** Seconds of a run, by its own record. */
export async function secondsOf(path: string, withEvaluations = true): Promise<number> {
  const lines = (await Deno.readTextFile(`${path}/metrics.jsonl`)).trimEnd().split("\n");
  const records = lines.map((line) => JSON.parse(line) as StepRecord);
  const of = (r: StepRecord) => (r["timing_s/total"] ?? 0) - (withEvaluations ? 0 : r["timing_s/eval"] ?? 0);
  return records.reduce((sum, record) => sum + of(record), 0);
}
