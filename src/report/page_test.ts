import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";
import type { SavedRollout } from "../run/rollout_files.ts";
import { answer, type ServedPage } from "./live_page.ts";
import { renderReport } from "./page.ts";
import { PICTURE, withFolder, writeRun } from "./testing.ts";
import { ChromiumPage, findChromium } from "./testing_chromium.ts";

const chromium = await findChromium();
if (!chromium) console.log("no Chromium on this machine: the report's page is not tested (apt-get install chromium)");

/** A test with a browser; skipped where there is none. */
function browserTest(name: string, test: (page: ChromiumPage, path: string) => Promise<void>): void {
  Deno.test(
    `${name}${chromium ? "" : " (skipped: no Chromium)"}`,
    { ignore: !chromium },
    () =>
      withFolder(async (path) => {
        const page = await ChromiumPage.start(chromium!);
        try {
          await test(page, path);
          assert.deepEqual(page.complaints, []);
        } finally {
          await page.close();
        }
      }),
  );
}

async function open(page: ChromiumPage, path: string, results?: string): Promise<void> {
  const { html } = await renderReport({ runs: [`${path}/runs`], results });
  await Deno.writeTextFile(`${path}/report.html`, html);
  await page.open(pathToFileURL(`${path}/report.html`).href);
}

const EVIL = `</script></title><img src=x onerror="globalThis.pwned=1"><script>globalThis.pwned=2</script><!--\ud800`;

browserTest("what a model, a dataset or a file wrote is text", async (page, path) => {
  const change = (rollout: SavedRollout) => ({
    ...{
      ...rollout,
      question: EVIL,
      answer: EVIL,
      said: EVIL,
      sampleId: EVIL,
      choices: [EVIL],
      parts: { [EVIL]: 1, b: 2 },
    },
    tokens: rollout.tokens.map((token) => Array.isArray(token) ? [EVIL, token[1]] : EVIL),
    turns: rollout.turns.map((turn) => ({
      ...turn,
      text: EVIL,
      prompt: EVIL,
      ...turn.invalid ? { invalid: EVIL } : {},
    })),
    pictures: [`pictures/${EVIL}.jpg`],
  });
  const settings = { policy: EVIL, method: EVIL, data: { name: EVIL } };
  await writeRun(`${path}/runs/${"<img src=x onerror=pwned=3>"}`, { change, settings });
  const rows = [{ method: EVIL, split: EVIL, metric: EVIL, mean: 1, ci95: [0, 1] }];
  const comparisons = [{ a: EVIL, b: EVIL, metric: EVIL, split: EVIL, difference: 1, test: EVIL }];
  await Deno.mkdir(`${path}/results`);
  const file = { name: EVIL, about: EVIL, command: EVIL, rows, comparisons, missing: [EVIL] };
  await Deno.writeTextFile(`${path}/results/x.json`, JSON.stringify(file));
  await open(page, path, `${path}/results`);
  assert.equal(await page.value("String(globalThis.pwned)"), "undefined");
  assert.equal(await page.value("document.querySelectorAll('main img').length"), 0);
  const shown = await page.value<string>("document.querySelector('.question h3').textContent");
  assert.equal(shown.toWellFormed(), EVIL.toWellFormed(), "shown as it is, but for the half of a character");
  assert.match(
    await page.value("document.querySelector('.message.written .body').textContent"),
    /<\/script><\/title><img src=x/,
  );
  assert.match(
    await page.value("document.querySelector('.missing').textContent"),
    /^picture missing: pictures\/<\/script>/,
  );
});

