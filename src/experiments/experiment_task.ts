/**
 * `deno task experiment` from its command line to its tables.
 *
 * @module
 */
import { type BackendChoice, chooseBackend, describeBackend } from "../gpu/backend.ts";
import { useKernels } from "../policy/ops.ts";
import { describeEnvironment } from "../run/environment.ts";
import { InputError } from "../run/errors.ts";
import { helpText, optionTable, type OptionValues, parseCommandLine, resolveOptions } from "../run/options.ts";
import { formatDuration, formatTable, Progress } from "../run/progress.ts";
import { writeAtomically } from "../run/run_folder.ts";
import { INTERRUPTED, Interrupted, listenForInterrupt } from "../run/tasks.ts";
import { sourceTable } from "../run/train_task.ts";
import { experiments, experimentsNamed } from "./catalogue.ts";
import type { Experiment } from "./experiment.ts";
import { commandLine, Planner, type Unit, type Workplace } from "./plan.ts";
import { waitForLock } from "./lock.ts";
import { assembleResult } from "./result.ts";
import { resultText } from "./result_text.ts";
import { type RunnerParts, runUnits, WorkClock } from "./runner.ts";

/** Options of the experiment task. */
export const experimentTable = optionTable({
  list: {
    kind: "boolean",
    default: false,
    help: "Print the experiments, what is done of them and how long the rest takes.",
  },
  seeds: { kind: "integer", min: 1, defaultText: "the experiment's own", help: "How many seeds, from 0 on." },
  only: {
    kind: "string",
    value: "METHOD,…",
    defaultText: "all methods",
    help: "Do only these methods' work now; the tables show all that is done.",
  },
  out: { kind: "string", value: "DIR", default: "benchmarks/results", help: "Where the results go, NAME.json." },
  runs: { kind: "string", value: "DIR", default: "runs/experiments", help: "Where runs and evaluations are kept." },
  backend: sourceTable.backend,
  kernels: sourceTable.kernels,
  threads: sourceTable.threads,
  help: { kind: "boolean", default: false, help: "Print this." },
});

type TaskOptions = OptionValues<typeof experimentTable>;

/** What `deno task experiment --help` prints. */
export function experimentHelp(known = experiments): string {
  const names = known.map(({ name, about }) => `  ${name.padEnd(16)}${about}`);
  const usage = [
    "deno task experiment NAME… [OPTIONS]",
    "",
    "Repeats experiments and writes their tables. What is done isn't done again; Ctrl-C and the same command go on.",
    "",
    ...["Experiments (or all):", ...names],
  ];
  return helpText(usage.join("\n"), ["Options", experimentTable]);
}

/** Names and options of a command line. */
export function parseExperimentTask(
  args: readonly string[],
  known = experiments,
): { chosen: readonly Experiment[]; task: TaskOptions } {
  const at = args.findIndex((word) => word.startsWith("-"));
  const names = at < 0 ? args : args.slice(0, at);
  const task = resolveOptions(experimentTable, { ...parseCommandLine(experimentTable, at < 0 ? [] : args.slice(at)) });
  if (names.length === 0 && !task.list && !task.help) {
    throw new InputError(`name an experiment: ${known.map((e) => e.name).join(", ")}, or all (--help says more)`);
  }
  const chosen = names.length === 0 ? known : [...new Set(names.flatMap((name) => experimentsNamed(name, known)))];
  const methods = new Set(chosen.flatMap((experiment) => experiment.methods.map((method) => method.name)));
  const unknown = task.only?.split(",").find((name) => !methods.has(name));
  if (unknown !== undefined) {
    throw new InputError(`--only ${unknown}: there is no such method; there are: ${[...methods].join(", ")}`);
  }
  return { chosen, task };
}

/**
 * Does experiments as the command line says.
 *
 * @param known The experiments that there are. @default {the catalogue}
 * @returns The exit status: 0, or 130 after Ctrl-C.
 * @throws {InputError} for anything that the user can put right.
 */
