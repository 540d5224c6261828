import assert from "node:assert/strict";
import type { Box, Sample } from "./data/dataset.ts";
import { chooseBackend } from "./gpu/backend.ts";
import { loadPolicy } from "./policy/load.ts";
import { Picture } from "./policy/picture.ts";
import type { Completion, Message, Policy } from "./policy/policy.ts";
import {
  boxAround,
  containsAll,
  cropBox,
  defaultTemplate,
  demonstrate,
  invalidReasons,
  parseBox,
  renderChoices,
  renderTurn,
  resolveTemplate,
  rollout,
  type Size,
  summarize,
  toOriginal,
  type Trajectory,
  trajectoryToJson,
} from "./rollout.ts";

Deno.test("parseBox reads a box wherever it stands", () => {
  const box = '{"bbox_2d": [10, 20, 100, 90], "label": "sign"}';
  const replies = [
    box,
    `[${box}]`,
    "```json\n[\n  " + box + "\n]\n```",
    "The sign is [here], at {left}:\n```json\n" + box + "\n```<|im_end|>",
    '[{"label":"a \\"quoted\\" ] sign","bbox_2d":[10,20,100,90]}]',
    `[${box}, {"bbox_2d": [0, 0, 5, 5], "label": "another"}]`, // the first entry of a list
    `[{"bbox_2d": [0, 0, 50, 50], "label": "guess"}] no, rather [${box}]`, // the last value of a reply
    `${box} as in [1], {} and []`,
    `see (note [2: [${box}]`,
    `an unclosed "quote and {a brace ${box}`,
    `{"bbox_2d": [10.0, 2e1, 100, 90], "label": ""}`,
    `${box} and the rest was cut: [{"bbox_2d": [1, 2`,
  ];
  for (const reply of replies) assert.deepEqual(parseBox(reply, 112, 112), { box: [10, 20, 100, 90] }, reply);
});

Deno.test("parseBox gives each rejection its reason", () => {
  const of = (corners: string) => `[{"bbox_2d": ${corners}, "label": "x"}]`;
  const table: [string, string][] = [
    ["", "no_json"],
    ["I cannot see it.", "no_json"],
    ["at (10, 20, 100, 90)", "no_json"],
    ['[{"bbox_2d": [10, 20, 100', "no_json"], // cut by the length limit
    ['[{"bbox_2d": [10, 20, 100, 90], "la', "wrong_shape"], // the list of numbers inside is JSON
    ["[{'bbox_2d': [10, 20, 100, 90], 'label': 'x'}]", "wrong_shape"],
    ["[10, 20, 100, 90]", "wrong_shape"],
    ["[]", "wrong_shape"],
    ["{}", "wrong_shape"],
    ['{"bbox": [10, 20, 100, 90], "label": "x"}', "wrong_shape"],
    ['{"bbox_2d": [10, 20, 100, 90]}', "wrong_shape"],
    ['{"bbox_2d": [10, 20, 100, 90], "label": 3}', "wrong_shape"],
    ['[[{"bbox_2d": [10, 20, 100, 90], "label": "x"}]]', "wrong_shape"],
    ['["x", {"bbox_2d": [10, 20, 100, 90], "label": "x"}]', "wrong_shape"],
    [of("[10, 20, 100]"), "wrong_shape"],
    [of("[10, 20, 100, 90, 1]"), "wrong_shape"],
    [of("[[10, 20], [100, 90]]"), "wrong_shape"],
    [of('"10, 20, 100, 90"'), "wrong_shape"],
    [of("null"), "wrong_shape"],
    [of('["10", 20, 100, 90]'), "not_numbers"],
    [of("[0.1, 0.2, 0.9, 0.8]"), "not_numbers"],
    [of("[null, 20, 100, 90]"), "not_numbers"],
    [of("[-1, 20, 100, 90]"), "out_of_range"],
    [of("[10, 20, 201, 90]"), "out_of_range"],
    [of("[10, 20, 100, 113]"), "out_of_range"],
    [of("[300, 20, 100, 90]"), "out_of_range"],
    [of("[100, 20, 10, 90]"), "degenerate"],
    [of("[10, 90, 100, 90]"), "degenerate"],
    [of("[10, 20, 38, 90]"), "too_small"], // 28 is not more than 28
    [of("[10, 20, 100, 48]"), "too_small"],
  ];
  for (const [reply, invalid] of table) assert.deepEqual(parseBox(reply, 200, 112), { invalid }, reply);
  assert.deepEqual(parseBox(of("[0, 0, 200, 112]"), 200, 112), { box: [0, 0, 200, 112] }, "the whole picture");
  assert.deepEqual(parseBox(of("[10, 20, 39, 49]"), 200, 112), { box: [10, 20, 39, 49] }, "29 is more than 28");
});

