import assert from "node:assert/strict";
import type { Box, Sample } from "./data/dataset.ts";
import {
  binaryReward,
  boxedAnswer,
  chosenIndex,
  combineRewards,
  formatReward,
  hitReward,
  intersectionOverUnion,
  iouReward,
  isCorrect,
  lengthPenalty,
  matchPoints,
  normalizeAnswer,
  parsePoints,
  type Point,
  pointReward,
  sameAnswer,
  validBoxReward,
} from "./reward.ts";
import { RandomStream } from "./random.ts";
import type { Trajectory, TurnRecord } from "./rollout.ts";

Deno.test("boxedAnswer takes the last complete box, braces balanced", () => {
  const table: [string, string | undefined][] = [
    ["", undefined],
    ["the answer is B", undefined],
    ["\\boxed{B}", "B"],
    ["first \\boxed{A}, no: \\boxed{ C }.", "C"],
    ["\\boxed{A} and then \\boxed{B", "A"],
    ["\\boxed{\\text{B}}", "\\text{B}"],
    ["\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"],
    ["\\boxed {D}", "D"],
    ["\\boxed{}", ""],
    ["\\boxed{a\\}b}", "a\\}b"],
    ["\\boxed{\\boxed{E}}", "E"],
    ["\\boxedB", undefined],
    ["\\boxed", undefined],
    ["boxed{B}", undefined],
    ["\\boxed{two\nlines}", "two\nlines"],
    ["\\boxed{A}\\boxed", "A"],
  ];
  for (const [text, expected] of table) assert.equal(boxedAnswer(text), expected, JSON.stringify(text));
});

Deno.test("normalizeAnswer removes dressing, not content", () => {
  const table: [string, string][] = [
    ["  Blue ", "blue"],
    ["\\text{Blue  sky}", "blue sky"],
    ["\\mathbf{\\text{B}}", "b"],
    ["$42$", "42"],
    ["\\(x\\)", "x"],
    ["“Exit”", "exit"],
    ["'exit'.", "exit"],
    ["50\\%", "50%"],
    ["3.5", "3.5"],
    [".5", ".5"],
    ["-5", "-5"],
    ["−5", "-5"],
    ["a – b", "a - b"],
    ["St. Louis!", "st. louis"],
    ["(B)", "b"],
    ["Ｂ", "b"],
    ["\\text{north}\\ \\text{east}", "north east"],
    ["$5", "$5"],
    ["...", ""],
  ];
  for (const [text, expected] of table) assert.equal(normalizeAnswer(text), expected, JSON.stringify(text));
});

Deno.test("sameAnswer: exact after normalising, or equal numbers", () => {
  const table: [string, string, boolean][] = [
    ["3", "3.0", true],
    ["3.", "3", true],
    ["+3", "3", true],
    ["1,000", "1000", true],
    ["12,34", "1234", false],
    ["0.50", ".5", true],
    ["-2", "2", false],
    ["35", "3.5", false],
    ["007", "7", false],
    ["007", "007", true],
    ["12345678901234567890", "12345678901234567891", false],
    ["three", "3", false],
    ["3 cars", "3", false],
    ["Stop", "stop", true],
    ["stop", "stops", false],
    ["", "", false],
    ["?", "!", false],
    ["\\text{EXIT}", "exit", true],
  ];
  for (const [a, b, expected] of table) {
    assert.equal(sameAnswer(a, b), expected, `${a} ~ ${b}`);
    assert.equal(sameAnswer(b, a), expected, `${b} ~ ${a}`);
  }
});

Deno.test("chosenIndex: letters and texts of lettered choices", () => {
  const colours = { choices: ["red", "blue", "Light blue", "green"] };
  const table: [string, number | undefined][] = [
    ["B", 1],
    ["b", 1],
    ["(B)", 1],
    ["B.", 1],
    ["B)", 1],
    ["**B**", 1],
    ["\\text{B}", 1],
    ["\\textbf{(B)}", 1],
    ["(B) blue", 1],
    ["B. Blue.", 1],
    ["B: blue", 1],
    ["B - blue", 1],
    ["blue", 1],
    ["Light  Blue", 2],
    ["light", undefined],
    ["E", undefined],
    ["(B) red", undefined], // contradicts itself
    ["A, B", undefined],
    ["A or B", undefined],
    ["AB", undefined],
    ["blue or green", undefined],
    ["", undefined],
    ["Answer: B", undefined],
    ["1", undefined],
  ];
  for (const [answer, expected] of table) assert.equal(chosenIndex(colours, answer), expected, JSON.stringify(answer));
});

Deno.test("chosenIndex: letters win among lettered choices, listed choices have no letters", () => {
  const letters = ["E", "K", "B", "A"];
  const lettered: [string, number | undefined][] = [["A", 0], ["B", 1], ["E", 0], ["K", 1], ["(D) A", 3], [
    "(A) A",
    undefined,
  ]];
  for (const [answer, expected] of lettered) {
    assert.equal(chosenIndex({ choices: letters }, answer), expected, answer);
  }
  const listed: [string, number | undefined][] = [["A", 3], ["B", 2], ["e", 0], ["K.", 1], ["C", undefined], [
    "E K",
    undefined,
  ]];
  for (const [answer, expected] of listed) {
    assert.equal(chosenIndex({ choices: letters, choiceStyle: "listed" }, answer), expected, answer);
  }
});