export async function runExperiments(
  args: readonly string[],
  progress = new Progress(),
  known = experiments,
): Promise<number> {
  const { chosen, task } = parseExperimentTask(args, known);
  if (task.help) {
    progress.log(experimentHelp(known));
    return 0;
  }
  useKernels(task.kernels);
  const backend = await chooseBackend(task.backend, {
    threads: task.threads,
    onLost: (message) => progress.log(`error: ${message}`),
  });
  const place: Workplace = { runs: task.runs, backend: backend.backend, kernels: task.kernels };
  if (task.list) {
    progress.log(await listOf(chosen, task, place));
    return 0;
  }
  progress.log(describeBackend(backend));
  const interrupt = listenForInterrupt(() =>
    progress.log("stopping as soon as this step is done; the same command goes on")
  );
  try {
    for (const experiment of chosen) {
      await doExperiment(experiment, { task, place, backend, progress, isInterrupted: () => interrupt.requested });
    }
    return 0;
  } catch (error) {
    if (!(error instanceof Interrupted)) throw error;
    progress.clear();
    progress.log(`stopped; go on with: deno task experiment ${args.join(" ")}`);
    return INTERRUPTED;
  } finally {
    progress.clear();
    interrupt.stop();
  }
}

interface Doing extends RunnerParts {
  task: TaskOptions;
  backend: BackendChoice;
}

/** Works on an experiment and writes its result, whatever there is of it. */
async function doExperiment(experiment: Experiment, doing: Doing): Promise<void> {
  const { task, place, progress } = doing;
  const planner = new Planner(experiment, place), seeds = seedsOf(experiment, task);
  // Two processes may do parts of the same experiment.
  const save = async () => {
    const lock = await waitForLock(`${place.runs}/locks/results-${experiment.name}`);
    try {
      return await writeResult();
    } finally {
      lock.release();
    }
  };
  const writeResult = async () => {
    const result = await assembleResult(experiment, planner, {
      seeds,
      command: repeatCommand(experiment, task),
      environment: await describeEnvironment(doing.backend),
    });
    await Deno.mkdir(task.out, { recursive: true });
    await writeAtomically(`${task.out}/${experiment.name}.json`, JSON.stringify(result, null, 2) + "\n");
    return result;
  };
  progress.log(`experiment ${experiment.name}: ${experiment.about}`);
  const units = await chosenUnits(planner, seeds, task.only);
  try {
    await runUnits(units, { ...doing, onUnit: async () => void await save() });
  } finally {
    progress.log(`\n${resultText(await save())}\nwritten to ${task.out}/${experiment.name}.json`);
  }
}

function seedsOf(experiment: Experiment, { seeds = experiment.seeds }: TaskOptions): number[] {
  return Array.from({ length: seeds }, (_, seed) => seed);
}

/** The units that `--only` leaves, with the stages that they start from. */
async function chosenUnits(
  planner: Planner,
  seeds: readonly number[],
  only: string | undefined,
): Promise<Unit[]> {
  return await planner.units(seeds, only?.split(","));
}

/** The command that makes the same file again, wherever its runs lie. */
function repeatCommand({ name }: Experiment, { seeds, backend, kernels }: TaskOptions): string {
  const options = { seeds, backend: backend === "auto" ? undefined : backend };
  return [
    "deno task experiment",
    name,
    ...commandLine({ ...options, kernels: kernels === "fused" ? undefined : kernels }),
  ]
    .join(" ");
}

/** What there is of each experiment. */
async function listOf(chosen: readonly Experiment[], task: TaskOptions, place: Workplace): Promise<string> {
  const rows = [["experiment", "seeds", "trainings", "evaluations", "cached", "time left"]];
  for (const experiment of chosen) {
    const seeds = seedsOf(experiment, task);
    const units = await chosenUnits(new Planner(experiment, place), seeds, task.only);
    const clock = await WorkClock.of(units), [done, all] = clock.pieces;
    const trainings = units.filter(({ run }) => run).length;
    const evaluations = units.reduce((sum, unit) => sum + unit.evaluations.length, 0);
    const left = `about ${formatDuration(clock.remaining())}`;
    rows.push([experiment.name, ...[seeds.length, trainings, evaluations].map(String), `${done}/${all}`, left]);
  }
  const about = chosen.map(({ name, about }) => `${name}: ${about}`);
  return [formatTable(rows), "", ...about].join("\n");
}
