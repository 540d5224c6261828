/**
 * All benchmarks behind one command line, that of `deno task bench`. Also an entry point of its own for a bare GPU machine:
 * `deno task bundle` makes one file of it, which may be bundled again by any packer and needs nothing but the folder of the embedded
 * policy beside it:
 *
 * ```sh
 * deno task bundle
 * deno run --allow-read --allow-write .gpu/bench.js --tiny fixtures/tiny --json bench.json
 * ```
 *
 * (The bundle needs WebGPU: the WebAssembly backend looks for its binary in the npm cache and is left out, with a line.)
 *
 * A benchmark that fails is reported and the others still run; the JSON file is written again after each one, so that a run that is
 * cut short leaves what it has measured.
 *
 * @module
 */
import "./one_file.ts";
import { pathToFileURL } from "node:url";
import { chooseBackend, describeBackend } from "../src/gpu/backend.ts";
import { tinyPolicyUrl } from "../src/policy/load.ts";
import { InputError } from "../src/run/errors.ts";
import { helpText, optionTable, parseCommandLine, resolveOptions } from "../src/run/options.ts";
import { formatTable } from "../src/run/progress.ts";
import { writeAtomically } from "../src/run/run_folder.ts";
import { errorText, runTask } from "../src/run/tasks.ts";
import type { Benchmark, BenchmarkSettings, Row } from "./benchmark.ts";
import { decode } from "./decode.ts";
import { phases } from "./phases.ts";
import { prefill } from "./prefill.ts";
import { recordedPasses } from "./recorded_passes.ts";
import { resize } from "./resize.ts";
import { bandwidthRoof, dispatchCost, matmulRoof, matmulRoofWasm } from "./roof.ts";
import { roofShare } from "./roof_share.ts";
import { type ShapeName, shapeNames } from "./shapes.ts";
import { sharedPrefix } from "./shared_prefix.ts";
import { slopes } from "./slopes.ts";
import { step } from "./step.ts";
import { threads } from "./threads.ts";
import { update } from "./update.ts";

/** The quick ones first, so that a run that is cut short has most of the rows. */
function benchmarks(shapes?: readonly ShapeName[]): readonly Benchmark[] {
  return [
    ...[dispatchCost, bandwidthRoof, matmulRoof, matmulRoofWasm, resize],
    ...[decode, update, recordedPasses, threads, sharedPrefix, prefill, phases, roofShare(shapes), ...slopes, step],
  ];
}

const table = optionTable({
  json: { kind: "string", value: "FILE", defaultText: "none", help: "write machine, adapter and rows there" },
  backend: {
    kind: "choice",
    choices: ["all", "webgpu", "wasm"],
    default: "all",
    help: "which backends to measure; all leaves out what cannot run here",
  },
  shapes: {
    kind: "string",
    value: "LIST",
    defaultText: `${shapeNames.join()} on a GPU, tiny elsewhere`,
    help: "sizes of the policies of decode/roof_share, with commas between",
  },
  tiny: {
    kind: "string",
    value: "FOLDER",
    defaultText: "fixtures/tiny beside the program",
    help: "where the embedded policy lies, for a program in one file",
  },
  python: {
    kind: "string",
    value: "PATH",
    default: "python3",
    help: "the Python with torch and transformers, for step/transformers; left out where there is none",
  },
  help: { kind: "boolean", default: false, help: "show this help" },
});

/** What `--json` writes. */
export interface Report {
  machine: Record<string, unknown>;
  /** The WebGPU adapter; null where none was used. */
  adapter: unknown;
  rows: Row[];
}

function parseShapes(list: string | undefined): ShapeName[] | undefined {
  const unknown = list?.split(",").find((name) => !shapeNames.some((known) => known === name));
  if (unknown !== undefined) throw new InputError(`--shapes ${list}: must be some of ${shapeNames.join()}`);
  return list === undefined ? undefined : shapeNames.filter((name) => list.split(",").includes(name));
}

/** The names that a benchmark has rows for on a backend. */
function namesOn({ names, backends }: Benchmark, backend: string): readonly string[] {
  if (backends) return backends.includes(backend) ? names : [];
  return names.filter((name) => name.includes(backend));
}

