/**
 * The command line of `deno task train`: its options, and what they open.
 *
 * @module
 */
import { datasetProblems, openDataset } from "../data/catalogue.ts";
import type { Dataset } from "../data/dataset.ts";
import { type BackendChoice, chooseBackend, describeBackend } from "../gpu/backend.ts";
import { loadPolicy } from "../policy/load.ts";
import { useKernels } from "../policy/ops.ts";
import {
  binaryReward,
  combineRewards,
  formatReward,
  hitReward,
  iouReward,
  pointReward,
  type RewardPart,
  validBoxReward,
} from "../reward.ts";
import { type PromptTemplate, resolveTemplate } from "../rollout.ts";
import { evaluateTable, splitByTable, type TrainOptions, trainTable } from "../settings.ts";
import { Training, type TrainParts } from "../train.ts";
import { loadTraining, type SavablePolicy } from "./checkpoint.ts";
import { describeEnvironment } from "./environment.ts";
import { InputError } from "./errors.ts";
import { checkMemory } from "./memory_check.ts";
import { helpText, optionTable, type OptionValues, parseCommandLine, resolveOptions } from "./options.ts";
import type { Progress } from "./progress.ts";
import { WatchedItems } from "./rollout_files.ts";
import { defaultRunPath, newestCheckpoint, refuseTaken, RunFolder } from "./run_folder.ts";

/** Options that say what policy sees what data on what machine; shared by tasks. */
export const sourceTable = optionTable({
  policy: {
    kind: "string",
    value: "DIR",
    default: "tiny",
    help: "A Hugging Face style folder with a Qwen2.5-VL, or tiny, the embedded base.",
  },
  data: {
    kind: "string",
    value: "NAME|DIR",
    default: "signs",
    help: "signs, signs:SIZE, or a folder with pictures and a JSONL file.",
  },
  heldoutShare: {
    kind: "number",
    min: 0,
    max: 1,
    default: 0.2,
    help: "The share of a folder's pictures that is held out for evaluation, where one JSONL file holds all rows.",
  },
  backend: {
    kind: "choice",
    choices: ["auto", "webgpu", "wasm"],
    default: "auto",
    help: "What computes; auto takes a real GPU if there is one.",
  },
  kernels: {
    kind: "choice",
    choices: ["fused", "plain"],
    default: "fused",
    help: "fused: own kernels where the backend has them; plain: tfjs operations only.",
  },
  threads: {
    kind: "integer",
    min: 1,
    defaultText: "all processor cores",
    help: "Threads that compute, on wasm; results do not depend on it.",
  },
  minPixels: { kind: "integer", min: 1, defaultText: "the policy's own", help: "Least pixels of a resized picture." },
  maxPixels: { kind: "integer", min: 1, defaultText: "the policy's own", help: "Most pixels of a resized picture." },
  template: {
    kind: "string",
    value: "FILE",
    defaultText: "the built-in wording",
    help: "JSON file with parts of the prompt template that replace the built-in ones.",
  },
});

/** Options of the train task beside the settings of training. */
export const trainTaskTable = optionTable({
  ...sourceTable,
  run: { kind: "string", value: "DIR", defaultText: "runs/<method>-<data>-s<seed>", help: "The run folder." },
  resume: { kind: "boolean", default: false, help: "Go on with the run in the run folder from its last checkpoint." },
  reward: {
    kind: "string",
    value: "NAME=W,…",
    default: "binary",
    help: "Rewards added up by weight: binary, format, valid_box, hit, iou, point; e.g. binary=1,format=0.1.",
  },
  checkpointEvery: {
    kind: "integer",
    min: 1,
    default: 5,
    help: "Steps between checkpoints; the last step has one too.",
  },
  memoryLimit: {
    kind: "number",
    value: "GIB",
    min: 0,
    above: true,
    defaultText: "4 on wasm; a GPU tells none",
    help: "A run that may take more memory than this, in GiB, is refused before it starts.",
  },
  baseEval: { kind: "boolean", default: true, help: "Evaluate the base before the first step." },
  finalItems: {
    kind: "integer",
    min: 0,
    default: 1000,
    help: "Held-out items of the final comparison of base and trained; 0 for none.",
  },
  saveRollouts: {
    kind: "integer",
    min: 0,
    default: 2,
    help: "Training samples of each evaluation step whose rollouts are all written, with their pictures.",
  },
  watch: {
    kind: "integer",
    min: 0,
    default: 8,
    help: "Held-out items whose conversations are written at each evaluation, the same ones each time.",
  },
  report: {
    kind: "boolean",
    default: false,
    help: "Keep report.html in the run folder up to date and serve it on this machine, read only.",
  },
  reportPort: {
    kind: "integer",
    min: 0,
    max: 65535,
    default: 0,
    help: "Port of that page on 127.0.0.1; 0 takes a free one.",
  },
  help: { kind: "boolean", default: false, help: "Print this." },
});