Deno.test("chosenIndex: choices that only differ in dressing need an exact answer", () => {
  const sample = { choices: ["3", "3.0", "x"], choiceStyle: "listed" as const };
  assert.equal(chosenIndex(sample, "3.0"), 1);
  assert.equal(chosenIndex(sample, "3.00"), undefined);
});

Deno.test("isCorrect is strict", () => {
  const sample = { choices: ["red", "blue", "Blue"], answer: "blue" };
  const table: [string, boolean][] = [
    ["I see it. \\boxed{B}", true],
    ["\\boxed{blue}", true],
    ["\\boxed{C}", false], // differs by case, and is another choice
    ["\\boxed{A} \\boxed{B}", true],
    ["\\boxed{B} \\boxed{A}", false],
    ["The answer is B", false],
    ["B", false],
    ["\\boxed{}", false],
    ["", false],
  ];
  for (const [text, expected] of table) assert.equal(isCorrect(sample, text), expected, text);
  assert.ok(
    isCorrect({ choices: ["RED", "Blue."], answer: "blue" }, "\\boxed{B}"),
    "answer written otherwise than the choice",
  );
  assert.ok(!isCorrect({ choices: ["red"], answer: "blue" }, "\\boxed{A}"), "answer that is not offered");
  assert.ok(isCorrect({ answer: "42" }, "\\boxed{42.0}"));
  assert.ok(!isCorrect({ answer: "42" }, "42"));
  assert.ok(isCorrect({ choices: [], answer: "Exit 7" }, "\\boxed{exit 7}"));
});

const sample: Sample = {
  id: "s",
  picture: () => Promise.reject(new Error("not needed")),
  question: "?",
  choices: ["red", "blue"],
  answer: "blue",
  boxes: [[100, 100, 200, 150], [150, 120, 300, 200]],
};

function turn(text: string, rest: Partial<TurnRecord> = {}, tokens = 3): TurnRecord {
  return { prompt: "", text, ids: Array(tokens).fill(1), logprobs: Array(tokens).fill(-1), finish: "stop", ...rest };
}
function trajectory(...turns: TurnRecord[]): Trajectory {
  return {
    sampleId: "s",
    prompt: 0,
    rollout: 0,
    ids: [],
    assistantMask: [],
    logprobs: [],
    images: [],
    turns,
    inputSize: [112, 112],
    pictureSize: [448, 448],
  };
}

Deno.test("answer rewards look at the last turn only", () => {
  const right = trajectory(turn("\\boxed{A}", { invalid: "no_json" }), turn("\\boxed{B}"));
  const wrong = trajectory(turn("\\boxed{B}", { invalid: "no_json" }), turn("\\boxed{A}"));
  const none = trajectory(turn("\\boxed{B}", { invalid: "no_json" }), turn("B"));
  const empty = trajectory(turn("\\boxed{}"));
  assert.deepEqual([right, wrong, none, empty].map((t) => binaryReward(sample, t)), [1, 0, 0, 0]);
  assert.deepEqual([right, wrong, none, empty].map((t) => formatReward(sample, t)), [1, 1, 0, 0]);
});

Deno.test("grounding rewards", () => {
  const box: Box = [25, 25, 75, 50]; // exactly around both boxes
  const good = trajectory(turn("", { box, crop: [100, 100, 300, 200], hit: true }), turn(""));
  const half = trajectory(turn("", { box: [25, 25, 50, 50], crop: [0, 0, 9, 9], hit: false }), turn(""));
  const invalid = trajectory(turn("", { invalid: "aspect", hit: false }), turn(""));
  const single = trajectory(turn("\\boxed{B}"));
  const all = [good, half, invalid, single];
  assert.deepEqual(all.map((t) => validBoxReward(sample, t)), [1, 1, 0, 0]);
  assert.deepEqual(all.map((t) => hitReward(sample, t)), [1, 0, 0, 0]);
  assert.deepEqual(all.map((t) => iouReward(sample, t)), [1, 0.5, 0, 0]);
  assert.equal(iouReward({ ...sample, boxes: undefined }, good), 0);
});

Deno.test("intersectionOverUnion equals counting cells", () => {
  const slow = (a: Box, b: Box) => {
    let both = 0, either = 0;
    for (let y = 0; y < 8; y++) {
      for (let x = 0; x < 8; x++) {
        const [inA, inB] = [a, b].map(([x1, y1, x2, y2]) => x >= x1 && x < x2 && y >= y1 && y < y2);
        both += Number(inA && inB);
        either += Number(inA || inB);
      }
    }
    return either ? both / either : 0;
  };
  const boxes: Box[] = [[0, 0, 8, 8], [0, 0, 3, 3], [2, 1, 5, 7], [5, 5, 8, 8], [4, 4, 4, 6], [3, 0, 6, 3]];
  for (const a of boxes) for (const b of boxes) assert.equal(intersectionOverUnion(a, b), slow(a, b), `${a} ${b}`);
});

