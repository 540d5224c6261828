import assert from "node:assert/strict";
import { type Evaluation, type EvaluationItem, proportion, summarizeItems } from "../evaluate.ts";
import { comparisonTable, evaluationLine, evaluationTable, gapWarning, summaryOf } from "./report.ts";

/** Of `n` items the first `valid` have a valid box; `right` of those, and `lucky` of the others, are right. */
function evaluation(n: number, valid: number, right: number, lucky: number, turns = 2): Evaluation {
  const items: EvaluationItem[] = Array.from({ length: n }, (_, i) => ({
    sampleId: `s${i}`,
    expected: "K",
    answer: "K",
    correct: i < valid ? i < right : i - valid < lucky,
    ...(turns > 1 ? { valid: i < valid, hit: i < right } : {}),
  }));
  const fixed = { policy: "p", dataset: "d", fingerprint: "f", temperature: 1, seed: 0, skipped: [] };
  return { ...fixed, turns, ...summarizeItems(items), clipped: proportion(0, n), items };
}

Deno.test("gapWarning warns below 0.2 only", () => {
  assert.equal(gapWarning(evaluation(200, 100, 50, 25)), undefined, "gap 0.25");
  assert.match(gapWarning(evaluation(200, 100, 30, 25)) ?? "", /0\.050 \[-0\.\d+, 0\.\d+\] over 200 items; below 0\.2/);
  assert.equal(gapWarning(evaluation(200, 0, 0, 25)), undefined, "nothing to compare");
});

Deno.test("lines and tables say what was measured", () => {
  const base = evaluation(100, 25, 15, 15), trained = evaluation(100, 90, 80, 5), one = evaluation(100, 100, 25, 0, 1);
  assert.equal(
    evaluationLine("base", summaryOf(base)),
    "base: accuracy 0.300 [0.219, 0.396]  valid 0.250  hit 0.150  100 items",
  );
  assert.match(evaluationTable(base), /accuracy, valid box +0\.600 +0\.407 … 0\.766 +15\/25/);
  const table = comparisonTable(
    { grounded: summaryOf(base), oneTurn: summaryOf(one) },
    { grounded: summaryOf(trained), oneTurn: summaryOf(one) },
  );
  assert.match(table, /two-turn accuracy +0\.300 \[.*\] +0\.850 \[.*\] +\+0\.550\n/);
  assert.match(table, /one-turn accuracy +0\.250 \[.*\] +0\.250 \[.*\] +0\.000\n/);
});
