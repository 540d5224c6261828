/**
 * `deno task train` from its command line to its table: the run folder, the progress, Ctrl-C.
 *
 * @module
 */
import { evaluate, type Evaluation } from "../evaluate.ts";
import { checkDevice, MachineError, machineError } from "../gpu/device_errors.ts";
import { loadPolicy } from "../policy/load.ts";
import type { Policy } from "../policy/policy.ts";
import { LiveReport } from "../report/live.ts";
import type { StepProgress, StepRollouts } from "../train.ts";
import { saveTraining } from "./checkpoint.ts";
import type { StepRecord } from "./metrics.ts";
import { formatBar, formatDuration, formatRatio, formatStep, Progress, remainingSeconds } from "./progress.ts";
import { comparisonTable, evaluationLine, type FinalEvaluation, gapWarning, summaryOf } from "./report.ts";
import { saveRollouts } from "./rollout_files.ts";
import { INTERRUPTED, Interrupted, listenForInterrupt } from "./tasks.ts";
import { type OpenRun, openRun, parseTrainTask, trainHelp } from "./train_task.ts";

/**
 * Trains as the command line says.
 *
 * @returns The exit status: 0, or 130 after Ctrl-C.
 * @throws {InputError} for anything that the user can put right.
 */
export async function runTraining(args: readonly string[], progress = new Progress()): Promise<number> {
  const parsed = parseTrainTask(args);
  if (parsed.task.help) {
    progress.log(trainHelp());
    return 0;
  }
  const { report, reportPort } = parsed.task;
  const live = report ? await LiveReport.serve(reportPort, (line) => progress.log(line)) : undefined;
  if (live) progress.log(`report ${live.address}`);
  try {
    return await trainRun(parsed, { args, progress, live });
  } finally {
    await live?.end();
  }
}

async function trainRun(
  parsed: ReturnType<typeof parseTrainTask>,
  { args, progress, live }: { args: readonly string[]; progress: Progress; live?: LiveReport },
): Promise<number> {
  const shown = new RunDisplay(progress);
  const run: OpenRun = await openRun(parsed, progress, {
    onProgress: (at) => shown.progress(at),
    onRollouts: (rollouts) => keepRollouts(run, rollouts, shown),
    onEvaluation: (step, evaluation) => keepEvaluation(run, step, evaluation, shown),
  });
  shown.steps = run.training.settings.steps;
  const interrupt = listenForInterrupt(() =>
    progress.log("stopping as soon as this step is done; Ctrl-C again stops at once")
  );
  shown.isInterrupted = () => interrupt.requested;
  live?.watch(run.folder.path);
  try {
    await evaluateBase(run, shown);
    live?.refresh();
    while (run.training.step < shown.steps) {
      const record = await run.training.next();
      await run.folder.appendMetrics(record);
      shown.step(record);
      live?.refresh();
      await checkpointIfDue(run, interrupt.requested);
      if (interrupt.requested) throw new Interrupted();
    }
    await compare(run, shown);
    return 0;
  } catch (error) {
    if (!(error instanceof Interrupted)) throw await withAdvice(error, run, args);
    progress.clear();
    progress.log(`stopped after step ${run.training.step}; go on with: ${resumeCommand(args, run.folder.path)}`);
    return INTERRUPTED;
  } finally {
    progress.clear();
    interrupt.stop();
    closeRun(run);
  }
}

/** The same command, told to resume. */
function resumeCommand(args: readonly string[], path: string): string {
  const words = args.filter((word) => word !== "--resume");
  const isNamed = words.some((word) => word === "--run" || word.startsWith("--run="));
  return ["deno task train", ...words, ...(isNamed ? [] : ["--run", path]), "--resume"].join(" ");
}

/** Where the machine gave up: what is left of the run, and how to go on. */
async function withAdvice(error: unknown, { folder }: OpenRun, args: readonly string[]): Promise<unknown> {
  const failure = await machineError(error);
  if (!(failure instanceof MachineError)) return failure;
  const newest = (await folder.checkpoints()).at(-1);
  const left = newest === undefined ? "there is no checkpoint yet" : `the checkpoint of step ${newest} is intact`;
  const message = `${failure.message}; nothing computed after that was written, ${left}; go on with: ` +
    resumeCommand(args, folder.path);
  return new MachineError(message, { cause: failure });
}

