import assert from "node:assert/strict";
import { Payoff } from "./payoff.ts";

Deno.test("threads that pay are never sent to rest, not even by one slow round", () => {
  const payoff = new Payoff();
  for (let now = 0; now < 1000; now++) {
    payoff.note(0.3, now === 500 ? 3 : 0.2, now);
    assert.ok(!payoff.isResting(now));
  }
});

Deno.test("threads that lose rest, longer each time, until they pay again", () => {
  const payoff = new Payoff(), rests: number[] = [];
  let now = 0;
  const loseUntilRest = () => {
    while (!payoff.isResting(now)) payoff.note(0.2, 0.7, now);
    const begin = now;
    while (payoff.isResting(now)) now++;
    rests.push(now - begin);
  };
  for (let i = 0; i < 8; i++) loseUntilRest();
  assert.deepEqual(rests, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
  for (let i = 0; i < 50; i++) payoff.note(0.5, 0.3, now);
  loseUntilRest();
  assert.equal(rests.at(-1), 50);
});
