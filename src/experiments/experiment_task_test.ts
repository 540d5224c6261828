import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { InputError } from "../run/errors.ts";
import { isTiming } from "../run/metrics.ts";
import { Progress } from "../run/progress.ts";
import { INTERRUPTED } from "../run/tasks.ts";
import { experiments } from "./catalogue.ts";
import type { Experiment } from "./experiment.ts";
import { experimentHelp, runExperiments } from "./experiment_task.ts";
import { tryLock } from "./lock.ts";
import type { ExperimentResult } from "./result.ts";

const policy = fileURLToPath(new URL("../../fixtures/goldens/models/tiny", import.meta.url));
const budget = { prompts: 2, groupSize: 2, steps: 2, maxNewTokens: [3, 2], evalEvery: 0 };

/** Small enough for seconds; `warm` is a stage that `tuned` goes on from. */
const small: Experiment = {
  name: "small",
  about: "a test",
  source: { policy, data: "signs", maxPixels: 3136 },
  seeds: 2,
  methods: [
    { name: "base", own: "one_turn" },
    { name: "sft", own: "one_turn", train: { ...budget, method: "sft", steps: 6 } },
    { name: "mgpo", own: "two_turn", train: { ...budget, method: "mgpo" } },
    { name: "warm", isStage: true, train: { ...budget, method: "sft", steps: 1 } },
    {
      name: "tuned",
      own: "two_turn",
      from: { method: "warm", seed: 0 },
      train: { ...budget, method: "mgpo", steps: 1 },
    },
  ],
  splits: { id: { data: "signs" }, ood: { data: "signs-shifted" } },
  protocols: {
    one_turn: { turns: 1, items: 3, maxNewTokens: [2] },
    two_turn: { turns: 2, items: 3, maxNewTokens: [3, 2] },
  },
  metrics: [{ name: "answer_length", of: ({ answer }) => answer?.length ?? 0, finish: Math.sqrt }],
  comparisons: [{ a: "mgpo", b: "base", metrics: ["accuracy", "valid_ratio", "answer_length"] }],
};

interface Outcome {
  status: number;
  out: string;
  result: ExperimentResult;
}

/** Runs the small experiment in a folder; `onText` sees the output as it comes. */
async function run(root: string, extra: string[] = [], onText?: (text: string) => void): Promise<Outcome> {
  let out = "";
  const write = (text: string) => {
    out += text;
    onText?.(text);
  };
  const args = ["small", "--backend", "wasm", "--out", `${root}/out`, "--runs", `${root}/runs`, ...extra];
  const progress = new Progress({ isTerminal: onText !== undefined, write, columns: () => 300 });
  const status = await runExperiments(args, progress, [small]);
  const result = await Deno.readTextFile(`${root}/out/small.json`).then(JSON.parse, () => undefined);
  return { status, out, result };
}

async function withFolder(test: (root: string) => Promise<void>): Promise<void> {
  const root = await Deno.makeTempDir();
  try {
    await test(root);
  } finally {
    await Deno.remove(root, { recursive: true });
  }
}

