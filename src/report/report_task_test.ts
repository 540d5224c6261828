import assert from "node:assert/strict";
import { InputError } from "../run/errors.ts";
import { Progress } from "../run/progress.ts";
import { parseReportTask, reportHelp, runReport } from "./report_task.ts";
import { withFolder, writeRun } from "./testing.ts";

async function report(...args: string[]): Promise<string> {
  let out = "";
  assert.equal(await runReport(args, new Progress({ isTerminal: false, write: (text) => void (out += text) })), 0);
  return out;
}

const refused = (pattern: RegExp) => (error: Error) => error instanceof InputError && pattern.test(error.message);

Deno.test("the command line takes folders and options in any order", () => {
  const { runs, task } = parseReportTask(["a", "--out", "x.html", "b", "--results=r", "c"]);
  assert.deepEqual([runs, task.out, task.results], [["a", "b", "c"], "x.html", "r"]);
  assert.throws(() => parseReportTask([]), refused(/^name at least one run folder/));
  assert.throws(() => parseReportTask(["a", "--ot", "x"]), refused(/^--ot: unknown option; did you mean --out\?/));
  assert.throws(() => parseReportTask(["a", "--out"]), refused(/^--out: needs a value/));
});

Deno.test("a report is one file, and problems are told", () =>
  withFolder(async (path) => {
    await writeRun(`${path}/a`, { planned: 9 });
    const out = await report(`${path}/a`, "--out", `${path}/r.html`, "--results", `${path}/none`);
    assert.match(out, /^note: a: not finished: 4 of 9 steps are there\nwrote .*r\.html: 1 run, 0\.\d MiB\n$/);
    const html = await Deno.readTextFile(`${path}/r.html`);
    assert.match(html, /<title>MGPO report: a<\/title>/);
    assert.match(html, /not finished: 4 of 9 steps are there/);
    // Nothing is loaded: no address but those of the SVG's own namespace.
    assert.deepEqual([...new Set(html.match(/https?:\/\/[^"'\s<)]*/g))], ["http://www.w3.org/2000/svg"]);
    await assert.rejects(report(`${path}/a`, "--out", `${path}/no/r.html`), refused(/--out .*no such folder/));
    await assert.rejects(report(`${path}/a`, "--out", `${path}/a`), refused(/--out .*must name a file/));
    await assert.rejects(report(`${path}/b`), refused(/^no run can be read/));
    assert.equal(await report("--help"), reportHelp() + "\n");
  }));
