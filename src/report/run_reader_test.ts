import assert from "node:assert/strict";
import { InputError } from "../run/errors.ts";
import { readRuns } from "./run_reader.ts";
import { withFolder, writeRun } from "./testing.ts";

Deno.test("a whole run is read without a complaint; the base's evaluation is step 0", () =>
  withFolder(async (path) => {
    await writeRun(`${path}/a`);
    const { runs: [run], problems } = await readRuns([`${path}/a/`]);
    assert.deepEqual([problems, run.problems, run.name, run.steps], [[], [], "a", 4]);
    assert.deepEqual([...run.records.keys()], [0, 1, 2, 3, 4]);
    assert.equal(run.records.get(0)!["eval/accuracy"], 0);
    assert.equal(run.rollouts.length, 3 * 3 + 2 * 2);
    assert.deepEqual(run.rollouts[0].split, "heldout");
  }));

Deno.test("what is missing, damaged or of another version is told, and the rest is read", () =>
  withFolder(async (path) => {
    await writeRun(`${path}/a`, { planned: 9 });
    const metrics = `${path}/a/metrics.jsonl`, lines = (await Deno.readTextFile(metrics)).split("\n");
    await Deno.writeTextFile(
      metrics,
      [lines[0], "{broken", "[1]", '{"reward/mean": 1}', lines[3], '{"step": 5, "rew'].join("\n"),
    );
    const rollouts = `${path}/a/rollouts/heldout-step-2.jsonl`, kept = (await Deno.readTextFile(rollouts)).split("\n");
    await Deno.writeTextFile(rollouts, [kept[0].replace('"format":2', '"format":1'), "nonsense", kept[2]].join("\n"));
    await Deno.writeTextFile(`${path}/a/evaluations/step-2.json`, "");
    await Deno.writeTextFile(`${path}/a/result.json`, "null");
    await Deno.writeTextFile(`${path}/a/evaluations/step-0-2-turns.json`, '{"step": 0, "valid": {"value": 0.25}}');
    const { runs: [run] } = await readRuns([`${path}/a`]);
    assert.equal(run.records.get(0)!["eval/valid_ratio/2_turns"], 0.25);
    assert.deepEqual(run.problems, [
      "metrics.jsonl:2 is not a JSON object",
      "metrics.jsonl:3 is not a JSON object",
      "metrics.jsonl:6 is not a JSON object",
      "1 more line of that kind",
      "metrics.jsonl has no line for 2 steps (2, 3)",
      "evaluations/step-2.json is not a JSON object; it is left out",
      "not finished: 4 of 9 steps are there",
      "result.json is not a JSON object; the final comparison is left out",
      "rollouts/heldout-step-2.jsonl:2 is not a JSON object",
      "rollouts of another version (heldout-step-2.jsonl; expected format 2): what they lack is left out",
    ]);
    assert.deepEqual([...run.records.keys()], [0, 1, 4]);
  }));

Deno.test("a folder with rollouts alone is a run too; without settings it says so", () =>
  withFolder(async (path) => {
    await writeRun(`${path}/a`);
    await Deno.remove(`${path}/a/run.json`);
    await Deno.remove(`${path}/a/metrics.jsonl`);
    const { runs: [run] } = await readRuns([`${path}/a`]);
    assert.deepEqual(run.problems, ["run.json is missing", "metrics.jsonl is missing"]);
    assert.equal(run.rollouts.length, 13);
  }));

Deno.test("folders of runs, runs of the same name, and folders that are none", () =>
  withFolder(async (path) => {
    await writeRun(`${path}/x/s0`);
    await writeRun(`${path}/x/s10`);
    await writeRun(`${path}/x/s2`);
    await writeRun(`${path}/y/s0`);
    await Deno.mkdir(`${path}/z`);
    const { runs, problems } = await readRuns([`${path}/x`, `${path}/y/s0`, `${path}/z`, `${path}/x/s0`]);
    assert.deepEqual(runs.map((run) => run.name), ["x/s0", "s2", "s10", "y/s0"]);
    assert.deepEqual(problems, [`${path}/z is not there or is empty`]);
    await Deno.writeTextFile(`${path}/z/x.txt`, "");
    const none = readRuns([`${path}/z`, `${path}/nowhere`]);
    await assert.rejects(
      none,
      (error: Error) =>
        error instanceof InputError && error.message.startsWith("no run can be read: ") &&
        error.message.includes("z is not a run folder") && error.message.includes("nowhere is not there"),
    );
  }));