Deno.test("an experiment writes its tables, and what is done isn't done again", () =>
  withFolder(async (root) => {
    const first = await run(root, ["--seeds", "1"]);
    assert.equal(first.status, 0);
    assert.deepEqual([first.result.complete, first.result.missing, first.result.seeds], [true, [], [0]]);
    const { out, result } = await run(root);
    assert.equal(out.match(/: trained/g)?.length, 3, "the second seed of sft, mgpo and tuned; warm is shared");
    assert.equal(result.name, "small");
    assert.equal(result.command, "deno task experiment small --backend=wasm");
    assert.deepEqual(result.seeds, [0, 1]);
    const runs = result.runs.map(({ method, seed }) => `${method} ${seed}`);
    assert.deepEqual(runs, ["sft 0", "mgpo 0", "warm 0", "tuned 0", "sft 1", "mgpo 1", "tuned 1"]);
    for (const { path, hash, seconds, settings, command } of result.runs) {
      assert.ok(path.endsWith(hash) && seconds > 0);
      assert.equal(settings.backend, "wasm");
      assert.match(command, /^deno task train .*--seed=[01] /);
      assert.ok((await Deno.stat(`${path}/metrics.jsonl`)).isFile);
    }
    const row = (method: string, split: string, metric: string) =>
      result.rows.find((r) => r.method === method && r.split === split && r.metric === metric);
    for (const method of ["base", "sft", "mgpo", "tuned"]) {
      for (const split of ["id", "ood"]) {
        for (const metric of ["accuracy", "accuracy/one_turn", "valid_ratio", "hit_ratio", "plate_ratio"]) {
          const { n, items, mean, ci95 } = row(method, split, metric)!;
          assert.deepEqual([n, items], [2, 3]);
          assert.ok(ci95[0] <= mean && mean <= ci95[1]);
        }
      }
    }
    const curve = (method: string, metric: string) =>
      result.curves.find((other) => other.method === method && other.metric === metric);
    const rewards = curve("mgpo", "reward/mean")!, own = result.runs.filter(({ method }) => method === "mgpo");
    assert.deepEqual([rewards.steps, rewards.n], [Array.from({ length: rewards.steps.length }, (_, i) => i + 1), 2]);
    const lines = await Promise.all(own.map(({ path }) => Deno.readTextFile(`${path}/metrics.jsonl`)));
    const last = lines.map((text) => JSON.parse(text.trimEnd().split("\n").at(-1)!)["reward/mean"]);
    assert.ok(Math.abs(rewards.mean.at(-1)! - (last[0] + last[1]) / 2) < 1e-5);
    assert.equal(curve("base", "reward/mean"), undefined);
    assert.equal(row("warm", "id", "accuracy"), undefined);
    assert.equal(row("base", "id", "accuracy")!.sd, 0);
    assert.equal(row("base", "id", "valid_ratio/one_turn"), undefined);
    assert.deepEqual(result.comparisons.map(({ metric, split, test }) => [metric, split, test]), [
      ...["accuracy", "valid_ratio"].map((metric) => [metric, "id", "mcnemar-exact"]),
      ["answer_length", "id", "paired-t-items"],
      ...["accuracy", "valid_ratio"].map((metric) => [metric, "ood", "mcnemar-exact"]),
      ["answer_length", "ood", "paired-t-items"],
    ]);
    const again = await run(root);
    assert.doesNotMatch(again.out, /trained|accuracy \d/);
    assert.deepEqual(again.result.rows, result.rows);
    assert.match(again.out, /small, ood +base +sft +mgpo +tuned/);
  }));

Deno.test("stopped within a training, the same command goes on and ends the same", () =>
  withFolder(async (root) => {
    let isSent = false;
    // Not SIGINT: the test runner listens to that itself.
    const stopped = await run(`${root}/parts`, ["--seeds", "1", "--only", "sft"], (text) => {
      if (isSent || !/step [12]\/6/.test(text)) return;
      isSent = true;
      Deno.kill(Deno.pid, "SIGTERM");
    });
    assert.equal(stopped.status, INTERRUPTED);
    assert.match(stopped.out, /stopped; go on with: deno task experiment small/);
    assert.equal(stopped.result.complete, false);
    assert.ok(stopped.result.missing.includes("sft, seed 0: training"), stopped.result.missing.join());
    const resumed = await run(`${root}/parts`, ["--seeds", "1", "--only", "sft"]);
    assert.match(resumed.out, /going on after step [1-5]\b/);
    const whole = await run(`${root}/whole`, ["--seeds", "1", "--only", "sft"]);
    assert.deepEqual(resumed.result.rows, whole.result.rows);
    assert.deepEqual(await metricsOf(resumed.result), await metricsOf(whole.result));
    assert.deepEqual(resumed.result.missing, whole.result.missing);
    assert.ok(resumed.result.missing.every((what) => !what.startsWith("sft")));
  }));

