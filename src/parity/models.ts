/**
 * Group `models`: every checkpoint folder loads, has the recorded names and shapes, and says the same in all its layouts.
 *
 * @module
 */
import { expectedTensors, openCheckpoint, parseJson, publishedName } from "../policy/checkpoint.ts";
import { parseConfig, parseGenerationConfig, type QwenConfig } from "../policy/config.ts";
import { loadPolicy, policyFromCheckpoint } from "../policy/load.ts";
import type { Sequence } from "../policy/policy.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { bytesSource, Safetensors } from "../policy/safetensors.ts";
import { packedLogits } from "./forward.ts";
import { fits, type Golden, tensor, type Tensors, traitsOf } from "./golden.ts";
import { namedImages, type TwoTurnJson } from "./inputs.ts";
import type { Check, Report } from "./report.ts";
import { tolerances } from "./tolerances.ts";

/** What `names.json` records of one model and its folders. */
interface NamesEntry {
  dims?: Record<string, unknown>;
  dirs: Record<string, string>;
  published_keys?: Record<string, { shape: number[]; dtype: string }>;
  keys?: Record<string, { shape: number[]; dtype: string; file?: string }>;
  module_to_published?: Record<string, string>;
  modulename_keys?: string[];
}

/** `preprocessor_config.json`, as far as it is compared. */
interface PreprocessorJson {
  min_pixels?: number;
  max_pixels?: number;
  size?: { shortest_edge?: number; longest_edge?: number };
  patch_size: number;
}

/** A tensor as a weight file has it. */
interface Stored {
  file: string;
  dtype: string;
  shape: readonly number[];
}

