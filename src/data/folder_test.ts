import assert from "node:assert/strict";
import { Picture } from "../policy/picture.ts";
import { InputError } from "../run/errors.ts";
import { openDataset } from "./catalogue.ts";
import { openFolder } from "./folder.ts";

/** A folder with files of given content, removed afterwards. */
async function withFolder(
  files: Record<string, string | Uint8Array>,
  use: (dir: string) => Promise<void>,
): Promise<void> {
  const dir = await Deno.makeTempDir();
  try {
    for (const [name, content] of Object.entries(files)) {
      const slash = name.lastIndexOf("/");
      if (slash > 0) await Deno.mkdir(`${dir}/${name.slice(0, slash)}`, { recursive: true });
      if (typeof content === "string") await Deno.writeTextFile(`${dir}/${name}`, content);
      else await Deno.writeFile(`${dir}/${name}`, content);
    }
    await use(dir);
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
}

const png = await Picture.fromRgb(Uint8Array.from({ length: 6 * 4 * 3 }, (_, i) => 3 * i), 6, 4).encodePng();
const line = (image: string, more: Record<string, unknown> = {}) =>
  JSON.stringify({ image, question: `what is in ${image}?`, answer: "x", ...more });
const ids = async (dataset: { size: number; get(i: number): Promise<{ id: string }> }) =>
  await Promise.all(Array.from({ length: dataset.size }, async (_, i) => (await dataset.get(i)).id));

Deno.test("good rows become samples, wrong ones are listed with file and row", async () => {
  const rows = [
    line("a.png", { choices: ["no", "yes"], answer: "(B)", boxes: [[1, 0, 6, 4]] }),
    "",
    "{oops",
    line("sub/b.png", { id: "second" }),
    line("missing.png"),
    line("a.png", { id: "second" }),
    line("sub"),
    line("sub/../a.png"),
    line("cut.png"),
    line("a.png", { boxes: [[0, 0, 7, 4]], id: "wide" }),
  ];
  const files = { "train.jsonl": "\ufeff" + rows.join("\r\n"), "test.jsonl": line("a.png"), "a.png": png };
  await withFolder({ ...files, "sub/b.png": png, "cut.png": png.slice(0, 40) }, async (dir) => {
    const train = await openFolder(dir, "train");
    assert.deepEqual(await ids(train), ["row-1", "second", "row-8", "row-9", "wide"]);
    assert.equal(train.name, `${dir}/train`);
    assert.equal(train.source, `5 of 9 rows of ${dir}/train.jsonl`);
    assert.deepEqual(train.problems.map(({ row }) => row), [3, 5, 6, 7]);
    const expected = [
      /train\.jsonl:3: not JSON/,
      /train\.jsonl:5: image "missing\.png" is not in .*; add the file/,
      /train\.jsonl:6: id "second" is taken by row 4/,
      /train\.jsonl:7: image "sub" is not a file/,
    ];
    train.problems.forEach(({ message }, i) => assert.match(message, expected[i]));

    const first = await train.get(0);
    assert.deepEqual([first.question, first.choices, first.answer, first.choiceStyle], [
      "what is in a.png?",
      ["no", "yes"],
      "yes",
      undefined,
    ]);
    assert.deepEqual(first.boxes, [[1, 0, 6, 4]]);
    const picture = await first.picture();
    assert.deepEqual([picture.width, picture.height, picture.data[4]], [6, 4, 12]);
    await assert.rejects((await train.get(3)).picture(), (error: Error) => {
      assert.ok(error instanceof InputError);
      assert.match(error.message, /cut\.png .*train\.jsonl:9/);
      return true;
    });
    await assert.rejects(
      (await train.get(4)).picture(),
      /train\.jsonl:10: box \[0, 0, 7, 4\] .*outside the picture of 6x4/,
    );
    await assert.rejects(train.get(5), RangeError);

    await Deno.remove(`${dir}/sub/b.png`);
    await assert.rejects((await train.get(1)).picture(), /train\.jsonl:4: image "sub\/b\.png" cannot be read/);
    const heldout = await openFolder(dir, "heldout");
    assert.deepEqual([heldout.size, heldout.problems.length], [1, 0]);
  });
});

Deno.test("no row can reach outside its folder", async () => {
  await withFolder({ "own/ok.png": png, "secret.png": png, "own2/x.png": png }, async (parent) => {
    const dir = `${parent}/own`;
    await Deno.symlink(`${parent}/secret.png`, `${dir}/link.png`);
    await Deno.symlink(parent, `${dir}/up`);
    await Deno.symlink(`${dir}/ok.png`, `${dir}/inner.png`);
    const outside = [
      "../secret.png",
      "a/../../secret.png",
      "..\\secret.png",
      `${parent}/secret.png`,
      `${dir}/ok.png`,
      "C:\\x.png",
      "file:///etc/passwd",
      "https://example.com/x.png",
      "link.png",
      "up/secret.png",
      "up/own2/x.png",
      "..",
    ];
    await Deno.writeTextFile(`${dir}/data.jsonl`, [...outside, "ok.png", "inner.png"].map((i) => line(i)).join("\n"));
    const dataset = await openFolder(dir, "heldout", { heldoutShare: 1 });
    assert.equal(dataset.problems.length, outside.length);
    for (const [i, { message }] of dataset.problems.entries()) {
      assert.match(message, /data\.jsonl:\d+: image ".*" lies outside the folder; put the picture into/, outside[i]);
    }
    assert.deepEqual(await ids(dataset), ["row-13", "row-14"]);
    // The folder itself may be reached through a link.
    await Deno.symlink(dir, `${parent}/alias`);
    assert.equal((await openFolder(`${parent}/alias`, "heldout", { heldoutShare: 1 })).size, 2);
  });
});

Deno.test("one file is split by picture, the same way each time", async () => {
  const names = Array.from({ length: 10 }, (_, i) => `p${i}.png`);
  const rows = [...names, ...names].map((name) => line(name)).join("\n") + "\n";
  const files = { "questions.jsonl": rows, ...Object.fromEntries(names.map((name) => [name, png])) };
  await withFolder(files, async (dir) => {
    const open = async (split: "train" | "heldout", heldoutShare?: number, splitSeed?: number) => {
      const dataset = await openFolder(dir, split, { heldoutShare, splitSeed });
      return {
        questions: await Promise.all((await ids(dataset)).map(async (_, i) => (await dataset.get(i)).question)),
        dataset,
      };
    };
    const train = await open("train"), heldout = await open("heldout");
    assert.deepEqual([train.questions.length, heldout.questions.length], [16, 4]);
    assert.equal(new Set([...train.questions, ...heldout.questions]).size, 10);
    assert.ok(heldout.questions.every((question) => !train.questions.includes(question)));
    assert.deepEqual(await open("heldout").then((d) => d.questions), heldout.questions);
    assert.match(train.dataset.fingerprint, /^sha256:[0-9a-f]{64}$/);
    assert.notEqual(train.dataset.fingerprint, heldout.dataset.fingerprint);
    const seeds = await Promise.all([1, 2, 3, 4].map((seed) => open("heldout", 0.2, seed)));
    assert.ok(new Set(seeds.map((d) => d.dataset.fingerprint)).size > 1);
    assert.equal((await open("heldout", 1)).questions.length, 20);
    assert.equal((await open("train", 0)).questions.length, 20);
    assert.equal((await open("heldout", 0.001)).questions.length, 2);
    assert.equal((await open("train", 0.999)).questions.length, 2);
    await assert.rejects(open("train", 1), /heldoutShare 1 leaves no row for the train split/);
    await assert.rejects(open("train", -1), /heldoutShare must be from 0 to 1, got -1/);
  });
  await withFolder({ "data.jsonl": [line("a.png"), line("a.png")].join("\n"), "a.png": png }, async (dir) => {
    const both = [...await ids(await openFolder(dir, "train")), ...await ids(await openFolder(dir, "heldout"))];
    assert.deepEqual(both.toSorted(), ["row-1", "row-2"], "a single picture's rows are split");
  });
});

Deno.test("the fingerprint follows the rows", async () => {
  await withFolder({ "data.jsonl": line("a.png"), "a.png": png }, async (dir) => {
    const before = (await openFolder(dir, "train")).fingerprint;
    assert.equal((await openFolder(dir, "train")).fingerprint, before);
    await Deno.writeTextFile(`${dir}/data.jsonl`, line("a.png", { answer: "y" }));
    assert.notEqual((await openFolder(dir, "train")).fingerprint, before);
  });
});

Deno.test("folders that cannot be used say why", async () => {
  const rejects = async (files: Record<string, string | Uint8Array>, message: RegExp) =>
    await withFolder(files, async (dir) => {
      await assert.rejects(openDataset(dir, "train"), (error: Error) => {
        assert.ok(error instanceof InputError, String(error));
        assert.ok(!error.message.includes("\n"));
        assert.match(error.message, message);
        return true;
      });
    });
  await rejects({ "a.png": png }, /no JSONL file there; write data\.jsonl/);
  await rejects({ "x.jsonl": "", "y.jsonl": "" }, /several JSONL files \(x\.jsonl, y\.jsonl\)/);
  await rejects({ "data.jsonl": "\n \n" }, /data\.jsonl: no rows; write one JSON object a line/);
  await rejects({ "data.jsonl": `${line("a.png")}\n{` }, /none of 2 rows can be used; the first: .*:1: image "a\.png"/);
  await rejects({ "data.jsonl": new Uint8Array([0x7b, 0xff, 0xfe]) }, /data\.jsonl: not UTF-8 text/);
  await withFolder({ "data.jsonl": "{}" }, async (dir) => {
    await assert.rejects(openFolder(`${dir}/none`, "train"), /cannot be read as a folder/);
    await assert.rejects(openDataset(`${dir}/data.jsonl`, "train"), /is a file; name the folder/);
  });
});
