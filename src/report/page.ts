/**
 * The report as one HTML file that needs nothing else: styles, script, charts, rollouts and pictures are inside. Its own policy
 * (CSP) lets no other script run and nothing be loaded, whatever a model wrote.
 *
 * @module
 */
import { type Chart, type ChartSpec, drawChart, drawPhases, phaseLegend } from "./charts.ts";
import { html, Markup, scriptJson } from "./markup.ts";
import { cards, problemList, runTable, settingsList } from "./overview.ts";
import browserScript from "./page/browser.js" with { type: "text" };
import chartScript from "./page/charts.js" with { type: "text" };
import conversationScript from "./page/conversation.js" with { type: "text" };
import liveScript from "./page/live.js" with { type: "text" };
import mainScript from "./page/main.js" with { type: "text" };
import stateScript from "./page/state.js" with { type: "text" };
import style from "./page/style.css" with { type: "text" };
import { readResults, resultTables } from "./results.ts";
import { collectRollouts, type PageRollouts } from "./rollouts.ts";
import { readRuns, type ReportRun } from "./run_reader.ts";
import { groupRuns, metricNames, type Series } from "./series.ts";

/** What a report shows. */
export interface ReportOptions {
  /** Run folders, or folders of run folders. */
  runs: readonly string[];
  /** The folder of experiments' results. @default {none} */
  results?: string;
  /** The most rollouts of the browser. @default {4000} */
  rollouts?: number;
  /** Whether the page looks for a newer one where it was served from. @default {false} */
  live?: boolean;
  /** What the page is called. @default {"MGPO report"} */
  title?: string;
}

/** Rollouts of a page unless told otherwise. */
export const DEFAULT_ROLLOUTS = 4000;

/** The curves, in their order; those of the paper's Figures 5 and 6 first. */
const CURVES: readonly ChartSpec[] = [
  {
    ...{
      title: "Held-out accuracy",
      about: "each method in its own turns (the paper’s Figure 5)",
      unit: "share",
      isLarge: true,
    },
    metrics: [{ name: "eval/accuracy" }],
  },
  {
    ...{
      title: "Ratio of valid grounding",
      about: "held-out questions (the paper’s Figure 6)",
      unit: "share",
      isLarge: true,
    },
    metrics: [
      { name: "eval/valid_ratio", label: "in its own turns" },
      { name: "eval/valid_ratio/2_turns", label: "asked in two turns" },
    ],
  },
  { title: "Reward", about: "mean of a step", unit: "number", metrics: [{ name: "reward/mean" }] },
  {
    title: "Valid boxes while training",
    about: "in rollouts",
    unit: "share",
    metrics: [{ name: "grounding/valid_ratio" }],
  },
  {
    title: "Hit ratio",
    about: "training crops that show the target",
    unit: "share",
    metrics: [{ name: "grounding/hit_ratio" }],
  },
  {
    ...{ title: "Held-out hits", about: "crops that show the target", unit: "share" },
    metrics: [
      { name: "eval/hit_ratio", label: "in its own turns" },
      { name: "eval/hit_ratio/2_turns", label: "asked in two turns" },
    ],
  },
  {
    ...{ title: "Idle groups", about: "all rollouts earned the same: nothing to learn", unit: "share" },
    metrics: [{ name: "frac_reward_zero_std" }],
  },
  {
    ...{ title: "Reply length", about: "tokens by turn", unit: "tokens" },
    metrics: [1, 2, 3, 4].map((n) => ({ name: `completions/mean_length/turn_${n}`, label: `turn ${n}` })),
  },
  {
    title: "Replies cut off",
    about: "by the length limit",
    unit: "share",
    metrics: [{ name: "completions/clipped_ratio" }],
  },
  { title: "Entropy", about: "nats a token", unit: "nats", metrics: [{ name: "entropy" }] },
  { title: "KL", about: "to the base policy, nats a token", unit: "nats", metrics: [{ name: "kl" }] },
  {
    ...{ title: "Clip share", about: "tokens whose ratio was clipped", unit: "number" },
    metrics: [{ name: "clip_ratio/low", label: "low" }, { name: "clip_ratio/high", label: "high" }],
  },
  { title: "Gradient norm", about: "before clipping", unit: "number", metrics: [{ name: "grad_norm" }] },
  { title: "Loss", about: "of the policy; cross-entropy for SFT", unit: "number", metrics: [{ name: "policy_loss" }] },
  { title: "Crop area", about: "share of the picture", unit: "number", metrics: [{ name: "crop/area_ratio" }] },
  { title: "Speed", about: "tokens a second", unit: "number", metrics: [{ name: "tokens_per_s" }] },
];

