import assert from "node:assert/strict";
import { signs } from "./data/signs.ts";
import type { Dataset } from "./data/dataset.ts";
import { difference, evaluate, evaluationMetrics, proportion, summarizeItems } from "./evaluate.ts";
import { boxAround, cropBox } from "./rollout.ts";
import { InputError } from "./run/errors.ts";
import { ScriptedPolicy } from "./testing_policy.ts";

function near(actual: number, expected: number, tolerance = 5e-5): void {
  assert.ok(Math.abs(actual - expected) <= tolerance, `${actual} is not ${expected}`);
}

Deno.test("Wilson intervals are those of the literature", () => {
  // Newcombe 1998, table I, method 3 (score without continuity correction).
  for (
    const [count, of, low, high] of [
      [81, 263, 0.2553, 0.3662],
      [15, 148, 0.0624, 0.1605],
      [0, 20, 0, 0.1611],
      [1, 29, 0.0061, 0.1718],
    ]
  ) {
    const p = proportion(count, of);
    near(p.low, low);
    near(p.high, high);
  }
  assert.deepEqual(proportion(20, 20).high, 1);
  assert.deepEqual([proportion(0, 0).low, proportion(0, 0).high], [0, 1]);
});

Deno.test("differences have Newcombe's interval", () => {
  // Newcombe 1998 (interval estimation for the difference), table II, method 10.
  for (
    const [a, m, b, n, low, high] of [
      [56, 70, 48, 80, 0.0524, 0.3339],
      [9, 10, 3, 10, 0.1705, 0.8090],
      [10, 10, 0, 20, 0.6791, 1],
    ]
  ) {
    const d = difference(proportion(a, m), proportion(b, n));
    near(d.value, a / m - b / n, 1e-12);
    near(d.low, low);
    near(d.high, high);
  }
});

/** Points at everything on even rows; answers right where it is told to. */
function scripted(answers: (row: number) => boolean): ScriptedPolicy {
  return new ScriptedPolicy((text, [, row, turn]) => {
    if (turn === 0 && !text.includes("boxed{}: the letter")) {
      return row % 2 === 0 ? '[{"bbox_2d": [0, 0, 112, 112], "label": "all"}]' : "I cannot see it.";
    }
    return answers(row) ? `\\boxed{${expected[row]}}` : row % 3 === 0 ? "?" : "\\boxed{nothing}";
  });
}
let expected: string[] = [];

Deno.test("evaluate counts what a scripted policy does, whatever the batch size", async () => {
  const dataset = signs({ split: "heldout" });
  expected = await Promise.all(Array.from({ length: 20 }, async (_, i) => (await dataset.get(i)).answer));
  // Valid on even rows; right on rows 0, 4, 8, … and on row 1.
  const policy = scripted((row) => row % 4 === 0 || row === 1);
  const options = { items: 20, maxNewTokens: [200] };
  const whole = await evaluate(policy, dataset, { ...options, batchSize: 20 });
  assert.deepEqual([whole.accuracy.count, whole.accuracy.of], [6, 20]);
  assert.deepEqual([whole.valid?.count, whole.valid?.of], [10, 20]);
  assert.deepEqual([whole.hit?.count, whole.hit?.of], [10, 20], "a crop of everything contains the sign");
  assert.deepEqual([whole.regions.plate.count, whole.regions.plate.of], [10, 20]);
  assert.deepEqual(whole.invalid, { no_json: 10 });
  assert.equal(whole.boxed.count, 20 - [3, 6, 9, 15, 18].length, "rows divisible by 3 that aren't right have no box");
  near(whole.gap!.difference.value, 5 / 10 - 1 / 10, 1e-12);
  assert.equal(whole.clipped.count, 0);
  assert.deepEqual(whole.items[4], {
    sampleId: (await dataset.get(4)).id,
    correct: true,
    expected: expected[4],
    answer: expected[4],
    valid: true,
    hit: true,
    regions: { plate: true },
  });
  assert.equal(whole.items[3].answer, undefined);
  const seen: number[] = [];
  const parts = await evaluate(policy, dataset, { ...options, batchSize: 7, onProgress: (done) => seen.push(done) });
  assert.deepEqual(parts, whole);
  assert.deepEqual(seen, [7, 14, 20]);
  const metrics = evaluationMetrics(whole);
  assert.equal(metrics["eval/accuracy"], 0.3);
  assert.equal(metrics["eval/valid_ratio"], 0.5);
  assert.equal(metrics["eval/plate_ratio"], 0.5);
});

Deno.test("one-turn evaluation has no grounding; cut replies are counted", async () => {
  const dataset = signs({ split: "heldout" });
  const policy = scripted((row) => row < 5);
  const result = await evaluate(policy, dataset, { items: 10, turns: 1, maxNewTokens: [200] });
  assert.equal(result.accuracy.count, 5);
  assert.equal(result.valid, undefined);
  assert.equal(result.gap, undefined);
  assert.ok(!("eval/valid_ratio" in evaluationMetrics(result)));
  const cut = await evaluate(policy, dataset, { items: 10, turns: 1, maxNewTokens: [3] });
  assert.equal(cut.accuracy.count, 0);
  assert.ok(cut.clipped.count >= 5);
});

/** Keys of the pictures that a policy was shown. */
async function keysShown(policy: ScriptedPolicy, dataset: Dataset, options: Parameters<typeof evaluate>[2]) {
  const keys: string[] = [], prepare = policy.prepareImage;
  policy.prepareImage = (picture) => {
    const image = prepare(picture);
    keys.push(image.key);
    return image;
  };
  const result = await evaluate(policy, dataset, { maxNewTokens: [200], ...options });
  policy.prepareImage = prepare;
  return { keys, result };
}

