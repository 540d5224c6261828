import assert from "node:assert/strict";
import { RandomStream } from "../random.ts";
import { makeCountingScene } from "./counting.ts";
import { makeScene, type Scene, signColours, signLetters, signs } from "./signs.ts";
import { drawScene, signFont } from "./signs_draw.ts";

const many = (split: "train" | "heldout", count: number) =>
  Array.from({ length: count }, (_, index) => makeScene(5, index, { split }));

Deno.test("scenes keep the rules of the world", () => {
  for (const scene of [...many("train", 1500), ...many("heldout", 500)]) {
    assert.ok(scene.signs.length >= 4 && scene.signs.length <= 6);
    assert.equal(new Set(scene.signs.map((sign) => sign.colour)).size, scene.signs.length, "colours are distinct");
    scene.signs.forEach((sign, i) => {
      const [left, top, right, bottom] = sign.box, [l, t, r, b] = sign.plate;
      assert.ok(left >= 0 && top >= 0 && right <= 672 && bottom <= 672);
      assert.ok(l > left && t > top && r < right && b < bottom, "the plate lies inside the sign");
      assert.deepEqual([right - left, bottom - top, r - l, b - t], [
        sign.side,
        sign.side,
        7 * sign.scale,
        9 * sign.scale,
      ]);
      assert.ok(sign.scale === 3 ? sign.side >= 44 && sign.side <= 56 : sign.side >= 80 && sign.side <= 96);
      sign.rgb.forEach((value, c) => assert.ok(Math.abs(value - signColours[sign.colour][c]) <= 14));
      for (const { centre: [x, y] } of scene.signs.slice(0, i)) {
        assert.ok(Math.max(Math.abs(x - sign.centre[0]), Math.abs(y - sign.centre[1])) > 100);
      }
    });
    const asked = scene.signs[scene.target];
    assert.equal(scene.question, `which letter is on the ${asked.colour} sign?`);
    assert.equal(scene.answer, asked.letter);
    assert.equal(new Set(scene.choices).size, 4);
    assert.ok(scene.choices.includes(scene.answer));
    assert.deepEqual(scene.choices, scene.choices.toSorted());
  }
});

Deno.test("draws are spread as stated", () => {
  const scenes = many("train", 2000);
  const objects = scenes.flatMap((scene) => scene.signs);
  const share = (hits: number, of: number) => hits / of;
  assert.ok(Math.abs(share(objects.filter((sign) => sign.scale === 7).length, objects.length) - 0.3) < 0.02);
  for (const count of [4, 5, 6]) {
    assert.ok(Math.abs(share(scenes.filter((s) => s.signs.length === count).length, scenes.length) - 1 / 3) < 0.04);
  }
  for (const letter of signLetters) {
    assert.ok(Math.abs(share(scenes.filter((s) => s.answer === letter).length, scenes.length) - 1 / 8) < 0.03);
  }
  // A place among the sorted choices, or a guess, must not give the answer away.
  const guess = scenes.filter((s, i) => s.choices[i % 4] === s.answer).length;
  assert.ok(Math.abs(share(guess, scenes.length) - 0.25) < 0.035);
  for (const half of [0, 1]) {
    const there = objects.filter((sign) => (sign.centre[0] >= 336 ? 1 : 0) === half).length;
    assert.ok(Math.abs(share(there, objects.length) - 0.5) < 0.02);
  }
  assert.equal(new Set(scenes.map((s) => s.texture)).size, 12);
});

Deno.test("train and held-out share no scene, and order does not matter", () => {
  const key = ({ window, texture, signs }: Scene) => JSON.stringify([window, texture, signs[0]]);
  const seen = new Set<string>();
  for (const seed of [0, 1, 2, 2 ** 32, 2 ** 40 + 3]) {
    for (const split of ["train", "heldout"] as const) {
      for (let index = 0; index < 300; index++) seen.add(key(makeScene(seed, index, { split })));
    }
  }
  assert.equal(seen.size, 5 * 2 * 300);
  const backwards = [40, 3, 12].map((index) => makeScene(5, index));
  assert.deepEqual(backwards, [40, 3, 12].map((index) => many("train", 41)[index]));
});

Deno.test("the large share is a setting", () => {
  const scales = (largeShare: number) =>
    new Set(Array.from({ length: 40 }, (_, i) => makeScene(0, i, { largeShare }).signs.map((s) => s.scale)).flat());
  assert.deepEqual([...scales(0)], [3]);
  assert.deepEqual([...scales(1)], [7]);
});