function closeRun({ training, policy, reference }: OpenRun): void {
  training.dispose();
  policy.dispose();
  reference?.dispose();
}

/** The base on the held-out items, before the first step, with a warning if it gives MGPO little to learn from. */
async function evaluateBase(run: OpenRun, shown: RunDisplay): Promise<void> {
  const { training, task } = run;
  if (training.step > 0 || !task.baseEval || training.settings.evalEvery === 0) return;
  shown.mayStop = true;
  const evaluations = await training.evaluate();
  shown.mayStop = false;
  for (const evaluation of evaluations) {
    await keepEvaluation(run, 0, evaluation, shown);
    const warning = gapWarning(evaluation);
    if (warning && training.settings.method === "mgpo") shown.log(warning);
  }
}

/** A name that is the same whether or not the run was resumed, unlike the policy's own. */
function policyAfter({ task }: OpenRun, step: number): string {
  return step === 0 ? task.policy : `${task.policy} after step ${step}`;
}

async function keepEvaluation(run: OpenRun, step: number, evaluation: Evaluation, shown: RunDisplay): Promise<void> {
  await checkDevice();
  const summary = { ...summaryOf(evaluation), policy: policyAfter(run, step) };
  const { turns, evalTurns } = run.training.settings, isFirst = evaluation.turns === (evalTurns?.[0] ?? turns);
  const asked = isFirst ? "" : `, ${evaluation.turns} turn${evaluation.turns === 1 ? "" : "s"}`;
  shown.log(evaluationLine((step === 0 ? "base" : `held-out after step ${step}`) + asked, summary));
  const name = isFirst ? `step-${step}` : `step-${step}-${evaluation.turns}-turns`;
  await run.folder.writeFile(`evaluations/${name}.json`, JSON.stringify({ step, ...summary }, null, 2) + "\n");
  const rollouts = run.watched.take();
  if (rollouts.length > 0) await saveRollouts(run.folder, run.policy, { step, split: "heldout", rollouts });
}

async function keepRollouts(run: OpenRun, rollouts: StepRollouts, shown: RunDisplay): Promise<void> {
  const { training: { settings }, task: { saveRollouts: count }, folder, policy } = run;
  const { step, samples, trajectories, rewards, skipped } = rollouts;
  for (const { sampleId, error } of skipped) shown.skipped(sampleId, error);
  await checkDevice();
  if (settings.evalEvery === 0 || step % settings.evalEvery !== 0) return;
  const kept = trajectories.flatMap((trajectory, i) =>
    trajectory.prompt < count ? [{ sample: samples[trajectory.prompt], trajectory, reward: rewards[i] }] : []
  );
  if (kept.length > 0) await saveRollouts(folder, policy, { step, split: "train", rollouts: kept });
}

async function checkpointIfDue({ training, policy, folder, task }: OpenRun, isStopping: boolean): Promise<void> {
  const { step, settings } = training;
  if (step % task.checkpointEvery !== 0 && step !== settings.steps && !isStopping) return;
  const state = await training.state();
  await folder.writeCheckpoint(step, async (to) => {
    await saveTraining(to, policy, state);
    // What was read back of a device that is gone must not take the place of a whole checkpoint.
    await checkDevice();
  });
}

/** Base against trained on the same held-out items and draws, with grounding and in one turn. */
async function compare(run: OpenRun, shown: RunDisplay): Promise<void> {
  const { training, folder, task, policy, reference } = run;
  const { steps } = training.settings;
  shown.log(`checkpoint ${folder.checkpointPath(steps)}`);
  if (task.finalItems === 0) return;
  let result = await folder.readJson("result.json") as { base: FinalEvaluation; trained: FinalEvaluation } | undefined;
  if (!result) {
    shown.mayStop = true;
    const trained = await evaluateFinal(run, policy, steps, shown);
    training.dispose();
    policy.dispose();
    const { minPixels, maxPixels } = task;
    const base = reference ?? await loadPolicy(task.policy, { minPixels, maxPixels });
    try {
      result = { base: await evaluateFinal(run, base, 0, shown), trained };
    } finally {
      if (base !== reference) base.dispose();
    }
    await checkDevice();
    await folder.writeFile("result.json", JSON.stringify({ steps, ...result }, null, 2) + "\n");
  }
  shown.clear();
  shown.log(`\n${comparisonTable(result.base, result.trained)}\n`);
  shown.log(
    `95 % intervals in brackets; ${result.base.grounded.items} held-out items of ${result.base.grounded.dataset}`,
  );
}

