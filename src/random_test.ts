import assert from "node:assert/strict";
import { philox4x32, RandomStream } from "./random.ts";

function block(key: [number, number], counter: [number, number, number, number]): string {
  const out = new Uint32Array(4);
  philox4x32(key[0], key[1], counter, out);
  return Array.from(out, (w) => w.toString(16).padStart(8, "0")).join(" ");
}

Deno.test("Philox4x32-10 gives the known answers of its authors' test vectors", () => {
  assert.equal(block([0, 0], [0, 0, 0, 0]), "6627e8d5 e169c58d bc57ac4c 9b00dbd8");
  const ones = 0xffffffff;
  assert.equal(block([ones, ones], [ones, ones, ones, ones]), "408f276d 41c83b0e a20bc7c6 6d5451fd");
  assert.equal(
    block([0xa4093822, 0x299f31d0], [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]),
    "d16cfe09 94fdcceb 5001e420 24126ea1",
  );
});

Deno.test("a stream is a function of its name, and every part of the name matters", () => {
  const first = (...name: [number, string, number?, number?, number?]) => {
    const [seed, purpose, ...counters] = name;
    return new RandomStream(seed, purpose, ...counters).next();
  };
  assert.equal(first(1, "a", 2, 3, 4), first(1, "a", 2, 3, 4));
  const others = [first(2, "a", 2, 3, 4), first(1, "b", 2, 3, 4), first(1, "a", 1, 3, 4), first(1, "a", 2, 4, 4)];
  for (const other of [...others, first(1, "a", 2, 3, 5), first(1 + 2 ** 32, "a", 2, 3, 4)]) {
    assert.notEqual(other, first(1, "a", 2, 3, 4));
  }
  for (const seed of [-1, 0.5, NaN, 2 ** 53]) assert.throws(() => new RandomStream(seed, "a"), RangeError);
});

Deno.test("uniform and normal draws have their moments; shuffle keeps the elements", () => {
  const random = new RandomStream(3, "moments"), n = 20000;
  const mean = (draw: () => number) => {
    let s = 0, q = 0;
    for (let i = 0; i < n; i++) {
      const x = draw();
      s += x;
      q += x * x;
    }
    return [s / n, q / n - (s / n) ** 2];
  };
  const [u, uVariance] = mean(() => random.uniform(2, 4));
  assert.ok(Math.abs(u - 3) < 0.02 && Math.abs(uVariance - 1 / 3) < 0.01, `${u} ${uVariance}`);
  const [z, zVariance] = mean(() => random.normal());
  assert.ok(Math.abs(z) < 0.03 && Math.abs(zVariance - 1) < 0.04, `${z} ${zVariance}`);
  const items = Array.from({ length: 50 }, (_, i) => i), shuffled = random.shuffle(items);
  assert.notDeepEqual(shuffled, items);
  assert.deepEqual(shuffled.sort((a, b) => a - b), items);
});