Deno.test("parseBox takes its rules from the options", () => {
  const of = (x2: number, y2: number) => `{"bbox_2d": [0, 0, ${x2}, ${y2}], "label": "x"}`;
  assert.deepEqual(parseBox(of(8, 8), 200, 200, { minBoxSide: 7 }), { box: [0, 0, 8, 8] });
  assert.deepEqual(parseBox(of(8, 7), 200, 200, { minBoxSide: 7 }), { invalid: "too_small" });
  assert.deepEqual(parseBox(of(1, 1), 200, 200, { minBoxSide: 0 }), { box: [0, 0, 1, 1] });
  assert.deepEqual(parseBox(of(3000, 30), 4000, 4000), { invalid: "aspect" });
  assert.deepEqual(parseBox(of(30, 2999), 4000, 4000), { box: [0, 0, 30, 2999] });
  assert.deepEqual(parseBox(of(100, 50), 200, 200, { maxAspect: 2 }), { invalid: "aspect" });
  assert.deepEqual(parseBox(of(99, 50), 200, 200, { maxAspect: 2 }), { box: [0, 0, 99, 50] });
});

Deno.test("parseBox is quick on a reply full of brackets", () => {
  assert.deepEqual(parseBox("[".repeat(4000), 100, 100), { invalid: "no_json" });
  assert.deepEqual(parseBox("[{".repeat(2000) + "]", 100, 100), { invalid: "no_json" });
});

/** x·W/w rounded down or up, in exact integers. */
function exactly(x: number, W: number, w: number, up: boolean): number {
  const n = BigInt(x) * BigInt(W), d = BigInt(w);
  return Number(up ? (n + d - 1n) / d : n / d);
}

Deno.test("toOriginal equals exact rational arithmetic", () => {
  const sizes: [Size, Size][] = [
    [[112, 112], [672, 672]],
    [[1288, 756], [5472, 3213]],
    [[1316, 728], [3000, 1657]],
    [[28, 1120], [7, 280]],
    [[84, 56], [83, 57]],
  ];
  for (const [[w, h], [W, H]] of sizes) {
    for (let i = 0; i < 200; i++) {
      const x1 = (i * 37) % w, y1 = (i * 53) % h, x2 = x1 + 1 + (i * 11) % (w - x1), y2 = y1 + 1 + (i * 7) % (h - y1);
      const expected = [
        exactly(x1, W, w, false),
        exactly(y1, H, h, false),
        exactly(x2, W, w, true),
        exactly(y2, H, h, true),
      ];
      const got = toOriginal([x1, y1, x2, y2], [w, h], [W, H]);
      assert.deepEqual(got, expected);
      assert.ok(got[0] < got[2] && got[1] < got[3] && got[2] <= W && got[3] <= H);
    }
    assert.deepEqual(toOriginal([0, 0, w, h], [w, h], [W, H]), [0, 0, W, H], "the whole picture stays whole");
  }
  assert.deepEqual(toOriginal([-5, -5, 500, 500], [112, 112], [672, 672]), [0, 0, 672, 672], "clamped");
});

Deno.test("cropBox grows a crop with context and keeps it inside", () => {
  const input: Size = [112, 112], picture: Size = [672, 600];
  const table: [Box, { minCropSide?: number; squareCrop?: boolean }, Box][] = [
    [[28, 28, 56, 56], {}, [168, 150, 336, 300]],
    [[28, 28, 56, 42], { squareCrop: true }, [168, 104, 336, 272]], // 168 × 75 → 168 × 168, (168 − 75) / 2 → 46 above
    [[28, 0, 56, 14], { squareCrop: true }, [168, 0, 336, 168]], // shifted down
    [[28, 98, 56, 112], { squareCrop: true }, [168, 432, 336, 600]], // shifted up
    [[0, 0, 112, 56], { squareCrop: true }, [0, 0, 672, 600]], // no more than there is
    [[28, 28, 36, 36], { minCropSide: 100 }, [142, 122, 242, 222]],
    [[28, 28, 36, 56], { minCropSide: 100 }, [142, 150, 242, 300]], // only the short side
    [[28, 28, 36, 36], { minCropSide: 48 }, [168, 148, 216, 196]], // 48 × 43 → 48 × 48
    [[28, 28, 36, 36], { minCropSide: 5000 }, [0, 0, 672, 600]],
    [[104, 104, 112, 112], { minCropSide: 100, squareCrop: true }, [572, 500, 672, 600]],
  ];
  for (const [box, options, expected] of table) {
    assert.deepEqual(cropBox(box, input, picture, options), expected, JSON.stringify([box, options]));
  }
});