/** Runs the group. */
export async function checkModels(golden: Golden, report: Report): Promise<void> {
  const models = await golden.models();
  await report.check("models/ has checkpoint folders", (check) => check.same(models.length > 0, true));
  const missing = (await golden.list("models", "folder")).filter((name) => !models.includes(name));
  for (const name of missing) {
    await report.check(`${name}: config.json`, (check) => check.same("missing", "there"));
  }
  let names: Record<string, NamesEntry> = {};
  await report.attempt("names.json", async () => {
    names = await golden.json("models/names.json");
    await checkNames(names, report);
  });
  const entryOf = (model: string) => Object.values(names).find(({ dirs }) => `models/${model}` in (dirs ?? {}));
  for (const model of models) {
    await report.attempt(`${model}`, () => checkModel(golden, report, model, entryOf(model)));
  }
  for (const { dirs } of Object.values(names)) {
    const folders = Object.keys(dirs ?? {}).map((dir) => dir.replace(/^models\//, ""));
    for (const folder of folders.filter((f) => !models.includes(f))) {
      await report.check(`${folder}: folder`, (check) => check.same("missing", "there"));
    }
    const there = models.filter((model) => folders.includes(model));
    for (const other of there.slice(1)) await checkSameWeights(golden, report, there[0], other);
  }
}

async function checkNames(names: Record<string, NamesEntry>, report: Report): Promise<void> {
  for (const [model, entry] of Object.entries(names)) {
    const published = Object.keys(entry.published_keys ?? entry.keys ?? {}).sort();
    if (entry.module_to_published) {
      const pairs = Object.entries(entry.module_to_published);
      await report.check(`names.json ${model}: module names → published names`, (check) => {
        check.equal(pairs.map(([from]) => publishedName(from)), pairs.map(([, to]) => to));
        check.equal(pairs.map(([, to]) => publishedName(to)), pairs.map(([, to]) => to));
      });
    }
    if (entry.modulename_keys) {
      await report.check(`names.json ${model}: module names → published names`, (check) => {
        check.equal(entry.modulename_keys!.map(publishedName).sort(), published);
      });
    }
  }
}

async function checkModel(golden: Golden, report: Report, model: string, entry?: NamesEntry): Promise<void> {
  const checkpoint = await golden.checkpoint(model);
  await report.check(`${model}: names, shapes and dtypes of the weights`, async (check) => {
    const stored = await storedTensors(golden, model);
    const published = [...stored.keys()].every((name) => name === publishedName(name));
    const recorded = entry?.published_keys ?? entry?.keys;
    const expected = recorded ? Object.keys(recorded) : [...expectedTensors(checkpoint.config).keys()];
    check.equal([...stored.keys()].map(publishedName).sort(), expected.sort());
    for (const [name, { shape, dtype, file }] of stored) {
      const known = recorded?.[publishedName(name)];
      check.equal(shape, known?.shape ?? expectedTensors(checkpoint.config).get(publishedName(name)) ?? [], name);
      if (known) check.same(dtype, known.dtype, name);
      // What is recorded of files is of the folder with published names.
      if (known && "file" in known && published) check.same(file, known.file, name);
    }
    if (entry?.modulename_keys && !published) {
      check.equal([...stored.keys()].sort(), [...entry.modulename_keys].sort());
    }
  });
  if (entry?.dims) {
    await report.check(`${model}: sizes of config.json`, (check) => {
      const own = dimensions(checkpoint.config);
      for (const [name, size] of Object.entries(entry.dims!)) if (name in own) check.same(own[name], size, name);
    });
  }
  await checkGenerationConfig(golden, report, model);
  const policy = await golden.policy(model);
  const probes = await probeSequences(golden, model, policy.config);
  let logits: Float32Array | undefined;
  for (const { file, tensors, sequence } of probes) {
    await report.check(`${model}: logits of ${file}`, async (check) => {
      logits = await packedLogits(policy, [sequence]);
      compareLogits(check, logits, tensors, file, policy.config.text.vocabSize);
    });
  }
  const probe = probes[0]?.sequence ?? { ids: [0, 1, 2, 3], images: [] };
  logits ??= await packedLogits(policy, [probe]);
  await checkOtherConfigs(golden, report, model, probe, logits);
  if (await golden.has(`models/${model}/tokenizer.json`)) await checkWholeFolder(golden, report, model, probe, logits);
}

/** The sizes of a configuration by the short names of `names.json`. */
function dimensions({ text, vision }: QwenConfig): Record<string, unknown> {
  return {
    vocab: text.vocabSize,
    hidden: text.hiddenSize,
    inter: text.intermediateSize,
    layers: text.layers,
    heads: text.heads,
    kv: text.kvHeads,
    mrope: text.mropeSection,
    theta: text.ropeTheta,
    eps: text.rmsNormEps,
    tie: text.tied,
    v_hidden: vision.hiddenSize,
    v_inter: vision.intermediateSize,
    v_depth: vision.depth,
    v_heads: vision.heads,
    v_full: vision.fullAttentionBlocks,
  };
}

/** Tensors of all weight files of a folder, as stored. */
async function storedTensors(golden: Golden, model: string): Promise<Map<string, Stored>> {
  const out = new Map<string, Stored>();
  for (const file of await golden.list(`models/${model}`)) {
    if (!file.endsWith(".safetensors")) continue;
    const opened = await Safetensors.open(bytesSource(await golden.bytes(`models/${model}/${file}`)), file);
    for (const [name, { dtype, shape }] of opened.tensors) out.set(name, { file, dtype, shape });
    opened.close();
  }
  return out;
}

async function checkGenerationConfig(golden: Golden, report: Report, model: string): Promise<void> {
  const file = `models/${model}/generation_config.json`;
  if (!await golden.has(file)) return;
  await report.check(`${model}: stop tokens of generation_config.json`, async (check) => {
    const { eos_token_id } = await golden.json<{ eos_token_id: number | number[] }>(file);
    check.same((await golden.policy(model)).stopTokens, [...new Set([eos_token_id].flat())]);
  });
}

interface Probe {
  file: string;
  tensors: Tensors;
  sequence: Sequence;
}

/** Recorded forward passes of group parity that belong to this model's weights. */
async function probeSequences(golden: Golden, model: string, config: QwenConfig): Promise<Probe[]> {
  const probes: Probe[] = [];
  for (const name of await golden.list("parity")) {
    if (!name.endsWith("two_turn.safetensors")) continue;
    const file = `parity/${name}`, tensors = await golden.tensors(file);
    // Variants of the model that the file was made with hold the same weights, so their sizes are equal too.
    if (!fits(config, traitsOf(tensors)) || !await sameFamily(golden, model, name, tensors)) continue;
    probes.push({ file: name, tensors, sequence: await twoTurnSequence(golden) });
  }
  return probes;
}

async function sameFamily(golden: Golden, model: string, file: string, tensors: Tensors): Promise<boolean> {
  const owner = await golden.modelFor(file, traitsOf(tensors));
  if (owner === model) return true;
  const names = await golden.has("models/names.json")
    ? await golden.json<Record<string, NamesEntry>>("models/names.json")
    : {};
  return Object.values(names).some(({ dirs }) =>
    `models/${owner}` in (dirs ?? {}) && `models/${model}` in (dirs ?? {})
  );
}

/** The conversation of `parity/two_turn`, which all recorded forward passes share. */
export async function twoTurnSequence(golden: Golden): Promise<Sequence> {
  const file = "parity/two_turn.safetensors", tensors = await golden.tensors(file);
  const { images } = await golden.json<TwoTurnJson>("parity/two_turn.json");
  return {
    ids: [...tensor(tensors, "input_ids", file).data],
    images: await namedImages(golden, images, tensors, file),
  };
}

/** Compares `[L, V]` logits with `logits` or the last rows `logits_last<n>` of a golden file. */
export function compareLogits(
  check: Check,
  logits: Float32Array,
  tensors: Tensors,
  file: string,
  vocab: number,
): void {
  const names = [...tensors.keys()].filter((name) => /^logits(_last\d+)?$/.test(name));
  for (const name of names) {
    const golden = tensor(tensors, name, file);
    check.same(golden.shape.at(-1), vocab, "vocabulary");
    check.close(logits.subarray(Math.max(0, logits.length - golden.data.length)), golden.data, tolerances.logits, name);
  }
}

/** `config.<layout>.json` beside `config.json` describe the same model. */
async function checkOtherConfigs(
  golden: Golden,
  report: Report,
  model: string,
  probe: Sequence,
  logits: Float32Array,
): Promise<void> {
  for (const name of await golden.list(`models/${model}`)) {
    if (!/^config\..+\.json$/.test(name)) continue;
    await report.check(`${model}: ${name} gives the same logits`, async (check) => {
      const checkpoint = await golden.checkpoint(model), file = `models/${model}/${name}`;
      let config = parseConfig(parseJson(await golden.text(file), file), file);
      const generation = checkpoint.files.get("generation_config.json");
      if (generation) config = parseGenerationConfig(JSON.parse(generation), "generation_config.json", config);
      check.same(config, checkpoint.config, "configuration");
      await compareWith(check, await policyFromCheckpoint({ ...checkpoint, config }, name), probe, logits);
    });
  }
}

/** A folder with everything in it loads as a user would load it. */
async function checkWholeFolder(
  golden: Golden,
  report: Report,
  model: string,
  probe: Sequence,
  logits: Float32Array,
): Promise<void> {
  await report.check(`${model}: loadPolicy, tokenizer and image settings`, async (check) => {
    const policy = await loadPolicy(`${golden.path}/models/${model}`);
    const settings = await golden.json<PreprocessorJson>(`models/${model}/preprocessor_config.json`);
    const { minPixels, maxPixels, patchSize } = policy.processor.config;
    check.same(minPixels, settings.min_pixels ?? settings.size?.shortest_edge, "min_pixels");
    check.same(maxPixels, settings.max_pixels ?? settings.size?.longest_edge, "max_pixels");
    check.same(patchSize, settings.patch_size, "patch_size");
    if (await golden.has("tokenizer/strings.json")) {
      const { strings } = await golden.json<{ strings: { text: string; ids: number[] }[] }>("tokenizer/strings.json");
      for (const { text, ids } of strings) check.same(policy.encode(text), ids, JSON.stringify(text));
    }
    await compareWith(check, policy, probe, logits);
  });
}

/** Disposes the policy. */
async function compareWith(check: Check, policy: QwenPolicy, probe: Sequence, logits: Float32Array): Promise<void> {
  try {
    check.close(await packedLogits(policy, [probe]), logits, tolerances.sameWeights, "logits");
  } finally {
    policy.dispose();
  }
}

/** Two folders that hold the same weights under different names or in different files. */
async function checkSameWeights(golden: Golden, report: Report, first: string, other: string): Promise<void> {
  await report.check(`${other}: same weights as ${first}`, async (check) => {
    const weights = new Map<string, Float32Array>();
    for await (const { name, data } of (await openCheckpoint(`${golden.path}/models/${first}`)).tensors()) {
      weights.set(name, data);
    }
    for await (const { name, data } of (await openCheckpoint(`${golden.path}/models/${other}`)).tensors()) {
      check.close(data, weights.get(name) ?? [], 0, name);
      weights.delete(name);
    }
    check.equal([...weights.keys()], []);
  });
}