browserTest("filters, list, slider and charts work by keyboard", async (page, path) => {
  await writeRun(`${path}/runs/mgpo-s0`);
  await writeRun(`${path}/runs/mgpo-s1`, { seed: 1 });
  await writeRun(`${path}/runs/grpo-s0`, { method: "grpo" });
  await open(page, path);
  const count = () => page.value<string>("document.querySelector('#count').value");
  const detail = () => page.value<string>("document.querySelector('.facts').textContent");
  assert.equal(await count(), "39 rollouts");
  assert.match(
    await detail(),
    /mgpo-s0, step 4, held-out heldout-0$/,
    "to begin with, something that has been learned",
  );

  // Every control can be reached, and shows that it has the focus.
  const reached: string[] = [];
  for (let i = 0; i < 60 && reached.at(-1) !== "slider"; i++) {
    await page.press("Tab");
    reached.push(await page.value("document.activeElement.id || document.activeElement.className"));
    const outline = await page.value<string>("getComputedStyle(document.activeElement).outlineStyle");
    assert.notEqual(outline, "none", `focus is visible on ${reached.at(-1)}`);
  }
  const wanted = [
    "skip",
    "chart-0",
    "filter-run",
    "filter-outcome",
    "filter-grounding",
    "filter-text",
    "clear",
    "list",
    "play",
    "slider",
  ];
  assert.deepEqual(wanted.filter((name) => !reached.includes(name)), []);

  // The slider goes through the steps of a question; what was learned is undone.
  await page.press("ArrowLeft");
  assert.match(await detail(), /step 2, held-out heldout-0$/);
  await page.press("ArrowLeft");
  assert.match(await detail(), /step 0, held-out heldout-0$/);
  assert.equal(await page.value("document.activeElement.id"), "slider", "it keeps the focus");
  assert.equal(
    await page.value("document.querySelector('#slider').getAttribute('aria-valuetext')"),
    "step 0: wrong, no JSON in the reply",
  );
  await page.value("new Promise((resolve) => setTimeout(resolve, 200))");
  assert.equal(await page.value("document.querySelectorAll('.cell').length"), 3);
  assert.equal(await page.value("document.querySelectorAll('.input .frame .asked').length"), 0);

  await page.value("document.querySelector('#list').focus()");
  await page.press("ArrowDown");
  assert.match(await detail(), /step 0, held-out heldout-1$/);
  await page.press("ArrowRight");
  assert.match(await detail(), /step 2, held-out heldout-1$/);
  assert.equal(await page.value("document.querySelectorAll('.input .frame .asked').length"), 1);
  assert.equal(
    await page.value("[...document.querySelectorAll('.message.written .loss')].map((e) => e.textContent).join('|')"),
    "[0, 0, 16, 16]|im_end|\\boxed{K}|im_end",
  );
  await page.press("End");
  const active = await page.value<string>("document.querySelector('#list').getAttribute('aria-activedescendant')");
  assert.equal(await page.value(`document.getElementById('${active}').getAttribute('aria-selected')`), "true");
  await page.press("Home");

  const filter = (name: string, value: string) =>
    page.value(`(() => { const e = document.querySelector('#filter-${name}'); e.value = '${value}';
      e.dispatchEvent(new Event('input', { bubbles: true })); })()`);
  await filter("outcome", "wrong");
  assert.equal(await count(), "18 of 39 rollouts");
  await filter("grounding", "no_json");
  await filter("run", "1");
  assert.equal(await count(), "6 of 39 rollouts");
  assert.ok((await page.value<string[]>("[...document.querySelectorAll('.row')].map((e) => e.ariaLabel)"))
    .every((label) => label.startsWith("wrong, no JSON in the reply") && label.endsWith("mgpo-s0")));
  await filter("text", "nothing has this");
  assert.match(await page.value("document.querySelector('#rows').textContent"), /No rollout passes/);
  await page.value("document.querySelector('#clear').click()");
  assert.equal(await count(), "39 rollouts");

  // A chart tells its values, and a method can be hidden.
  await page.value("document.querySelector('#chart-2').focus()");
  await page.press("ArrowLeft");
  assert.match(
    await page.value("document.querySelector('#chart-2 .readout').textContent"),
    /^step 3mgpo: 0\.583\d \(0\.5 to 0\.6667, n = 2\)grpo: 0\.5$/,
  );
  await page.value("document.querySelector('[data-series=\"1\"]').click()");
  assert.equal(await page.value("getComputedStyle(document.querySelector('#chart-2 .series-1')).display"), "none");
});

browserTest("of an incomplete run the rest is drawn, and what is missing is told in its place", async (page, path) => {
  await writeRun(`${path}/runs/a`);
  await Deno.remove(`${path}/runs/a/rollouts/${PICTURE}`);
  await Deno.writeTextFile(`${path}/runs/a/metrics.jsonl`, '{"step":1,"reward/mean":0.5}\n{"step":2,"rew');
  await Deno.mkdir(`${path}/runs/b`);
  await Deno.writeTextFile(`${path}/runs/b/run.json`, "{}");
  await open(page, path);
  const problems = await page.value<string>("document.querySelector('.problems').textContent");
  assert.match(
    problems,
    /a: metrics\.jsonl:2 is not a JSON object; .*1 picture is missing or damaged: pictures\/0123456789abcdef\.jpg/,
  );
  assert.match(
    problems,
    /b: run\.json names no method: it is of another version; metrics\.jsonl is missing; no rollouts were kept/,
  );
  assert.equal(await page.value("document.querySelectorAll('#chart-2 .series-0 circle').length"), 1);
  assert.match(
    await page.value("document.querySelector('.input .missing').textContent"),
    /^picture missing: pictures\/0123456789abcdef\.jpg$/,
  );
  assert.equal(
    await page.value("document.querySelectorAll('.input .frame .asked').length"),
    1,
    "its box is still drawn",
  );
  assert.ok(await page.value("document.querySelector('.crop img').decode().then(() => true)"), "the crop is there");
  assert.ok(await page.value<number>("document.querySelector('.input .frame').clientHeight") > 100, "its place stays");
});

