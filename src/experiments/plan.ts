/**
 * From an experiment to its work: which policies are trained, which evaluations there are, under what names their results lie.
 * Nothing is computed here, so this also answers what is cached.
 *
 * ```
 * <runs>/<mgpo|grpo|sft>-s<seed>-<hash>/          a run folder, as `deno task train` writes it
 * <runs>/evaluations/<policy>-<data>-…-<hash>.json an evaluation with each item's outcome
 * <runs>/locks/                                    who works on what
 * ```
 *
 * @module
 */
import { openDataset } from "../data/catalogue.ts";
import type { Dataset } from "../data/dataset.ts";
import { flagOf, resolveOptions } from "../run/options.ts";
import { newestCheckpoint } from "../run/run_folder.ts";
import { readTemplate, sourceTable, trainTaskTable } from "../run/train_task.ts";
import { type EvaluateOptions, evaluateTable, trainTable, withHints } from "../settings.ts";
import { settleTraining, type TrainSettings } from "../train.ts";
import type { Experiment, Method, Source } from "./experiment.ts";
import { contentHash, policyHash, withoutDefaults } from "./identity.ts";

/** Where results lie, and what computes. */
export interface Workplace {
  /** The folder of runs and evaluations. */
  readonly runs: string;
  /** What computes; results of different backends differ in their last digits, so it is part of their names. */
  readonly backend: "webgpu" | "wasm";
  /** Own kernels or tfjs operations only. */
  readonly kernels: "fused" | "plain";
}

/** A training run. */
export interface RunPlan {
  /** The method of the experiment. */
  readonly method: string;
  /** Of its draws. */
  readonly seed: number;
  /** Names it by content. */
  readonly hash: string;
  /** Its folder. */
  readonly path: string;
  /** Every setting, worked out. */
  readonly settings: TrainSettings;
  /** What is trained on what. */
  readonly source: Source;
  /** The run that it starts from. */
  readonly after?: RunPlan;
  /** The command line of `deno task train` that makes it. */
  readonly args: readonly string[];
}

/** An evaluation of a policy. */
export interface EvaluationPlan {
  /** A split of the experiment. */
  readonly split: string;
  /** A way of being asked, of the method. */
  readonly protocol: string;
  /** Names it by content. */
  readonly hash: string;
  /** The file of its outcome. */
  readonly path: string;
  /** As the method has them. */
  readonly options: EvaluateOptions;
  /** The dataset as `--data` names it, and which samples of it. */
  readonly data: string;
  readonly dataSplit: "train" | "heldout";
}

/** A policy with everything that is done to it: made once, then evaluated. */
export interface Unit {
  /** Names it by content: for messages and for the lock. */
  readonly name: string;
  /** How it is made; undefined for a policy that is there. */
  readonly run?: RunPlan;
  /** The run that must be finished before. */
  readonly after?: RunPlan;
  /** The folder of the policy, or `tiny`. */
  readonly policy: string;
  /** What it is trained on, and how it sees pictures. */
  readonly source: Source;
  /** What is measured of it. */
  readonly evaluations: readonly EvaluationPlan[];
}

/** Works out the units of an experiment, seed by seed, stages before what starts from them. */
export class Planner {
  readonly #experiment: Experiment;
  readonly #place: Workplace;
  readonly #datasets = new Map<string, Promise<Dataset>>();
  readonly #policies = new Map<string, Promise<string>>();

  constructor(experiment: Experiment, place: Workplace) {
    this.#experiment = experiment;
    this.#place = place;
  }

  /**
   * The units of these seeds; those that are the same for several seeds come once.
   *
   * @param only Names of methods. @default {all}
   */
  async units(seeds: readonly number[], only?: readonly string[]): Promise<Unit[]> {
    const units = new Map<string, Unit>();
    for (const seed of seeds) {
      for (const method of this.#experiment.methods) {
        if (method.isStage || only && !only.includes(method.name)) continue;
        for (const unit of await this.unitsOf(method, seed)) {
          const before = units.get(unit.name);
          units.set(unit.name, before ? joined(before, unit) : unit);
        }
      }
    }
    return [...units.values()];
  }

  /** The unit of a method and a seed, after the stages that it starts from. */
  async unitsOf(method: Method, seed: number): Promise<Unit[]> {
    const source = { ...this.#experiment.source, ...method.source };
    const stage = method.from && this.#method(method.from.method);
    const before = stage ? await this.unitsOf(stage, method.from!.seed ?? seed) : [];
    const after = before.at(-1)?.run;
    const run = method.train && await this.#run(method, seed, source, after);
    const trained = run ?? after;
    const policy = trained ? checkpointOf(trained) : source.policy ?? "tiny";
    const identity = trained ? trained.hash : await this.#policyHash(policy);
    const { minPixels, maxPixels, template } = source;
    const seen = contentHash({ identity, minPixels, maxPixels, template });
    const name = run ? nameOf(run.path) : `${after ? nameOf(after.path) : fileName(nameOf(policy))}-${seen}`;
    const evaluations = method.isStage ? [] : await this.#evaluations(method, name, source, identity);
    return [...before, { name, run, after, policy, source, evaluations }];
  }

  #method(name: string): Method {
    const method = this.#experiment.methods.find((other) => other.name === name);
    if (!method) throw new Error(`${this.#experiment.name}: no method ${name}`);
    return method;
  }

