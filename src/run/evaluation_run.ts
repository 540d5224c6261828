/**
 * `deno task eval` from its command line to its table.
 *
 * @module
 */
import { evaluate } from "../evaluate.ts";
import { checkDevice, machineError } from "../gpu/device_errors.ts";
import { loadPolicy } from "../policy/load.ts";
import { evaluateTable, splitByTable } from "../settings.ts";
import { InputError } from "./errors.ts";
import { parseCommandLine, resolveOptions } from "./options.ts";
import { formatBar, formatRatio, Progress } from "./progress.ts";
import { evaluationTable } from "./report.ts";
import { writeAtomically } from "./run_folder.ts";
import { evalHelp, evalTaskTable, openBackend, openSplits, readTemplate } from "./train_task.ts";

/**
 * Evaluates as the command line says.
 *
 * @returns The exit status.
 * @throws {InputError} for anything that the user can put right.
 */
export async function runEvaluation(args: readonly string[], progress = new Progress()): Promise<number> {
  const given = parseCommandLine({ ...evalTaskTable, ...evaluateTable }, args);
  const [settings, rest] = splitByTable(evaluateTable, given);
  const task = resolveOptions(evalTaskTable, { ...rest });
  if (task.help) {
    progress.log(evalHelp());
    return 0;
  }
  const options = resolveOptions(evaluateTable, { ...settings });
  if (task.json !== undefined) await refuseUnwritable(task.json);
  const template = await readTemplate(task.template);
  const { backend } = await openBackend(task, progress);
  const [dataset] = await openSplits(task, [task.split], progress);
  const policy = await loadPolicy(task.policy, { minPixels: task.minPixels, maxPixels: task.maxPixels });
  progress.log(`${task.policy} on ${dataset.name}, ${options.turns} turn${options.turns === 1 ? "" : "s"}`);
  const started = performance.now();
  const evaluation = await evaluate(policy, dataset, {
    ...options,
    template,
    onProgress: (done, items, correct) =>
      progress.status(`${formatBar(done, items)} ${done}/${items}  accuracy ${formatRatio(correct / done)}`),
  }).catch(async (error) => {
    throw await machineError(error);
  });
  await checkDevice();
  const seconds = (performance.now() - started) / 1000;
  progress.clear();
  progress.log(evaluationTable(evaluation));
  for (const { sampleId, error } of evaluation.skipped.slice(0, 3)) progress.log(`skipped ${sampleId}: ${error}`);
  if (evaluation.skipped.length > 0) progress.log(`skipped samples: ${evaluation.skipped.length}`);
  progress.log(`${evaluation.items.length} items in ${seconds.toFixed(1)} s`);
  if (task.json !== undefined) {
    const { help: _help, json: _json, ...asked } = task;
    const report = { settings: { ...asked, ...options, backend }, seconds, ...evaluation };
    await writeAtomically(task.json, JSON.stringify(report, null, 2) + "\n");
    progress.log(`written to ${task.json}`);
  }
  policy.dispose();
  return 0;
}

/** Better now than after an hour of evaluation. */
async function refuseUnwritable(path: string): Promise<void> {
  const folder = path.slice(0, path.lastIndexOf("/") + 1) || ".";
  try {
    if ((await Deno.stat(folder)).isDirectory) return;
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  throw new InputError(`--json ${path}: there is no folder ${folder}; make it first`);
}