/** Options of the eval task beside the settings of an evaluation. */
export const evalTaskTable = optionTable({
  ...sourceTable,
  split: {
    kind: "choice",
    choices: ["heldout", "train"],
    default: "heldout",
    help: "Which samples of the data.",
  },
  json: { kind: "string", value: "FILE", help: "Writes everything measured to this file." },
  help: { kind: "boolean", default: false, help: "Print this." },
});

/** What `deno task train --help` prints. */
export function trainHelp(): string {
  return helpText(
    "deno task train [OPTIONS]\n\nTrains a policy with MGPO, or a baseline, and writes a run folder.",
    ["Run", trainTaskTable],
    ["Training", trainTable],
  );
}

/** What `deno task eval --help` prints. */
export function evalHelp(): string {
  return helpText(
    "deno task eval [OPTIONS]\n\nMeasures a policy on held-out samples.",
    ["Run", evalTaskTable],
    ["Evaluation", evaluateTable],
  );
}

/** The options of a source, all set. */
export type SourceOptions = OptionValues<typeof sourceTable>;
/** The options of the train task itself, all set. */
export type TrainTaskOptions = OptionValues<typeof trainTaskTable>;

/** Splits a command line of `deno task train` into the task's options and those of training. */
export function parseTrainTask(args: readonly string[]): { task: TrainTaskOptions; train: TrainOptions } {
  const given = parseCommandLine({ ...trainTaskTable, ...trainTable }, args);
  const [train, task] = splitByTable(trainTable, given);
  return { task: resolveOptions(trainTaskTable, { ...task }), train };
}

/** Reads rewards like `binary=1,format=0.1`; a name alone has weight 1. */
export function parseReward(text: string): Record<string, RewardPart> {
  const known: Record<string, RewardPart["reward"]> = {
    ...{ binary: binaryReward, format: formatReward, valid_box: validBoxReward, hit: hitReward, iou: iouReward },
    point: pointReward,
  };
  const parts: Record<string, RewardPart> = {};
  for (const part of text.split(",")) {
    const [name, weight = "1", ...more] = part.split("=");
    const value = weight.trim() === "" ? NaN : Number(weight);
    if (!Object.hasOwn(known, name)) {
      throw new InputError(`--reward ${text}: no reward "${name}"; there are ${Object.keys(known).join(", ")}`);
    }
    if (!Number.isFinite(value) || more.length > 0) {
      throw new InputError(`--reward ${text}: the weight of ${name} must be a number, as in ${name}=0.5`);
    }
    if (Object.hasOwn(parts, name)) throw new InputError(`--reward ${text}: ${name} stands twice`);
    parts[name] = { reward: known[name], weight: value };
  }
  return parts;
}

/** Reads and checks a file of replaced template parts. */
export async function readTemplate(path: string | undefined): Promise<Partial<PromptTemplate> | undefined> {
  if (path === undefined) return undefined;
  try {
    const template = JSON.parse(await Deno.readTextFile(path));
    if (typeof template !== "object" || template === null || Array.isArray(template)) {
      throw new RangeError("must be a JSON object");
    }
    resolveTemplate(template);
    return template;
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof RangeError || error instanceof TypeError) {
      throw new InputError(`--template ${path}: ${error.message}`);
    }
    throw error;
  }
}

/** Starts the backend and says which and why. */
export async function openBackend(
  { backend, kernels, threads }: Pick<SourceOptions, "backend" | "kernels" | "threads">,
  progress: Progress,
): Promise<BackendChoice> {
  useKernels(kernels);
  // Nothing to say at once: whoever is about to write results asks `checkDevice`, and fails with what it says.
  const choice = await chooseBackend(backend, { threads, onLost: () => {} });
  progress.log(describeBackend(choice));
  if (choice.notice) progress.log(`note: ${choice.notice}`);
  return choice;
}

