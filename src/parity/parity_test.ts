import assert from "node:assert/strict";
import { chooseBackend } from "../gpu/backend.ts";
import { readSafetensors, type TensorToWrite, writeSafetensors } from "../policy/safetensors.ts";
import { InputError } from "../run/errors.ts";
import { Golden, trimmedGoldens } from "./golden.ts";
import { groupNames, runParity } from "./groups.ts";
import { Check, type Report } from "./report.ts";

const checkedGroups = groupNames.filter((name) => name !== "lora");

function assertPasses(report: Report, groups: readonly string[]): void {
  assert.deepEqual(report.failed.map(({ group, name, note }) => `${group}: ${name}: ${note}`), []);
  for (const group of groups) {
    assert.ok(report.rows.some((row) => row.group === group && row.compared > 0), `group ${group} checked nothing`);
  }
}

/** A copy of the trimmed set that a test may change; removed afterwards. */
async function withCopy(run: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await copyFolder(new Golden(trimmedGoldens).path, folder);
    await run(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function copyFolder(from: string, to: string): Promise<void> {
  await Deno.mkdir(to, { recursive: true });
  for await (const { name, isDirectory } of Deno.readDir(from)) {
    if (isDirectory) await copyFolder(`${from}/${name}`, `${to}/${name}`);
    else await Deno.copyFile(`${from}/${name}`, `${to}/${name}`);
  }
}

async function editJson(file: string, edit: (json: Record<string, unknown>) => void): Promise<void> {
  const json = JSON.parse(await Deno.readTextFile(file));
  edit(json);
  await Deno.writeTextFile(file, JSON.stringify(json));
}

Deno.test("a check shows the comparison that is closest to its tolerance", () => {
  const check = new Check();
  check.close([1, 2], [1, 2.5], 1, "far from it");
  check.close([1], [1.009], 0.01, "near");
  const row = check.row("group", "name");
  assert.ok(row.pass);
  assert.equal(row.note, "near");
  assert.equal(row.compared, 3);
  assert.equal(row.tolerance, 0.01);
  assert.ok(Math.abs(row.error - 0.009) < 1e-12);
});

Deno.test("a check fails on what is beyond, unequal, undefined, of another length, or not compared at all", () => {
  const fails: [string, (check: Check) => void][] = [
    ["beyond", (check) => check.close([1, 2], [1, 2.2], 0.1)],
    ["one of several", (check) => (check.close([1], [2], 0.1), check.close([1], [1], 0.1))],
    ["NaN is not a number", (check) => check.close([NaN], [1], 10)],
    ["a number is not NaN", (check) => check.number(1, null, 10)],
    ["length", (check) => check.close([1], [1, 2], 10)],
    ["unequal", (check) => check.equal([1, 2], [1, 3])],
    ["unequal lists", (check) => check.same([1, [2]], [1, [3]])],
    ["nothing", () => {}],
    ["nothing in lists", (check) => check.close([], [], 1)],
  ];
  for (const [name, run] of fails) {
    const check = new Check();
    run(check);
    assert.equal(check.row("", "").pass, false, name);
  }
  const same = new Check();
  same.number(NaN, null, 0);
  same.same({ a: 1, b: undefined }, { a: 1 });
  same.equal(Int32Array.of(1, 2), [1, 2]);
  assert.ok(same.row("", "").pass);
});

Deno.test("wasm: the trimmed golden set", async () => {
  await chooseBackend("wasm");
  const lines: string[] = [];
  const report = await runParity(trimmedGoldens, { print: (line) => lines.push(line) });
  assertPasses(report, checkedGroups);
  assert.ok(lines.some((line) => line.includes("two_turn: position_ids")));
});

Deno.test("wasm: a set with other model names, shards and module names", async () => {
  await chooseBackend("wasm");
  await withCopy(async (folder) => {
    await Deno.rename(`${folder}/models/tiny`, `${folder}/models/mini`);
    await reshard(`${folder}/models/mini`, `${folder}/models/mini-in-parts`);
    await editJson(`${folder}/models/names.json`, (json) => {
      const entry = json.tiny as Record<string, unknown>;
      entry.dirs = { "models/mini": "", "models/mini-in-parts": "" };
      delete json.tiny;
      json.other = entry;
    });
    await Deno.remove(`${folder}/images`, { recursive: true });
    const lines: string[] = [];
    const report = await runParity(folder, { print: (line) => lines.push(line) });
    assertPasses(report, checkedGroups.filter((name) => name !== "images"));
    assert.ok(report.rows.some(({ name }) => name === "mini-in-parts: same weights as mini"));
    assert.ok(lines.some((line) => line.includes("skipped: no such folder")));
  });
});

/** The same model in two files with an index, under module names. */
async function reshard(from: string, to: string): Promise<void> {
  await Deno.mkdir(to);
  for (const file of ["config.json", "generation_config.json"]) await Deno.copyFile(`${from}/${file}`, `${to}/${file}`);
  const moduleName = (name: string) =>
    name.startsWith("visual.") ? `model.${name}` : name.replace(/^model\./, "model.language_model.");
  const shards: TensorToWrite[][] = [[], []], weight_map: Record<string, string> = {};
  const tensors = await readSafetensors(await Deno.readFile(`${from}/model.safetensors`), "model.safetensors");
  let i = 0;
  for (const { name, shape, data } of tensors.values()) {
    weight_map[moduleName(name)] = `model-${i % 2}.safetensors`;
    shards[i++ % 2].push({ name: moduleName(name), shape, data });
  }
  for (const [k, shard] of shards.entries()) {
    await Deno.writeFile(`${to}/model-${k}.safetensors`, writeSafetensors(shard));
  }
  await Deno.writeTextFile(`${to}/model.safetensors.index.json`, JSON.stringify({ weight_map }));
}

Deno.test("wasm: wrong values and missing files are failing rows", async () => {
  await chooseBackend("wasm");
  await withCopy(async (folder) => {
    const file = `${folder}/parity/two_turn.safetensors`;
    const tensors = await readSafetensors(await Deno.readFile(file), "two_turn");
    tensors.get("text.norm")!.data[7] += 1e-3;
    tensors.get("vision.window_index")!.data[3] += 1;
    await Deno.writeFile(file, writeSafetensors(tensors.values()));
    await editJson(`${folder}/grpo/advantages.json`, (json) => {
      (json.cases as { advantages: number[] }[])[0].advantages[0] += 1e-3;
    });
    await Deno.remove(`${folder}/grpo/losses.json`);
    const report = await runParity(folder, { only: ["parity", "grpo"] });
    assert.deepEqual(report.failed.map(({ name }) => name), [
      "two_turn: vision.window_index",
      "two_turn: text.norm",
      "advantages, scale group (10 cases)",
      "losses.json",
    ]);
    assert.match(report.failed.at(-1)!.note, /grpo\/losses\.json: no such file/);
    await Deno.remove(`${folder}/grpo`, { recursive: true });
    assert.equal((await runParity(folder, { only: ["grpo"] })).failed.length, 1);
  });
});

Deno.test("a foreign folder and an unknown group are refused", async () => {
  await assert.rejects(runParity(new URL("./", import.meta.url)), InputError);
  await assert.rejects(runParity(trimmedGoldens, { only: ["grad"] }), /unknown group/);
});

// Last, as it switches the backend for what follows.
Deno.test({
  name: "webgpu: the trimmed golden set",
  // The device lives until the end of the program.
  sanitizeResources: false,
  sanitizeOps: false,
  fn: async () => {
    try {
      await chooseBackend("webgpu");
    } catch (error) {
      if (!(error instanceof InputError && /no WebGPU adapter/.test(error.message))) throw error;
      console.log(`skipped: ${error.message}`);
      return;
    }
    assertPasses(await runParity(trimmedGoldens), checkedGroups);
  },
});