  async #run(method: Method, seed: number, source: Source, after?: RunPlan): Promise<RunPlan> {
    const train = { ...method.train, seed };
    const dataset = await this.#dataset(source.data ?? "signs", "train", source.heldoutShare);
    const heldOut = await this.#dataset(source.data ?? "signs", "heldout", source.heldoutShare);
    // Its own limit of tokens is in the hash of the policy.
    const settings = settleTraining({}, dataset, train);
    const { policy: _policy, data: _data, template, saveRollouts: _kept, ...rest } = source;
    const hash = contentHash({
      policy: after?.hash ?? await this.#policyHash(source.policy ?? "tiny"),
      data: [dataset.fingerprint, heldOut.fingerprint],
      settings: withoutDefaults(trainTable, settings),
      source: withoutDefaults({ ...trainTaskTable, ...sourceTable }, rest),
      template: await readTemplate(template) ?? null,
      backend: [this.#place.backend, this.#place.kernels],
    });
    const path = `${this.#place.runs}/${settings.method}-s${seed}-${hash}`;
    const policy = after ? checkpointOf(after) : source.policy;
    const args = commandLine({
      ...source,
      policy,
      ...train,
      backend: this.#place.backend,
      kernels: this.#place.kernels,
    });
    args.push("--final-items", "0", "--checkpoint-every", "10", "--run", path);
    return { method: method.name, seed, hash, path, settings, source, after, args };
  }

  async #evaluations(
    method: Method,
    policyName: string,
    source: Source,
    policy: string,
  ): Promise<EvaluationPlan[]> {
    const plans: EvaluationPlan[] = [];
    for (const [split, { data, split: dataSplit = "heldout" }] of Object.entries(this.#experiment.splits)) {
      const dataset = await this.#dataset(data, dataSplit, source.heldoutShare);
      for (const [protocol, options] of Object.entries(method.protocols ?? this.#experiment.protocols)) {
        const { minPixels, maxPixels, template } = source;
        const settings = withHints(resolveOptions(evaluateTable, { ...options }), dataset.hints);
        const { batchSize: _same, ...deciding } = settings;
        const hash = contentHash({
          policy,
          data: dataset.fingerprint,
          // The number of turns stays whatever the default.
          settings: { ...withoutDefaults(evaluateTable, deciding), turns: settings.turns, items: settings.items },
          source: { minPixels, maxPixels },
          template: await readTemplate(template) ?? null,
          backend: [this.#place.backend, this.#place.kernels],
        });
        const file = `${policyName}-${fileName(dataset.name)}-${settings.turns}-turns-${hash}.json`;
        const path = `${this.#place.runs}/evaluations/${file}`;
        plans.push({ split, protocol, hash, path, options, data, dataSplit });
      }
    }
    return plans;
  }

  #dataset(name: string, split: "train" | "heldout", heldoutShare?: number): Promise<Dataset> {
    const key = JSON.stringify([name, split, heldoutShare]);
    const dataset = this.#datasets.get(key) ?? openDataset(name, split, { heldoutShare });
    this.#datasets.set(key, dataset);
    return dataset;
  }

  #policyHash(source: string): Promise<string> {
    const hash = this.#policies.get(source) ?? policyHash(source);
    this.#policies.set(source, hash);
    return hash;
  }
}

/** The policy that a finished run leaves. */
export function checkpointOf(run: RunPlan): string {
  return `${run.path}/checkpoints/step-${run.settings.steps}`;
}

/** Whether a run is finished. */
export async function isTrained(run: RunPlan): Promise<boolean> {
  return await newestCheckpoint(run.path) >= run.settings.steps;
}

/** Whether an evaluation is there. */
export async function isEvaluated({ path }: EvaluationPlan): Promise<boolean> {
  try {
    return (await Deno.stat(path)).isFile;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/** Options as words of a command line. */
export function commandLine(options: Readonly<Record<string, unknown>>): string[] {
  return Object.entries(options).flatMap(([key, value]) => {
    if (value === undefined) return [];
    const flag = flagOf(key);
    if (typeof value === "boolean") return [value ? flag : `--no-${flag.slice(2)}`];
    return [`${flag}=${Array.isArray(value) ? value.join(",") : value}`];
  });
}

function joined(a: Unit, b: Unit): Unit {
  const paths = new Set(a.evaluations.map(({ path }) => path));
  return { ...a, evaluations: [...a.evaluations, ...b.evaluations.filter(({ path }) => !paths.has(path))] };
}

function nameOf(path: string): string {
  return path.slice(path.lastIndexOf("/") + 1);
}

/** A method's name as part of a file's. */
function fileName(method: string): string {
  return method.replace(/[^\w.+=-]+/g, "-");
}
