/**
 * `deno task report` from its command line to its file.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { helpText, optionTable, type OptionValues, parseCommandLine, resolveOptions } from "../run/options.ts";
import { Progress } from "../run/progress.ts";
import { DEFAULT_ROLLOUTS, renderReport, reportTitle } from "./page.ts";
import { writeReport } from "./report_file.ts";

/** Options of the report task. */
export const reportTable = optionTable({
  out: { kind: "string", value: "FILE", default: "report.html", help: "Where the report goes." },
  results: {
    kind: "string",
    value: "DIR",
    default: "benchmarks/results",
    help: "Results of experiments, whose tables the report shows.",
  },
  rollouts: {
    kind: "integer",
    min: 0,
    default: DEFAULT_ROLLOUTS,
    help: "The most rollouts in the browser; they decide the size of the file.",
  },
  help: { kind: "boolean", default: false, help: "Print this." },
});

/** What `deno task report --help` prints. */
export function reportHelp(): string {
  const usage = [
    "deno task report RUN… [OPTIONS]",
    "",
    "Writes one HTML file about runs: curves, tables, and a browser of their rollouts. It needs no network and no server.",
    "RUN is a run folder, or a folder of run folders.",
  ];
  return helpText(usage.join("\n"), ["Options", reportTable]);
}

/**
 * Run folders and options of a command line; options and folders may be mixed.
 *
 * @throws {InputError} if an option is unknown or impossible, or no run is named.
 */
export function parseReportTask(args: readonly string[]): { runs: string[]; task: OptionValues<typeof reportTable> } {
  const runs: string[] = [], options: string[] = [];
  for (let i = 0; i < args.length; i++) {
    if (!args[i].startsWith("-")) runs.push(args[i]);
    else {
      options.push(args[i]);
      // All options but --help take a value.
      if (!args[i].includes("=") && args[i] !== "--help" && i + 1 < args.length) options.push(args[++i]);
    }
  }
  const task = resolveOptions(reportTable, { ...parseCommandLine(reportTable, options) });
  if (runs.length === 0 && !task.help) {
    throw new InputError("name at least one run folder, e.g. deno task report runs/mgpo-signs-s0 (--help says more)");
  }
  return { runs, task };
}

/**
 * Writes a report as the command line says.
 *
 * @returns The exit status.
 * @throws {InputError} for anything that the user can put right.
 */
export async function runReport(args: readonly string[], progress = new Progress()): Promise<number> {
  const { runs: paths, task } = parseReportTask(args);
  if (task.help) {
    progress.log(reportHelp());
    return 0;
  }
  const { results, rollouts } = task;
  const { html, runs } = await renderReport({ runs: paths, results, rollouts, title: reportTitle(paths) });
  await writeReport(task.out, html);
  for (const run of runs) for (const problem of run.problems) progress.log(`note: ${run.name}: ${problem}`);
  const size = (new TextEncoder().encode(html).length / 2 ** 20).toFixed(1);
  progress.log(`wrote ${task.out}: ${runs.length} run${runs.length === 1 ? "" : "s"}, ${size} MiB`);
  return 0;
}