Deno.test("cropBox always contains the mapped box", () => {
  const input: Size = [84, 140], picture: Size = [331, 997];
  for (let i = 0; i < 300; i++) {
    const x1 = (i * 37) % 80, y1 = (i * 53) % 130, x2 = x1 + 1 + i % (84 - x1), y2 = y1 + 1 + (i * 7) % (140 - y1);
    const least = (i * 13) % 400, square = i % 2 === 0;
    const tight = toOriginal([x1, y1, x2, y2], input, picture);
    const crop = cropBox([x1, y1, x2, y2], input, picture, { minCropSide: least, squareCrop: square });
    const [w, h] = [crop[2] - crop[0], crop[3] - crop[1]];
    assert.ok(containsAll(crop, [tight]) && containsAll([0, 0, ...picture], [crop]));
    assert.ok(w >= Math.min(least, picture[0]) && h >= Math.min(least, picture[1]));
    if (square) assert.ok(w === h || Math.min(w, h) === Math.min(...picture));
  }
});

Deno.test("containsAll: every box, edges included", () => {
  assert.ok(containsAll([0, 0, 10, 10], [[0, 0, 10, 10], [2, 2, 3, 3]]));
  assert.ok(!containsAll([0, 0, 10, 10], [[2, 2, 3, 3], [5, 5, 11, 6]]));
  for (const box of [[-1, 0, 5, 5], [0, -1, 5, 5], [0, 0, 5, 11]] as Box[]) {
    assert.ok(!containsAll([0, 0, 10, 10], [box]));
  }
});

Deno.test("choices are lettered lines or one line", () => {
  assert.equal(renderChoices({}), "");
  assert.equal(renderChoices({ choices: [] }), "");
  assert.equal(renderChoices({ choices: ["red", "a {question}"] }), "\n(A) red\n(B) a {question}");
  assert.equal(renderChoices({ choices: ["E", "K", "T", "X"], choiceStyle: "listed" }), " E K T X");
  assert.equal(renderChoices({ choices: ["<|image_pad|>"] }), "\n(A) < |image_pad|>");
  assert.throws(() => renderChoices({ choices: Array(27).fill("x") }), RangeError);
});

Deno.test("renderTurn fills placeholders once and lets no special token in", () => {
  const message = renderTurn(
    ["see", "{image}", "{question}{choices}", " {other}"],
    "Is <|image_pad|> {choices}?",
    " A {question}",
  );
  assert.deepEqual(message, {
    role: "user",
    content: [
      { type: "text", text: "see" },
      { type: "image" },
      { type: "text", text: "Is < |image_pad|> {choices}? A {question}" },
      { type: "text", text: " {other}" },
    ],
  });
});

Deno.test("the default template is data, shows choices only where an answer is asked for", () => {
  assert.deepEqual(JSON.parse(JSON.stringify(defaultTemplate)), defaultTemplate);
  assert.deepEqual(resolveTemplate(), defaultTemplate);
  for (const turn of ["ground", "refine", "retry"] as const) {
    assert.ok(!defaultTemplate[turn].join("").includes("{choices}"));
  }
  for (const turn of ["valid", "invalid", "single", "free", "freeValid", "freeInvalid"] as const) {
    assert.ok(defaultTemplate[turn].join("").includes("{choices}"));
  }
});

Deno.test("resolveTemplate refuses unknown keys and turns without their picture", () => {
  assert.equal(resolveTemplate({ system: "Look." }).system, "Look.");
  assert.throws(() => resolveTemplate({ sytem: "x" } as Record<string, string>), /no "sytem"/);
  assert.throws(() => resolveTemplate({ valid: ["{question}"] }), /template\.valid/);
  assert.throws(() => resolveTemplate({ ground: ["{image}", "{image}"] }), /template\.ground/);
  assert.throws(() => resolveTemplate({ single: ["{image}{question}"] }), /template\.single/);
});

function conversation(turns: Partial<Trajectory["turns"][number]>[], length = 10): Trajectory {
  return {
    sampleId: "s",
    prompt: 0,
    rollout: 0,
    ids: Array(length).fill(1),
    assistantMask: Array(length).fill(0),
    logprobs: Array(length).fill(0),
    images: [],
    turns: turns.map((turn) => ({ prompt: "", text: "", ids: [1, 2], logprobs: [0, 0], finish: "stop", ...turn })),
    inputSize: [112, 112],
    pictureSize: [200, 100],
  };
}