/** The light's factor as the world's definition gives it. */
const light = (at: number, size: number) => 1 + 0.2 * (2 * (at + 0.5) / size - 1);

Deno.test("signs, plates and letters are where the scene says, lit by their place", () => {
  for (let index = 0; index < 40; index++) {
    const scene = makeScene(9, index), picture = drawScene(scene);
    assert.deepEqual([picture.width, picture.height], [672, 672]);
    const check = (x: number, y: number, [r, g, b]: readonly number[]) => {
      const at = (y * 672 + x) * 3;
      const want = [Math.min(255, r * light(x, 672)), g, Math.min(255, b * light(y, 672))];
      want.forEach((value, c) =>
        assert.ok(Math.abs(picture.data[at + c] - value) <= 0.51, `scene ${index}, ${x}, ${y}`)
      );
    };
    for (const { box: [left, top, right, bottom], centre, rgb, plate, letter, scale } of scene.signs) {
      // The middle of each edge is coloured, whatever the shape.
      for (const [x, y] of [[left + 2, centre[1]], [right - 3, centre[1]], [centre[0], top + 2]]) check(x, y, rgb);
      check(centre[0], bottom - 3, rgb);
      for (let y = plate[1]; y < plate[3]; y++) {
        for (let x = plate[0]; x < plate[2]; x++) {
          const column = Math.floor((x - plate[0]) / scale) - 1, row = Math.floor((y - plate[1]) / scale) - 1;
          const grey = signFont[letter][row]?.[column] === "1" ? 240 : 28;
          check(x, y, [grey, grey, grey]);
        }
      }
    }
  }
});

/** One background pixel before lighting, straight from the definition: noise cells summed with Keys' cubic kernel. */
function slowBackground(kind: number): (x: number, y: number) => number[] {
  const random = new RandomStream(1234, "signs texture", kind);
  const grey = random.uniform(90, 165);
  const base = [0, 1, 2].map(() => grey + random.uniform(-14, 14));
  const layers = [[8, 14], [32, 10], [128, 10], [512, 10]].map(([n, amplitude]) => {
    const gain = [0, 1, 2].map(() => amplitude * (1 + 0.3 * random.normal()));
    const cells = Array.from({ length: n * n }, () => {
      const word = random.next();
      return [0, 8, 16, 24].reduce((sum, shift) => sum + (word >>> shift & 255) - 127.5, 0) / Math.sqrt(21845);
    });
    return { n, gain, cells };
  });
  const kernel = (d: number) => {
    const a = Math.abs(d);
    return a < 1 ? (1.5 * a - 2.5) * a * a + 1 : a < 2 ? ((-0.5 * a + 2.5) * a - 4) * a + 2 : 0;
  };
  return (x, y) => {
    const out = [...base];
    for (const { n, gain, cells } of layers) {
      const px = (x + 0.5) / 1024 * n - 0.5, py = (y + 0.5) / 1024 * n - 0.5;
      for (let i = Math.floor(py) - 1; i <= Math.floor(py) + 2; i++) {
        for (let j = Math.floor(px) - 1; j <= Math.floor(px) + 2; j++) {
          const v = cells[(i + n) % n * n + (j + n) % n] * kernel(py - i) * kernel(px - j);
          gain.forEach((g, c) => out[c] += g * v);
        }
      }
    }
    return out;
  };
}

Deno.test("the background equals the slow version, across the texture's seam too", () => {
  const size = 1344, window = [1000, 512] as const;
  const picture = drawScene({ ...makeScene(0, 0, { size }), texture: 3, window, signs: [] });
  const slow = slowBackground(3);
  const random = new RandomStream(1, "pixels of the test");
  for (let i = 0; i < 400; i++) {
    const x = random.int(size), y = random.int(size);
    const [r, g, b] = slow((x + window[0]) % 1024, (y + window[1]) % 1024).map((v) => Math.min(255, Math.max(0, v)));
    const at = (y * size + x) * 3;
    [r * light(x, size), g, b * light(y, size)].forEach((value, c) => {
      // Rounded once as a texture and once when lit.
      assert.ok(Math.abs(picture.data[at + c] - Math.min(255, value)) < 1.2, `${x}, ${y}`);
    });
  }
});

Deno.test("the same scene is drawn with the same bytes as when it was recorded", () => {
  const prints = [[0, "train"], [1, "heldout"]] as const;
  assert.deepEqual(prints.map(([i, split]) => drawScene(makeScene(0, i, { split })).fingerprint), [
    "92c7dc4f1d62f0ff",
    "5e82b5a512f80726",
  ]);
});

