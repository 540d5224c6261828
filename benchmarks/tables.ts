/**
 * Prints the results of experiments as Markdown, or puts them where they stand in a page, between `<!-- table NAME -->` and
 * `<!-- end NAME -->`:
 *
 * ```sh
 * deno run --allow-read benchmarks/tables.ts benchmarks/results/main.json
 * deno run --allow-read --allow-write benchmarks/tables.ts --into benchmarks/README.md benchmarks/results/*.json
 * ```
 *
 * @module
 */

import type { ExperimentResult, ResultRow } from "../src/experiments/result.ts";

/** .875; with a sign where it is a difference. */
function number(value: number | null, signed = false): string {
  if (value === null || !Number.isFinite(value)) return "–";
  const text = (Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(3)).replace(/^(-?)0\./, "$1.");
  return signed && value > 0 ? `+${text}` : text;
}

const line = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
const table = (head: readonly string[], body: readonly (readonly string[])[]) =>
  [line(head), line(head.map(() => "---")), ...body.map(line)].join("\n");

/** Whether `hit_ratio/two_turn` says of every method no more than `hit_ratio` does. Accuracies stay, whatever they are. */
function isRepeated(rows: readonly ResultRow[], metric: string): boolean {
  const [name, protocol] = metric.split("/");
  if (!protocol || name === "accuracy") return false;
  const meanOf = (method: string, metric: string) =>
    rows.find((row) => row.method === method && row.metric === metric)?.mean;
  return rows.filter((row) => row.metric === metric).every((row) => row.mean === meanOf(row.method, name));
}

/** One table a split: a row a method, a column a metric. */
function splitTable(results: ExperimentResult, split: string): string {
  const rows = results.rows.filter((row) => row.split === split);
  const methods = [...new Set(rows.map((row) => row.method))];
  const metrics = [...new Set(rows.map((row) => row.metric))].filter((metric) => !isRepeated(rows, metric));
  const body = methods.map((method) => [
    method,
    ...metrics.map((metric) => {
      const row = rows.find((r) => r.method === method && r.metric === metric);
      if (!row) return "";
      const spread = row.n > 1 && row.sd > 0 ? ` ± ${number(row.sd)}` : "";
      return `${number(row.mean)}${spread} [${number(row.ci95[0])}, ${number(row.ci95[1])}]`;
    }),
  ]);
  return table([`${split}`, ...metrics], body);
}

function comparisonTable({ comparisons }: ExperimentResult): string {
  const body = comparisons.map(({ a, b, metric, metricOfB, split, difference, ci95, p, test, effect }) => [
    `${a} − ${b}`,
    split,
    metricOfB ? `${metric} − ${metricOfB}` : metric,
    `${number(difference, true)} [${number(ci95[0], true)}, ${number(ci95[1], true)}]`,
    p === 0 ? "< 1e-300" : p < 1e-4 ? p.toExponential(0) : p.toPrecision(2),
    test,
    effect ? `${effect.name === "cohens-h" ? "h" : "d"} = ${number(effect.value)}` : "–",
  ]);
  return table(["", "split", "metric", "difference [95 %]", "p", "test", "effect"], body);
}

/** The commits that made the runs. */
function commitsOf({ runs, commit }: ExperimentResult): string {
  const all = [...new Set(runs.map((run) => run.commit ?? commit))];
  return all.map((each) => each?.slice(0, 7) ?? "unknown").join(", ");
}

/** What everything took that the tables rest on, runs that other experiments share included. */
function timeOf({ runs, evaluations }: ExperimentResult): string {
  const seconds = new Map([...runs, ...evaluations].map(({ path, seconds }) => [path, seconds]));
  const minutes = [...seconds.values()].reduce((sum, each) => sum + each, 0) / 60;
  return `${minutes.toFixed(0)} minutes of one core`;
}

/** The tables of one experiment. */
export function markdown(results: ExperimentResult): string {
  const splits = [...new Set(results.rows.map((row) => row.split))];
  return [
    `\`${results.command}\`, seeds ${results.seeds.join(", ")}, commit ${commitsOf(results)}, ${timeOf(results)}`,
    ...(results.complete ? [] : [
      `**Not complete**: ${results.missing.length} of its runs and evaluations are still to do; rows rest on what is.`,
    ]),
    ...splits.map((split) => splitTable(results, split)),
    ...(results.comparisons.length > 0 ? [comparisonTable(results)] : []),
  ].join("\n\n");
}

/**
 * A page with the tables put in.
 *
 * @throws {RangeError} if it has no place for them.
 */
export function withTables(page: string, results: ExperimentResult): string {
  const [start, end] = [`<!-- table ${results.name} -->`, `<!-- end ${results.name} -->`];
  const from = page.indexOf(start), to = page.indexOf(end, from);
  if (from < 0 || to < 0) throw new RangeError(`the page has no "${start}" with "${end}" after it`);
  return `${page.slice(0, from + start.length)}\n\n${markdown(results)}\n\n${page.slice(to)}`;
}

if (import.meta.main) {
  const [flag, page] = Deno.args, isInto = flag === "--into";
  const paths = Deno.args.slice(isInto ? 2 : 0);
  const read = async (path: string) => JSON.parse(await Deno.readTextFile(path)) as ExperimentResult;
  if (isInto) {
    let text = await Deno.readTextFile(page);
    for (const path of paths) text = withTables(text, await read(path));
    await Deno.writeTextFile(page, text);
  } else {
    for (const path of paths) console.log(`### ${(await read(path)).name}\n\n${markdown(await read(path))}\n`);
  }
}