Deno.test("summarize: shares over all trajectories, by the first grounding turn", () => {
  const box: Box = [0, 0, 56, 56];
  const batch = [
    conversation([{ box, crop: [0, 0, 100, 50], hit: true, regions: { plate: true } }, { ids: [1] }], 20),
    conversation([{ box, crop: [0, 0, 100, 100], hit: false, regions: { plate: true } }, { ids: [1, 2, 3] }]),
    conversation([{ invalid: "no_json", hit: false, regions: { plate: false }, finish: "length" }, {}]),
    conversation([{ invalid: "too_small", hit: false, regions: { plate: false } }, {}]),
  ];
  const expected: Record<string, number> = {
    "grounding/valid_ratio": 0.5,
    "grounding/hit_ratio": 0.25,
    "grounding/plate_ratio": 0.5,
    "crop/area_ratio": 0.375,
    "turns/mean": 2,
    "turns/answered_early_ratio": 0,
    "turns/over_ratio": 1,
    "completions/mean_length": 2,
    "completions/mean_length/turn_1": 2,
    "completions/mean_length/turn_2": 2,
    "completions/clipped_ratio": 1 / 8,
    num_tokens: 50,
  };
  for (const reason of invalidReasons) expected[`grounding/invalid/${reason}`] = 0;
  expected["grounding/invalid/no_json"] = expected["grounding/invalid/too_small"] = 0.25;
  assert.deepEqual(summarize(batch), expected);
});

Deno.test("summarize leaves out what was not measured", () => {
  assert.deepEqual(summarize([]), { num_tokens: 0 });
  assert.deepEqual(summarize([conversation([{ finish: "length" }])]), {
    "turns/mean": 1,
    "turns/over_ratio": 1,
    "completions/mean_length": 2,
    "completions/mean_length/turn_1": 2,
    "completions/clipped_ratio": 1,
    num_tokens: 10,
  });
  const noBoxes = summarize([conversation([{ invalid: "aspect" }, {}])]);
  assert.ok(!("grounding/hit_ratio" in noBoxes) && !("crop/area_ratio" in noBoxes));
});

Deno.test("trajectoryToJson is one line with images by key", () => {
  const trajectory = conversation([{ text: "two\nlines" }]);
  trajectory.images.push({ grid_thw: [1, 2, 2], pixel_values: new Float32Array(4), key: "k1" });
  const line = trajectoryToJson(trajectory);
  assert.ok(!line.includes("\n"));
  assert.deepEqual(JSON.parse(line), { ...trajectory, images: ["k1"] });
});

// ---- Conversations of a real policy. The golden checkpoint has random weights, so what it says by itself is no box. ----

/** A picture without two equal regions: every pixel tells its place. */
function chart(width: number, height: number): Picture {
  const data = new Uint8Array(width * height * 3);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at += 3) data.set([x * 255 / width, y * 255 / height, (x ^ y) & 255], at);
  }
  return Picture.fromRgb(data, width, height);
}

const size: Size = [350, 260]; // resized to 112 × 84
function sampleOf(id: string, rest: Partial<Sample> = {}): Sample {
  return {
    id,
    picture: () => Promise.resolve(chart(...size)),
    question: `Which letter is on sign ${id}?`,
    choices: ["E", "K"],
    answer: "K",
    ...rest,
  };
}

async function withPolicy(f: (policy: Policy) => Promise<void>): Promise<void> {
  await chooseBackend("wasm");
  const folder = new URL("../fixtures/goldens/models/tiny/", import.meta.url);
  const policy = await loadPolicy(folder, { minPixels: 56 * 56, maxPixels: 112 * 112 });
  try {
    await f(policy);
  } finally {
    policy.dispose();
  }
}

/** Makes the policy say given replies, with the log-probs that it gives them; `undefined` lets it speak for itself. */
function force(policy: Policy, reply: (rollout: number, turn: number) => string | undefined): void {
  const generate = policy.generate.bind(policy);
  policy.generate = async (sequences, options) => {
    const own = await generate(sequences, options);
    return own.map((completion, i): Completion => {
      const [, row, turn] = options.keys![i];
      const text = reply(row, turn);
      if (text === undefined) return completion;
      const ids = policy.encode(text), before = sequences[i].ids;
      const mask = [...before.map(() => 0), ...ids.map(() => 1)];
      const { logprobs, entropy } = policy.logProbs([{ ids: [...before, ...ids], images: sequences[i].images }], [
        mask,
      ]);
      entropy.dispose();
      const values = [...logprobs.dataSync()];
      logprobs.dispose();
      return { ids, logprobs: values, finish: policy.stopTokens.includes(ids[ids.length - 1]) ? "stop" : "length" };
    });
  };
}

