import assert from "node:assert/strict";
import { InputError } from "../run/errors.ts";
import { datasetProblems, openDataset } from "./catalogue.ts";

Deno.test("signs are opened by name, with size and seed", async () => {
  const train = await openDataset("signs", "train", { seed: 4 });
  assert.equal(train.name, "signs/train");
  assert.match(train.fingerprint, /seed=4/);
  assert.deepEqual(datasetProblems(train), []);
  const large = await openDataset("signs:1344", "heldout");
  assert.equal(large.name, "signs:1344/heldout");
  assert.equal((await (await large.get(0)).picture()).width, 1344);
  assert.equal((await openDataset("signs-shifted", "heldout")).name, "signs-shifted/heldout");
  assert.equal((await openDataset("counting", "heldout")).name, "counting/heldout");
  assert.equal((await openDataset("signs-shifted:1344", "train")).name, "signs-shifted:1344/train");
});

Deno.test("unknown datasets are answered with the names there are", async () => {
  const wrong: [string, RegExp][] = [
    ["sings", /no dataset or folder "sings"; there are: signs, signs:SIZE \(e\.g\. signs:1344\), signs-shifted/],
    ["", /no dataset or folder ""/],
    ["signs:big", /what follows the colon must be a size in pixels/],
    ["signs:", /what follows the colon/],
    ["signs:100", /dataset "signs:100": size of a signs picture must be a multiple of 28 from 504 to 4032, got 100/],
  ];
  for (const [name, message] of wrong) {
    await assert.rejects(openDataset(name, "train"), (error: Error) => {
      assert.ok(error instanceof InputError, String(error));
      assert.match(error.message, message);
      return true;
    });
  }
});
