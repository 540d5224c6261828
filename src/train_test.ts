import assert from "node:assert/strict";
import type { Dataset } from "./data/dataset.ts";
import { signs } from "./data/signs.ts";
import { tf } from "./deps.ts";
import { chooseBackend } from "./gpu/backend.ts";
import { evaluate } from "./evaluate.ts";
import { loadPolicy } from "./policy/load.ts";
import type { QwenPolicy } from "./policy/qwen.ts";
import type { RewardFunction } from "./reward.ts";
import type { PromptTemplate } from "./rollout.ts";
import { InputError } from "./run/errors.ts";
import { isTiming, type StepRecord } from "./run/metrics.ts";
import type { TrainOptions } from "./settings.ts";
import { shortAnswer, train, Training, type TrainParts } from "./train.ts";

const golden = new URL("../fixtures/goldens/models/tiny/", import.meta.url);

/** Few tokens, so that a step takes a moment. */
const template: Partial<PromptTemplate> = {
  system: "",
  singleSystem: "",
  ground: ["{image}", "where"],
  valid: ["{image}", "what"],
  invalid: ["{image}", "again"],
  single: ["{image}", "what"],
};
const small: TrainOptions = { prompts: 2, groupSize: 3, maxNewTokens: [3, 2], evalEvery: 2, evalItems: 3 };
/** The untrained golden policy never answers, so it is paid for something that its draws do vary in. */
const odd: RewardFunction = (_, { turns }) => turns.flatMap((turn) => turn.ids).reduce((a, b) => a + b, 0) % 7 / 7;
const rewards = { odd: { reward: odd, weight: 1 } };

async function openPolicy(): Promise<QwenPolicy> {
  await chooseBackend("wasm");
  return await loadPolicy(golden, { maxPixels: 56 * 56 });
}

async function run(policy: QwenPolicy, options: TrainOptions & TrainParts): Promise<StepRecord[]> {
  return await Array.fromAsync(train(policy, signs(), { ...small, template, rewards, ...options }));
}

function withoutTiming(record: StepRecord): Record<string, number> {
  return Object.fromEntries(Object.entries(record).filter(([name]) => !isTiming(name)));
}

async function weightsOf(policy: QwenPolicy): Promise<Map<string, Float32Array>> {
  const weights = new Map<string, Float32Array>();
  for (const [name, variable] of policy.parameters) weights.set(name, Float32Array.from(await variable.data()));
  return weights;
}

Deno.test("two steps from a saved state are bit for bit those of an uninterrupted run", async () => {
  const heldOut = signs({ split: "heldout" });
  const whole = await openPolicy(), start = await weightsOf(whole);
  const all = await run(whole, { steps: 4, heldOut });
  assert.deepEqual(all.map((record) => record.step), [1, 2, 3, 4]);
  assert.ok(all.every((record) => record.grad_norm > 0), "every step learnt something");
  assert.ok(all[1]["eval/accuracy"] === 0 && !("eval/accuracy" in all[0]));
  assert.ok(all[3].num_tokens > all[2].num_tokens);
  assert.ok(all.every((record) => record["rollout/logprob_diff_max"] < 1e-4));
  assert.equal(all[3]["memory/numTensors"], all[0]["memory/numTensors"], "tensors leak");
  assert.equal(all[3]["memory/numBytes"], all[0]["memory/numBytes"], "bytes leak");

  const half = await openPolicy();
  const training = new Training(half, signs(), { ...small, steps: 4 }, { template, rewards, heldOut });
  const first = [await training.next(), await training.next()];
  const state = await training.state(), weights = await weightsOf(half);
  training.dispose();
  for (const [name, values] of start) {
    const isFrozen = name.startsWith("visual.");
    assert.equal(weights.get(name)!.some((x, i) => x !== values[i]), !isFrozen, `${name} frozen?`);
  }
  half.dispose();

  const other = await openPolicy();
  for (const [name, variable] of other.parameters) {
    tf.tidy(() => variable.assign(tf.tensor(weights.get(name)!, variable.shape)));
  }
  const rest = await run(other, { steps: 4, heldOut, state });
  const resumed = [...first, ...rest].map(withoutTiming), straight = all.map(withoutTiming);
  for (const record of [...resumed, ...straight]) {
    for (const name of ["memory/numTensors", "memory/numBytes"]) delete record[name];
  }
  assert.deepEqual(resumed, straight);
  assert.deepEqual(await weightsOf(other), await weightsOf(whole));
  whole.dispose();
  other.dispose();
});

