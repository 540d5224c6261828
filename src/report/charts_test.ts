import assert from "node:assert/strict";
import { type ChartSpec, drawChart, drawPhases } from "./charts.ts";
import { readRuns } from "./run_reader.ts";
import { groupRuns } from "./series.ts";
import { withFolder, writeRun } from "./testing.ts";

const spec: ChartSpec = { title: "Reward", about: "mean", unit: "number", metrics: [{ name: "reward/mean" }] };

Deno.test("a chart has a line a series, a band over seeds, and its values for the page's script", () =>
  withFolder(async (path) => {
    await writeRun(`${path}/a`);
    await writeRun(`${path}/b`, { seed: 1 });
    await writeRun(`${path}/c`, { method: "grpo" });
    const series = groupRuns((await readRuns([path])).runs);
    const chart = drawChart(spec, series, "chart-0")!, { text } = chart.markup;
    assert.equal(text.match(/class="series series-0"/g)!.length, 3, "band, line, dots");
    assert.equal(text.match(/class="series series-1"/g)!.length, 2, "line, dots");
    assert.match(text, /stroke="var\(--s1\)"/);
    assert.match(text, /aria-label="Reward by step: mgpo from 0\.25 at step 1 to 0\.75 at step 4; grpo /);
    assert.ok(!text.includes("NaN"));
    const [from, to, left, right] = chart.data.x;
    assert.deepEqual([from, to, left < right], [1, 4, true]);
    assert.deepEqual(chart.data.lines[0].points[0], [1, 0.25, 0.1667, 0.3333, 2]);
    assert.equal(drawChart({ ...spec, metrics: [{ name: "kl" }] }, series, "x"), undefined);
    const phases = drawPhases(series).map((markup) => markup.text);
    assert.equal(phases.length, 2);
    assert.equal(phases[0].match(/fill="var\(--p\d\)"/g)!.length, 4);
  }));

Deno.test("one step, and a metric that is always 0", () =>
  withFolder(async (path) => {
    await writeRun(`${path}/a`, { steps: 1, evaluations: [] });
    const series = groupRuns((await readRuns([path])).runs);
    series[0].runs[0].records.get(1)!;
    const flat = groupRuns([{ ...series[0].runs[0], records: new Map([[1, { "reward/mean": 0 }]]) }]);
    for (const one of [series, flat]) {
      const { text } = drawChart(spec, one, "chart-0")!.markup;
      assert.ok(!text.includes("NaN") && text.includes("<circle"));
    }
  }));
