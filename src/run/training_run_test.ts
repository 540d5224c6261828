import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { InputError } from "./errors.ts";
import { runEvaluation } from "./evaluation_run.ts";
import { isTiming, type StepRecord } from "./metrics.ts";
import { Progress } from "./progress.ts";
import { runTraining } from "./training_run.ts";

const golden = fileURLToPath(new URL("../../fixtures/goldens/models/tiny", import.meta.url));
const source = ["--policy", golden, "--max-pixels", "3136", "--backend", "wasm"];
// With sft even the untrained golden policy has something to learn.
const settings =
  "--method sft --prompts 2 --steps 5 --eval-every 2 --eval-items 2 --final-items 2 --checkpoint-every 2 --max-new-tokens 3,2";

/** Trains in this process; `crashAt` is a text in a line of output at which it ends as if killed. */
async function train(folder: string, extra: string[] = [], crashAt?: string): Promise<string> {
  let out = "";
  const write = (text: string) => {
    out += text;
    if (crashAt && text.includes(crashAt)) throw new Error("killed");
  };
  const args = [...source, ...settings.split(" "), "--run", folder, ...extra];
  try {
    assert.equal(await runTraining(args, new Progress({ isTerminal: false, write })), 0);
  } catch (error) {
    if (!crashAt || !(error instanceof Error) || error.message !== "killed") throw error;
  }
  return out;
}

async function metrics(folder: string): Promise<StepRecord[]> {
  const lines = (await Deno.readTextFile(`${folder}/metrics.jsonl`)).trimEnd().split("\n");
  return lines.map((line) => {
    const record: StepRecord = JSON.parse(line);
    return Object.fromEntries(Object.entries(record).filter(([name]) => !isTiming(name))) as StepRecord;
  });
}

Deno.test("a run that is stopped and resumed again and again ends like one that isn't", async () => {
  const root = await Deno.makeTempDir();
  try {
    const whole = `${root}/whole`, parts = `${root}/parts`, turns = ["--eval-turns", "1,2"];
    const out = await train(whole, turns);
    assert.match(out, /^backend wasm, \d+ threads?: asked for\n/);
    assert.match(out, /\nstep 1\/5 .*loss/);
    assert.match(out, /\nheld-out after step 4: accuracy 0\.000 \[0\.000, 0\.658\]/);
    assert.match(out, /\nheld-out after step 4, 2 turns: accuracy 0\.000/);
    assert.match(out, /two-turn accuracy +0\.000 \[0\.000, 0\.658\]/);

    await train(parts, turns, "step 1/5"); // before the first checkpoint
    assert.equal((await metrics(parts)).length, 1);
    await assert.rejects(
      train(parts, turns),
      (error: Error) => error instanceof InputError && /add --resume/.test(error.message),
    );
    await train(parts, [...turns, "--resume"], "step 3/5"); // a line after the checkpoint of step 2
    await train(parts, [...turns, "--resume"], "held-out after step 4"); // within a step
    assert.match(await train(parts, [...turns, "--resume"], "checkpoint "), /going on after step 2 of 5/); // before the comparison
    assert.match(await train(parts, [...turns, "--resume"]), /going on after step 5 of 5\ncheckpoint/);

    assert.deepEqual(await metrics(parts), await metrics(whole));
    for (
      const file of [
        "checkpoints/step-5/model.safetensors",
        "checkpoints/step-5/optimizer.safetensors",
        "result.json",
        "evaluations/step-4.json",
        "evaluations/step-0-2-turns.json",
        "evaluations/step-4-2-turns.json",
        "rollouts/heldout-step-0.jsonl",
        "rollouts/heldout-step-4.jsonl",
      ]
    ) {
      assert.deepEqual(await Deno.readFile(`${parts}/${file}`), await Deno.readFile(`${whole}/${file}`), file);
    }
    const manifest = JSON.parse(await Deno.readTextFile(`${parts}/run.json`));
    assert.equal(manifest.settings.method, "sft");
    assert.equal(manifest.settings.learningRate, 3e-4);
    assert.match(manifest.settings.data.fingerprint, /signs/);
    const refused = train(parts, [...turns, "--resume", "--seed", "1"]);
    await assert.rejects(
      refused,
      (error: Error) => error instanceof InputError && /\(seed was 0, now 1\)/.test(error.message),
    );
  } finally {
    await Deno.remove(root, { recursive: true });
  }
});

Deno.test("rollouts are written with their pictures", async () => {
  const root = await Deno.makeTempDir();
  try {
    const extra = "--method mgpo --group-size 2 --steps 1 --eval-every 1 --final-items 0 --no-base-eval".split(" ");
    await train(`${root}/run`, extra);
    const linesOf = async (name: string) =>
      (await Deno.readTextFile(`${root}/run/rollouts/${name}`)).trimEnd().split("\n");
    const trained = await linesOf("step-1.jsonl"), heldOut = await linesOf("heldout-step-1.jsonl");
    assert.equal(trained.length, 4, "both rollouts of both samples");
    assert.ok(heldOut.length > 0);
    for (const line of [...trained, ...heldOut]) {
      const rollout = JSON.parse(line);
      assert.equal(rollout.turns.length, 2);
      assert.equal(rollout.reward, 0);
      assert.equal(rollout.pictures.length, 1);
      assert.equal(
        rollout.tokens.flatMap((token: unknown) => Array(Array.isArray(token) ? token[1] : 1).fill(0)).length,
        rollout.ids.length,
      );
      const jpeg = await Deno.readFile(`${root}/run/rollouts/${rollout.pictures[0]}`);
      assert.deepEqual([...jpeg.slice(0, 3)], [0xff, 0xd8, 0xff]);
    }
  } finally {
    await Deno.remove(root, { recursive: true });
  }
});

Deno.test("the eval task prints a table and writes JSON", async () => {
  const root = await Deno.makeTempDir();
  try {
    let out = "";
    const progress = new Progress({ isTerminal: false, write: (text) => void (out += text) });
    const args = [...source, "--items", "3", "--turns", "1", "--max-new-tokens", "2", "--json", `${root}/e.json`];
    assert.equal(await runEvaluation(args, progress), 0);
    assert.match(out, /accuracy +0\.000 +0\.000 … 0\.561 +0\/3/);
    const report = JSON.parse(await Deno.readTextFile(`${root}/e.json`));
    assert.equal(report.accuracy.of, 3);
    assert.equal(report.items.length, 3);
    assert.equal(report.settings.backend, "wasm");
    const nowhere = runEvaluation([...source, "--json", `${root}/no/e.json`], progress);
    await assert.rejects(
      nowhere,
      (error: Error) => error instanceof InputError && /--json .*no folder/.test(error.message),
    );
  } finally {
    await Deno.remove(root, { recursive: true });
  }
});
