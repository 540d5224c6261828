import assert from "node:assert/strict";
import { binaryReward, pointReward } from "../reward.ts";
import type { Trajectory } from "../rollout.ts";
import { counting, countingMetrics, makeCountingScene } from "./counting.ts";

Deno.test("counting scenes hold one to six signs of the colour and two or three others", async () => {
  const scenes = Array.from({ length: 600 }, (_, index) => makeCountingScene(3, index));
  for (const { signs, colour, points, question } of scenes) {
    const same = signs.filter((sign) => sign.colour === colour);
    assert.ok(points.length >= 1 && points.length <= 6 && points.length === same.length);
    assert.ok(signs.length - same.length >= 2 && signs.length - same.length <= 3);
    assert.match(question, new RegExp(`how many ${colour} signs`));
    for (const point of points) assert.ok(same.some((sign) => sign.centre.join() === point.join()));
    assert.deepEqual(points, [...points].sort((a, b) => a[1] - b[1] || a[0] - b[0]));
  }
  for (let count = 1; count <= 6; count++) {
    const share = scenes.filter(({ points }) => points.length === count).length / scenes.length;
    assert.ok(Math.abs(share - 1 / 6) < 0.06, `${count}: ${share}`);
  }
  const sample = await counting({ seed: 3 }).get(0);
  assert.equal(sample.answer, String(scenes[0].points.length));
  assert.equal((await sample.picture()).width, 672);
  const { answer } = sample.demonstration!;
  const reply = typeof answer === "string" ? answer : answer([112, 112]);
  const trajectory = {
    inputSize: [112, 112],
    pictureSize: [672, 672],
    turns: [{ text: reply }],
  } as unknown as Trajectory;
  assert.equal(binaryReward(sample, trajectory), 1);
  assert.equal(pointReward(sample, trajectory), 1);
  assert.notDeepEqual(makeCountingScene(3, 0, "heldout").points, scenes[0].points);
  assert.throws(() => counting({ split: "test" as "train" }), /split must be "train" or "heldout"/);
});

Deno.test("exact match, MAE and RMSE; no number counts as zero", () => {
  const items = [
    { answer: "3", expected: "3" },
    { answer: "5", expected: "3" },
    { answer: "many", expected: "4" },
    { expected: "1" },
  ];
  const { exact, answered, mae, rmse } = countingMetrics(items);
  assert.deepEqual([exact, answered, mae], [0.25, 0.5, (0 + 2 + 4 + 1) / 4]);
  assert.ok(Math.abs(rmse - Math.sqrt((4 + 16 + 1) / 4)) < 1e-12);
  assert.throws(() => countingMetrics([]), /no items/);
  assert.throws(() => countingMetrics([{ expected: "K" }]), /"K" is not a count/);
});
