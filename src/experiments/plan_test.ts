import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { InputError } from "../run/errors.ts";
import { trainTable } from "../settings.ts";
import { experiments, experimentsNamed } from "./catalogue.ts";
import { canonicalJson, contentHash, policyHash, withoutDefaults } from "./identity.ts";
import { main } from "./main.ts";
import { commandLine, Planner, type Unit, type Workplace } from "./plan.ts";
import { parseTrainTask } from "../run/train_task.ts";

const place: Workplace = { runs: "r", backend: "wasm", kernels: "fused" };

const runsOf = (units: readonly Unit[]) => units.flatMap(({ run }) => run ? [run.path] : []);

Deno.test("a hash names content, not its order", () => {
  assert.equal(contentHash({ a: 1, b: { c: [1, 2], d: undefined } }), contentHash({ b: { c: [1, 2] }, a: 1 }));
  assert.notEqual(contentHash({ a: [1, 2] }), contentHash({ a: [2, 1] }));
  assert.equal(canonicalJson({ b: 1, a: { d: 2, c: 3 } }), '{"a":{"c":3,"d":2},"b":1}');
  const settings = { steps: 50, beta: 0.01, turns: 2, delta: undefined };
  assert.deepEqual(withoutDefaults(trainTable, settings), { beta: 0.01, turns: 2 });
});

Deno.test("a policy's hash is that of its files, whatever the optimizer's state beside them", async () => {
  const folder = await Deno.makeTempDir();
  try {
    await assert.rejects(policyHash(folder), InputError);
    await assert.rejects(policyHash(`${folder}/none`), InputError);
    await Deno.writeTextFile(`${folder}/model.safetensors`, "weights");
    const before = await policyHash(folder);
    await Deno.writeTextFile(`${folder}/state.json`, "{}");
    assert.equal(await policyHash(folder), before);
    await Deno.writeTextFile(`${folder}/model.safetensors`, "weighty");
    assert.notEqual(await policyHash(folder), before);
    assert.match(await policyHash("tiny"), /^[0-9a-f]{12}$/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("options become the command line that says the same", () => {
  const options = { method: "sft", seed: 3, maxNewTokens: [3, 2], trainVision: true, squareCrop: false, data: "signs" };
  const { task, train } = parseTrainTask(commandLine({ ...options, beta: undefined }));
  const { data, ...rest } = options;
  assert.deepEqual(train, rest);
  assert.equal(task.data, data);
});

Deno.test("what decides a run is in its name", async () => {
  const named = async (change: object, other = place) => {
    const experiment = {
      ...main,
      methods: [{ name: "m", own: "one_turn", train: { method: "mgpo" as const }, ...change }],
    };
    return runsOf(await new Planner(experiment, other).units([0]))[0];
  };
  const plain = await named({});
  assert.equal(await named({ name: "other", own: "two_turn" }), plain);
  assert.equal(await named({ train: { method: "mgpo", turns: 2, steps: 50 } }), plain);
  const folder = fileURLToPath(new URL("../../fixtures/goldens/models/tiny", import.meta.url));
  const changes = [
    { train: { method: "grpo" } },
    { train: { method: "mgpo", beta: 0.1 } },
    { train: { method: "mgpo", maxNewTokens: [3] } },
    { source: { data: "signs-shifted" } },
    { source: { maxPixels: 3136 } },
    { source: { reward: "format" } },
    { source: { policy: folder } },
  ];
  const names = await Promise.all(changes.map((change) => named(change)));
  names.push(plain, await named({}, { ...place, backend: "webgpu" }), await named({}, { ...place, kernels: "plain" }));
  assert.equal(new Set(names).size, names.length);
});

Deno.test("the experiments hold together, and share the runs of main", async () => {
  const trained = new Map<string, Set<string>>();
  for (const experiment of experiments) {
    const { name, methods, comparisons } = experiment, names = methods.map((method) => method.name);
    assert.deepEqual(experimentsNamed(name), [experiment]);
    assert.equal(new Set(names).size, names.length, name);
    for (const method of methods.filter(({ isStage }) => !isStage)) {
      const protocols = method.protocols ?? experiment.protocols;
      assert.ok(method.own === undefined || method.own in protocols, `${name}: ${method.name} is asked ${method.own}`);
    }
    const suffixes = new Set(methods.flatMap((method) => Object.keys(method.protocols ?? experiment.protocols)));
    for (const { a, b, metrics = [], metricOfB } of comparisons) {
      assert.ok(names.includes(a) && names.includes(b), `${name}: ${a} or ${b}`);
      for (const metric of [...metrics, ...metricOfB ? [metricOfB] : []]) {
        const [, protocol] = metric.split("/");
        assert.ok(protocol === undefined || suffixes.has(protocol), `${name}: ${metric}`);
      }
    }
    trained.set(name, new Set(runsOf(await new Planner(experiment, place).units([0, 1, 2]))));
  }
  const beyondMain = (name: string) => trained.get(name)!.difference(trained.get("main")!).size;
  assert.equal(trained.get("main")!.size, 9);
  assert.deepEqual(["hit-ratio", "reward-hacking"].map(beyondMain), [0, 0]);
  assert.deepEqual(["ablation", "turns", "supervision", "max-pixels"].map(beyondMain), [21, 6, 6, 18]);
});
