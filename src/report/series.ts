/**
 * Runs that differ by nothing but their seed are one series: a line with a band. This file says which those are, and works out
 * the lines.
 *
 * @module
 */
import { asNumber, asObject, asText, type Json } from "./checked.ts";
import type { ReportRun } from "./run_reader.ts";

/** Runs of the same method and settings. */
export interface Series {
  /** The method, with the settings that tell it from other series of that method. */
  name: string;
  method: string;
  /** Whether its conversations ground before they answer. */
  grounds: boolean;
  runs: ReportRun[];
}

/** What a curve shows at one step. */
export interface CurvePoint {
  step: number;
  /** Over the runs that have it. */
  mean: number;
  /** The least and the greatest of them. */
  low: number;
  high: number;
  /** How many. */
  n: number;
}

/** Settings that say how a run was watched or computed, not what was trained. */
const BOOKKEEPING = new Set([
  ...[
    "seed",
    "steps",
    "evalEvery",
    "evalItems",
    "evalBatch",
    "baseEval",
    "finalItems",
    "checkpointEvery",
    "saveRollouts",
  ],
  ...["backend", "kernels", "tokensPerPass", "gradientCheckpointing", "heldoutShare", "fingerprint", "heldOut"],
]);
/** The order of methods in legends and tables. */
const METHODS = ["mgpo", "grpo", "sft"];

/** Groups runs into series: methods in their order, in the order of the runs otherwise. */
export function groupRuns(runs: readonly ReportRun[]): Series[] {
  const groups = new Map<string, { method: string; settings: Map<string, string>; runs: ReportRun[] }>();
  for (const run of runs) {
    const settings = decidingSettings(run.settings);
    const method = asText(run.settings.method) ?? "unknown method";
    const key = JSON.stringify([method, ...settings]);
    const group = groups.get(key) ?? { method, settings, runs: [] };
    groups.set(key, group);
    group.runs.push(run);
  }
  const rank = (method: string) => (METHODS.indexOf(method) + METHODS.length + 1) % (METHODS.length + 1);
  const ordered = [...groups.values()].sort((a, b) => rank(a.method) - rank(b.method));
  return ordered.map(({ method, settings, runs }) => {
    const rivals = ordered.filter((other) => other.method === method).map((other) => other.settings);
    const keys = [...settings.keys()].filter((key) => rivals.some((other) => other.get(key) !== settings.get(key)));
    const missing = rivals.flatMap((other) => [...other.keys()]).filter((key) => !settings.has(key));
    const told = [...keys.map((key) => `${key} ${settings.get(key)}`), ...new Set(missing.map((key) => `no ${key}`))];
    const shown = told.length > 4 ? [...told.slice(0, 4), "…"] : told;
    const turns = asNumber(runs[0].settings.turns) ?? 1;
    return { name: [method, ...shown].join(" · "), method, grounds: turns > 1, runs };
  });
}

/** What was trained, as text by dotted name, in the order of the names. */
function decidingSettings(settings: Json): Map<string, string> {
  const out = new Map<string, string>();
  const add = (value: unknown, name: string, key: string) => {
    const inner = asObject(value);
    if (BOOKKEEPING.has(key) || key === "method" && name === key) return;
    if (inner) { for (const [k, v] of Object.entries(inner)) add(v, name ? `${name}.${k}` : k, k); }
    else if (value !== undefined && value !== null) out.set(name, plain(name, value));
  };
  add(settings, "", "");
  return new Map([...out].sort(([a], [b]) => a < b ? -1 : 1));
}

function plain(name: string, value: unknown): string {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  // An experiment's stage has one policy a seed.
  return name === "policy" ? text.replace(/-s\d+(?=-|\/|$)/g, "-s*").replace(/-[0-9a-f]{8,}(?=\/|$)/g, "") : text;
}

/** Points of a curve beyond this many are averaged over neighbouring steps. */
const MOST_POINTS = 400;

/**
 * A metric by step, over the runs of a series that have it.
 *
 * @returns Empty if none has it.
 */
export function curveOf({ runs }: Series, metric: string): CurvePoint[] {
  const last = Math.max(0, ...runs.flatMap((run) => [...run.records.keys()]));
  const width = Math.max(1, Math.ceil(last / MOST_POINTS)), bins = new Map<number, number[]>();
  for (const run of runs) {
    const sums = new Map<number, { total: number; steps: number[] }>();
    for (const [step, record] of run.records) {
      const value = record[metric];
      if (value === undefined) continue;
      const at = Math.ceil(step / width), bin = sums.get(at) ?? { total: 0, steps: [] };
      sums.set(at, bin);
      bin.total += value;
      bin.steps.push(step);
    }
    for (const [at, { total, steps }] of sums) bins.set(at, [...bins.get(at) ?? [], total / steps.length]);
  }
  return [...bins].sort(([a], [b]) => a - b).map(([at, values]) => ({
    step: at * width,
    mean: values.reduce((a, b) => a + b, 0) / values.length,
    low: Math.min(...values),
    high: Math.max(...values),
    n: values.length,
  }));
}

/** Names of all metrics that any run has. */
export function metricNames(runs: readonly ReportRun[]): Set<string> {
  return new Set(runs.flatMap((run) => [...run.records.values()].flatMap((record) => Object.keys(record))));
}

/**
 * The mean of a run's last values of a metric.
 *
 * @param count How many. @default {5}
 * @returns Undefined if there is none.
 */
export function lastValue(run: ReportRun, metric: string, count = 5): number | undefined {
  const values = [...run.records.values()].flatMap((record) => record[metric] ?? []).slice(-count);
  return values.length > 0 ? values.reduce((a, b) => a + b, 0) / values.length : undefined;
}

/** The first value of a metric. */
export function firstValue(run: ReportRun, metric: string): number | undefined {
  for (const record of run.records.values()) if (record[metric] !== undefined) return record[metric];
  return undefined;
}