Deno.test("another seed gives another run; grpo has one turn", async () => {
  const policy = await openPolicy(), again = await openPolicy();
  const [a] = await run(policy, { steps: 1, method: "grpo" });
  const [b] = await run(again, { steps: 1, method: "grpo", seed: 1 });
  assert.notDeepEqual(withoutTiming(a), withoutTiming(b));
  assert.equal(a.learning_rate, 1e-4);
  assert.ok("completions/mean_length/turn_1" in a && !("completions/mean_length/turn_2" in a));
  assert.ok(!("grounding/valid_ratio" in a));
  policy.dispose();
  again.dispose();
});

Deno.test("evaluations with several turns are those that each gives alone, under names of their own", async () => {
  await chooseBackend("wasm");
  // The embedded policy gives valid boxes and right answers now and then, in one turn others than in two.
  const policy = await loadPolicy(), heldOut = signs({ split: "heldout" }), seen: number[] = [];
  const settings = { steps: 1, prompts: 1, groupSize: 2, method: "grpo", evalEvery: 1, evalItems: 40 } as const;
  const [both] = await Array.fromAsync(
    train(policy, signs(), {
      ...{ ...settings, heldOut, evalTurns: [1, 2], onEvaluation: (_, { turns }) => void seen.push(turns) },
    }),
  );
  assert.deepEqual(seen, [1, 2]);
  for (const [turns, suffix] of [[1, ""], [2, "/2_turns"]] as const) {
    const { accuracy, valid } = await evaluate(policy, heldOut, { turns, items: 40 });
    assert.ok(accuracy.count > 0 && accuracy.count < 40);
    assert.deepEqual(
      [both[`eval/accuracy${suffix}`], both[`eval/valid_ratio${suffix}`], both[`eval/items${suffix}`]],
      [accuracy.value, valid?.value, 40],
    );
    assert.equal(valid === undefined || valid.count > 0, true);
  }
  assert.notEqual(both["eval/accuracy"], both["eval/accuracy/2_turns"]);
  policy.dispose();
});

Deno.test("sft lowers the cross-entropy of the right answers", async () => {
  const policy = await openPolicy();
  const records = await run(policy, { steps: 6, method: "sft", prompts: 4, evalEvery: 0 });
  const losses = records.map((record) => record.policy_loss);
  assert.ok(losses[5] < losses[0] - 2, losses.join(" "));
  assert.ok(!("reward/mean" in records[0]));
  policy.dispose();
});

Deno.test("sft in two turns imitates the true box and the answer; a sample without boxes is skipped", async () => {
  const policy = await openPolicy(), world = signs(), reasons: string[] = [];
  const some: Dataset = {
    ...world,
    get: async (i) => i % 2 === 0 ? await world.get(i) : { ...await world.get(i), boxes: undefined },
  };
  const options = { ...small, template, steps: 6, method: "sft", turns: 2, prompts: 6, evalEvery: 0 } as const;
  const records = await Array.fromAsync(train(policy, some, {
    ...options,
    onRollouts: ({ skipped }) => void reasons.push(...skipped.map(({ error }) => error)),
  }));
  const losses = records.map((record) => record.policy_loss);
  assert.ok(losses[5] < losses[0] - 1, losses.join(" "));
  assert.ok(reasons.length > 0 && reasons.every((reason) => /has no boxes/.test(reason)), reasons[0]);
  assert.equal(reasons.length, records.reduce((sum, record) => sum + record.samples_skipped, 0));
  policy.dispose();
});

