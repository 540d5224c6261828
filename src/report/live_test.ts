import assert from "node:assert/strict";
import { InputError } from "../run/errors.ts";
import { LiveReport } from "./live.ts";
import { withFolder, writeRun } from "./testing.ts";

Deno.test("a report is served while this thread is busy, refreshed, and left in the run folder", () =>
  withFolder(async (path) => {
    const told: string[] = [], run = `${path}/run`;
    const live = await LiveReport.serve(0, (line) => told.push(line));
    assert.match(live.address, /^http:\/\/127\.0\.0\.1:\d+\/$/);
    assert.match(await (await fetch(live.address)).text(), /appears when/);
    const port = Number(new URL(live.address).port);
    await assert.rejects(
      LiveReport.serve(port, () => {}),
      (error: Error) => error instanceof InputError && error.message.startsWith(`--report-port ${port}: is in use`),
    );
    await writeRun(run, { steps: 2, planned: 4, evaluations: [0] });
    live.watch(run);
    let page = "";
    while (!page.includes('id="overview"')) {
      await new Promise((resolve) => setTimeout(resolve, 50));
      page = await (await fetch(live.address)).text();
    }
    assert.match(page, /"live":true/);
    assert.ok(!page.includes("Not everything could be read"), "what isn't there yet is no problem");
    await writeRun(run);
    live.refresh();
    const ended = live.end();
    // An open browser still gets the last page.
    while (page.includes('"live":true')) page = await (await fetch(live.address)).text();
    await ended;
    const last = await Deno.readTextFile(`${run}/report.html`);
    assert.match(last, /"live":false/);
    assert.match(last, /"step":4/);
    assert.deepEqual(told, []);
  }));