/** Checks what holds for every trajectory: mask and log-probs say what was sampled, and the policy agrees on them. */
function checkTokens(policy: Policy, trajectories: readonly Trajectory[]): void {
  const { logprobs, entropy } = policy.logProbs(trajectories, trajectories.map((t) => t.assistantMask));
  const again = logprobs.arraySync();
  logprobs.dispose();
  entropy.dispose();
  trajectories.forEach((t, b) => {
    const written = (values: readonly number[]) => values.filter((_, i) => t.assistantMask[i] === 1);
    assert.equal(t.assistantMask.length, t.ids.length);
    assert.equal(t.logprobs.length, t.ids.length);
    assert.deepEqual(written(t.ids), t.turns.flatMap((turn) => turn.ids));
    assert.deepEqual(written(t.logprobs), t.turns.flatMap((turn) => turn.logprobs));
    t.logprobs.forEach((value, i) => assert.ok(t.assistantMask[i] === 1 || value === 0));
    const worst = Math.max(...written(t.logprobs).map((value, i) => Math.abs(value - again[b][i])));
    assert.ok(worst < 1e-4, `rollout and update disagree by ${worst}`);
  });
}

/** The ids that a conversation must have: prompts encoded, replies as sampled. */
function expectedIds(policy: Policy, t: Trajectory, opening: Message[], users: Message[], ended: boolean[]): number[] {
  let ids = policy.encodeChat(opening, [t.images[0]]);
  const history = [...opening];
  t.turns.forEach((turn, k) => {
    ids = ids.concat(turn.ids);
    if (k === t.turns.length - 1) return;
    ids = ids.concat(policy.encodeContinuation(history, [users[k]], [t.images[k + 1]], ended[k]));
    history.push({ role: "assistant", content: turn.text }, users[k]);
  });
  return ids;
}

function openingOf(sample: Sample): Message[] {
  return [{ role: "system", content: defaultTemplate.system }, renderTurn(defaultTemplate.ground, sample.question, "")];
}
const choicesShown = "\n(A) E\n(B) K";

Deno.test("rollout: an invalid box brings the first picture again; a broken picture costs its sample only", () =>
  withPolicy(async (policy) => {
    const broken = sampleOf("broken", { picture: () => Promise.reject(new Error("broken.png: truncated")) });
    const samples = [sampleOf("a", { boxes: [[0, 0, 9, 9]] }), broken, sampleOf("c")];
    const progress: string[] = [], keys: (readonly number[])[] = [];
    const generate = policy.generate.bind(policy);
    policy.generate = (sequences, options) => {
      keys.push(...options.keys ?? []);
      return generate(sequences, options);
    };
    const { trajectories, skipped } = await rollout(policy, samples, {
      groupSize: 2,
      maxNewTokens: [7, 4],
      seed: 3,
      step: 5,
      onProgress: (p) => progress.push(`${p.turn}/${p.turns}`),
    });
    assert.deepEqual(skipped, [{ sampleId: "broken", prompt: 1, error: "broken.png: truncated" }]);
    assert.deepEqual(trajectories.map((t) => [t.sampleId, t.prompt, t.rollout]), [
      ["a", 0, 0],
      ["a", 0, 1],
      ["c", 2, 0],
      ["c", 2, 1],
    ]);
    const named = (turn: number) => [0, 1, 4, 5].map((row) => [5, row, turn]);
    assert.deepEqual(keys, [...named(0), ...named(1)], "draws are named by step, prompt · G + rollout, turn");
    assert.ok(progress.includes("1/2") && progress.includes("2/2"));
    for (const t of trajectories) {
      const sample = samples[t.prompt], [first, last] = t.turns;
      assert.deepEqual([t.inputSize, t.pictureSize, t.turns.length], [[112, 84], [...size], 2]);
      assert.equal(first.invalid, "no_json");
      assert.equal(first.hit, t.prompt === 0 ? false : undefined);
      assert.ok(first.ids.length <= 7 && last.ids.length <= 4);
      assert.ok(!first.prompt.includes("(A)") && last.prompt.includes(choicesShown));
      assert.equal(t.images.length, 2);
      assert.equal(t.images[0], t.images[1]);
      const user = renderTurn(defaultTemplate.invalid, sample.question, choicesShown);
      const endOfTurn = policy.encode("<|im_end|>")[0];
      assert.deepEqual(t.ids, expectedIds(policy, t, openingOf(sample), [user], [first.ids.at(-1) === endOfTurn]));
    }
    assert.notDeepEqual(trajectories[0].turns[0].ids, trajectories[1].turns[0].ids, "rollouts of a group differ");
    checkTokens(policy, trajectories);

    const alone = await rollout(policy, [samples[2]], {
      groupSize: 2,
      maxNewTokens: [7, 4],
      seed: 3,
      step: 5,
      firstPrompt: 2,
    });
    assert.deepEqual(
      alone.trajectories.map((t) => t.ids),
      trajectories.slice(2).map((t) => t.ids),
      "the batch changes no draw",
    );
    const other = await rollout(policy, [samples[2]], {
      groupSize: 2,
      maxNewTokens: [7, 4],
      seed: 3,
      step: 6,
      firstPrompt: 2,
    });
    assert.notDeepEqual(
      other.trajectories.map((t) => t.ids),
      alone.trajectories.map((t) => t.ids),
      "another step draws anew",
    );
  }));