/** Opens splits of the data and reports rows that were left out. */
export async function openSplits<const S extends readonly ("train" | "heldout")[]>(
  { data, heldoutShare }: SourceOptions,
  splits: S,
  progress: Progress,
): Promise<{ [K in keyof S]: Dataset }> {
  const datasets: Dataset[] = [], problems = new Set<string>();
  for (const split of splits) {
    const dataset = await openDataset(data, split, { heldoutShare });
    datasets.push(dataset);
    // Splits of one file share its wrong rows.
    for (const { message } of datasetProblems(dataset)) problems.add(message);
  }
  for (const message of [...problems].slice(0, 3)) progress.log(`skipped row: ${message}`);
  if (problems.size > 3) progress.log(`skipped rows: ${problems.size} in all`);
  return datasets as { [K in keyof S]: Dataset };
}

/** Everything that a run needs, open. */
export interface OpenRun {
  task: TrainTaskOptions;
  policy: SavablePolicy;
  reference?: SavablePolicy;
  heldOut?: Dataset;
  template?: Partial<PromptTemplate>;
  /** The rewards of the command line. */
  score: ReturnType<typeof combineRewards>;
  /** Held-out conversations to be kept. */
  watched: WatchedItems;
  training: Training;
  folder: RunFolder;
}

/**
 * Opens a run: backend, data, policy, training, and last the run folder, so that bad input leaves nothing behind.
 *
 * @param parts Callbacks for the training.
 */
export async function openRun(
  { task, train }: ReturnType<typeof parseTrainTask>,
  progress: Progress,
  parts: Pick<TrainParts, "onProgress" | "onRollouts" | "onEvaluation">,
): Promise<OpenRun> {
  const rewards = parseReward(task.reward), score = combineRewards(rewards);
  const template = await readTemplate(task.template);
  const { evalEvery, method, seed } = resolveOptions(trainTable, { ...train });
  const path = task.run ?? await defaultRunPath(`runs/${method}-${nameOf(task.data)}-s${seed}`, task.resume);
  // Said before minutes of loading; RunFolder.create checks again.
  if (!task.resume) await refuseTaken(path);
  const backend = await openBackend(task, progress);
  const isEvaluated = evalEvery > 0 || task.finalItems > 0;
  const splits = isEvaluated ? ["train", "heldout"] as const : ["train"] as const;
  const [dataset, heldOut] = await openSplits(task, splits, progress);
  const begun = task.resume ? await newestCheckpoint(path) : 0;
  const checkpoint = `${path}/checkpoints/step-${begun}`;
  const { minPixels, maxPixels } = task;
  const source = begun > 0 ? checkpoint : task.policy, pixels = { minPixels, maxPixels };
  const question = { policy: source, pixels, dataset, train, template, isEvaluated, backend: backend.backend };
  await checkMemory({ ...question, limit: task.memoryLimit });
  const policy = await loadPolicy(source, { minPixels, maxPixels });
  const reference = (train.beta ?? 0) > 0 ? await loadPolicy(task.policy, { minPixels, maxPixels }) : undefined;
  const watched = new WatchedItems(task.watch, score);
  const given = { heldOut, rewards, reference, template, onEvaluationBatch: watched.add, ...parts };
  const training = new Training(policy, dataset, train, given);
  // A run may go on with another number of threads, and be watched in another way.
  const { run: _run, resume: _resume, help: _help, threads: _threads, memoryLimit: _limit, ...rest } = task;
  const { watch: _watch, report: _report, reportPort: _port, ...asked } = rest;
  const manifest = {
    settings: {
      ...{ ...asked, template, backend: backend.backend, ...training.settings },
      data: { name: dataset.name, fingerprint: dataset.fingerprint, heldOut: heldOut?.fingerprint },
    },
    environment: await describeEnvironment(backend),
  };
  const folder = task.resume ? (await RunFolder.resume(path, manifest)).folder : await RunFolder.create(path, manifest);
  // Only now is it certain that the settings are those of the run.
  if (begun > 0) training.load(await loadTraining(checkpoint));
  progress.log(
    begun > 0
      ? `run ${path}: going on after step ${begun} of ${training.settings.steps}`
      : `run ${path}: ${method} on ${dataset.name} from ${task.policy}, ${training.settings.steps} steps`,
  );
  return { task, policy, reference, heldOut, template, score, watched, training, folder };
}

/** A dataset's name as part of a folder's. */
function nameOf(data: string): string {
  const last = data.replace(/[/\\]+$/, "").split(/[/\\]/).at(-1) ?? "";
  return last.replace(/[^\w.-]+/g, "-") || "data";
}
