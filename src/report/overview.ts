/**
 * What a reader wants to know first: each method's figures before and after, then each run in a row.
 *
 * @module
 */
import { asCount, asNumber, asObject, asText } from "./checked.ts";
import { type Content, html, type Markup } from "./markup.ts";
import type { ReportRun } from "./run_reader.ts";
import { firstValue, lastValue, type Series } from "./series.ts";

/** A figure before and after training. */
interface Change {
  before?: number;
  after?: number;
}

/** From the final comparison if there is one, else from the evaluations in between; the base is that of step 0. */
function changeOf(run: ReportRun, measure: "accuracy" | "valid" | "hit", metric: string): Change {
  const final = (side: string) =>
    asNumber(
      asObject(
        asObject(asObject(asObject(run.result)?.[side])?.[run.settings.turns === 1 ? "oneTurn" : "grounded"])
          ?.[measure],
      )?.value,
    );
  const whole: Change = { before: final("base"), after: final("trained") };
  if (whole.after !== undefined) return whole;
  return { before: run.records.get(0)?.[metric], after: lastValue(run, metric, 1) };
}

/** A card a series: accuracy, valid boxes and hits before and after, over its runs. */
export function cards(series: readonly Series[]): Markup {
  return html`<div class="cards">${
    series.map((one, i) => {
      const accuracy = meanChange(one.runs.map((run) => changeOf(run, "accuracy", "eval/accuracy")));
      const valid = meanChange(one.runs.map((run) => changeOf(run, "valid", "eval/valid_ratio")));
      const hit = meanChange(one.runs.map((run) => changeOf(run, "hit", "eval/hit_ratio")));
      const seeds = one.runs.length === 1 ? "1 run" : `${one.runs.length} runs`;
      return html`<div class="card series-colour-${i % 8}"><h3>${one.name}</h3>
        <p class="figure">${accuracy.after === undefined ? "–" : percent(accuracy.after)}<small>${
        accuracy.before !== undefined && html`
          from ${percent(accuracy.before)}
        `
      }</small></p><p class="muted">held-out accuracy, ${seeds}</p>
        ${one.grounds && html`<p class="pairs">${pair("valid boxes", valid)}${pair("crops that hit", hit)}</p>`}</div>`;
    })
  }</div>`;
}

function meanChange(changes: readonly Change[]): Change {
  const mean = (values: (number | undefined)[]) => {
    const known = values.filter((value) => value !== undefined);
    return known.length > 0 ? known.reduce((a, b) => a + b, 0) / known.length : undefined;
  };
  return { before: mean(changes.map(({ before }) => before)), after: mean(changes.map(({ after }) => after)) };
}

function pair(name: string, { before, after }: Change): Content {
  if (after === undefined) return undefined;
  return html`<span>${name} <b>${before !== undefined && `${percent(before)} → `}${percent(after)}</b></span>`;
}

/** A row a run. */
export function runTable(series: readonly Series[]): Markup {
  const names = ["run", "method", "seed", "data", "steps", "accuracy", "valid boxes", "hits", "reward", "time"];
  const rows = series.flatMap((one, i) =>
    one.runs.map((run) => {
      const { settings } = run, planned = asCount(settings.steps), data = asObject(settings.data);
      const seconds = [...run.records.values()].reduce((sum, record) => sum + (record["timing_s/total"] ?? 0), 0);
      const reward: Change = { before: firstValue(run, "reward/mean"), after: lastValue(run, "reward/mean") };
      return html`<tr><th scope="row" title="${run.path}">${run.name}</th>
        <td><i class="swatch series-colour-${i % 8}"></i>${one.method}</td><td>${asCount(settings.seed)}</td>
        <td>${asText(data?.name) ?? asText(settings.data)}</td>
        <td>${run.steps}${
        planned !== undefined && planned !== run.steps && html`<span class="muted"> of ${planned}</span>`
      }</td>
        ${
        [
          changeOf(run, "accuracy", "eval/accuracy"),
          changeOf(run, "valid", "eval/valid_ratio"),
          changeOf(run, "hit", "eval/hit_ratio"),
          reward,
        ].map(changeCell)
      }<td>${seconds > 0 ? duration(seconds) : "–"}</td></tr>`;
    })
  );
  return html`
    <div class="scroll" tabindex="0" role="group" aria-label="runs">
      <table class="numbers">
        <thead>
          <tr>${names.map((name) => html`<th scope="col">${name}</th>`)}</tr>
        </thead>
        <tbody>${rows}</tbody>
      </table>
    </div>
    <p
      class="muted small">Before → after training on held-out items: the final comparison where there is one, else the base's and the
        last evaluation. Reward: the first step's and the mean of the last five.</p>
  `;
}

function changeCell({ before, after }: Change): Markup {
  if (after === undefined) return html`<td class="muted">–</td>`;
  return html`<td>${
    before !== undefined && html`
      <span class="muted">${ratio(before)} →</span>
    `
  }${ratio(after)}</td>`;
}

/** What is missing or damaged, run by run. */
export function problemList(runs: readonly ReportRun[], more: readonly string[]): Content {
  const told = runs.filter((run) => run.problems.length > 0);
  if (told.length === 0 && more.length === 0) return undefined;
  return html`
    <div class="problems" role="note">
      <h3>Not everything could be read</h3>
      <ul>${told.map((run) => html`<li><b>${run.name}</b>: ${run.problems.join("; ")}</li>`)}${more.map((problem) =>
        html`<li>${problem}</li>`
      )}</ul>
    </div>
  `;
}

/** Every setting of every run, folded away. */
export function settingsList(runs: readonly ReportRun[]): Markup {
  return html`<details><summary>All settings</summary>${
    runs.map((run) =>
      html`
        <h4>${run.name}</h4>
        <pre class="settings">${JSON.stringify({ ...run.settings, environment: run.environment }, null, 1)}</pre>
      `
    )
  }</details>`;
}

function percent(value: number): string {
  return `${(100 * value).toFixed(1)} %`;
}

function ratio(value: number): string {
  return value.toFixed(3);
}

function duration(seconds: number): string {
  return seconds < 90
    ? `${seconds.toFixed(0)} s`
    : seconds < 5400
    ? `${(seconds / 60).toFixed(1)} min`
    : `${(seconds / 3600).toFixed(1)} h`;
}