Deno.test("rollout: a valid box brings its crop of the original, however the reply ended", () =>
  withPolicy(async (policy) => {
    const json = '```json\n[{"bbox_2d": [40, 10, 100, 70], "label": "sign"}]\n```';
    const endings = ["<|im_end|>", "", "<|endoftext|>"]; // ended, cut by the limit, ended by another stop token
    force(policy, (row, turn) => turn === 0 ? endings[row] === undefined ? undefined : json + endings[row] : undefined);
    const sample = sampleOf("a", {
      boxes: [[130, 40, 200, 100], [300, 200, 312, 216]],
      regions: { plate: [[125, 30, 130, 35]], corner: [[124, 30, 130, 35]] },
    });
    const { trajectories } = await rollout(policy, [sample], { groupSize: 4, maxNewTokens: [3, 5] });
    // 350/112 = 3.125 and 260/84 = 3.0952: ⌊125⌋, ⌊30.95⌋, ⌈312.5⌉, ⌈216.67⌉
    const crop: Box = [125, 30, 313, 217];
    trajectories.slice(0, 3).forEach((t, row) => {
      const [first, last] = t.turns;
      assert.deepEqual([first.box, first.crop, first.invalid], [[40, 10, 100, 70], crop, undefined]);
      assert.deepEqual([first.hit, first.regions], [true, { plate: true, corner: false }]);
      assert.equal(first.finish, row === 1 ? "length" : "stop");
      assert.equal(t.images.length, 2);
      assert.equal(t.images[1].key, policy.prepareImage(chart(...size).crop(crop)).key);
      assert.notEqual(t.images[1].key, t.images[0].key);
      const user = renderTurn(defaultTemplate.valid, sample.question, choicesShown);
      assert.equal(
        last.prompt,
        defaultTemplate.valid.join("").replace("{question}{choices}", sample.question + choicesShown),
      );
      assert.deepEqual(t.ids, expectedIds(policy, t, openingOf(sample), [user], [row === 0]));
      assert.equal(last.box ?? last.invalid ?? last.hit, undefined, "the last turn grounds nothing");
    });
    assert.equal(trajectories[3].turns[0].invalid, "no_json");
    checkTokens(policy, trajectories);
    const metrics = summarize(trajectories);
    assert.equal(metrics["grounding/valid_ratio"], 0.75);
    assert.equal(metrics["grounding/hit_ratio"], 0.75);
    assert.equal(metrics["grounding/corner_ratio"], 0);
  }));