/**
 * Writes a report.
 *
 * @returns The HTML, the runs with their problems, and the time that the page says of itself.
 * @throws {InputError} if no run can be read.
 */
export async function renderReport(
  options: ReportOptions,
): Promise<{ html: string; runs: ReportRun[]; written: string }> {
  const { runs, problems } = await readRuns(options.runs, options.live);
  const series = groupRuns(runs), rollouts = await collectRollouts(runs, options.rollouts ?? DEFAULT_ROLLOUTS);
  const results = options.results === undefined ? [] : await readResults(options.results);
  const charts = CURVES.flatMap((spec, i) => drawChart(spec, series, `chart-${i}`) ?? []);
  const title = options.title ?? "MGPO report",
    main = html`
      <main>
        <section id="overview"><h2>Overview</h2>${cards(series)}${problemList(runs, problems)}${runTable(
          series,
        )}${settingsList(runs)}</section>
        ${curveSection(charts, series, runs)}
        ${results.length > 0 &&
          html`<section id="tables"><h2>Experiments</h2>${results.map(resultTables)}</section>`}
        ${browserSection(rollouts)}
      </main>
    `;
  const script = await pageScript(), written = new Date().toISOString();
  const data = pageData(runs, series, charts, rollouts, { live: options.live ?? false, written });
  const policy = `default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src '${script.hash}'; ` +
    "connect-src 'self'; base-uri 'none'; form-action 'none'";
  const page = html`
    <!doctype html>
    <html lang="en">
      <head>
        <meta charset="utf-8">
        <meta http-equiv="Content-Security-Policy" content="${new Markup(policy)}">
        <meta name="viewport" content="width=device-width, initial-scale=1">
        <meta name="color-scheme" content="light dark">
        <title>${title}</title>
        <link rel="icon" href="data:,">
        <style>${new Markup(style)}</style>
      </head>
      <body>
    <a class="skip" href="#rollouts">Skip to the rollouts</a>
    <header><h1>${title}</h1><nav aria-label="Sections"><a href="#overview">Overview</a><a href="#curves">Curves</a>${results
          .length > 0 &&
      html`<a href="#tables">Experiments</a>`}<a href="#rollouts">Rollouts</a></nav><span class="muted" id="live" aria-live="polite"></span></header>
    ${main}
    <script type="application/json" id="data">${data}</script>
    ${[...rollouts.pictures].map(([name, { type, base64 }]) =>
      html`<script type="text/plain" data-picture="${name}" data-type="${type}">${new Markup(base64)}</script>\n`
    )}
    <script>${new Markup(script.text)}</script>
      </body>
    </html>
  `;
  return { html: page.text, runs, written };
}

