/**
 * A run folder: what a run writes, in such an order that it may be killed at any moment and go on from its last checkpoint.
 *
 * ```
 * run.json                 every setting, the data's fingerprint, versions, the machine
 * metrics.jsonl            a line a step
 * evaluations/step-N.json  held-out evaluations, step 0 being the base; step-N-T-turns.json with other turns
 * rollouts/                conversations of evaluation steps with what they saw: see rollout_files.ts
 * checkpoints/step-N/      the policy as a Hugging Face folder, and the optimizer's state
 * result.json              base against trained, once the run is complete
 * ```
 *
 * Files and folders are written under a name that begins with `.tmp-` and renamed when complete. A step's line is written
 * before its checkpoint, so a checkpoint of step N implies N lines.
 *
 * @module
 */
import { InputError } from "./errors.ts";
import { keepSteps, metricsLine, type StepRecord } from "./metrics.ts";

/** What `run.json` holds. */
export interface RunManifest {
  /** Every setting with its value; a run goes on only with the same. */
  settings: Record<string, unknown>;
  /** What may differ when a run goes on: versions, machine, time. */
  environment: Record<string, unknown>;
}

const TEMPORARY = ".tmp-";
/** Checkpoints kept: the newest, and one more in case it turns out unreadable. */
const KEPT_CHECKPOINTS = 2;

/** A run folder that is open for writing. */
export class RunFolder {
  /** Where it is. */
  readonly path: string;

  private constructor(path: string) {
    this.path = path;
  }

  /**
   * Makes a new run folder.
   *
   * @throws {InputError} if there is something at that place already.
   */
  static async create(path: string, manifest: RunManifest): Promise<RunFolder> {
    await refuseTaken(path);
    await Deno.mkdir(path, { recursive: true });
    await writeAtomically(`${path}/run.json`, JSON.stringify(manifest, null, 2) + "\n");
    return await new RunFolder(path).#makeFolders();
  }

  /**
   * Opens a run folder to go on from its last checkpoint: lines of later steps are removed from `metrics.jsonl`. Where no run
   * was begun yet, makes a new one.
   *
   * @returns The folder, and the step of the checkpoint (0 if there is none yet).
   * @throws {InputError} if the settings aren't those of the run; only `steps` may have grown.
   */
  static async resume(path: string, manifest: RunManifest): Promise<{ folder: RunFolder; step: number }> {
    const names = await namesIn(path);
    // run.json comes before everything else, so a kill before it leaves at most its temporary file.
    if (!names?.some((name) => !name.startsWith(TEMPORARY))) {
      return { folder: await RunFolder.create(path, manifest), step: 0 };
    }
    const before = await readManifest(path);
    refuseDifferences(path, before.settings, manifest.settings);
    const folder = await new RunFolder(path).#makeFolders();
    await removeTemporaries(path);
    await removeTemporaries(`${path}/checkpoints`);
    const step = await newestCheckpoint(path);
    const steps = Number(manifest.settings.steps);
    if (step > steps) {
      throw new InputError(`--steps ${steps}: ${path} has already done ${step} steps; give at least that many`);
    }
    await folder.#truncateMetrics(step);
    if (before.settings.steps !== manifest.settings.steps) await removeIfThere(`${path}/result.json`);
    const environment = { ...before.environment, resumed: manifest.environment };
    await writeAtomically(
      `${path}/run.json`,
      JSON.stringify({ settings: manifest.settings, environment }, null, 2) + "\n",
    );
    return { folder, step };
  }

  /** Adds a step's line. */
  async appendMetrics(record: StepRecord): Promise<void> {
    await Deno.writeTextFile(`${this.path}/metrics.jsonl`, metricsLine(record), { append: true });
  }

  /** The steps so far. */
  async readMetrics(): Promise<StepRecord[]> {
    const text = await readIfThere(`${this.path}/metrics.jsonl`) ?? "";
    return keepSteps(text, text.split("\n").length - 1, `${this.path}/metrics.jsonl`);
  }

  /** Steps that have a checkpoint, ascending. */
  checkpoints(): Promise<number[]> {
    return checkpointSteps(this.path);
  }

  /** Where the checkpoint of a step is. */
  checkpointPath(step: number): string {
    return `${this.path}/checkpoints/step-${step}`;
  }

  /**
   * Writes a checkpoint and removes those older than the one before it.
   *
   * @param fill Writes the files into the folder it is given.
   */
  async writeCheckpoint(step: number, fill: (folder: string) => Promise<void>): Promise<void> {
    const temporary = `${this.path}/checkpoints/${TEMPORARY}step-${step}`;
    await Deno.mkdir(temporary, { recursive: true });
    await fill(temporary);
    await removeIfThere(this.checkpointPath(step));
    await Deno.rename(temporary, this.checkpointPath(step));
    for (const old of (await this.checkpoints()).slice(0, -KEPT_CHECKPOINTS)) {
      // Renamed first, so that a half-removed checkpoint is never taken for a whole one.
      const doomed = `${this.path}/checkpoints/${TEMPORARY}old-${old}`;
      await Deno.rename(this.checkpointPath(old), doomed);
      await Deno.remove(doomed, { recursive: true });
    }
  }

  /** Writes a file of the folder, whole or not at all; `name` may have folders. */
  async writeFile(name: string, content: string | Uint8Array): Promise<void> {
    await writeAtomically(`${this.path}/${name}`, content);
  }

  /** Writes a file whose name says what is in it, unless it is there: such files are never half written, and never change. */
  async writeNewFile(name: string, make: () => Promise<Uint8Array>): Promise<void> {
    if (!await isThere(`${this.path}/${name}`)) await this.writeFile(name, await make());
  }