Deno.test("rollout: with three turns two of them ground, both in the first picture", () =>
  withPolicy(async (policy) => {
    const box = (corners: string) => `{"bbox_2d": [${corners}], "label": "x"}<|im_end|>`;
    const said = [[box("0, 0, 56, 42"), box("56, 42, 112, 84")], ["no", box("0, 0, 56, 42")], [
      box("9, 9, 3, 3"),
      "no",
    ]];
    force(policy, (row, turn) => said[row][turn]);
    const sample = sampleOf("a");
    const { trajectories } = await rollout(policy, [sample], {
      turns: 3,
      groupSize: 3,
      maxNewTokens: 3,
      squareCrop: true,
    });
    const key = (crop: Box) => policy.prepareImage(chart(...size).crop(crop)).key;
    const whole = policy.prepareImage(chart(...size)).key;
    const corner = key([0, 0, 175, 175]), other = key([175, 85, 350, 260]);
    assert.deepEqual(trajectories.map((t) => t.images.map((image) => image.key)), [
      [whole, corner, other],
      [whole, whole, corner],
      [whole, whole, whole],
    ]);
    assert.deepEqual(trajectories.map((t) => t.turns.map((turn) => turn.invalid)), [
      [undefined, undefined, undefined],
      ["no_json", undefined, undefined],
      ["degenerate", "no_json", undefined],
    ]);
    const names = [["refine", "valid"], ["retry", "valid"], ["retry", "invalid"]] as const;
    trajectories.forEach((t, row) => {
      const users = names[row].map((name) => renderTurn(defaultTemplate[name], sample.question, choicesShown));
      const ended = t.turns.map((turn) => turn.text !== "no");
      assert.deepEqual(t.ids, expectedIds(policy, t, openingOf(sample), users, ended));
    });
    checkTokens(policy, trajectories);
  }));

Deno.test("rollout: in the free form a boxed answer ends the conversation", () =>
  withPolicy(async (policy) => {
    const box = '{"bbox_2d": [0, 0, 56, 42], "label": "x"}<|im_end|>', answer = "K \\boxed{B}<|im_end|>";
    const said = [[answer], [box, answer], [box, "no", answer], ["no", box, "no"], [`${box} ${answer}`]];
    force(policy, (row, turn) => said[row][turn]);
    const sample = sampleOf("a", { boxes: [[0, 0, 9, 9]] });
    const options = { turns: 3, form: "free", groupSize: 5, maxNewTokens: 3 } as const;
    const { trajectories } = await rollout(policy, [sample], options);
    assert.deepEqual(trajectories.map((t) => t.turns.map((turn) => turn.text)), [
      ...said.slice(0, 4).map((turns) => turns.map((text) => text.replace("<|im_end|>", ""))),
      [said[4][0].replaceAll("<|im_end|>", "")],
    ]);
    const names = [[], ["freeValid"], ["freeValid", "invalid"], ["freeInvalid", "valid"], []] as const;
    const system: Message = { role: "system", content: defaultTemplate.system };
    const opening = [system, renderTurn(defaultTemplate.free, sample.question, choicesShown)];
    trajectories.forEach((t, row) => {
      const users = names[row].map((name) => renderTurn(defaultTemplate[name], sample.question, choicesShown));
      assert.deepEqual(t.ids, expectedIds(policy, t, opening, users, t.turns.map((turn) => turn.text !== "no")));
      assert.equal(t.images.length, t.turns.length);
    });
    assert.deepEqual(trajectories.map((t) => t.turns[0].answered), [true, false, false, false, true]);
    assert.deepEqual(trajectories.map((t) => t.turns[0].hit), [false, true, true, false, false]);
    assert.equal(trajectories[4].turns[0].box, undefined, "an answer looks at nothing");
    checkTokens(policy, trajectories);
    const metrics = summarize(trajectories);
    assert.equal(metrics["turns/mean"], (1 + 2 + 3 + 3 + 1) / 5);
    assert.equal(metrics["turns/answered_early_ratio"], 0.6);
    assert.equal(metrics["turns/over_ratio"], 0.2);
    assert.equal(metrics["grounding/valid_ratio"], 0.4);
    assert.equal(metrics["grounding/invalid/no_json"], 0.2);
    assert.equal(metrics["grounding/hit_ratio"], 0.4);
    const one = await rollout(policy, [sample], { ...options, turns: 1, groupSize: 1 });
    assert.equal(one.trajectories[0].turns[0].answered, undefined, "the last turn is no choice");
  }));

Deno.test("rollout: what is cut out can be another area than the model asked for", () =>
  withPolicy(async (policy) => {
    const said = ['{"bbox_2d": [0, 0, 56, 42], "label": "x"}<|im_end|>', "no"];
    force(policy, (row, turn) => turn === 0 ? said[row] : undefined);
    const sample = sampleOf("a", { boxes: [[0, 0, 9, 9]] }), other: Box = [200, 100, 300, 200];
    const options = { groupSize: 2, maxNewTokens: 4, seed: 1 };
    const { trajectories } = await rollout(policy, [sample], { ...options, cropInstead: () => other });
    const own = await rollout(policy, [sample], options);
    const user = renderTurn(defaultTemplate.valid, sample.question, choicesShown);
    trajectories.forEach((t, row) => {
      assert.equal(t.images[1].key, policy.prepareImage(chart(...size).crop(other)).key);
      const { shown, ...first } = t.turns[0];
      assert.deepEqual(shown, other);
      assert.deepEqual(first, own.trajectories[row].turns[0], "what the model asked for stays on record");
      assert.deepEqual(t.ids, expectedIds(policy, t, openingOf(sample), [user], [row === 0]));
    });
    checkTokens(policy, trajectories);
  }));

