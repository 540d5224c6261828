import assert from "node:assert/strict";
import type { Sample } from "../data/dataset.ts";
import { Picture } from "../policy/picture.ts";
import { rollout } from "../rollout.ts";
import { ScriptedPolicy } from "../testing_policy.ts";
import { type SavedRollout, saveRollouts, tokenTexts, WatchedItems } from "./rollout_files.ts";
import { RunFolder } from "./run_folder.ts";

const picture = Picture.fromRgb(Uint8Array.from({ length: 3 * 900 * 600 }, (_, i) => i % 251), 900, 600);

function sample(id: string): Sample {
  return {
    ...{ id, question: "which?", choices: ["K", "X"], choiceStyle: "listed", answer: "K", boxes: [[90, 60, 100, 70]] },
    picture: () => Promise.resolve(picture),
  };
}

/** Grounds, then answers right, in the first rollout of a group; in the others it does neither. */
const policy = new ScriptedPolicy((_, [, row, turn]) =>
  row % 2 === 1 ? "no" : turn === 0 ? '[{"bbox_2d": [0, 0, 29, 30], "label": "é"}]' : "\\boxed{K}"
);
const score = (_: Sample, { rollout }: { rollout: number }) => ({ total: 1 - rollout, parts: { binary: 1 - rollout } });

Deno.test("a saved rollout has all that a report shows; the same again writes the same bytes", async () => {
  const root = await Deno.makeTempDir();
  try {
    const samples = [sample("a")],
      { trajectories } = await rollout(policy, samples, { groupSize: 2, maxNewTokens: 64 });
    const rollouts = trajectories.map((trajectory) => ({
      sample: samples[0],
      trajectory,
      reward: score(samples[0], trajectory),
    }));
    const folder = await RunFolder.create(`${root}/run`, { settings: {}, environment: {} });
    const files = async () => {
      const out: Record<string, string> = {};
      for await (const { name, isFile } of Deno.readDir(`${root}/run/rollouts`)) {
        if (isFile) out[name] = await Deno.readTextFile(`${root}/run/rollouts/${name}`);
      }
      for await (const { name } of Deno.readDir(`${root}/run/rollouts/pictures`)) {
        out[name] = (await Deno.readFile(`${root}/run/rollouts/pictures/${name}`)).toBase64();
      }
      return out;
    };
    await saveRollouts(folder, policy, { step: 3, split: "train", rollouts });
    const once = await files();
    await saveRollouts(folder, policy, { step: 3, split: "train", rollouts });
    assert.deepEqual(await files(), once);
    const [right, wrong] = once["step-3.jsonl"].trimEnd().split("\n").map((line): SavedRollout => JSON.parse(line));
    assert.deepEqual(
      [right.step, right.split, right.sampleId, right.rollout, right.said, right.correct, right.reward],
      [
        ...[3, "train", "a", 0, "K", true, 1],
      ],
    );
    assert.deepEqual([wrong.said, wrong.correct, wrong.reward, wrong.turns[0].invalid], [
      undefined,
      false,
      0,
      "no_json",
    ]);
    assert.deepEqual([right.pictures.length, wrong.pictures], [2, [right.pictures[0]]]);
    // As many tokens as ids, and what the model wrote can be told from what it was given.
    const texts = right.tokens.flatMap((token) =>
      Array.isArray(token) ? new Array<string>(token[1]).fill(token[0]) : [token]
    );
    assert.equal(texts.length, right.ids.length);
    assert.equal(right.assistantMask.length, right.ids.length);
    const written = texts.filter((_, i) => right.assistantMask[i] === 1).join("");
    assert.equal(written, right.turns.map((turn) => turn.text).join(""));
    const original = await Picture.decode(await Deno.readFile(`${root}/run/rollouts/${right.pictures[0]}`), "original");
    assert.deepEqual([original.width, original.height], [448, 299]);
    const crop = await Picture.decode(await Deno.readFile(`${root}/run/rollouts/${right.pictures[1]}`), "crop");
    const [x1, y1, x2, y2] = right.turns[0].crop!;
    assert.deepEqual([crop.width, crop.height], [x2 - x1, y2 - y1]);
  } finally {
    await Deno.remove(root, { recursive: true });
  }
});

Deno.test("watched items are the first ones of an evaluation, whatever the batches", () => {
  const watched = new WatchedItems(3, score);
  const batch = (from: number, count: number) => {
    const trajectories = Array.from({ length: count }, (_, i) => ({ prompt: from + i, rollout: 0 }));
    // Only these two fields are looked at.
    const samples = trajectories.map(({ prompt }) => sample(`s${prompt}`));
    watched.add({ trajectories, skipped: [] } as unknown as Parameters<typeof watched.add>[0], samples, from);
  };
  batch(0, 2), batch(2, 2), batch(4, 1);
  assert.deepEqual(watched.take().map((kept) => kept.sample.id), ["s0", "s1", "s2"]);
  assert.deepEqual(watched.take(), []);
  batch(0, 2), batch(0, 1);
  assert.equal(watched.take().length, 1, "an evaluation that was broken off is forgotten");
});

Deno.test("tokens become texts: special ones and places of pictures are counted, parts of characters join", () => {
  const bytes = new TextEncoder().encode("aé漢");
  const bytePolicy = {
    suppressTokens: [300, 301],
    decode: (ids: readonly number[]) =>
      ids[0] >= 300 ? `<${ids[0]}>`.repeat(ids.length) : new TextDecoder().decode(Uint8Array.from(ids)),
  };
  assert.deepEqual(tokenTexts(bytePolicy, [300, ...bytes, 301, 301, 301, 97]), [
    ...[["<300>", 1], "a", "é", "", "漢", "", "", ["<301>", 3], "a"] as const,
  ]);
  // Bytes that never become a character stay as they are.
  assert.deepEqual(tokenTexts(bytePolicy, [0xe6, 97, 0xff]), ["\ufffd", "a", "\ufffd"]);
});
