/**
 * Tables of experiments: what `benchmarks/results/*.json` holds, checked field by field, as HTML.
 *
 * @module
 */
import { asList, asNumber, asNumbers, asObject, asText, type Json } from "./checked.ts";
import { type Content, html, type Markup } from "./markup.ts";

/** A result file, or what is wrong with it. */
export type ResultFile = { name: string; value: Json } | { name: string; problem: string };

/**
 * Reads all result files of a folder, by name.
 *
 * @returns None if there is no such folder.
 */
export async function readResults(folder: string): Promise<ResultFile[]> {
  let names: string[];
  try {
    names = (await Array.fromAsync(Deno.readDir(folder))).map((entry) => entry.name);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return [];
    throw error;
  }
  const files: ResultFile[] = [];
  for (const name of names.filter((name) => name.endsWith(".json") && !name.startsWith(".")).sort()) {
    try {
      const value = asObject(JSON.parse(await Deno.readTextFile(`${folder}/${name}`)));
      const isResult = value && Array.isArray(value.rows) && Array.isArray(value.comparisons);
      files.push(
        isResult ? { name, value } : { name, problem: "has no rows and comparisons: it is no experiment's result" },
      );
    } catch (error) {
      files.push({ name, problem: error instanceof SyntaxError ? "is not JSON" : `cannot be read (${error})` });
    }
  }
  return files;
}

interface Row {
  method: string;
  split: string;
  metric: string;
  mean: number;
  sd?: number;
  ci95?: number[];
  n?: number;
}

/** The tables of a result. */
export function resultTables(file: ResultFile): Markup {
  if ("problem" in file) return html`<p class="problem"><b>${file.name}</b> ${file.problem}; it is left out.</p>`;
  const { name, value } = file;
  const rows = asList(value.rows).map(readRow).filter((row) => row !== undefined);
  const comparisons = asList(value.comparisons).map(asObject).filter((row) => row !== undefined);
  const dropped = asList(value.rows).length - rows.length, missing = asList(value.missing);
  const other = rows.filter((row) => row.metric.includes("/")),
    seeds = asList(value.seeds),
    commit = asText(value.commit)?.slice(0, 10);
  return html`
    <article class="result">
      <h3>${asText(value.name) ?? name}</h3>
      <p class="muted">${asText(value.about)}</p>
      ${splitTables(rows.filter((row) => !row.metric.includes("/")))}
      ${comparisons.length > 0 && comparisonTable(comparisons)}
      <p class="muted small">Mean ± standard deviation over seeds; 95 % intervals in brackets.
        ${seeds.length > 0 && html`Seeds ${seeds.join(", ")}.`} ${commit && html`Commit ${commit}.`}
        <code>${asText(value.command)}</code></p>
      ${other.length > 0 && html`<details><summary>asked in other ways</summary>${splitTables(other)}</details>`}
      ${missing.length > 0 &&
        html`<p class="problem">Not complete: ${missing.length} parts are missing, e.g. ${String(missing[0])}.</p>`}
      ${dropped > 0 && html`<p class="problem">${dropped} rows without method, metric or mean are left out.</p>`}
    </article>
  `;
}

function readRow(value: unknown): Row | undefined {
  const row = asObject(value), mean = asNumber(row?.mean);
  const [method, split, metric] = [row?.method, row?.split, row?.metric].map(asText);
  if (method === undefined || split === undefined || metric === undefined || mean === undefined) return undefined;
  return { method, split, metric, mean, sd: asNumber(row?.sd), ci95: asNumbers(row?.ci95, 2), n: asNumber(row?.n) };
}

function splitTables(rows: readonly Row[]): Markup[] {
  const splits = [...new Set(rows.map((row) => row.split))];
  return splits.map((split) => splitTable(rows.filter((row) => row.split === split), split));
}

/** Metrics down, methods across: there are more metrics than methods. The best of a row is bold where larger is better. */
function splitTable(rows: readonly Row[], split: string): Markup {
  const methods = [...new Set(rows.map((row) => row.method))], metrics = [...new Set(rows.map((row) => row.metric))];
  const cell = (metric: string, method: string): Content => {
    const row = rows.find((other) => other.metric === metric && other.method === method);
    if (!row) return html`<td class="muted">–</td>`;
    const best = Math.max(...rows.filter((other) => other.metric === metric).map((other) => other.mean));
    const isBest = row.mean === best && /accuracy|ratio|exact/.test(metric);
    const deviation = row.sd ? ` ± ${three(row.sd)}` : "";
    return html`<td title="${row.n && `n = ${row.n}`}">${
      isBest ? html`<b>${three(row.mean)}</b>` : three(row.mean)
    }${deviation}
      ${row.ci95 && html`<span class="interval">${interval(row.ci95)}</span>`}</td>`;
  };
  return html`
    <div class="scroll" tabindex="0" role="group" aria-label="table">
      <table class="numbers">
        <caption>${splitNames[split] ?? split}</caption>
        <thead>
          <tr><th scope="col"></th>${methods.map((method) => html`<th scope="col">${method}</th>`)}</tr>
        </thead>
        <tbody>${metrics.map((metric) =>
          html`<tr><th scope="row">${metric}</th>${methods.map((method) => cell(metric, method))}</tr>`
        )}
        </tbody>
      </table>
    </div>
  `;
}

const splitNames: Readonly<Record<string, string>> = { id: "in distribution", ood: "out of distribution" };

function comparisonTable(comparisons: readonly Json[]): Markup {
  const cells = comparisons.map((row) => {
    const [a, b, metric, split] = [row.a, row.b, row.metric, row.split].map((value) => asText(value) ?? "?");
    const other = asText(row.metricOfB), difference = asNumber(row.difference), ci95 = asNumbers(row.ci95, 2);
    const effect = asObject(row.effect), size = asNumber(effect?.value), p = asNumber(row.p);
    return html`
      <tr>
        <th scope="row">${a} − ${b}: ${metric}${other && ` − ${other}`}, ${splitNames[split] ?? split}</th>
        <td>${difference === undefined ? "–" : (difference > 0 ? "+" : "") + three(difference)}</td>
        <td>${ci95 ? interval(ci95) : "–"}</td>
        <td>${p === undefined ? "–" : probability(p)}</td>
        <td>${size === undefined ? "–" : `${asText(effect?.name) ?? ""} ${size.toFixed(2)}`}</td>
        <td class="muted">${asText(row.test)}</td>
      </tr>
    `;
  });
  return html`
    <div class="scroll" tabindex="0" role="group" aria-label="comparisons">
      <table class="numbers">
        <caption>differences on the same items</caption>
        <thead>
          <tr><th scope="col"></th>${["a − b", "95 %", "p", "effect", "test"].map((name) =>
            html`<th scope="col">${name}</th>`
          )}</tr>
        </thead>
        <tbody>${cells}</tbody>
      </table>
    </div>
  `;
}

function interval([low, high]: readonly number[]): string {
  return `[${three(low)}, ${three(high)}]`;
}

function three(value: number): string {
  return (Math.abs(value) < 100 ? value.toFixed(3) : value.toFixed(1)).replace("-", "−");
}

function probability(p: number): string {
  return p === 0 ? "< 1e-300" : p < 1e-3 ? p.toExponential(1) : p.toFixed(3);
}