async function evaluateFinal(run: OpenRun, policy: Policy, step: number, shown: RunDisplay): Promise<FinalEvaluation> {
  const { training, heldOut, template, task } = run, label = step === 0 ? "base" : "trained";
  const { turns, maxNewTokens, topP, minBoxSide, maxAspect, minCropSide, squareCrop, ...rest } = training.settings;
  const measure = async (turns: number) => {
    const evaluation = await evaluate(policy, heldOut!, {
      ...{ turns, maxNewTokens, topP, minBoxSide, maxAspect, minCropSide, squareCrop, template },
      temperature: rest.evalTemperature,
      batchSize: rest.evalBatch,
      items: task.finalItems,
      onProgress: (done, items) => shown.evaluating(`${label}, ${turns} turn${turns === 1 ? "" : "s"}`, done, items),
    });
    return { ...summaryOf(evaluation), policy: policyAfter(run, step) };
  };
  return { grounded: await measure(Math.max(2, turns)), oneTurn: await measure(1) };
}

/** What a run shows. */
class RunDisplay {
  steps = 0;
  /** Whether Ctrl-C was pressed. */
  isInterrupted = () => false;
  /** Whether there is nothing to finish first. */
  mayStop = false;
  readonly #progress: Progress;
  readonly #seconds: number[] = [];
  #last?: StepRecord;
  #skipped = 0;
  #drawn = 0;

  constructor(progress: Progress) {
    this.#progress = progress;
  }

  log(line: string): void {
    this.#progress.log(line);
  }

  clear(): void {
    this.#progress.clear();
  }

  /** A sample that couldn't be read: the first few by name, then by number. */
  skipped(sampleId: string, error: string): void {
    this.#skipped++;
    if (this.#skipped <= 5) this.log(`skipped ${sampleId}: ${error}`);
    else if (this.#skipped % 100 === 0) this.log(`skipped samples: ${this.#skipped}`);
  }

  progress({ step, phase, detail }: StepProgress): void {
    this.#refuseIfStopping();
    this.#status(step, `${phase} ${detail}`);
  }

  evaluating(what: string, done: number, items: number): void {
    this.#refuseIfStopping();
    this.#progress.status(`${formatBar(done, items)} ${what}: ${done}/${items} items`);
  }

  step(record: StepRecord): void {
    this.#last = record;
    this.#seconds.push(record["timing_s/total"] ?? 0);
    if (!this.#progress.isTerminal) this.log(formatStep(record, this.steps));
    this.#drawn = 0;
    this.#status(record.step, "");
  }

  #refuseIfStopping(): void {
    if (this.mayStop && this.isInterrupted()) throw new Interrupted();
  }

  /** At most ten times a second: what is shown between steps changes with every token. */
  #status(step: number, detail: string): void {
    const now = performance.now();
    if (now - this.#drawn < 100) return;
    this.#drawn = now;
    const parts = [`${formatBar(this.#last?.step ?? 0, this.steps)} step ${step}/${this.steps}`];
    const add = (label: string, name: string) => {
      const value = this.#last?.[name];
      if (value !== undefined) parts.push(`${label} ${formatRatio(value)}`);
    };
    add("reward", "reward/mean");
    add("valid", "grounding/valid_ratio");
    add("hit", "grounding/hit_ratio");
    const left = remainingSeconds(this.#seconds, this.steps - (this.#last?.step ?? 0));
    if (left !== undefined) parts.push(`ETA ${formatDuration(left)}`);
    if (detail) parts.push(detail);
    this.#progress.status(parts.join("  "));
  }
}
