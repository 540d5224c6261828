import assert from "node:assert/strict";
import { sceneSample } from "../data/signs.ts";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { RandomStream } from "../random.ts";
import { containsAll, cropBox, parseBox, rollout } from "../rollout.ts";
import { Composer } from "./dialogue.ts";
import { drawBox, gridStep, inputSide, Pool, taughtBox } from "./pool.ts";
import { initialPolicy, pretrain, type PretrainRecord } from "./pretrain.ts";
import { pretrainDefaults } from "./stages.ts";
import { groundingReply } from "./tiny_files.ts";

await chooseBackend("wasm");

Deno.test("lessons have exactly the prompts of rollouts", async () => {
  const policy = await initialPolicy(0), pool = new Pool(policy), composer = new Composer(policy);
  const scene = pool.scene(5), view = pool.far(5), { target, choices } = scene, sample = sceneSample(scene, "s");
  const settings = { groupSize: 1, maxNewTokens: 3, minBoxSide: 7, minCropSide: 48, squareCrop: true };
  const [two] = (await rollout(policy, [sample], settings)).trajectories;
  const [one] = (await rollout(policy, [sample], { ...settings, turns: 1 })).trajectories;
  const refused = composer.twoTurn(view, scene, target, choices, { refuse: true });
  const single = composer.single(view, scene, target, choices);
  const prompt = (ids: readonly number[], at: number) => ids.slice(0, at);
  assert.deepEqual(
    prompt(refused.sequence.ids, refused.targets[0].at),
    prompt(two.ids, two.assistantMask.indexOf(1)),
  );
  assert.deepEqual(prompt(single.sequence.ids, single.targets[0].at), prompt(one.ids, one.assistantMask.indexOf(1)));
  // Between the two replies, from the opening of the user's turn on: the untrained policy gave no box either.
  const between = (ids: readonly number[], isWritten: (t: number) => boolean) => {
    const first = ids.findIndex((_, t) => isWritten(t)), end = ids.findIndex((_, t) => t > first && !isWritten(t));
    const next = ids.findIndex((_, t) => t > end && isWritten(t));
    return ids.slice(end, next).slice(ids[end] === policy.stopTokens[0] ? 1 : 0);
  };
  const written = new Set(refused.targets.map(({ at }) => at));
  assert.deepEqual(
    between(refused.sequence.ids, (t) => written.has(t)),
    between(two.ids, (t) => two.assistantMask[t] === 1),
  );
  assert.deepEqual(refused.sequence.images.map((i) => i.key), two.images.map((i) => i.key));
  policy.dispose();
});

Deno.test("a lesson of several questions begins as one of a single question, and letters count apart", async () => {
  const policy = await initialPolicy(0), pool = new Pool(policy), composer = new Composer(policy);
  const scene = pool.scene(7), view = pool.far(7), signs = [2, 0, 3];
  const choices = signs.map((sign) => [scene.signs[sign].letter, "Q", "R", "Z"].sort());
  const several = composer.reading(view, scene, signs, choices), ids = several.sequence.ids;
  const single = composer.single(view, scene, signs[0], choices[0]).sequence.ids;
  assert.deepEqual(ids.slice(0, single.length), single);
  const said = several.targets.filter(({ kind }) => kind === "letter").map(({ at }) => policy.decode([ids[at]]));
  assert.deepEqual(said, signs.map((sign) => scene.signs[sign].letter));
  assert.equal(several.targets.filter(({ kind }) => kind === "answer").length, 4 * signs.length);
  // Each question is one of its own, with its own choices.
  const text = policy.decode(ids), asked = [...text.matchAll(/on the (\w+) sign\?((?: \w)+)/g)];
  assert.deepEqual(asked.map(([, colour]) => colour), signs.map((sign) => scene.signs[sign].colour));
  assert.deepEqual(asked.map(([, , offered]) => offered.trim().split(" ")), choices);
  // A letter is predicted where attention is guided to its sign.
  assert.deepEqual(
    several.looks.map(({ sign, from }) => [sign, policy.decode([ids[from[0] + 1]])]),
    signs.map((sign) => [sign, scene.signs[sign].letter]),
  );
  policy.dispose();
});

Deno.test("taught boxes are valid and their crops show the sign; missing boxes don't", async () => {
  const policy = await initialPolicy(0), pool = new Pool(policy);
  let missed = 0;
  for (let index = 0; index < 200; index++) {
    const scene = pool.scene(index), sign = scene.signs[scene.target], random = new RandomStream(1, "test", index);
    const cut = (box: readonly number[]) =>
      cropBox(
        box.map((v) => v * gridStep) as [number, number, number, number],
        [inputSide, inputSide],
        [scene.size, scene.size],
        { minCropSide: 48, squareCrop: true },
      );
    const taught = taughtBox(sign, scene.size);
    assert.deepEqual(drawBox(scene, scene.target, "exact", random), taught);
    assert.ok(containsAll(cut(taught), [sign.plate]), `scene ${index}: ${taught}`);
    for (const kind of ["good", "loose", "miss"] as const) {
      const box = drawBox(scene, scene.target, kind, random);
      const reply = groundingReply(sign.colour, box.map((v) => v * gridStep) as typeof box);
      assert.ok("box" in parseBox(reply, inputSide, inputSide, { minBoxSide: 7 }), `${kind} ${reply}`);
      if (kind === "miss") missed += containsAll(cut(box), [sign.box]) ? 0 : 1;
    }
  }
  assert.ok(missed >= 195, `${missed} of 200 missing boxes miss`);
  policy.dispose();
});

Deno.test("an interrupted pretraining run resumes to the same losses and weights, and keeps no tensors", async () => {
  const folder = await Deno.makeTempDir();
  const options = { ...pretrainDefaults, steps: { see: 1, use: 1, habit: 1 }, scenes: 100, freezeTower: false };
  const run = async (path: string, stopAfter: number, resume: boolean) => {
    const policy = await initialPolicy(3), records: PretrainRecord[] = [];
    for await (const record of pretrain(policy, path, options, { saveEvery: 1, resume })) {
      records.push(record);
      if (records.length === stopAfter) break;
    }
    const weights = new Map([...policy.parameters].map(([name, v]) => [name, v.dataSync().slice()]));
    policy.dispose();
    return { losses: records.map((r) => [r.stage, r.step, r.losses]), weights };
  };
  try {
    const before = tf.memory().numTensors;
    const whole = await run(`${folder}/a`, Infinity, false);
    const first = await run(`${folder}/b`, 2, false), rest = await run(`${folder}/b`, Infinity, true);
    assert.deepEqual([...first.losses, ...rest.losses], whole.losses);
    assert.deepEqual(rest.weights, whole.weights);
    assert.equal(tf.memory().numTensors, before);
    await assert.rejects(
      async () => await pretrain(await initialPolicy(3), `${folder}/none`, options, { resume: true }).next(),
      /nothing to resume/,
    );
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
