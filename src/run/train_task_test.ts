import assert from "node:assert/strict";
import { evaluateTable, trainTable } from "../settings.ts";
import { InputError } from "./errors.ts";
import { flagOf } from "./options.ts";
import { Progress } from "./progress.ts";
import {
  evalHelp,
  evalTaskTable,
  parseReward,
  parseTrainTask,
  readTemplate,
  trainHelp,
  trainTaskTable,
} from "./train_task.ts";
import { runEvaluation } from "./evaluation_run.ts";
import { runTraining } from "./training_run.ts";

Deno.test("the command line of the issue is understood", () => {
  const args = "--policy dir --data photos --method grpo --seed 3 --steps 7 --backend wasm --run r --resume";
  const { task, train } = parseTrainTask(args.split(" "));
  assert.deepEqual(train, { method: "grpo", seed: 3, steps: 7 });
  assert.deepEqual(
    [task.policy, task.data, task.backend, task.run, task.resume],
    ["dir", "photos", "wasm", "r", true],
  );
  const bare = parseTrainTask([]);
  assert.deepEqual(bare.train, {});
  assert.deepEqual([bare.task.policy, bare.task.data, bare.task.backend, bare.task.resume], [
    "tiny",
    "signs",
    "auto",
    false,
  ]);
});

Deno.test("--help lists every option with its default and does nothing else", async () => {
  let out = "";
  const progress = () => new Progress({ isTerminal: false, write: (text) => void (out += text) });
  assert.equal(await runTraining(["--help"], progress()), 0);
  assert.equal(out, trainHelp() + "\n");
  for (const key of Object.keys({ ...trainTaskTable, ...trainTable })) assert.ok(out.includes(flagOf(key) + " "), key);
  assert.match(out, /--steps N +Training steps\. \[default: 50\]/);
  out = "";
  assert.equal(await runEvaluation(["--help"], progress()), 0);
  assert.equal(out, evalHelp() + "\n");
  for (const key of Object.keys({ ...evalTaskTable, ...evaluateTable })) {
    assert.ok(out.includes(flagOf(key) + " "), key);
  }
});

Deno.test("options of the two tables don't hide each other", () => {
  const clash = (a: object, b: object) => Object.keys(a).filter((key) => key in b);
  assert.deepEqual(clash(trainTaskTable, trainTable), []);
  assert.deepEqual(clash(evalTaskTable, evaluateTable), []);
});

Deno.test("parseReward reads names and weights", () => {
  const weights = (text: string) =>
    Object.fromEntries(Object.entries(parseReward(text)).map(([k, v]) => [k, v.weight]));
  assert.deepEqual(weights("binary"), { binary: 1 });
  assert.deepEqual(weights("binary=1,format=0.1,hit=-2"), { binary: 1, format: 0.1, hit: -2 });
  for (const text of ["binray", "binary=", "binary=x", "binary=1=2", "binary,binary", "", "toString"]) {
    assert.throws(
      () => parseReward(text),
      (error: Error) => error instanceof InputError && error.message.startsWith(`--reward ${text}:`),
    );
  }
});

Deno.test("readTemplate reads replaced parts and refuses what isn't a template", async () => {
  const folder = await Deno.makeTempDir(), path = `${folder}/t.json`;
  const read = async (text: string) => {
    await Deno.writeTextFile(path, text);
    return await readTemplate(path);
  };
  try {
    assert.equal(await readTemplate(undefined), undefined);
    assert.deepEqual(await read('{"system": "s"}'), { system: "s" });
    for (const text of ["{", "[]", '{"sytem": "s"}', '{"ground": ["no picture"]}', '{"ground": 3}']) {
      await assert.rejects(
        read(text),
        (error: Error) => error instanceof InputError && error.message.includes("t.json"),
        text,
      );
    }
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