Deno.test("the crop can be a random, the true or the whole area, the picture blank; the policy's own box stays on record", async () => {
  const dataset = signs({ split: "heldout" }), items = 4;
  const policy = new ScriptedPolicy((text, [, row, turn]) =>
    turn === 0 ? row % 2 === 0 ? '[{"bbox_2d": [0, 0, 20, 12], "label": "x"}]' : "no" : `\\boxed{${text.length % 7}}`
  );
  const samples = await Promise.all(Array.from({ length: items }, (_, i) => dataset.get(i)));
  const pictures = await Promise.all(samples.map((sample) => sample.picture()));
  const wholeKeys = pictures.map((picture) => picture.fingerprint);
  const own = await keysShown(policy, dataset, { items });
  assert.equal(own.keys.length, items + items / 2, "a crop of every second item");
  for (const boxes of ["random", "true", "whole"] as const) {
    const { keys, result } = await keysShown(policy, dataset, { items, boxes });
    assert.deepEqual(keys.slice(0, items), wholeKeys);
    assert.equal(keys.length, 2 * items, "a crop of every item");
    assert.deepEqual(result.items.map(({ valid, hit }) => [valid, hit]), own.result.items.map((i) => [i.valid, i.hit]));
    if (boxes === "whole") assert.deepEqual(keys.slice(items), wholeKeys);
    if (boxes === "true") {
      const expected = samples.map(({ boxes }, i) => {
        const around = boxAround(boxes!, [112, 112], [672, 672], dataset.hints);
        return pictures[i].crop(cropBox(around, [112, 112], [672, 672], dataset.hints)).fingerprint;
      });
      assert.deepEqual(keys.slice(items), expected);
    }
    const again = await keysShown(policy, dataset, { items, boxes, batchSize: 3 });
    assert.deepEqual(again.keys.toSorted(), keys.toSorted(), "draws don't depend on the batch");
    if (boxes !== "random") continue;
    const other = await keysShown(policy, dataset, { items, boxes, seed: 1 });
    assert.notDeepEqual(other.keys.slice(items), keys.slice(items));
  }
  const { keys } = await keysShown(policy, dataset, { items, blank: true });
  assert.equal(new Set(keys.slice(0, items)).size, 1, "all pictures are the same grey");
  const none: Dataset = { ...dataset, get: async (i) => ({ ...await dataset.get(i), boxes: undefined }) };
  await assert.rejects(evaluate(policy, none, { items, boxes: "true" }), /has no boxes, which boxes = true needs/);
  await assert.rejects(
    evaluate(policy, dataset, { turns: 1, boxes: "whole" }),
    /boxes = whole: needs turns that ground/,
  );
});

Deno.test("in the free form the last reply is the answer, and the first tells whether it grounded", async () => {
  const dataset = signs({ split: "heldout" });
  const right = (await dataset.get(0)).answer;
  const policy = new ScriptedPolicy((_, [, row, turn]) =>
    turn === 0 && row > 0 ? ["", '[{"bbox_2d": [0, 0, 20, 12], "label": "x"}]', "no"][row] : `\\boxed{${right}}`
  );
  const result = await evaluate(policy, dataset, { items: 3, form: "free", maxNewTokens: [200] });
  assert.deepEqual(result.items.map(({ valid, invalid }) => [valid, invalid]), [
    [false, undefined],
    [true, undefined],
    [false, "no_json"],
  ]);
  assert.equal(result.items[0].correct, true);
  assert.equal(result.boxed.count, 3);
  assert.deepEqual([result.valid?.count, result.valid?.of], [1, 3]);
});

Deno.test("samples that can't be read are skipped and counted, and change no other draw", async () => {
  const world = signs({ split: "heldout" });
  const broken: Dataset = {
    ...world,
    size: 10,
    get: async (i) => {
      if (i === 2) throw new InputError("rows.jsonl:3: not JSON");
      const sample = await world.get(i);
      return i === 5 ? { ...sample, picture: () => Promise.reject(new InputError("a.png: truncated")) } : sample;
    },
  };
  const policy = scripted(() => true);
  const result = await evaluate(policy, broken, { items: 10, maxNewTokens: [200] });
  assert.equal(result.accuracy.of, 8);
  assert.equal(result.accuracy.count, 8, "rows keep their numbers");
  assert.deepEqual(result.skipped.map(({ error }) => error), ["rows.jsonl:3: not JSON", "a.png: truncated"]);
  const none: Dataset = { ...world, size: 3, get: () => Promise.reject(new Error("gone")) };
  await assert.rejects(
    evaluate(policy, none),
    (e: Error) => e instanceof InputError && /none of the 3 items/.test(e.message),
  );
});

Deno.test("unknown and impossible options are refused by name", async () => {
  const world = signs(), policy = scripted(() => true);
  const odd = { item: 3 } as { items?: number };
  await assert.rejects(evaluate(policy, world, odd), /item: unknown option; did you mean items\?/);
  await assert.rejects(evaluate(policy, world, { items: 0 }), /items = 0: must be a whole number of at least 1/);
});

Deno.test("summarizeItems leaves the gap out where one side is empty", () => {
  const item = { sampleId: "", correct: true, expected: "K", valid: true };
  assert.equal(summarizeItems([item, item]).gap, undefined);
  assert.ok(summarizeItems([item, { ...item, valid: false }]).gap);
});