async function metricsOf({ runs: [{ path }] }: ExperimentResult): Promise<unknown[]> {
  const lines = (await Deno.readTextFile(`${path}/metrics.jsonl`)).trimEnd().split("\n");
  return lines.map((line) => Object.entries(JSON.parse(line)).filter(([name]) => !isTiming(name)));
}

Deno.test("what another process works on is left for later and then waited for", () =>
  withFolder(async (root) => {
    const lock = await tryLock(`${root}/lock/a`);
    assert.ok("release" in lock);
    assert.deepEqual(await tryLock(`${root}/lock/a`), { heldBy: `process ${Deno.pid}` });
    lock.release();
    const again = await tryLock(`${root}/lock/a`);
    assert.ok("release" in again);
    again.release();

    await run(root, ["--seeds", "1", "--only", "base"]);
    const [unit] = await Array.fromAsync(Deno.readDir(`${root}/runs/locks`));
    await Deno.remove(`${root}/runs/evaluations`, { recursive: true });
    const held = await tryLock(`${root}/runs/locks/${unit.name}`);
    assert.ok("release" in held);
    let isWaiting = false;
    const { status, out } = await run(root, ["--seeds", "1", "--only", "base,mgpo"], (text) => {
      if (isWaiting || !/waiting: .* process \d+ works on it/.test(text)) return;
      isWaiting = true;
      held.release();
    });
    assert.ok(isWaiting);
    assert.equal(status, 0);
    // mgpo didn't wait for base.
    assert.ok(out.indexOf("mgpo-s0") < out.indexOf("waiting: "));
    assert.ok(out.lastIndexOf("tiny-") > out.indexOf("waiting: "));
  }));

Deno.test("a finished run of a program with other defaults is refused, a begun one is begun again", () =>
  withFolder(async (root) => {
    const only = ["--seeds", "1", "--only", "mgpo"];
    const { result } = await run(root, only), path = result.runs[0].path;
    const manifest = JSON.parse(await Deno.readTextFile(`${path}/run.json`));
    manifest.settings.clipLow = 0.3;
    await Deno.writeTextFile(`${path}/run.json`, JSON.stringify(manifest));
    await assert.rejects(
      run(root, only),
      (error: Error) => error instanceof InputError && /another clipLow/.test(error.message),
    );
    await Deno.remove(`${path}/checkpoints`, { recursive: true });
    const again = await run(root, only);
    assert.match(again.out, /another clipLow; begun again/);
    assert.deepEqual(again.result.rows, result.rows);
  }));

Deno.test("bad input is one clear error; --list and --help do nothing", async () => {
  const fails = (args: string[], message: RegExp) =>
    assert.rejects(
      runExperiments(args, new Progress({ isTerminal: false, write: () => {} })),
      (error: Error) => error instanceof InputError && message.test(error.message),
    );
  await fails([], /name an experiment: main, /);
  await fails(["mian"], /no experiment "mian"; there are: main, .*all/);
  await fails(["main", "--only", "mgpo,sgd"], /--only sgd: there is no such method; there are: base, sft, grpo, mgpo$/);
  await fails(["main", "--seeds", "0"], /--seeds 0/);
  await withFolder(async (root) => {
    let out = "";
    const progress = new Progress({ isTerminal: false, write: (text) => void (out += text) });
    assert.equal(await runExperiments(["--list", "--backend", "wasm", "--runs", `${root}/runs`], progress), 0);
    for (const { name } of experiments) {
      assert.match(out, new RegExp(`^${name} +\\d+ +\\d+ +\\d+ +0/\\d+ +about \\d+:`, "m"));
    }
    await assert.rejects(Deno.stat(`${root}/runs`), Deno.errors.NotFound);
    out = "";
    assert.equal(await runExperiments(["--help"], progress), 0);
    assert.equal(out, experimentHelp() + "\n");
  });
});