function curveSection(charts: readonly Chart[], series: readonly Series[], runs: readonly ReportRun[]): Markup {
  const drawn = metricNames(runs), phases = drawPhases(series);
  const absent = CURVES.filter(({ metrics }) => !metrics.some(({ name }) => drawn.has(name))).map(({ title }) => title);
  const several = series.some((one) => one.runs.length > 1);
  return html`<section id="curves"><h2>Curves by step</h2>
    <div class="legend" role="group" aria-label="Methods shown">${
    series.map((one, i) =>
      html`
        <button type="button" class="toggle series-colour-${i % 8}" data-series="${i}"
          aria-pressed="true"><i class="swatch series-colour-${i % 8}"></i>${one.name}${one.runs.length > 1 && html`
            <span class="muted">× ${one.runs.length}</span>
          `}</button>
      `
    )
  }</div>
    <p class="muted small">${
    several
      ? "Lines are means over the runs of a method that differ only by their seed; bands span the smallest and the largest of them."
      : "Each line is one run."
  } Point at a chart, or focus it and press ← →, to read values.${
    absent.length > 0 && ` Not measured in these runs: ${absent.join(", ")}.`
  }</p>
    ${charts.length === 0 && html`<p class="problem">No run has metrics to draw.</p>`}
    <div class="charts">${charts.map((chart) => chart.markup)}</div>
    ${phases.length > 0 && html`<h3>Time by phase</h3>${phaseLegend()}<div class="charts">${phases}</div>`}
  </section>`;
}

/** The frame of the rollout browser; the script fills it. */
function browserSection({ rollouts, left }: PageRollouts): Markup {
  const select = (name: string, label: string) => html`<label>${label} <select id="filter-${name}"></select></label>`;
  return html`<section id="rollouts"><h2>Rollouts</h2>
    ${rollouts.length === 0 && html`<p class="problem">No rollouts were kept in these runs.</p>`}
    ${
    left > 0 && html`
      <p
        class="muted small">${rollouts.length} of ${rollouts.length +
          left} rollouts are in this file: held-out ones first, then those of the latest steps.</p>
    `
  }
    <noscript><p class="problem">The rollout browser needs JavaScript; the charts and tables above don’t.</p></noscript>
    <div class="browser" id="browser" hidden>
      <form class="filters" id="filters" aria-label="Filters">
        ${select("run", "Run")}${select("split", "Data")}${select("step", "Step")}${select("outcome", "Answer")}${
    select("grounding", "Box")
  }
        <label>Text <input id="filter-text" type="search" placeholder="question or reply" autocomplete="off"></label>
        <button type="button" id="clear">Clear</button><output id="count" aria-live="polite"></output>
      </form>
      <div class="panes">
        <div class="list" id="list" role="listbox" tabindex="0" aria-label="Rollouts: ↑ ↓ choose one, ← → go through its steps"><div id="rows"></div></div>
        <div class="detail" id="detail" aria-live="off"></div>
      </div>
    </div>
  </section>`;
}

function pageData(
  runs: readonly ReportRun[],
  series: readonly Series[],
  charts: readonly Chart[],
  { rollouts, texts }: PageRollouts,
  { live, written }: { live: boolean; written: string },
): Markup {
  return scriptJson({
    live,
    written,
    runs: runs.map((run) => {
      const at = series.findIndex((one) => one.runs.includes(run));
      return { name: run.name, series: at, method: series[at].name };
    }),
    series: series.map((one) => one.name),
    charts: charts.map((chart) => chart.data),
    ...{ rollouts, texts },
  });
}

/** The modules of the page in one script: imports and exports are only for the tests. */
async function pageScript(): Promise<{ text: string; hash: string }> {
  const parts = [stateScript, chartScript, conversationScript, browserScript, liveScript, mainScript];
  const bare = parts.map((text) => text.replace(/^import [^;]*;$/gm, "").replace(/^export /gm, ""));
  const text = `(() => {\n"use strict";\n${bare.join("\n")}\n})();`;
  if (/<\/script|<!--/i.test(text)) throw new Error("the page's script would end its element");
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return { text, hash: `sha256-${new Uint8Array(digest).toBase64()}` };
}

/** Names a report by what is in it. */
export function reportTitle(paths: readonly string[]): string {
  const name = paths.length === 1 ? paths[0].replace(/[/\\]+$/, "").split(/[/\\]/).at(-1) : undefined;
  return name ? `MGPO report: ${name}` : "MGPO report";
}
