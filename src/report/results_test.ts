import assert from "node:assert/strict";
import { readResults, resultTables } from "./results.ts";
import { withFolder } from "./testing.ts";

const row = { method: "mgpo", split: "id", metric: "accuracy", mean: 0.855, sd: 0.014, ci95: [0.81, 0.89], n: 5 };

Deno.test("results become tables; files that are none are told", () =>
  withFolder(async (path) => {
    const rows = [row, { ...row, method: "base", mean: 0.32, sd: 0, ci95: null }, {
      ...row,
      metric: "accuracy/one_turn",
    }, {
      method: "<b>",
    }];
    const comparisons = [{
      ...{ a: "mgpo", b: "base", metric: "accuracy", split: "id", difference: 0.535, ci95: [0.5, 0.6], p: 1e-9 },
      test: "mcnemar-exact",
    }];
    const file = {
      name: "main",
      command: "deno task <x>",
      commit: "0123456789abcdef",
      seeds: [0, 1],
      rows,
      comparisons,
    };
    await Deno.writeTextFile(`${path}/main.json`, JSON.stringify(file));
    await Deno.writeTextFile(`${path}/broken.json`, "{");
    await Deno.writeTextFile(`${path}/other.json`, "{}");
    await Deno.writeTextFile(`${path}/notes.txt`, "");
    const [broken, main, other] = (await readResults(path)).map((file) => resultTables(file).text);
    assert.match(broken, /broken\.json<\/b> is not JSON/);
    assert.match(other, /other\.json<\/b> has no rows and comparisons/);
    assert.match(main, /in distribution/);
    assert.match(main, /<b>0\.855<\/b> ± 0\.014\s+<span class="interval">\[0\.810, 0\.890\]/);
    assert.match(main, /<td title="n = 5">0\.320\s*<\/td>/);
    assert.match(
      main,
      /mgpo − base: accuracy, in distribution<\/th>\s*<td>\+0\.535<\/td>\s*<td>\[0\.500, 0\.600\]<\/td>\s*<td>1\.0e-9/,
    );
    assert.match(main, /<summary>asked in other ways<\/summary>/);
    assert.match(main, /1 rows without method, metric or mean are left out/);
    assert.match(main, /deno task &lt;x&gt;/);
    assert.deepEqual(await readResults(`${path}/nowhere`), []);
  }));
