/**
 * `deno task bench [NAME…] [--json FILE]`: runs the benchmarks and prints a table.
 *
 * @module
 */
import type { Benchmark, Row } from "../benchmarks/benchmark.ts";
import { decode } from "../benchmarks/decode.ts";
import { step } from "../benchmarks/step.ts";
import { update } from "../benchmarks/update.ts";
import { chooseBackend, describeBackend } from "../src/gpu/backend.ts";
import { InputError } from "../src/run/errors.ts";
import { helpText, optionTable, parseCommandLine, resolveOptions } from "../src/run/options.ts";
import { formatTable } from "../src/run/progress.ts";
import { writeAtomically } from "../src/run/run_folder.ts";
import { runTask } from "../src/run/tasks.ts";

const benchmarks: readonly Benchmark[] = [decode, update, step];

const table = optionTable({
  json: { kind: "string", value: "FILE", defaultText: "none", help: "write machine, adapter and rows there" },
  backend: {
    kind: "choice",
    choices: ["all", "webgpu", "wasm"],
    default: "all",
    help: "which backends to measure; all leaves out webgpu where there is no adapter",
  },
  python: {
    kind: "string",
    value: "PATH",
    default: "python3",
    help: "the Python with torch and transformers, for step/transformers; left out where there is none",
  },
  help: { kind: "boolean", default: false, help: "show this help" },
});

/** The names that a benchmark has rows for on a backend. */
function namesOn({ names, backends }: Benchmark, backend: string): readonly string[] {
  if (backends) return backends.includes(backend) ? names : [];
  return names.filter((name) => name.includes(backend));
}

function machine(): Record<string, unknown> {
  return { os: Deno.build.os, arch: Deno.build.arch, cores: navigator.hardwareConcurrency, deno: Deno.version.deno };
}

await runTask(async (args) => {
  const names = args.slice(0, args.findIndex((a) => a.startsWith("-")) >>> 0);
  const o = resolveOptions(table, parseCommandLine(table, args.slice(names.length)));
  const known = benchmarks.flatMap((b) => b.names);
  if (o.help) {
    console.log(
      helpText(`deno task bench [NAME…] [OPTIONS]\n\nNames (or parts of them): ${known.join(", ")}`, [
        "Options",
        table,
      ]),
    );
    return 0;
  }
  for (const name of names) {
    if (!known.some((k) => k.includes(name))) {
      throw new InputError(`${name}: no such benchmark; there are ${known.join(", ")}`);
    }
  }
  const rows: Row[] = [];
  let adapter: unknown = null;
  for (const backend of o.backend === "all" ? ["wasm", "webgpu"] : [o.backend]) {
    const wanted = benchmarks.filter((b) =>
      namesOn(b, backend).some((n) => names.length === 0 || names.some((name) => n.includes(name)))
    );
    if (wanted.length === 0) continue;
    try {
      const choice = await chooseBackend(backend);
      console.log(describeBackend(choice));
      if (choice.adapter) adapter = choice.adapter;
    } catch (error) {
      if (o.backend !== "all" || !(error instanceof InputError)) throw error;
      console.log(`${backend} left out: ${error.message}`);
      continue;
    }
    for (const benchmark of wanted) {
      console.log(`running ${namesOn(benchmark, backend).join(", ")}…`);
      rows.push(...await benchmark.run(backend, console.log, { python: o.python }));
    }
  }
  console.log(formatTable([
    ["benchmark", "value", "unit", "ratio", "peer"],
    ...rows.map((r) => [r.name, r.value.toPrecision(4), r.unit, r.ratio ? `${r.ratio.toFixed(2)}×` : "", r.peer ?? ""]),
  ]));
  if (o.json) await writeAtomically(o.json, JSON.stringify({ machine: machine(), adapter, rows }, null, 2) + "\n");
  return 0;
});
