/**
 * Do runs with different seeds agree? Reads finished run folders and prints a row each, then mean and standard deviation:
 *
 * ```sh
 * deno run --allow-read benchmarks/seeds.ts runs/mgpo-signs-s0 runs/mgpo-signs-s1 runs/mgpo-signs-s2
 * ```
 *
 * @module
 */
import { formatRatio, formatTable } from "../src/run/progress.ts";

interface Final {
  grounded: Measured;
  oneTurn: Measured;
}
interface Measured {
  accuracy: { value: number };
  valid?: { value: number };
  hit?: { value: number };
}

/** Mean of a metric over steps `from` to `to` (from 1; negative counts from the end). */
function meanOf(steps: Record<string, number>[], name: string, from: number, to?: number): number {
  const values = steps.slice(from, to).map((s) => s[name]).filter((v) => v !== undefined);
  return values.reduce((a, b) => a + b, 0) / values.length;
}

const columns = [
  "valid, step 1",
  "valid, last 5",
  "two-turn, base",
  "two-turn, trained",
  "one-turn, base",
  "one-turn, trained",
  "hit, trained",
  "seconds a step",
];

async function row(folder: string): Promise<number[]> {
  const lines = (await Deno.readTextFile(`${folder}/metrics.jsonl`)).trim().split("\n");
  const steps = lines.map((line) => JSON.parse(line) as Record<string, number>);
  const { base, trained } = JSON.parse(await Deno.readTextFile(`${folder}/result.json`)) as Record<string, Final>;
  return [
    meanOf(steps, "grounding/valid_ratio", 0, 1),
    meanOf(steps, "grounding/valid_ratio", -5),
    base.grounded.accuracy.value,
    trained.grounded.accuracy.value,
    base.oneTurn.accuracy.value,
    trained.oneTurn.accuracy.value,
    trained.grounded.hit?.value ?? NaN,
    meanOf(steps, "timing_s/rollout", 0) + meanOf(steps, "timing_s/update", 0),
  ];
}

const show = (value: number) => Number.isFinite(value) ? formatRatio(value) : "–";
const rows = await Promise.all(Deno.args.map(row));
const mean = columns.map((_, c) => rows.reduce((s, r) => s + r[c], 0) / rows.length);
const deviation = columns.map((_, c) =>
  rows.length < 2 ? NaN : Math.sqrt(rows.reduce((s, r) => s + (r[c] - mean[c]) ** 2, 0) / (rows.length - 1))
);
console.log(formatTable([
  ["", ...columns],
  ...rows.map((r, i) => [Deno.args[i].replace(/\/$/, "").split("/").at(-1)!, ...r.map(show)]),
  ["mean", ...mean.map(show)],
  ["standard deviation", ...deviation.map(show)],
]));
