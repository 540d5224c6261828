import assert from "node:assert/strict";
import type { Dataset, Sample } from "./data/dataset.ts";
import { evaluationPositions, readSamples, stepPositions } from "./samples.ts";

Deno.test("a finite dataset is gone through in seeded epochs, whatever the step size", () => {
  const size = 10;
  const steps = (count: number, total: number) =>
    Array.from({ length: total / count }, (_, i) => stepPositions(size, 3, i + 1, count)).flat();
  const stream = steps(4, 40);
  assert.deepEqual(steps(8, 40), stream, "epochs run across steps");
  for (let epoch = 0; epoch < 4; epoch++) {
    const order = stream.slice(epoch * size, (epoch + 1) * size);
    assert.deepEqual(order.toSorted((a, b) => a - b), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    if (epoch > 0) assert.notDeepEqual(order, stream.slice(0, size));
  }
  assert.notDeepEqual(stepPositions(size, 4, 1, 10), stream.slice(0, 10), "another seed, another order");
  assert.equal(stepPositions(3, 0, 1, 8).length, 8, "a step may be longer than an epoch");
  assert.throws(() => stepPositions(0, 0, 1, 1), RangeError);
});

Deno.test("an endless dataset gives fresh samples each step", () => {
  const seen = [1, 2, 3, 4].flatMap((step) => stepPositions(Infinity, 0, step, 100));
  assert.equal(new Set(seen).size, 400);
  assert.deepEqual(stepPositions(Infinity, 0, 2, 100), seen.slice(100, 200));
  assert.notDeepEqual(stepPositions(Infinity, 1, 1, 100), seen.slice(0, 100));
});

Deno.test("evaluationPositions: a prefix of the endless, a seeded choice of the finite", () => {
  assert.deepEqual(evaluationPositions(Infinity, 3, 0), [0, 1, 2]);
  assert.deepEqual(evaluationPositions(3, 5, 0), [0, 1, 2]);
  const chosen = evaluationPositions(1000, 10, 0);
  assert.equal(new Set(chosen).size, 10);
  assert.ok(chosen.some((position) => position > 100), "not a prefix");
  assert.deepEqual(evaluationPositions(1000, 10, 0), chosen);
});

Deno.test("readSamples keeps the place of a row that can't be read", async () => {
  const good = (i: number): Sample => ({
    id: `s${i}`,
    question: "q",
    answer: "a",
    picture: () => Promise.reject("none"),
  });
  const dataset: Dataset = {
    name: "rows",
    size: 3,
    fingerprint: "",
    get: (i) => i === 1 ? Promise.reject(new Error("rows.jsonl:2: not JSON")) : Promise.resolve(good(i)),
  };
  const samples = await readSamples(dataset, [0, 1, 2]);
  assert.deepEqual(samples.map((sample) => sample.id), ["s0", "rows #1", "s2"]);
  await assert.rejects(samples[1].picture(), /rows\.jsonl:2: not JSON/);
});
