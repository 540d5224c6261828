/**
 * `deno task parity`: compares the policy with reference values in a golden folder, a row a check.
 *
 * @module
 */
import { chooseBackend, describeBackend } from "../src/gpu/backend.ts";
import { trimmedGoldens } from "../src/parity/golden.ts";
import { groupNames, runParity } from "../src/parity/groups.ts";
import type { Report } from "../src/parity/report.ts";
import { useKernels } from "../src/policy/ops.ts";
import { InputError } from "../src/run/errors.ts";
import { helpText, optionTable, parseCommandLine, resolveOptions } from "../src/run/options.ts";
import { runTask } from "../src/run/tasks.ts";

const table = optionTable({
  backend: { kind: "choice", choices: ["auto", "webgpu", "wasm"], default: "auto", help: "Where to compute" },
  only: { kind: "string", value: "GROUP,…", help: `Groups to check: ${groupNames.join(", ")}`, defaultText: "all" },
  kernels: { kind: "choice", choices: ["plain", "fused"], default: "fused", help: "Own fused kernels, or plain tfjs" },
  json: { kind: "string", value: "FILE", help: "Write the rows to FILE as JSON too", defaultText: "not written" },
  help: { kind: "boolean", default: false, help: "Print this and end" },
});
const usage = `Usage: deno task parity [DIR] [options]

Compares policy, image processor, tokenizer, losses, gradients and optimizer with the reference values in the golden
folder DIR [default: the trimmed set in fixtures/goldens]. Exit status 1 if any check falls short.`;

/** Takes the one positional argument out of a command line. */
function splitArguments(args: readonly string[]): { folder?: string; flags: string[] } {
  const flags: string[] = [], folders: string[] = [];
  args.forEach((arg, i) => {
    const before = args[i - 1];
    const isValue = before?.startsWith("--") && !before.includes("=") && before !== "--help";
    if (arg.startsWith("--") || isValue) flags.push(arg);
    else folders.push(arg);
  });
  if (folders.length > 1) throw new InputError(`${folders[1]}: stray argument; one golden folder is checked at a time`);
  return { folder: folders[0], flags };
}

async function writeJson(file: string, report: Report, context: Record<string, unknown>): Promise<void> {
  // JSON has no NaN and no Infinity: both become null.
  const text = JSON.stringify({
    ...context,
    checks: report.rows.length,
    failed: report.failed.length,
    rows: report.rows,
  });
  await Deno.writeTextFile(file, text + "\n");
}

async function main(args: readonly string[]): Promise<number> {
  const { folder, flags } = splitArguments(args);
  const options = resolveOptions(table, parseCommandLine(table, flags));
  if (options.help) {
    console.log(helpText(usage, ["Options", table]));
    return 0;
  }
  const start = performance.now(), source = folder ?? trimmedGoldens;
  const choice = await chooseBackend(options.backend);
  useKernels(options.kernels);
  console.log(`${describeBackend(choice)}; kernels ${options.kernels}; goldens ${folder ?? "fixtures/goldens"}`);
  const report = await runParity(source, { only: options.only?.split(","), print: console.log });
  for (const { group, name, note } of report.failed) console.log(`\nfailed: ${group} / ${name}${note && `: ${note}`}`);
  console.log(`\n${report.summary()} (${((performance.now() - start) / 1000).toFixed(1)} s)`);
  if (options.json) {
    await writeJson(options.json, report, {
      backend: choice.backend,
      kernels: options.kernels,
      goldens: String(source),
    });
  }
  return report.failed.length === 0 ? 0 : 1;
}

if (import.meta.main) await runTask(main);