Deno.test("three turns, the free form, loss on every text token: a step of each learns", async () => {
  for (const options of [{ turns: 3 }, { turns: 3, form: "free" }, { lossOn: "every" }] as TrainOptions[]) {
    const policy = await openPolicy();
    const heldOut = signs({ split: "heldout" }), limits = { maxNewTokens: [3, 2, 2], evalEvery: 1 };
    const [record] = await run(policy, { ...limits, ...options, steps: 1, heldOut });
    assert.ok(record.grad_norm > 0 && record["rollout/logprob_diff_max"] < 1e-4, JSON.stringify(options));
    assert.equal(record["turns/mean"], options.turns ?? 2);
    assert.ok(Number.isFinite(record.policy_loss) && Number.isFinite(record["eval/accuracy"]));
    policy.dispose();
  }
});

Deno.test("conversations without an answer can be left out of the update; their rewards are logged", async () => {
  const policy = await openPolicy(), before = await weightsOf(policy);
  const [masked] = await run(policy, { steps: 1, overTurnMasking: true, evalEvery: 0 });
  assert.deepEqual(await weightsOf(policy), before, "the golden policy never answers, so nothing is learnt");
  const [plain] = await run(policy, { steps: 1, evalEvery: 0 });
  for (const name of ["reward/mean", "reward/std"]) assert.ok(Math.abs(masked[name] - plain[name]) < 1e-12, name);
  assert.ok(plain["reward/std"] > 0);
  assert.deepEqual([masked["turns/over_ratio"], masked["advantage/abs_mean"]], [1, 0]);
  assert.ok(plain["advantage/abs_mean"] > 0);
  policy.dispose();
});

Deno.test("the right answer is the letter of a lettered choice, else the answer itself", async () => {
  const sample = await signs().get(0);
  assert.equal(shortAnswer(sample), sample.answer);
  assert.equal(shortAnswer({ ...sample, choices: ["no", "yes"], choiceStyle: undefined, answer: "yes" }), "B");
  assert.equal(shortAnswer({ ...sample, choices: undefined, answer: "12" }), "12");
  assert.throws(() => shortAnswer({ ...sample, choices: ["no"], choiceStyle: "lettered", answer: "yes" }), InputError);
});

Deno.test("a sample that can't be read is skipped and counted; data of nothing else is refused", async () => {
  const world = signs();
  const some: Dataset = {
    ...world,
    size: 2,
    get: (i) => i === 0 ? world.get(0) : Promise.reject(new InputError("rows.jsonl:2: not JSON")),
  };
  const policy = await openPolicy();
  const skipped: string[] = [];
  const options = { ...small, template, rewards, evalEvery: 0 };
  const records = await Array.fromAsync(train(policy, some, {
    ...options,
    steps: 2,
    onRollouts: (rollouts) => void skipped.push(...rollouts.skipped.map(({ error }) => error)),
  }));
  assert.deepEqual(records.map((record) => record.samples_skipped), [1, 1]);
  assert.deepEqual(skipped, ["rows.jsonl:2: not JSON", "rows.jsonl:2: not JSON"]);
  const none: Dataset = { ...some, get: () => Promise.reject(new InputError("all gone")) };
  await assert.rejects(
    Array.fromAsync(train(policy, none, { ...options, steps: 9 })),
    (error: Error) =>
      error instanceof InputError && /not one of 6 samples could be read; the last: all gone/.test(error.message),
  );
  policy.dispose();
});

Deno.test("unknown and impossible options are refused by name", async () => {
  const policy = await openPolicy();
  const start = (options: object) => train(policy, signs(), options).next();
  await assert.rejects(start({ stps: 3 }), /stps: unknown option; did you mean steps\?/);
  await assert.rejects(start({ temperature: 0 }), /temperature = 0: must be a number above 0/);
  await assert.rejects(start({ beta: 0.1 }), /beta = 0\.1: the KL needs the base policy/);
  await assert.rejects(start({ form: "open" }), /form = "open": must be fixed or free/);
  policy.dispose();
});