/** Whether a name is asked for: by its beginning, or by any part where no name begins so. */
function isAsked(name: string, asked: readonly string[], known: readonly string[]): boolean {
  return asked.length === 0 ||
    asked.some((part) => known.some((k) => k.startsWith(part)) ? name.startsWith(part) : name.includes(part));
}

/** What the device has complained of since the running benchmark began. */
const gpuErrors: string[] = [];

/** Runs benchmarks on the current backend, each one on its own. */
async function runOn(
  backend: string,
  wanted: readonly Benchmark[],
  settings: BenchmarkSettings,
  take: (rows: readonly Row[]) => Promise<void>,
): Promise<number> {
  let failures = 0;
  for (const benchmark of wanted) {
    console.log(`running ${namesOn(benchmark, backend).join(", ")}…`);
    try {
      gpuErrors.length = 0;
      const rows = await benchmark.run(backend, console.log, settings);
      // A kernel that was refused does nothing, very fast.
      if (gpuErrors.length > 0) throw new Error(`the GPU reported ${gpuErrors.length} errors, first: ${gpuErrors[0]}`);
      for (const { name, value, unit } of rows) console.log(`  ${name}: ${value.toPrecision(4)} ${unit}`);
      await take(rows);
    } catch (error) {
      failures++;
      console.error(`${namesOn(benchmark, backend)[0]} failed: ${errorText(error)}`);
    }
  }
  return failures;
}

/** Whether a backend could be started; a line says why not. An adapter goes into the report. */
async function start(backend: string, optional: boolean, report: Report): Promise<boolean> {
  try {
    const choice = await chooseBackend(backend, { onLost: (message) => gpuErrors.push(message) });
    console.log(describeBackend(choice));
    report.adapter = choice.adapter ?? report.adapter;
    return true;
  } catch (error) {
    if (!optional || !(error instanceof InputError)) throw error;
    console.log(`${backend} left out: ${error.message}`);
    return false;
  }
}

/**
 * The command line: `[NAME…] [OPTIONS]`.
 *
 * @returns The exit status: 1 where a benchmark failed.
 * @throws {InputError} A name or option is unknown, or the one backend asked for cannot run.
 */
export async function bench(args: readonly string[]): Promise<number> {
  const asked = args.slice(0, args.findIndex((a) => a.startsWith("-")) >>> 0);
  const o = resolveOptions(table, parseCommandLine(table, args.slice(asked.length)));
  const all = benchmarks(parseShapes(o.shapes)), known = all.flatMap(({ names }) => names);
  if (o.help) {
    const usage = `deno task bench [NAME…] [OPTIONS]\n\nNames (or their beginnings, or parts): ${known.join(", ")}`;
    console.log(helpText(usage, ["Options", table]));
    return 0;
  }
  const unknown = asked.find((name) => !known.some((k) => k.includes(name)));
  if (unknown !== undefined) throw new InputError(`${unknown}: no such benchmark; there are ${known.join(", ")}`);
  // Every benchmark loads the embedded policy from here.
  if (o.tiny) tinyPolicyUrl.href = pathToFileURL(`${o.tiny}/`).href;
  const { os, arch } = Deno.build, cores = navigator.hardwareConcurrency;
  const report: Report = { machine: { os, arch, cores, deno: Deno.version.deno }, adapter: null, rows: [] };
  const save = async () => {
    if (o.json) await writeAtomically(o.json, JSON.stringify(report, null, 2) + "\n");
  };
  let failures = 0;
  for (const backend of o.backend === "all" ? ["webgpu", "wasm"] : [o.backend]) {
    const wanted = all.filter((b) => namesOn(b, backend).some((name) => isAsked(name, asked, known)));
    if (wanted.length === 0 || !await start(backend, o.backend === "all", report)) continue;
    failures += await runOn(backend, wanted, { python: o.python }, async (rows) => {
      report.rows.push(...rows);
      await save();
    });
  }
  await save();
  console.log(formatTable([
    ["benchmark", "value", "unit", "ratio", "peer"],
    ...report.rows.map((
      r,
    ) => [r.name, r.value.toPrecision(4), r.unit, r.ratio ? `${r.ratio.toFixed(2)}×` : "", r.peer ?? ""]),
  ]));
  return failures > 0 ? 1 : 0;
}

if (import.meta.main) await runTask(bench);
