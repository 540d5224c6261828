/**
 * The result of an experiment: tables with intervals from the evaluations that are there, as a file and for people.
 *
 * @module
 */
import type { EvaluationItem } from "../evaluate.ts";
import { readCommit } from "../run/environment.ts";
import type { ComparisonSpec, Experiment, Method } from "./experiment.ts";
import { readRecords } from "../report/run_reader.ts";
import { type ItemMetric, itemValues, standardMetrics } from "./metrics.ts";
import { type EvaluationPlan, isTrained, type Planner, type RunPlan } from "./plan.ts";
import { readEvaluation, readManifest, secondsOf } from "./runner.ts";
import {
  bootstrapInterval,
  cohensD,
  cohensH,
  discordant,
  type Interval,
  mcnemarOverSeeds,
  meanAndDeviation,
  type PairedT,
  pairedT,
  rowMeans,
  type Values,
} from "./statistics.ts";

/** A measured number of a method. */
export interface ResultRow {
  method: string;
  split: string;
  /** A metric of the method's own protocol, or `metric/protocol`. */
  metric: string;
  /** Over seeds. */
  mean: number;
  /** Sample standard deviation over seeds; 0 for one seed, and for a policy that no seed enters. */
  sd: number;
  /** Bootstrap over seeds and items. */
  ci95: Interval;
  /** Seeds. */
  n: number;
  /** Items of each seed. */
  items: number;
}

/** Two methods on the same items and seeds. */
export interface ResultComparison {
  a: string;
  b: string;
  metric: string;
  /** The metric of `b`, where it is another. */
  metricOfB?: string;
  split: string;
  /** a − b. */
  difference: number;
  /** Paired bootstrap over seeds and items. */
  ci95: Interval;
  /** Two-sided. */
  p: number;
  /**
   * `mcnemar-exact` on the items of each seed, of which `p` is the largest; `paired-t-items` on the items' means over seeds where
   * values aren't 0 and 1.
   */
  test: "mcnemar-exact" | "paired-t-items";
  /** Items that only `a` and only `b` got right, over all seeds. */
  discordant?: [onlyA: number, onlyB: number];
  /** Cohen's h for shares, d of the paired differences otherwise. */
  effect?: { name: "cohens-h" | "cohens-d"; value: number };
  /** The paired t test over seeds, which doubts what the items don't: another training. */
  overSeeds?: PairedT;
  /** Seeds. */
  n: number;
  items: number;
}

/** A training run behind the rows. */
export interface ResultRun {
  method: string;
  seed: number;
  settings: Record<string, unknown>;
  /** Its folder: the curves are its `metrics.jsonl`. */
  path: string;
  /** What it took without its evaluations. */
  seconds: number;
  hash: string;
  /** Of the program that made it; the result's own is that of the program which put the tables together. */
  commit: string | null;
  /** Makes it again. */
  command: string;
}

/** A metric of a method's runs, step by step. */
export interface ResultCurve {
  method: string;
  /** As in `metrics.jsonl`. */
  metric: string;
  /** Steps at which it was measured; 0 is before the first. */
  steps: number[];
  /** Over seeds, one a step. */
  mean: number[];
  sd: number[];
  /** Seeds. */
  n: number;
}

/** What `benchmarks/results/NAME.json` holds. */
export interface ExperimentResult {
  name: string;
  about: string;
  command: string;
  commit: string | null;
  /** The seeds that were asked for. */
  seeds: number[];
  /** Whether everything is there; if not, `missing` says what isn't, and rows rest on what is. */
  complete: boolean;
  missing: string[];
  rows: ResultRow[];
  comparisons: ResultComparison[];
  curves: ResultCurve[];
  runs: ResultRun[];
  /** What a training took without its evaluations, over seeds. Comparable only where the runs shared a machine in peace. */
  seconds: { method: string; mean: number; sd: number; n: number }[];
  /** The files behind the rows. */
  evaluations: { method: string; seed?: number; split: string; protocol: string; path: string; seconds: number }[];
  environment: Record<string, unknown>;
}

/** Values of a metric with the seeds and items that they belong to. */
interface Table {
  metric: ItemMetric;
  seeds: number[];
  values: Float64Array[];
  ids: string[];
}

/** Tables by method, split and name of the metric. */
type Tables = Map<string, Table>;
const tableKey = (method: string, split: string, metric: string) => [method, split, metric].join("\n");

