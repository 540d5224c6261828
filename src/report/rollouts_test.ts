import assert from "node:assert/strict";
import type { SavedRollout } from "../run/rollout_files.ts";
import type { Json } from "./checked.ts";
import { collectRollouts, pageRollout } from "./rollouts.ts";
import { readRuns } from "./run_reader.ts";
import { CROP, PICTURE, savedRollout, withFolder, writeRun } from "./testing.ts";

function page(rollout: SavedRollout | Json, settings: Json = {}, texts: string[] = []) {
  const line = { step: 2, split: "heldout" as const, value: rollout as Json, where: "f:1" };
  return pageRollout(line, 0, settings, { add: (text) => texts.push(text) - 1 });
}

Deno.test("tokens are marked as the run trained on them", () => {
  const saved = savedRollout(2, "train", 0, 0, true), texts: string[] = [];
  const all = page(saved, {}, texts)!;
  assert.equal(all.marks, "0000000" + "22" + "0000000" + "22");
  assert.equal(all.tokens.length, all.marks.length);
  assert.deepEqual(all.tokens[2], [2, 4]);
  assert.deepEqual([texts[2], texts[7]], ["<|image_pad|>", "[0, 0, 16, 16]"]);
  assert.deepEqual(all.logprobs, [-0.5, -0.5, -0.5, -0.5]);
  assert.equal(page(saved, { lossOn: "last" })!.marks, "0000000" + "11" + "0000000" + "22");
  // All text but special tokens, which no policy writes.
  assert.equal(page(saved, { lossOn: "every" })!.marks, "0303303" + "22" + "0303303" + "22");
});

Deno.test("boxes become shares of the picture; what can't be read is left out", () => {
  const saved = savedRollout(2, "heldout", 0, 0, true), shown = page(saved)!;
  assert.deepEqual(shown.turns[0].box, [0, 0, 0.25, 0.25]);
  assert.deepEqual(shown.targets, [[0.0313, 0.0313, 0.1563, 0.1563]]);
  assert.equal(shown.grounding, "hit");
  const strange: Json = {
    ...saved,
    boxes: [[1, 2, 3], "x", null],
    said: 7,
    tokens: [3],
    pictures: "p",
    inputSize: [0, 0],
  };
  const rest = page(strange)!;
  assert.deepEqual([rest.targets, rest.said, rest.tokens, rest.pictures], [[], undefined, [], []]);
  assert.equal(page({ ...saved, turns: [] }), undefined);
  assert.equal(page({}), undefined);
  // A version without what later ones have.
  const old = page({ turns: [{ text: "t", invalid: "no_json" }, { text: "u" }], reward: 1 })!;
  assert.deepEqual([old.correct, old.grounding, old.marks], [true, "no_json", ""]);
});

Deno.test("groups, pictures and limits", () =>
  withFolder(async (path) => {
    const change = (rollout: SavedRollout) =>
      rollout.step === 4 && rollout.prompt === 1
        ? { ...rollout, pictures: ["pictures/gone.jpg", "pictures/../../../run.json"] }
        : rollout;
    await writeRun(`${path}/a`, { change });
    await writeRun(`${path}/b`, {
      seed: 1,
      change: (rollout) => ({ ...rollout, turns: rollout.step === 2 ? 5 : rollout.turns }),
    });
    const { runs } = await readRuns([`${path}/a`, `${path}/b`]);
    const { rollouts, pictures, left } = await collectRollouts(runs, 100);
    assert.equal(left, 0);
    assert.deepEqual(rollouts.filter((r) => r.run === 0 && r.split === "train").map((r) => r.advantage), [
      -0.5,
      0.5,
      -0.5,
      0.5,
    ]);
    assert.deepEqual([...pictures.keys()].sort(), [PICTURE, CROP].sort(), "shared by both runs");
    assert.equal(pictures.get(CROP)!.type, "image/jpeg");
    assert.deepEqual(rollouts.find((r) => r.run === 0 && r.step === 4 && r.item === "heldout-1")!.pictures, [
      "!pictures/gone.jpg",
      "!pictures/../../../run.json",
    ]);
    assert.deepEqual(runs[0].problems, [
      "2 pictures are missing or damaged: pictures/gone.jpg, pictures/../../../run.json",
    ]);
    assert.match(
      runs[1].problems.join(),
      /^5 rollouts lack a conversation and are left out \(rollouts\/heldout-step-2.jsonl:1, /,
    );

    const few = await collectRollouts((await readRuns([`${path}/a`])).runs, 5);
    assert.deepEqual(few.rollouts.map((r) => [r.split, r.step]), [
      ...[["heldout", 2], ["heldout", 2], ["heldout", 4], ["heldout", 4], ["heldout", 4]],
    ]);
    assert.equal(few.left, 8);
  }));