browserTest("a run that has only begun", async (page, path) => {
  await writeRun(`${path}/runs/a`, { steps: 0, planned: 5, evaluations: [] });
  await open(page, path);
  assert.match(await page.value("document.querySelector('#curves').textContent"), /No run has metrics to draw/);
  assert.match(await page.value("document.querySelector('#rollouts').textContent"), /No rollouts were kept/);
});

browserTest("a thousand rollouts answer a key at once", async (page, path) => {
  const evaluations = Array.from({ length: 51 }, (_, i) => i);
  await writeRun(`${path}/runs/long`, { steps: 50, evaluations, watched: 20 });
  await open(page, path);
  assert.equal(await page.value("document.querySelector('#count').value"), "1120 rollouts");
  assert.ok(await page.value<number>("document.querySelectorAll('.row').length") < 60, "only rows in sight are drawn");
  await page.value(`(() => {
    globalThis.waits = [];
    document.querySelector('#list').focus();
    addEventListener('keydown', () => {
      const start = performance.now();
      requestAnimationFrame(() => setTimeout(() => waits.push(performance.now() - start)));
    }, { capture: true });
  })()`);
  const keys = ["ArrowDown", "ArrowDown", "ArrowLeft", "ArrowRight", "End", "ArrowUp", "Home", "ArrowDown"];
  for (const key of keys) {
    await page.press(key);
    await page.value("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 20)))");
  }
  const waits = await page.value<number[]>("waits");
  assert.equal(waits.length, keys.length);
  // Whatever else the machine does may slow some of them.
  const quarter = waits.sort((a, b) => a - b)[waits.length >> 2];
  assert.ok(quarter < 200, `a key takes ${waits.map((wait) => wait.toFixed(0)).join(", ")} ms`);
});

browserTest("light and dark are both readable", async (page, path) => {
  await writeRun(`${path}/runs/a`);
  for (const scheme of ["light", "dark"] as const) {
    await page.prefer(scheme);
    await open(page, path);
    const contrast = (selector: string) =>
      page.value<number>(`(${contrastOf})(document.querySelector(${JSON.stringify(selector)}))`);
    for (
      const selector of ["body", ".muted", ".chart text", ".facts dt", ".badge", ".row .line.muted", ".t", ".t.loss"]
    ) {
      assert.ok(
        await contrast(selector) >= 4.5,
        `${scheme}: ${selector} has a contrast of ${await contrast(selector)}`,
      );
    }
    const background = await page.value<string>("getComputedStyle(document.body).backgroundColor");
    assert.equal(Number(/\d+/.exec(background)![0]) < 128, scheme === "dark");
  }
});

/** Contrast of a text with what is behind it, by WCAG. Runs in the page. */
const contrastOf = `(element) => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const luminance = (...colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = [];
  for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
  const style = getComputedStyle(element);
  const [a, b] = [luminance(...behind), luminance(...behind, element.namespaceURI.endsWith('svg') ? style.fill : style.color)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}`;

browserTest("a served page comes back at the same place when there is a newer one", async (page, path) => {
  const run = `${path}/runs/a`;
  await writeRun(run, { steps: 2, planned: 4, evaluations: [0, 2] });
  let served: ServedPage = await renderReport({ runs: [run], live: true });
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen: () => {} },
    (request) => answer(request, served),
  );
  try {
    await page.open(`http://127.0.0.1:${server.addr.port}/`);
    await page.value("document.querySelector('#list').focus()");
    await page.press("End");
    await page.value("new Promise((resolve) => setTimeout(resolve, 1000))");
    const before = await page.value("document.querySelector('.facts').textContent + scrollY");
    await writeRun(run);
    served = await renderReport({ runs: [run], live: true });
    let count = "";
    for (const end = performance.now() + 20_000; count !== "13 rollouts" && performance.now() < end;) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      count = await page.value<string>("document.querySelector('#count')?.value ?? ''").catch(() => "");
    }
    assert.equal(count, "13 rollouts");
    assert.equal(await page.value("document.querySelector('.facts').textContent + scrollY"), before);
    assert.equal(await page.value("document.activeElement.id"), "list");
  } finally {
    await server.shutdown();
  }
});