Deno.test("scenes of all worlds and sizes are drawn with the same bytes as when they were recorded", () => {
  const scenes = [0, 1, 2, 3, 4, 5].flatMap((index): Scene[] => {
    const split = index % 2 ? "heldout" : "train";
    return [makeScene(3, index, { split }), makeScene(3, index, { split, world: "shifted" })];
  });
  scenes.push(makeCountingScene(3, 0), makeCountingScene(3, 1));
  scenes.push(makeScene(3, 9, { size: 504 }), makeScene(3, 9, { size: 1344 }));
  assert.deepEqual(scenes.map((scene) => drawScene(scene).fingerprint), [
    "609a72b81bea0465",
    "a743ec40cbfbd0c7",
    "e3b96e882e031382",
    "19f92125216d7cb5",
    "bcbd72f970e92e2f",
    "a0d9435c7a4587a7",
    "ff56d7ad63170947",
    "40e2a392c05650ce",
    "4ce5d076e6e82a64",
    "534f86bc22973611",
    "7efce2ba60594eb1",
    "55512d14c96786f4",
    "977416fc3ccf95d3",
    "901dc1e18c6ef005",
    "e62aa846157dd993",
    "f93e68e6da32d52e",
  ]);
});

Deno.test("signs is a dataset of both sizes", async () => {
  const train = signs({ seed: 3 }), heldout = signs({ seed: 3, split: "heldout", size: 1344 });
  assert.deepEqual([train.name, heldout.name], ["signs/train", "signs:1344/heldout"]);
  assert.notEqual(train.fingerprint, signs({ seed: 4 }).fingerprint);
  assert.equal(train.size, Infinity);
  assert.deepEqual(train.hints, { minBoxSide: 7, minCropSide: 48, squareCrop: true });
  const sample = await heldout.get(11), scene = makeScene(3, 11, { split: "heldout", size: 1344 });
  assert.equal(sample.id, "signs-heldout-3-11");
  assert.equal(sample.question, scene.question);
  assert.equal(sample.choiceStyle, "listed");
  assert.deepEqual(sample.choices, scene.choices);
  assert.deepEqual(sample.boxes, [scene.signs[scene.target].box]);
  assert.deepEqual(sample.regions, { plate: [scene.signs[scene.target].plate] });
  const picture = await sample.picture();
  assert.deepEqual([picture.width, picture.height], [1344, 1344]);
});

Deno.test("settings out of range are named", async () => {
  assert.throws(() => signs({ size: 673 }), /multiple of 28 from 504 to 4032, got 673/);
  assert.throws(() => signs({ largeShare: 1.5 }), /largeShare must be from 0 to 1, got 1.5/);
  assert.throws(() => signs({ seed: -1 }), /seed must be/);
  await assert.rejects(signs().get(-1), /index of a scene must be an integer/);
  await assert.rejects(signs().get(2 ** 32), RangeError);
});

Deno.test("the shifted world asks the same about what the standard one never shows", () => {
  const shifted = { split: "heldout", world: "shifted" } as const;
  const scenes = Array.from({ length: 400 }, (_, index) => makeScene(5, index, shifted));
  for (const scene of scenes) {
    assert.ok(scene.signs.length === 7 || scene.signs.length === 8);
    assert.ok(scene.texture >= 12 && scene.texture < 18);
    assert.equal(scene.question, `which letter is on the ${scene.signs[scene.target].colour} sign?`);
    scene.signs.forEach(({ scale, side, plate: [l, t, r, b], box: [left, top, right, bottom], centre }, i) => {
      assert.ok(scale === 4 ? side >= 60 && side <= 72 : scale === 6 && side >= 104 && side <= 120);
      assert.ok(left >= 0 && top >= 0 && right <= 672 && bottom <= 672);
      assert.ok(l > left && t > top && r < right && b < bottom, "the plate lies inside the sign");
      for (const { centre: [x, y] } of scene.signs.slice(0, i)) {
        assert.ok(Math.max(Math.abs(x - centre[0]), Math.abs(y - centre[1])) > 124);
      }
    });
  }
  assert.equal(new Set(scenes.map((s) => s.texture)).size, 6);
  assert.throws(() => makeScene(0, 0, { world: "other" as "shifted" }), /world must be "standard" or "shifted"/);
  assert.match(signs(shifted).fingerprint, /^signs-shifted v1/);
  assert.notEqual(signs(shifted).name, signs({ split: "heldout" }).name);
});
