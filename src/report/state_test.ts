import assert from "node:assert/strict";
import { ALL, counterpart, nameOf, passes, pointAt, trackOf } from "./page/state.js";

const one = { run: 0, split: "heldout", step: 2, item: "i", rollout: 0, correct: true, grounding: "hit" };
const shown = { ...one, question: "Which letter?", answer: "K", turns: [{ text: "the \\boxed{K}" }] };

Deno.test("filters: empty ones pass all; each looks at its own field", () => {
  assert.ok(passes(shown, ALL));
  const pass = (filters: Partial<typeof ALL>, rollout: object = {}) =>
    passes({ ...shown, ...rollout }, { ...ALL, ...filters });
  assert.deepEqual([pass({ run: "0" }), pass({ run: "1" })], [true, false]);
  assert.deepEqual([pass({ split: "train" }), pass({ step: "2" }), pass({ step: "0" })], [false, true, false]);
  assert.deepEqual([pass({ outcome: "right" }), pass({ outcome: "wrong" })], [true, false]);
  assert.deepEqual([pass({ grounding: "any" }), pass({ grounding: "none" }), pass({ grounding: "miss" })], [
    true,
    false,
    false,
  ]);
  assert.deepEqual(["no_json", "one turn"].map((grounding) => pass({ grounding: "none" }, { grounding })), [
    true,
    false,
  ]);
  assert.deepEqual([pass({ text: "LETTER" }), pass({ text: "boxed{k" }), pass({ text: "zebra" })], [true, true, false]);
});

Deno.test("a held-out question's slider goes over steps, a training question's over its group", () => {
  const rollouts = [
    { ...one, step: 4 },
    { ...one, step: 0 },
    { ...one, item: "j" },
    { ...one, run: 1, step: 1 },
    ...[1, 0].map((rollout) => ({ ...one, split: "train", rollout })),
    { ...one, split: "train", step: 4 },
    one,
  ];
  assert.deepEqual(trackOf(rollouts, 7), [1, 7, 0]);
  assert.deepEqual(trackOf(rollouts, 4), [5, 4]);
  assert.equal(counterpart(rollouts, 0, 1), 3, "the nearest step before");
  assert.equal(counterpart(rollouts, 1, 1), -1);
  assert.equal(nameOf(one, [{ name: "a" }]), '["a","heldout",2,"i",0]');
  assert.deepEqual(pointAt([[1, 0], [4, 0]], 3), [4, 0]);
});
