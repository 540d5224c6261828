/**
 * A result for people: a table for each split, and the comparisons.
 *
 * @module
 */
import { formatRatio, formatTable } from "../run/progress.ts";
import type { ExperimentResult, ResultComparison } from "./result.ts";

/** The tables of a result, and what is missing. */
export function resultText(result: ExperimentResult): string {
  const parts = [...new Set(result.rows.map((row) => row.split))].map((split) => splitTable(result, split));
  if (result.comparisons.length > 0) parts.push(comparisonTable(result.comparisons));
  if (result.seconds.length > 0) {
    const seconds = result.seconds.map(({ method, mean }) => `${method} ${mean.toFixed(0)} s`);
    parts.push(`training without evaluations: ${seconds.join(", ")}`);
  }
  parts.push("95 % intervals in brackets: bootstrap over seeds and items; ± standard deviation over seeds");
  if (!result.complete) {
    const shown = result.missing.slice(0, 5).join("; "), more = result.missing.length - 5;
    parts.push(`not complete; missing: ${shown}${more > 0 ? `; and ${more} more` : ""}`);
  }
  return parts.join("\n\n");
}

function splitTable({ rows, name }: ExperimentResult, split: string): string {
  const here = rows.filter((row) => row.split === split), metrics = [...new Set(here.map((row) => row.metric))];
  const cells = [...new Set(here.map((row) => row.method))].map((method) => [
    method,
    ...metrics.map((metric) => {
      const row = here.find((other) => other.method === method && other.metric === metric);
      if (!row) return "–";
      const deviation = row.n > 1 && row.sd > 0 ? ` ±${formatRatio(row.sd)}` : "";
      return `${formatRatio(row.mean)}${deviation} ${bracket(row.ci95)}`;
    }),
  ]);
  // Metrics down, methods across: there are more metrics than methods.
  const columns = [[`${name}, ${split}`, ...metrics], ...cells];
  return formatTable(columns[0].map((_, i) => columns.map((column) => column[i])));
}

function comparisonTable(comparisons: readonly ResultComparison[]): string {
  return formatTable([
    ["a − b", "difference", "95 %", "p", "effect", "n"],
    ...comparisons.map(({ a, b, metric, metricOfB, split, difference, ci95, p, effect, n, items }) => [
      `${a} − ${b}: ${metric}${metricOfB ? ` − ${metricOfB}` : ""}, ${split}`,
      (difference > 0 ? "+" : "") + formatRatio(difference),
      bracket(ci95),
      formatP(p),
      effect ? `${effect.name === "cohens-h" ? "h" : "d"} ${effect.value.toFixed(2)}` : "–",
      `${n} × ${items}`,
    ]),
  ]);
}

function bracket([low, high]: readonly [number, number]): string {
  return `[${formatRatio(low)}, ${formatRatio(high)}]`;
}

function formatP(p: number): string {
  return p === 0 ? "< 1e-300" : p < 1e-3 ? p.toExponential(1) : p.toFixed(3);
}