/** Puts together what is there. */
export async function assembleResult(
  experiment: Experiment,
  planner: Planner,
  given: { seeds: readonly number[]; command: string; environment: Record<string, unknown> },
): Promise<ExperimentResult> {
  const metrics = [...standardMetrics, ...experiment.metrics ?? []];
  const tables: Tables = new Map(), missing: string[] = [];
  const runs: ResultRun[] = [], evaluations: ExperimentResult["evaluations"] = [];
  for (const seed of given.seeds) {
    for (const method of experiment.methods.filter(({ isStage }) => !isStage)) {
      const units = await planner.unitsOf(method, seed), unit = units.at(-1)!;
      for (const { run } of units) {
        if (!run || runs.some((other) => other.path === run.path && other.method === run.method)) continue;
        if (await isTrained(run)) runs.push(await runOf(run));
        else missing.push(`${run.method}, seed ${run.seed}: training`);
      }
      for (const plan of unit.evaluations) {
        const file = await readEvaluation(plan);
        if (!file) {
          missing.push(`${method.name}, seed ${seed}: ${plan.split}, ${plan.protocol}`);
          continue;
        }
        const { split, protocol, path } = plan, { seconds } = file;
        if (!evaluations.some((other) => other.path === path && other.method === method.name)) {
          evaluations.push({ method: method.name, ...unit.run ? { seed } : {}, split, protocol, path, seconds });
        }
        enter(tables, metrics, { method, seed, plan, items: file.evaluation.items });
      }
    }
  }
  return {
    name: experiment.name,
    about: experiment.about,
    command: given.command,
    commit: await readCommit(new URL("../../", import.meta.url)) ?? null,
    seeds: [...given.seeds],
    complete: missing.length === 0,
    missing,
    rows: rowsOf(experiment, tables),
    comparisons: experiment.comparisons.flatMap((spec) => comparisonsOf(spec, Object.keys(experiment.splits), tables)),
    curves: await curvesOf(experiment, runs),
    runs,
    seconds: secondsByMethod(experiment, runs),
    evaluations,
    environment: given.environment,
  };
}

/** Enters an evaluation's values under the names that its method gives them. */
function enter(
  tables: Tables,
  metrics: readonly ItemMetric[],
  { method, seed, plan, items }: { method: Method; seed: number; plan: EvaluationPlan; items: EvaluationItem[] },
): void {
  const ids = items.map((item) => item.sampleId), { split, protocol } = plan;
  for (const metric of metrics) {
    const values = itemValues(metric, items);
    if (!values) continue;
    const names = [`${metric.name}/${protocol}`];
    // Where a method's own protocol has no boxes, those of the first protocol that has stand for it.
    const bare = tables.get(tableKey(method.name, split, metric.name));
    if (protocol === method.own || !bare?.seeds.includes(seed)) names.push(metric.name);
    for (const name of names) {
      const key = tableKey(method.name, split, name);
      const table = tables.get(key) ?? { metric, seeds: [], values: [], ids };
      tables.set(key, table);
      const at = table.seeds.indexOf(seed);
      // Seeds whose items aren't the same can't be put into one table.
      if (table.ids.join() !== ids.join()) throw new Error(`${plan.path}: has other items than the seeds before it`);
      if (at >= 0) table.values[at] = values;
      else table.seeds.push(seed), table.values.push(values);
    }
  }
}

function rowsOf({ methods, splits }: Experiment, tables: Tables): ResultRow[] {
  const rows: ResultRow[] = [];
  for (const { name: method } of methods) {
    for (const split of Object.keys(splits)) {
      const prefix = tableKey(method, split, "");
      for (const [key, { metric: { finish = same }, values, ids }] of tables) {
        if (!key.startsWith(prefix)) continue;
        const ci95 = bootstrapInterval([values], ([mean]) => finish(mean));
        const overSeeds = meanAndDeviation(rowMeans(values).map(finish));
        rows.push({
          method,
          split,
          metric: key.slice(prefix.length),
          ...overSeeds,
          ci95,
          n: values.length,
          items: ids.length,
        });
      }
    }
  }
  return rows;
}

const same = (mean: number) => mean;

