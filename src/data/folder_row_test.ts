import assert from "node:assert/strict";
import { InputError } from "../run/errors.ts";
import { parseRow } from "./folder_row.ts";

const row = (fields: Record<string, unknown>) =>
  parseRow(JSON.stringify({ image: "a.png", question: "what?", answer: "x", ...fields }), "data.jsonl:7");

Deno.test("an answer is a choice's text or its letter", () => {
  const choices = ["red", "blue", "Green"];
  const right: [unknown, string][] = [
    ["blue", "blue"],
    [" blue ", "blue"],
    ["BLUE", "blue"],
    ["green", "Green"],
    ["B", "blue"],
    ["b", "blue"],
    ["(C)", "Green"],
    ["A.", "red"],
    ["A)", "red"],
  ];
  for (const [answer, want] of right) assert.equal(row({ choices, answer }).answer, want);
  // Choices that are letters or numbers themselves are taken at their word.
  assert.equal(row({ choices: ["E", "A", "K"], answer: "A" }).answer, "A");
  assert.equal(row({ choices: [3, "5", 7.5], answer: 5 }).answer, "5");
  assert.equal(row({ answer: 12 }).answer, "12");
  assert.equal(row({ answer: "twelve " }).answer, "twelve");
});

Deno.test("the other fields are read, unknown ones left alone", () => {
  assert.deepEqual(row({ id: 12, boxes: [[0, 1.5, 20, 30], [4, 4, 5, 5]], source: "own" }), {
    image: "a.png",
    question: "what?",
    answer: "x",
    choices: undefined,
    boxes: [[0, 1.5, 20, 30], [4, 4, 5, 5]],
    id: "12",
  });
  assert.equal(row({ boxes: [], choices: null, id: null }).boxes, undefined);
});

Deno.test("each way to be wrong is named with file and row", () => {
  const wrong: [Record<string, unknown> | string, RegExp][] = [
    ["{not json", /not JSON: "\{not json"; write one whole JSON object/],
    ["[1, 2]", /must be a JSON object with image, question and answer, got \[1,2\]/],
    ["null", /must be a JSON object/],
    [{ image: undefined }, /"image" is missing; add the path of a picture/],
    [{ image: 5 }, /"image" must be the path of a picture in the folder, got 5/],
    [{ image: "a\0.png" }, /"image" must be/],
    [{ question: undefined }, /"question" is missing; add a text/],
    [{ question: " " }, /"question" must be a text, got " "/],
    [{ answer: undefined }, /"answer" is missing; add the right answer/],
    [{ answer: undefined, choices: ["a", "b"] }, /"answer" is missing; add the right choice or its letter/],
    [{ answer: ["x"] }, /"answer" must be a text or a number, got \["x"\]/],
    [{ answer: "" }, /"answer" must be a text or a number, got ""/],
    [{ answer: "D", choices: ["u", "v"] }, /"answer" "D" is not among the choices \["u","v"\].* a letter A to B/],
    [{ answer: 1, choices: ["u", "v"] }, /"answer" 1 is not among the choices/],
    [{ choices: "a, b" }, /"choices" must be a list of 2 to 26 texts, got "a, b"/],
    [{ choices: ["x"] }, /"choices" must be a list of 2 to 26/],
    [{ choices: Array.from({ length: 27 }, (_, i) => `c${i}`) }, /"choices" must be a list of 2 to 26/],
    [{ choices: ["x", null] }, /"choices" must be a list/],
    [{ choices: ["x", "y", " x"] }, /"choices" holds "x" twice/],
    [{ boxes: {} }, /"boxes" must be a list of \[x1, y1, x2, y2\], got \{\}/],
    [{ boxes: [1, 2, 3, 4] }, /"boxes" holds 1; a box is/],
    [{ boxes: [[1, 2, 3]] }, /"boxes" holds \[1,2,3\]/],
    [{ boxes: [[5, 2, 3, 8]] }, /"boxes" holds \[5,2,3,8\]/],
    [{ boxes: [[-1, 2, 3, 8]] }, /0 <= x1 < x2/],
    [{ boxes: [[0, 0, "3", 8]] }, /in pixels of the original/],
    [{ id: {} }, /"id" must be a text or a number, got \{\}/],
  ];
  for (const [fields, message] of wrong) {
    assert.throws(
      () => typeof fields === "string" ? parseRow(fields, "data.jsonl:7") : row(fields),
      (error: Error) => {
        assert.ok(error instanceof InputError, String(error));
        assert.ok(error.message.startsWith("data.jsonl:7: ") && !error.message.includes("\n"), error.message);
        assert.match(error.message, message);
        return true;
      },
    );
  }
});
