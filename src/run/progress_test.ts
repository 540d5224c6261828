import assert from "node:assert/strict";
import { formatBar, formatDuration, formatStep, formatTable, Progress, remainingSeconds } from "./progress.ts";

Deno.test("formatStep shows what there is", () => {
  const record = {
    step: 7,
    "reward/mean": 0.5,
    "grounding/valid_ratio": 0.25,
    policy_loss: -0.01234,
    samples_skipped: 0,
    "timing_s/total": 1.26,
  };
  assert.equal(formatStep(record, 50), "step  7/50  reward 0.500  valid 0.250  loss -0.0123  1.3 s");
  assert.equal(formatStep({ step: 50, policy_loss: 2, samples_skipped: 3 }, 50), "step 50/50  loss 2.0000  skipped 3");
});

Deno.test("durations, bars and remaining time", () => {
  assert.deepEqual([0, 59.6, 61, 3661].map(formatDuration), ["0:00", "1:00", "1:01", "1:01:01"]);
  assert.equal(formatBar(1, 4, 8), "[##------]");
  assert.equal(formatBar(9, 4, 4), "[####]");
  assert.equal(remainingSeconds([], 3), undefined);
  assert.equal(remainingSeconds([100, ...Array<number>(10).fill(2)], 3), 6, "old steps are forgotten");
});

Deno.test("formatTable aligns", () => {
  assert.equal(
    formatTable([["", "base", "trained"], ["accuracy", "0.3", "0.875"]]),
    "          base  trained\n--------  ----  -------\naccuracy   0.3    0.875",
  );
});

Deno.test("Progress draws over one line on a terminal and leaves it out elsewhere", () => {
  let out = "";
  const write = (text: string) => void (out += text);
  const plain = new Progress({ isTerminal: false, write });
  plain.status("working");
  plain.log("done");
  plain.clear();
  assert.equal(out, "done\n");
  out = "";
  const terminal = new Progress({ isTerminal: true, write, columns: () => 25 });
  terminal.status("x".repeat(40));
  assert.equal(out, "\r\x1b[2K" + "x".repeat(24));
  terminal.log("line");
  assert.ok(out.endsWith("\r\x1b[2Kline\n" + "x".repeat(24)), "the status stays below");
  terminal.clear();
  assert.ok(out.endsWith("\r\x1b[2K"));
});