function comparisonsOf(spec: ComparisonSpec, splits: readonly string[], tables: Tables): ResultComparison[] {
  const { a, b, metrics = ["accuracy"], metricOfB } = spec;
  return splits.flatMap((split) =>
    metrics.flatMap((metric) => {
      const first = tables.get(tableKey(a, split, metric)),
        second = tables.get(tableKey(b, split, metricOfB ?? metric));
      if (!first || !second || first.ids.join() !== second.ids.join()) return [];
      const seeds = first.seeds.filter((seed) => second.seeds.includes(seed));
      if (seeds.length === 0) return [];
      const pick = (table: Table) => seeds.map((seed) => table.values[table.seeds.indexOf(seed)]);
      const names = { a, b, metric, ...metricOfB ? { metricOfB } : {}, split };
      return [{
        ...names,
        ...compare(pick(first), pick(second), first.metric),
        n: seeds.length,
        items: first.ids.length,
      }];
    })
  );
}

function compare(a: Values, b: Values, { finish = same, isBinary }: ItemMetric) {
  const [meansA, meansB] = [rowMeans(a).map(finish), rowMeans(b).map(finish)];
  const bySeed = meansA.map((value, i) => value - meansB[i]);
  const { mean: difference } = meanAndDeviation(bySeed);
  const ci95 = bootstrapInterval([a, b], ([x, y]) => finish(x) - finish(y));
  const overSeeds = pairedT(bySeed);
  if (isBinary) {
    const split = discordant(a, b), mean = (values: number[]) => meanAndDeviation(values).mean;
    const value = cohensH(mean(meansA), mean(meansB));
    const effect = { name: "cohens-h" as const, value };
    return {
      difference,
      ci95,
      p: mcnemarOverSeeds(a, b),
      test: "mcnemar-exact" as const,
      discordant: split,
      effect,
      overSeeds,
    };
  }
  const byItem = Array.from(a[0], (_, i) => a.reduce((sum, row, s) => sum + row[i] - b[s][i], 0) / a.length);
  const value = cohensD(byItem);
  return {
    ...{ difference, ci95, p: pairedT(byItem)?.p ?? 1, test: "paired-t-items" as const, overSeeds },
    ...value === undefined ? {} : { effect: { name: "cohens-d" as const, value } },
  };
}

async function runOf(run: RunPlan): Promise<ResultRun> {
  const { method, seed, path, hash, args } = run, { settings = {}, environment } = await readManifest(run) ?? {};
  const command = `deno task train ${args.join(" ")}`;
  const commit = environment?.commit as string | null | undefined ?? null;
  return { method, seed, settings, path, seconds: await secondsOf(path, false), hash, commit, command };
}

/** Metrics that curves show, each also as `metric/N_turns`. */
const CURVES = ["reward/mean", "grounding/valid_ratio", "eval/accuracy", "eval/valid_ratio", "eval/hit_ratio"];

/** The runs' metrics by step, over the seeds that have them. */
async function curvesOf({ methods }: Experiment, runs: readonly ResultRun[]): Promise<ResultCurve[]> {
  const curves: ResultCurve[] = [];
  for (const { name: method } of methods.filter(({ isStage }) => !isStage)) {
    const own = runs.filter((run) => run.method === method);
    const records = await Promise.all(own.map(({ path }) => readRecords(path)));
    const names = new Set(records.flatMap((record) => [...record.values()].flatMap(Object.keys)));
    for (const metric of [...names].filter((name) => CURVES.includes(name.replace(/\/\d+_turns$/, ""))).sort()) {
      const steps = [...new Set(records.flatMap((record) => [...record.keys()]))].sort((a, b) => a - b)
        .filter((step) => records.every((record) => record.get(step)?.[metric] !== undefined));
      if (steps.length === 0) continue;
      const points = steps.map((step) => meanAndDeviation(records.map((record) => record.get(step)![metric])));
      const [mean, sd] = (["mean", "sd"] as const).map((key) => points.map((point) => Number(point[key].toFixed(5))));
      curves.push({ method, metric, steps, mean, sd, n: own.length });
    }
  }
  return curves;
}

function secondsByMethod({ methods }: Experiment, runs: readonly ResultRun[]): ExperimentResult["seconds"] {
  return methods.flatMap(({ name: method }) => {
    const seconds = runs.filter((run) => run.method === method).map((run) => run.seconds);
    return seconds.length > 0 ? [{ method, ...meanAndDeviation(seconds), n: seconds.length }] : [];
  });
}