  /** Reads a JSON file of the folder; undefined if it isn't there. */
  async readJson(name: string): Promise<unknown> {
    const text = await readIfThere(`${this.path}/${name}`);
    return text === undefined ? undefined : JSON.parse(text);
  }

  async #makeFolders(): Promise<this> {
    for (const folder of ["checkpoints", "evaluations", "rollouts/pictures"]) {
      await Deno.mkdir(`${this.path}/${folder}`, { recursive: true });
    }
    return this;
  }

  async #truncateMetrics(step: number): Promise<void> {
    const path = `${this.path}/metrics.jsonl`;
    const text = await readIfThere(path) ?? "";
    await writeAtomically(path, keepSteps(text, step, path).map(metricsLine).join(""));
  }
}

/**
 * Checks that a new run may be written at a place.
 *
 * @throws {InputError} if there is something already.
 */
export async function refuseTaken(path: string): Promise<void> {
  const names = await namesIn(path);
  if (names?.includes("run.json")) {
    throw new InputError(`${path}: a run is there already; add --resume to go on with it, or choose another --run`);
  }
  if (names?.some((name) => !name.startsWith(TEMPORARY))) {
    throw new InputError(`${path}: the folder is not empty and not a run; choose another --run`);
  }
}

/** Writes a file under a temporary name in the same folder and renames it, so that it is never seen half written. */
export async function writeAtomically(path: string, content: string | Uint8Array): Promise<void> {
  const at = path.lastIndexOf("/") + 1;
  const temporary = `${path.slice(0, at)}${TEMPORARY}${path.slice(at)}`;
  const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
  await Deno.writeFile(temporary, bytes);
  await Deno.rename(temporary, path);
}

async function readManifest(path: string): Promise<RunManifest> {
  const text = await readIfThere(`${path}/run.json`);
  if (text === undefined) throw new InputError(`${path}: not a run folder (no run.json); choose another --run`);
  try {
    const manifest = JSON.parse(text);
    if (typeof manifest?.settings === "object" && manifest.settings !== null) return manifest;
  } catch {
    // Falls through to the same message.
  }
  throw new InputError(`${path}/run.json: cannot be read as a run's settings; start a new run`);
}

/** Throws if settings other than a grown number of steps differ. */
function refuseDifferences(path: string, before: Record<string, unknown>, now: Record<string, unknown>): void {
  const [a, b] = [flatten(before), flatten(now)];
  // A decaying learning rate depends on the number of steps, so there even that must stay.
  if (now.schedule === undefined || now.schedule === "constant") a.delete("steps"), b.delete("steps");
  const differences = [...new Set([...a.keys(), ...b.keys()])].filter((key) => a.get(key) !== b.get(key))
    .map((key) => `${key} was ${a.get(key) ?? "not set"}, now ${b.get(key) ?? "not set"}`);
  if (differences.length > 0) {
    throw new InputError(
      `${path}: cannot resume with other settings (${
        differences.join("; ")
      }); give the same ones, or choose another --run`,
    );
  }
}

/** Leaves of a JSON value by dotted path, as JSON text. */
function flatten(value: Record<string, unknown>, prefix = ""): Map<string, string> {
  const out = new Map<string, string>();
  for (const [key, item] of Object.entries(value)) {
    if (typeof item === "object" && item !== null && !Array.isArray(item)) {
      for (const [k, v] of flatten(item as Record<string, unknown>, `${prefix}${key}.`)) out.set(k, v);
    } else if (item !== undefined) out.set(prefix + key, JSON.stringify(item));
  }
  return out;
}

/** Names in a folder; undefined if it isn't there. */
async function namesIn(path: string): Promise<string[] | undefined> {
  try {
    return (await Array.fromAsync(Deno.readDir(path))).map((entry) => entry.name);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    if (error instanceof Deno.errors.NotADirectory) {
      throw new InputError(`${path}: is a file, not a folder; choose another --run`);
    }
    throw error;
  }
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await Deno.readTextFile(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

async function isThere(path: string): Promise<boolean> {
  try {
    await Deno.lstat(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

async function removeIfThere(path: string): Promise<void> {
  try {
    await Deno.remove(path, { recursive: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

async function removeTemporaries(path: string): Promise<void> {
  for (const name of await namesIn(path) ?? []) {
    if (name.startsWith(TEMPORARY)) await removeIfThere(`${path}/${name}`);
  }
}

/** The step of the newest checkpoint of a run folder; 0 if there is none, or no folder. */
export async function newestCheckpoint(path: string): Promise<number> {
  return (await checkpointSteps(path)).at(-1) ?? 0;
}

/** Steps that have a checkpoint, ascending. */
async function checkpointSteps(path: string): Promise<number[]> {
  const steps: number[] = [];
  for (const name of await namesIn(`${path}/checkpoints`) ?? []) {
    const match = /^step-(\d+)$/.exec(name);
    if (match) steps.push(Number(match[1]));
  }
  return steps.sort((a, b) => a - b);
}

/**
 * A folder for a run that was given no name: `base`, or with the first free number behind it.
 *
 * @param resume Takes the newest that is there instead.
 */
export async function defaultRunPath(base: string, resume: boolean): Promise<string> {
  let last = base;
  for (let number = 2;; number++) {
    const names = await namesIn(last);
    const next = `${base}-${number}`;
    const isTaken = names !== undefined && names.length > 0;
    if (resume ? await namesIn(next) === undefined : !isTaken) return last;
    last = next;
  }
}
