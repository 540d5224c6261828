/**
 * Charts as SVG, drawn when the report is written: no script and no network are needed to see them. Colours are CSS variables, so
 * they follow the reader's light or dark mode.
 *
 * @module
 */
import { areaY, dot, lineY, parseHTML, plot, ruleY } from "../deps_report.ts";
import { html, Markup } from "./markup.ts";
import { curveOf, type CurvePoint, type Series } from "./series.ts";

/** A chart of one or more metrics by step. */
export interface ChartSpec {
  title: string;
  /** What it shows, in a sentence. */
  about: string;
  /** Metrics, with what tells their lines apart: the first is drawn solid, others dashed. */
  metrics: readonly { name: string; label?: string }[];
  /** Shares are drawn from 0 to 1. */
  unit: "share" | "number" | "tokens" | "nats" | "seconds";
  isLarge?: boolean;
}

/** What the page's script needs to read values off a chart. */
export interface ChartData {
  id: string;
  /** Steps at the left and right end, and where those are in the SVG's own units. */
  x: readonly [from: number, to: number, left: number, right: number];
  lines: {
    series: number;
    name: string;
    points: (readonly [step: number, mean: number, low: number, high: number, n: number])[];
  }[];
}

/** A chart ready to be put into the page. */
export interface Chart {
  markup: Markup;
  data: ChartData;
}

const DASHES = ["", "5 3", "1.5 3", "8 3 2 3"];

interface Line {
  series: number;
  metric: string;
  name: string;
  dash: string;
  points: CurvePoint[];
}

/**
 * Draws a chart.
 *
 * @returns Undefined if no run has the metrics.
 */
export function drawChart(spec: ChartSpec, series: readonly Series[], id: string): Chart | undefined {
  const lines: Line[] = series.flatMap((one, i) =>
    spec.metrics.flatMap(({ name, label }, m) => {
      const points = curveOf(one, name);
      return points.length > 0
        ? [{
          series: i,
          metric: name,
          name: label ? `${one.name}, ${label}` : one.name,
          dash: DASHES[m % DASHES.length],
          points,
        }]
        : [];
    })
  );
  if (lines.length === 0) return undefined;
  const width = spec.isLarge ? 560 : 380, height = spec.isLarge ? 300 : 210;
  const svg = plot({
    ...{ document: emptyDocument(), width, height, marginLeft: 44, marginRight: 12, marginTop: 14, marginBottom: 34 },
    style: { fontFamily: "inherit", fontSize: "11px", background: "none" },
    x: { label: "step", labelArrow: "none", labelAnchor: "right", ...stepDomain(lines) },
    y: { label: null, grid: true, nice: true, ...valueDomain(spec, lines), tickFormat: tickFormat(spec) },
    marks: [ruleY([0], { stroke: "currentColor", strokeOpacity: 0.25 }), ...lines.flatMap(marksOf)],
  });
  const scale = svg.scale("x")!, [from, to] = scale.domain as number[], [left, right] = scale.range as number[];
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${spec.title} by step: ${lines.map(summary).join("; ")}`);
  const keys = spec.metrics.map(({ name, label = "" }, i) => ({ label, dash: DASHES[i % DASHES.length], name }))
    .filter(({ name }) => lines.some((line) => line.metric === name));
  const markup = html`
    <figure class="chart${spec.isLarge ? " large" : ""}" id="${id}" tabindex="0" role="group" aria-label="${spec
      .title}">
      <figcaption><b>${spec.title}</b> <span>${spec.about}</span>${keys.length > 1 && dashKey(keys)}</figcaption>
      ${new Markup(svg.outerHTML)}
      <div class="readout" hidden></div>
    </figure>
  `;
  const data = lines.map(({ series, name, points }) => ({
    series,
    name,
    points: points.map(({ step, mean, low, high, n }) => [step, ...[mean, low, high].map(rounded), n] as const),
  }));
  return { markup, data: { id, x: [from, to, left, right], lines: data as ChartData["lines"] } };
}

/** Which metric is drawn how. */
function dashKey(keys: readonly { label: string; dash: string }[]): Markup {
  return html`<span class="dashes">${
    keys.map(({ label, dash }) =>
      html`<span><svg width="26" height="8" aria-hidden="true"><line x1="1" x2="25" y1="4" y2="4" stroke="currentColor" stroke-width="1.8" stroke-dasharray="${dash}"/></svg> ${label}</span>`
    )
  }</span>`;
}

function marksOf({ series, dash, points }: Line) {
  const colour = `var(--s${series % 8})`, className = `series series-${series}`;
  const several = points.some((point) => point.n > 1);
  return [
    ...several ? [areaY(points, { x: "step", y1: "low", y2: "high", fill: colour, fillOpacity: 0.16, className })] : [],
    lineY(points, {
      ...{ x: "step", y: "mean", stroke: colour, strokeWidth: 1.8, strokeLinejoin: "round", className },
      ...dash ? { strokeDasharray: dash } : {},
    }),
    // A few points would be lost in a line; many would hide it.
    ...points.length <= 25 ? [dot(points, { x: "step", y: "mean", fill: colour, r: 2.4, className })] : [],
  ];
}

/** Phases of a step, from the bottom of the stack to its top. */
const PHASES = [["timing_s/rollout", "sampling"], ["timing_s/update", "update"], [
  "timing_s/eval",
  "evaluation",
]] as const;

/**
 * Seconds of a step by what they were spent on, one chart a series, stacked.
 *
 * @returns Nothing for series without times.
 */
export function drawPhases(series: readonly Series[]): Markup[] {
  const most = Math.max(0, ...series.flatMap((one) => curveOf(one, "timing_s/total").map((point) => point.mean)));
  return series.flatMap((one, index) => {
    const totals = curveOf(one, "timing_s/total");
    if (totals.length === 0) return [];
    const base = totals.map(() => 0), layers: { step: number; y1: number; y2: number }[][] = [];
    for (const [metric] of PHASES) {
      const at = new Map(curveOf(one, metric).map((point) => [point.step, point.mean]));
      layers.push(totals.map(({ step }, i) => ({ step, y1: base[i], y2: base[i] += at.get(step) ?? 0 })));
    }
    layers.push(totals.map(({ step, mean }, i) => ({ step, y1: base[i], y2: Math.max(base[i], mean) })));
    const svg = plot({
      ...{
        document: emptyDocument(),
        width: 380,
        height: 190,
        marginLeft: 44,
        marginRight: 12,
        marginTop: 14,
        marginBottom: 34,
      },
      style: { fontFamily: "inherit", fontSize: "11px", background: "none" },
      x: { label: "step", labelArrow: "none", labelAnchor: "right", tickFormat: wholeSteps },
      y: { label: null, grid: true, domain: [0, most || 1], nice: true },
      marks: layers.map((layer, i) =>
        areaY(layer, { x: "step", y1: "y1", y2: "y2", fill: `var(--p${i})`, curve: "step" })
      ),
    });
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Seconds of a step by phase, ${one.name}`);
    return [html`
      <figure
        class="chart series series-${index}"><figcaption><b>Time by phase</b> <span>${one
          .name}: seconds of a step</span></figcaption>
      ${new Markup(svg.outerHTML)}</figure>
    `];
  });
}

