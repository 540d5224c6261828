import assert from "node:assert/strict";
import type { ReportRun } from "./run_reader.ts";
import { curveOf, firstValue, groupRuns, lastValue, metricNames } from "./series.ts";

function run(settings: Record<string, unknown>, values: readonly (number | undefined)[] = []): ReportRun {
  const records = new Map(values.map((x, i) => [i + 1, x === undefined ? {} : { "reward/mean": x }] as const));
  const path = JSON.stringify(settings);
  const rest = { environment: {}, rollouts: [], problems: [] };
  return { path, name: path, settings, records: records as ReportRun["records"], steps: values.length, ...rest };
}

Deno.test("runs that differ by seed and bookkeeping alone are one series; others are told apart by what differs", () => {
  const base = { method: "mgpo", turns: 2, lossOn: "all", data: { name: "signs/train", fingerprint: "f" } };
  const series = groupRuns([
    run({ ...base, method: "sft", turns: 1, seed: 0 }),
    run({ ...base, seed: 0, steps: 50, policy: "runs/sft-s0-0123456789ab/checkpoints/step-5" }),
    run({ ...base, seed: 1, steps: 60, policy: "runs/sft-s1-ba9876543210/checkpoints/step-5", evalEvery: 3 }),
    run({ ...base, seed: 1, lossOn: "last", policy: "tiny", maxPixels: 9 }),
    run({}),
  ]);
  assert.deepEqual(series.map(({ name, runs }) => [name, runs.length]), [
    ["mgpo · lossOn all · policy runs/sft-s*/checkpoints/step-5 · no maxPixels", 2],
    ["mgpo · lossOn last · maxPixels 9 · policy tiny", 1],
    ["sft", 1],
    ["unknown method", 1],
  ]);
  assert.deepEqual(series.map(({ grounds }) => grounds), [true, true, false, false]);
});

Deno.test("a curve has the mean and the extremes of the runs that have the step", () => {
  const [series] = groupRuns([run({ seed: 0 }, [0, 0.5, 1]), run({ seed: 1 }, [1, undefined])]);
  assert.deepEqual(curveOf(series, "reward/mean"), [
    { step: 1, mean: 0.5, low: 0, high: 1, n: 2 },
    { step: 2, mean: 0.5, low: 0.5, high: 0.5, n: 1 },
    { step: 3, mean: 1, low: 1, high: 1, n: 1 },
  ]);
  assert.deepEqual(curveOf(series, "kl"), []);
  assert.deepEqual([...metricNames(series.runs)], ["reward/mean"]);
  assert.deepEqual([firstValue(series.runs[0], "reward/mean"), lastValue(series.runs[0], "reward/mean", 2)], [0, 0.75]);
  assert.equal(lastValue(series.runs[0], "kl"), undefined);
});

Deno.test("long runs are averaged over neighbouring steps", () => {
  const [series] = groupRuns([run({ seed: 0 }, Array.from({ length: 1000 }, (_, i) => i + 1))]);
  const curve = curveOf(series, "reward/mean");
  assert.equal(curve.length, 334);
  assert.deepEqual(curve[0], { step: 3, mean: 2, low: 2, high: 2, n: 1 });
});