Deno.test("lengthPenalty counts the tokens of all turns", () => {
  const penalty = lengthPenalty(20, 10);
  const at = (n: number) => penalty(sample, trajectory(turn("", {}, 4), turn("", {}, n - 4)));
  assert.deepEqual([5, 10, 11, 15, 20, 30].map(at), [0, 0, -0.1, -0.5, -1, -1]);
  assert.throws(() => lengthPenalty(10, 0), RangeError);
  assert.throws(() => lengthPenalty(10, 11), RangeError);
});

Deno.test("combineRewards weighs by name and refuses what is not a number", () => {
  const reward = combineRewards({
    answer: { reward: binaryReward, weight: 1 },
    format: { reward: formatReward, weight: 0.25 },
    long: { reward: () => -2, weight: 0.5 },
  });
  assert.deepEqual(reward(sample, trajectory(turn("\\boxed{B}"))), {
    total: 0.25,
    parts: { answer: 1, format: 1, long: -2 },
  });
  assert.throws(() => combineRewards({}), RangeError);
  assert.throws(() => combineRewards({ a: { reward: binaryReward, weight: NaN } }), /"a"/);
  const broken = combineRewards({ bad: { reward: () => NaN, weight: 1 } });
  assert.throws(() => broken(sample, trajectory(turn(""))), /"bad" of sample s/);
});

Deno.test("parsePoints reads JSON points and pairs in brackets, in order", () => {
  const text = '[{"point_2d": [1, 2.5], "label": "a"}] then (3,4), ( -5 , 6 ) but not (A) nor (7) nor [8, 9]';
  assert.deepEqual(parsePoints(text), [[1, 2.5], [3, 4], [-5, 6]]);
  assert.deepEqual(parsePoints(""), []);
});

/** The best matching by trying all: most pairs, then least distance. */
function bestMatching(predicted: readonly Point[], reference: readonly Point[], tolerance: number): [number, number] {
  let best: [number, number] = [0, 0];
  const visit = (at: number, used: number, pairs: number, sum: number) => {
    if (pairs > best[0] || (pairs === best[0] && sum < best[1])) best = [pairs, sum];
    if (at === predicted.length) return;
    visit(at + 1, used, pairs, sum);
    reference.forEach(([a, b], j) => {
      const d = Math.hypot(predicted[at][0] - a, predicted[at][1] - b);
      if (d <= tolerance && !(used >> j & 1)) visit(at + 1, used | 1 << j, pairs + 1, sum + d);
    });
  };
  visit(0, 0, 0, 0);
  return best;
}

Deno.test("matchPoints finds as many pairs as there can be, at least distance", () => {
  const random = new RandomStream(1, "match points");
  const points = (n: number) => Array.from({ length: n }, (): Point => [random.int(60), random.int(60)]);
  for (let round = 0; round < 300; round++) {
    const predicted = points(random.int(6)), reference = points(random.int(6)), tolerance = 5 + random.int(40);
    const pairs = matchPoints(predicted, reference, tolerance);
    assert.equal(new Set(pairs.map(([p]) => p)).size, pairs.length);
    assert.equal(new Set(pairs.map(([, r]) => r)).size, pairs.length);
    const distances = pairs.map(([p, r]) =>
      Math.hypot(predicted[p][0] - reference[r][0], predicted[p][1] - reference[r][1])
    );
    assert.ok(distances.every((d) => d <= tolerance));
    const [count, sum] = bestMatching(predicted, reference, tolerance);
    assert.equal(pairs.length, count);
    assert.ok(Math.abs(distances.reduce((a, b) => a + b, 0) - sum) < 1e-9);
  }
});

Deno.test("pointReward is the matched share, in pixels of the original", () => {
  const sample: Sample = {
    ...{ id: "c", question: "how many?", answer: "2", points: [[100, 100], [300, 200]], pointTolerance: 20 },
    picture: () => Promise.reject(new Error("not needed")),
  };
  const reply = (text: string) =>
    ({ inputSize: [112, 112], pictureSize: [448, 448], turns: [{ text }] }) as unknown as Trajectory;
  assert.equal(pointReward(sample, reply("(25, 25) (75, 50) \\boxed{2}")), 1);
  assert.equal(pointReward(sample, reply("(25, 25) \\boxed{2}")), 0.5);
  assert.equal(pointReward(sample, reply("(25, 25) (25, 26) (75, 50) (0, 0)")), 0.5);
  assert.equal(pointReward(sample, reply("(100, 100)")), 0);
  assert.equal(pointReward(sample, reply("\\boxed{2}")), 0);
  assert.equal(pointReward({ ...sample, points: undefined }, reply("(25, 25)")), 0);
});