/** The legend of {@linkcode drawPhases}. */
export function phaseLegend(): Markup {
  const names = [...PHASES.map(([, name]) => name), "the rest"];
  return html`<p class="legend">${
    names.map((name, i) => html`<span><i class="swatch phase-${i}"></i>${name}</span>`)
  }</p>`;
}

/** What Plot draws into. */
type PlotDocument = NonNullable<NonNullable<Parameters<typeof plot>[0]>["document"]>;

function emptyDocument(): PlotDocument {
  // Typed as a browser's window, whose types Deno doesn't have.
  return (parseHTML("<!doctype html><html><body></body></html>") as unknown as { document: PlotDocument }).document;
}

function stepDomain(lines: readonly Line[]) {
  const steps = lines.flatMap(({ points }) => points.map(({ step }) => step));
  const from = Math.min(...steps), to = Math.max(...steps);
  return { domain: from === to ? [from - 1, to + 1] : [from, to], tickFormat: wholeSteps };
}

function wholeSteps(step: number): string {
  return Number.isInteger(step) ? String(step) : "";
}

function valueDomain({ unit }: ChartSpec, lines: readonly Line[]) {
  if (unit === "share") return { domain: [0, 1] };
  const values = lines.flatMap(({ points }) => points.flatMap(({ low, high }) => [low, high]));
  const low = Math.min(0, ...values), high = Math.max(0, ...values);
  return { domain: low === high ? [low, low + 1] : [low, high] };
}

function tickFormat({ unit }: ChartSpec): ((value: number) => string) | undefined {
  return unit === "share"
    ? (value) => value === 0 || value === 1 ? String(value) : value.toFixed(1).slice(1)
    // Longer numbers would not fit beside the chart.
    : unit === "number"
    ? (value) => Math.abs(value) >= 10_000 ? `${value / 1000}k` : value.toLocaleString("en-US")
    : undefined;
}

/** For those who can't see the chart. */
function summary({ name, points }: Line): string {
  const first = points[0], last = points[points.length - 1];
  return `${name} from ${rounded(first.mean)} at step ${first.step} to ${rounded(last.mean)} at step ${last.step}`;
}

/** Four significant digits. */
function rounded(value: number): number {
  return Number(value.toPrecision(4));
}
