import assert from "node:assert/strict";
import { expectedTensors, type NamedTensor, openCheckpoint, saveCheckpoint } from "./checkpoint.ts";
import { readSafetensors, type TensorToWrite, writeSafetensors } from "./safetensors.ts";

const tiny = new URL("../../fixtures/goldens/models/tiny/", import.meta.url);
const names = new URL("../../fixtures/goldens/models/names.json", import.meta.url);

async function withFolder(use: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await use(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function collect(tensors: AsyncIterable<NamedTensor>): Promise<Map<string, NamedTensor>> {
  const out = new Map<string, NamedTensor>();
  for await (const tensor of tensors) out.set(tensor.name, tensor);
  return out;
}

const tinyWeights = async () => [...(await collect((await openCheckpoint(tiny)).tensors())).values()];
const tinyConfig = () => Deno.readTextFile(new URL("config.json", tiny));

/** Writes a checkpoint folder with changed weights or configuration. */
async function makeFolder(folder: string, tensors: Iterable<TensorToWrite>, config?: string): Promise<void> {
  await Deno.writeTextFile(`${folder}/config.json`, config ?? await tinyConfig());
  await Deno.writeFile(`${folder}/model.safetensors`, writeSafetensors(tensors));
}

/** The upper half of each float: bfloat16 by truncation. */
function truncate(data: Float32Array): Uint16Array {
  return Uint16Array.from(new Uint32Array(data.buffer, data.byteOffset, data.length), (bits) => bits >>> 16);
}

/** A safetensors file of bfloat16 tensors. */
function brainFile(tensors: readonly NamedTensor[]): Uint8Array {
  const header: Record<string, unknown> = {};
  let at = 0;
  for (const { name, shape, data } of tensors) {
    header[name] = { dtype: "BF16", shape, data_offsets: [at, at += 2 * data.length] };
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const out = new Uint8Array(8 + json.length + at);
  new DataView(out.buffer).setBigUint64(0, BigInt(json.length), true);
  out.set(json, 8);
  at = 8 + json.length;
  for (const { data } of tensors) {
    out.set(new Uint8Array(truncate(data).buffer), at);
    at += 2 * data.length;
  }
  return out;
}

Deno.test("the expected tensors are those that transformers writes", async () => {
  const { config } = await openCheckpoint(tiny);
  const golden: Record<string, { shape: number[] }> = JSON.parse(await Deno.readTextFile(names)).tiny.published_keys;
  const want = new Map(Object.entries(golden).map(([name, { shape }]) => [name, shape]));
  assert.deepEqual(new Map([...expectedTensors(config)].sort()), new Map([...want].sort()));
  const untied = expectedTensors({ ...config, text: { ...config.text, tied: false } });
  assert.deepEqual(untied.get("lm_head.weight"), [512, 64]);
});

Deno.test("a published folder is read with its text files, again and again", async () => {
  const checkpoint = await openCheckpoint(tiny);
  const stored = await readSafetensors(await Deno.readFile(new URL("model.safetensors", tiny)), "tiny");
  for (let round = 0; round < 2; round++) {
    const tensors = await collect(checkpoint.tensors());
    assert.deepEqual(new Map([...tensors].sort()), new Map([...stored].sort()));
  }
  assert.deepEqual(checkpoint.config.tokens.eos, [492, 490]);
  assert.equal(checkpoint.files.get("config.json"), await tinyConfig());
  assert.ok(checkpoint.files.has("tokenizer.json"));
  const flat = await Deno.readTextFile(new URL("config.published.json", tiny));
  await withFolder(async (folder) => {
    await makeFolder(folder, stored.values(), flat);
    assert.deepEqual((await openCheckpoint(folder)).config.text, checkpoint.config.text);
  });
});

Deno.test("bfloat16 shards with an index, module names and an untied head", async () => {
  const weights = await tinyWeights();
  const head = { name: "lm_head.weight", shape: [512, 64], data: new Float32Array(512 * 64).fill(0.25) };
  const renamed = [...weights, head].map((t) => ({
    ...t,
    name: t.name.startsWith("visual.") ? `model.${t.name}` : t.name.replace(/^model\./, "model.language_model."),
  }));
  await withFolder(async (folder) => {
    const weight_map: Record<string, string> = {};
    for (const shard of [0, 1, 2]) {
      const part = renamed.filter((_, i) => i % 3 === shard), file = `model-0000${shard + 1}-of-00003.safetensors`;
      for (const { name } of part) weight_map[name] = file;
      await Deno.writeFile(`${folder}/${file}`, brainFile(part));
    }
    await Deno.writeTextFile(`${folder}/model.safetensors.index.json`, JSON.stringify({ metadata: {}, weight_map }));
    const config = JSON.parse(await tinyConfig());
    await Deno.writeTextFile(`${folder}/config.json`, JSON.stringify({ ...config, tie_word_embeddings: false }));
    const got = await collect((await openCheckpoint(folder)).tensors());
    assert.equal(got.size, weights.length + 1);
    for (const { name, data } of [...weights, head]) {
      const bits = Uint32Array.from(truncate(data), (half) => half << 16);
      assert.deepEqual(got.get(name)!.data, new Float32Array(bits.buffer), name);
    }
    const fail = async (map: Record<string, unknown>, message: RegExp) => {
      await Deno.writeTextFile(`${folder}/model.safetensors.index.json`, JSON.stringify({ weight_map: map }));
      await assert.rejects(openCheckpoint(folder), message);
    };
    await fail({ a: "../model.safetensors" }, /index\.json: tensor "a" is said to be in "\.\.\/model\.safetensors"/);
    await fail({ a: "none.safetensors" }, /none\.safetensors: no such file, though .*index\.json names it/);
    await fail({ a: "model-00001-of-00003.safetensors" }, /is not listed for this file/);
  });
});

Deno.test("a tied head and rotary buffers may be stored; nothing else may be extra, missing or misshapen", async () => {
  const weights = await tinyWeights();
  const extra = (name: string, shape: number[]) => ({
    name,
    shape,
    data: new Float32Array(shape.reduce((a, b) => a * b, 1)),
  });
  await withFolder(async (folder) => {
    await makeFolder(folder, [
      ...weights,
      extra("lm_head.weight", [512, 64]),
      extra("model.layers.0.self_attn.rotary_emb.inv_freq", [8]),
    ]);
    assert.equal((await collect((await openCheckpoint(folder)).tensors())).size, weights.length);
    const fail = async (tensors: TensorToWrite[], message: RegExp) => {
      await makeFolder(folder, tensors);
      await assert.rejects(openCheckpoint(folder), message);
    };
    const without = weights.filter((t) => t.name !== "model.norm.weight");
    await fail(
      without,
      /^InputError: .*: tensor "model\.norm\.weight" of shape \[64\] is missing in model\.safetensors/,
    );
    await fail(
      [...weights, extra("model.what", [3])],
      /model\.safetensors: unexpected tensor "model\.what" of shape \[3\]/,
    );
    await fail(
      [...without, extra("model.norm.weight", [65])],
      /"model\.norm\.weight" has shape \[65\], expected \[64\]/,
    );
    await fail(
      [...weights, extra("model.language_model.norm.weight", [64])],
      /tensor "model\.norm\.weight" is there twice under different names/,
    );
    await fail(
      [...without, { name: "model.norm.weight", shape: [64], data: new Int32Array(64) }],
      /is I32; expected F32/,
    );
  });
});

Deno.test("folders that are no checkpoints say what they lack", async () => {
  await withFolder(async (folder) => {
    await assert.rejects(openCheckpoint(`${folder}/none`), /^InputError: .*none: no config\.json there/);
    await Deno.writeTextFile(`${folder}/config.json`, "{");
    await assert.rejects(openCheckpoint(folder), /config\.json: not valid JSON/);
    await Deno.writeTextFile(`${folder}/config.json`, await tinyConfig());
    await assert.rejects(
      openCheckpoint(folder),
      /neither model\.safetensors nor model\.safetensors\.index\.json there/,
    );
    await Deno.writeTextFile(`${folder}/model.safetensors`, "version https://");
    await assert.rejects(openCheckpoint(folder), /model\.safetensors: the header claims/);
  });
});

Deno.test("files are checked against their sums", async () => {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(await tinyConfig()));
  const sum = [...new Uint8Array(digest)].map((b) => b.toString(16).padStart(2, "0")).join("");
  await openCheckpoint(tiny, { sha256: { "config.json": sum } });
  for (const name of ["config.json", "model.safetensors"]) {
    await assert.rejects(
      openCheckpoint(tiny, { sha256: { [name]: "00" } }),
      (error: Error) => error.message.includes(`${name}: SHA-256 is `) && error.message.includes("expected 00"),
    );
  }
});

Deno.test("saving keeps the other files, states float32, and replaces an older checkpoint", async () => {
  const checkpoint = await openCheckpoint(tiny);
  const weights = await tinyWeights();
  const files = new Map(checkpoint.files);
  files.set("config.json", files.get("config.json")!.replace('"dtype": "float32"', '"dtype": "bfloat16"'));
  await withFolder(async (folder) => {
    const target = `${folder}/deep/step-1/`;
    await saveCheckpoint(target, {
      tensors: weights.map((t) => ({ ...t, data: t.data.map((v) => 2 * v) })),
      configFiles: files,
    });
    await saveCheckpoint(target, { tensors: checkpoint.tensors(), configFiles: files });
    const saved = await openCheckpoint(target);
    assert.deepEqual([...(await collect(saved.tensors())).values()], weights);
    assert.deepEqual(saved.files, checkpoint.files);
    assert.deepEqual([...Deno.readDirSync(`${folder}/deep`)].map((entry) => entry.name), ["step-1"]);
  });
});