Deno.test("boxAround: the smallest valid box, in the resized picture's pixels", () => {
  const rules = { minBoxSide: 7, maxAspect: 100 };
  const around = (...boxes: Box[]) => boxAround(boxes, [112, 112], [672, 672], rules);
  assert.deepEqual(around([60, 66, 121, 120], [90, 130, 96, 131]), [10, 11, 21, 22]);
  assert.deepEqual(around([1, 660, 2, 672]), [0, 104, 8, 112], "grown and inside");
  assert.deepEqual(boxAround([[0, 100, 1600, 104]], [400, 300], [1600, 1200], { minBoxSide: 0, maxAspect: 20 }), [
    ...[0, 15, 400, 36],
  ]);
  assert.deepEqual(boxAround([[0, 0, 5, 5]], [112, 84], [350, 260]), [0, 0, 29, 29], "28 is not enough");
});

Deno.test("demonstrate: the conversation that a rollout of the same replies has", () =>
  withPolicy(async (policy) => {
    const sample = sampleOf("a", { boxes: [[130, 40, 300, 200]], regions: { corner: [[129, 38, 130, 39]] } });
    const box: Box = [41, 12, 96, 65],
      json = `\`\`\`json\n[{"bbox_2d": [${box.join(", ")}], "label": "key area"}]\n\`\`\``;
    for (const turns of [1, 2, 3]) {
      const replies = [...Array(turns - 1).fill(json), "\\boxed{B}"].map((text) => text + "<|im_end|>");
      force(policy, (_, turn) => replies[turn]);
      const given = await demonstrate(policy, sample, { answer: "\\boxed{B}" }, { turns });
      const { trajectories: [sampled] } = await rollout(policy, [sample], { turns, groupSize: 1, maxNewTokens: 2 });
      const wordless = (t: Trajectory) => {
        const turnsOf = t.turns.map((turn) => ({ ...turn, logprobs: [] }));
        return { ...t, logprobs: [], images: t.images.map((image) => image.key), turns: turnsOf };
      };
      assert.deepEqual(wordless(given), wordless(sampled));
      if (turns > 1) assert.deepEqual([given.turns[0].hit, given.turns[0].box], [true, box]);
    }
    const two = { turns: 2 }, answer = "B";
    await assert.rejects(demonstrate(policy, sampleOf("a"), { answer }, two), /sample a has no boxes/);
    const wrong = { answer, ground: () => "there" };
    await assert.rejects(demonstrate(policy, sample, wrong, two), /"there" has no valid box \(no_json\)/);
  }));

Deno.test("rollout: one turn asks for the answer at once; wording and options are checked", () =>
  withPolicy(async (policy) => {
    const sample = sampleOf("a", { choiceStyle: "listed", boxes: [[0, 0, 9, 9]] });
    const template = { singleSystem: "", single: ["Look: ", "{image}", "{question}{choices}"] };
    const { trajectories } = await rollout(policy, [sample], { turns: 1, groupSize: 1, maxNewTokens: 3, template });
    const [t] = trajectories;
    assert.equal(t.turns.length, 1);
    assert.equal(t.turns[0].prompt, "Look: {image}Which letter is on sign a? E K");
    assert.deepEqual([t.turns[0].invalid, t.turns[0].hit, t.images.length], [undefined, undefined, 1]);
    const opening = [renderTurn(template.single, sample.question, " E K")];
    assert.deepEqual(t.ids, expectedIds(policy, t, opening, [], []));
    checkTokens(policy, trajectories);

    assert.deepEqual(await rollout(policy, []), { trajectories: [], skipped: [] });
    for (
      const wrong of [
        { turns: 0 },
        { groupSize: 1.5 },
        { maxNewTokens: [] },
        { maxNewTokens: [4, 0] },
        { minBoxSide: NaN },
        { minCropSide: 0.5 },
        { maxAspect: 300 },
        { form: "open" as "free" },
      ]
    ) await assert.rejects(rollout(policy, [sample], wrong), RangeError, JSON.stringify(wrong));
  }));
