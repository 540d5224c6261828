import assert from "node:assert/strict";
import { InputError } from "./errors.ts";
import { isTiming, keepSteps, metricsLine } from "./metrics.ts";
import { defaultRunPath, RunFolder, type RunManifest, writeAtomically } from "./run_folder.ts";

function manifest(settings: Record<string, unknown> = {}): RunManifest {
  return {
    settings: { seed: 0, steps: 5, schedule: "constant", data: { name: "signs", fingerprint: "a1" }, ...settings },
    environment: { deno: "2" },
  };
}

async function inFolder(body: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await body(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function refusal(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof InputError, `not an InputError: ${error}`);
    assert.ok(!error.message.includes("\n"));
    return error.message;
  }
  throw new Error("did not reject");
}

/** A run of some steps with a checkpoint at each of `checkpoints`. */
async function makeRun(path: string, steps: number, checkpoints: number[]): Promise<RunFolder> {
  const folder = await RunFolder.create(path, manifest());
  for (let step = 1; step <= steps; step++) {
    await folder.appendMetrics({ step, "reward/mean": step / 10 });
    if (checkpoints.includes(step)) {
      await folder.writeCheckpoint(step, (to) => Deno.writeTextFile(`${to}/state.json`, `${step}`));
    }
  }
  return folder;
}

Deno.test("keepSteps forgets later and half-written lines and refuses gaps", () => {
  const text = metricsLine({ step: 1, a: 1 }) + metricsLine({ step: 2, a: 2 }) + '{"step": 3, "a"';
  assert.deepEqual(keepSteps(text, 2, "m"), [{ step: 1, a: 1 }, { step: 2, a: 2 }]);
  assert.deepEqual(keepSteps(text, 0, "m"), []);
  assert.throws(() => keepSteps(text, 3, "m.jsonl"), /m\.jsonl:3: step 3 should stand here/);
  assert.throws(() => keepSteps(metricsLine({ step: 2 }), 1, "m.jsonl"), /m\.jsonl:1: /);
  assert.ok(isTiming("timing_s/update") && isTiming("tokens_per_s") && !isTiming("reward/mean"));
});

Deno.test("a run folder goes on from its newest checkpoint, without duplicate lines", async () => {
  await inFolder(async (root) => {
    const path = `${root}/run`;
    await makeRun(path, 4, [1, 2, 3]);
    // What a kill may leave behind: a half-written line, a half-written checkpoint, a half-written file.
    await Deno.writeTextFile(`${path}/metrics.jsonl`, '{"step": 5, "rew', { append: true });
    await Deno.mkdir(`${path}/checkpoints/.tmp-step-4`);
    await Deno.writeTextFile(`${path}/.tmp-result.json`, "{");
    const { folder, step } = await RunFolder.resume(path, manifest());
    assert.equal(step, 3);
    assert.deepEqual((await folder.readMetrics()).map((record) => record.step), [1, 2, 3]);
    assert.deepEqual(await folder.checkpoints(), [2, 3], "only the last two are kept");
    assert.equal(await Deno.readTextFile(`${folder.checkpointPath(3)}/state.json`), "3");
    const names = [...Deno.readDirSync(path), ...Deno.readDirSync(`${path}/checkpoints`)].map((entry) => entry.name);
    assert.ok(!names.some((name) => name.startsWith(".tmp-")), names.join());
  });
});

Deno.test("a run that was killed before its first checkpoint, or before run.json, starts at step 1", async () => {
  await inFolder(async (root) => {
    await makeRun(`${root}/a`, 2, []);
    const { folder, step } = await RunFolder.resume(`${root}/a`, manifest());
    assert.equal(step, 0);
    assert.deepEqual(await folder.readMetrics(), []);
    await Deno.mkdir(`${root}/b`);
    await Deno.writeTextFile(`${root}/b/.tmp-run.json`, "{");
    assert.equal((await RunFolder.resume(`${root}/b`, manifest())).step, 0);
    assert.equal((await RunFolder.resume(`${root}/new`, manifest())).step, 0);
  });
});

Deno.test("a failed checkpoint leaves the one before it in place", async () => {
  await inFolder(async (root) => {
    const folder = await makeRun(`${root}/run`, 2, [1]);
    await assert.rejects(
      folder.writeCheckpoint(2, async (to) => {
        await Deno.writeTextFile(`${to}/half`, "x");
        throw new Error("disk full");
      }),
      /disk full/,
    );
    assert.deepEqual(await folder.checkpoints(), [1]);
  });
});

Deno.test("a run folder is not taken over by accident", async () => {
  await inFolder(async (root) => {
    await makeRun(`${root}/run`, 3, [3]);
    assert.match(await refusal(RunFolder.create(`${root}/run`, manifest())), /a run is there already; add --resume/);
    await Deno.mkdir(`${root}/papers`);
    await Deno.writeTextFile(`${root}/papers/a.txt`, "mine");
    assert.match(await refusal(RunFolder.create(`${root}/papers`, manifest())), /not empty and not a run/);
    assert.match(await refusal(RunFolder.resume(`${root}/papers`, manifest())), /not a run folder/);
    assert.equal(await Deno.readTextFile(`${root}/papers/a.txt`), "mine");
    assert.match(await refusal(RunFolder.create(`${root}/papers/a.txt`, manifest())), /is a file/);
  });
});

Deno.test("resuming with other settings lists the differences; only steps may grow", async () => {
  await inFolder(async (root) => {
    const path = `${root}/run`;
    await makeRun(path, 3, [3]);
    const other = manifest({ seed: 1, data: { name: "signs", fingerprint: "b2" }, extra: true });
    const message = await refusal(RunFolder.resume(path, other));
    assert.match(message, /seed was 0, now 1; data\.fingerprint was "a1", now "b2"; extra was not set, now true/);
    assert.match(await refusal(RunFolder.resume(path, manifest({ steps: 2 }))), /--steps 2: .* already done 3 steps/);
    assert.equal((await RunFolder.resume(path, manifest({ steps: 9 }))).step, 3);
    assert.equal(JSON.parse(await Deno.readTextFile(`${path}/run.json`)).settings.steps, 9);
  });
});

Deno.test("with a decaying learning rate not even steps may change", async () => {
  await inFolder(async (root) => {
    await RunFolder.create(`${root}/run`, manifest({ schedule: "cosine" }));
    const message = await refusal(RunFolder.resume(`${root}/run`, manifest({ schedule: "cosine", steps: 6 })));
    assert.match(message, /steps was 5, now 6/);
  });
});

Deno.test("defaultRunPath numbers new runs and finds the newest to resume", async () => {
  await inFolder(async (root) => {
    const base = `${root}/mgpo-signs-s0`;
    assert.equal(await defaultRunPath(base, false), base);
    assert.equal(await defaultRunPath(base, true), base);
    await RunFolder.create(base, manifest());
    assert.equal(await defaultRunPath(base, false), `${base}-2`);
    assert.equal(await defaultRunPath(base, true), base);
    await RunFolder.create(`${base}-2`, manifest());
    assert.equal(await defaultRunPath(base, false), `${base}-3`);
    assert.equal(await defaultRunPath(base, true), `${base}-2`);
  });
});

Deno.test("writeAtomically replaces a file whole", async () => {
  await inFolder(async (root) => {
    await writeAtomically(`${root}/a.json`, "1");
    await writeAtomically(`${root}/a.json`, new Uint8Array([50]));
    assert.equal(await Deno.readTextFile(`${root}/a.json`), "2");
    assert.deepEqual([...Deno.readDirSync(root)].map((entry) => entry.name), ["a.json"]);
  });
});
