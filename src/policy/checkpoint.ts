/**
 * A checkpoint in a Hugging Face style folder: configuration, tokenizer files and weights, local or behind a URL. Weights go
 * by their published names everywhere in the project; fine-tunes saved with module names are renamed here.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { parseConfig, parseGenerationConfig, type QwenConfig } from "./config.ts";
import { Folder, isMissing } from "./checkpoint_folder.ts";
import { Safetensors, type TensorToWrite, writeSafetensors } from "./safetensors.ts";

/** A weight by its published name. */
export interface NamedTensor {
  name: string;
  shape: readonly number[];
  data: Float32Array;
}

/** An open checkpoint whose tensors are known to be complete and of the right shapes. */
export interface Checkpoint {
  /** Where it came from, for messages. */
  readonly where: string;
  readonly config: QwenConfig;
  /** The text of every configuration and tokenizer file that is there, by file name. */
  readonly files: ReadonlyMap<string, string>;
  /** Reads the weights one at a time, under published names, as float32. May be called again. */
  tensors(): AsyncIterable<NamedTensor>;
}

/** Options of {@linkcode openCheckpoint}. */
export interface OpenOptions {
  /** SHA-256 by file name, in hexadecimal; files named here are checked before use. @default {no checks} */
  sha256?: Readonly<Record<string, string>>;
}

/** Text files that belong to a checkpoint; all but the first may be missing. */
const textFiles = [
  "config.json",
  "generation_config.json",
  "preprocessor_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "chat_template.json",
  "chat_template.jinja",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
] as const;

const indexFile = "model.safetensors.index.json";
const weightFile = "model.safetensors";

/** Parses JSON text of a file. @throws {InputError} It is not JSON. */
export function parseJson(text: string, where: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new InputError(`${where}: not valid JSON (${error instanceof Error ? error.message : error})`);
  }
}

/** Published name of a weight: `model.visual.*` → `visual.*`, `model.language_model.*` → `model.*`. */
export function publishedName(name: string): string {
  if (name.startsWith("model.visual.")) return name.slice("model.".length);
  if (name.startsWith("model.language_model.")) return `model.${name.slice("model.language_model.".length)}`;
  return name;
}

/** Published names and shapes of all weights that a configuration asks for, embedding first. */
export function expectedTensors(config: QwenConfig): Map<string, readonly number[]> {
  const { text: t, vision: v } = config;
  const out = new Map<string, readonly number[]>();
  const linear = (name: string, to: number, from: number, bias: boolean) => {
    out.set(`${name}.weight`, [to, from]);
    if (bias) out.set(`${name}.bias`, [to]);
  };
  out.set("visual.patch_embed.proj.weight", [
    v.hiddenSize,
    v.inChannels,
    v.temporalPatchSize,
    v.patchSize,
    v.patchSize,
  ]);
  for (let i = 0; i < v.depth; i++) {
    const block = `visual.blocks.${i}`;
    out.set(`${block}.norm1.weight`, [v.hiddenSize]);
    out.set(`${block}.norm2.weight`, [v.hiddenSize]);
    linear(`${block}.attn.qkv`, 3 * v.hiddenSize, v.hiddenSize, true);
    linear(`${block}.attn.proj`, v.hiddenSize, v.hiddenSize, true);
    linear(`${block}.mlp.gate_proj`, v.intermediateSize, v.hiddenSize, true);
    linear(`${block}.mlp.up_proj`, v.intermediateSize, v.hiddenSize, true);
    linear(`${block}.mlp.down_proj`, v.hiddenSize, v.intermediateSize, true);
  }
  const merged = v.hiddenSize * v.spatialMergeSize ** 2;
  out.set("visual.merger.ln_q.weight", [v.hiddenSize]);
  linear("visual.merger.mlp.0", merged, merged, true);
  linear("visual.merger.mlp.2", v.outHiddenSize, merged, true);
  out.set("model.embed_tokens.weight", [t.vocabSize, t.hiddenSize]);
  for (let i = 0; i < t.layers; i++) {
    const layer = `model.layers.${i}`;
    out.set(`${layer}.input_layernorm.weight`, [t.hiddenSize]);
    out.set(`${layer}.post_attention_layernorm.weight`, [t.hiddenSize]);
    linear(`${layer}.self_attn.q_proj`, t.heads * t.headDim, t.hiddenSize, true);
    linear(`${layer}.self_attn.k_proj`, t.kvHeads * t.headDim, t.hiddenSize, true);
    linear(`${layer}.self_attn.v_proj`, t.kvHeads * t.headDim, t.hiddenSize, true);
    linear(`${layer}.self_attn.o_proj`, t.hiddenSize, t.heads * t.headDim, false);
    linear(`${layer}.mlp.gate_proj`, t.intermediateSize, t.hiddenSize, false);
    linear(`${layer}.mlp.up_proj`, t.intermediateSize, t.hiddenSize, false);
    linear(`${layer}.mlp.down_proj`, t.hiddenSize, t.intermediateSize, false);
  }
  out.set("model.norm.weight", [t.hiddenSize]);
  if (!t.tied) out.set("lm_head.weight", [t.vocabSize, t.hiddenSize]);
  return out;
}

/** Where each weight lies: published name → file and the name there. */
type Placement = Map<string, { file: string; stored: string }>;

/**
 * Opens a checkpoint and checks everything but the values: configuration, the headers of all weight files, and that exactly
 * the tensors that the configuration asks for are there in the right shapes.
 *
 * @param source A local folder, or the `file:`, `http:` or `https:` URL of one.
 * @throws {InputError} The folder has no configuration or no weights, or something in it is damaged or does not fit.
 */
export async function openCheckpoint(source: string | URL, options: OpenOptions = {}): Promise<Checkpoint> {
  const folder = new Folder(source, options.sha256 ?? {});
  const { where } = folder;
  const files = new Map<string, string>();
  const texts = await Promise.all(textFiles.map((name) => folder.text(name)));
  textFiles.forEach((name, i) => texts[i] !== undefined && files.set(name, texts[i]));
  const configText = files.get("config.json");
  if (configText === undefined) {
    throw new InputError(`${where}: no config.json there; expected a checkpoint folder in Hugging Face layout`);
  }
  let config = parseConfig(parseJson(configText, `${where}/config.json`), `${where}/config.json`);
  const generation = files.get("generation_config.json");
  if (generation !== undefined) {
    const file = `${where}/generation_config.json`;
    config = parseGenerationConfig(parseJson(generation, file), file, config);
  }
  const placement = await checkWeights(folder, config);
  return { where, config, files, tensors: () => readTensors(folder, placement) };
}

/** The weight files of a folder; with an index, also which file each stored name is said to be in. */
async function weightFiles(folder: Folder): Promise<{ files: string[]; index?: Map<string, string> }> {
  const where = `${folder.where}/${indexFile}`;
  const text = await folder.text(indexFile);
  if (text === undefined) return { files: [weightFile] };
  const json = parseJson(text, where);
  const map = typeof json === "object" && json !== null && "weight_map" in json ? json.weight_map : undefined;
  if (typeof map !== "object" || map === null || Array.isArray(map)) {
    throw new InputError(`${where}: weight_map is missing or not an object`);
  }
  const index = new Map<string, string>();
  for (const [name, file] of Object.entries(map)) {
    // A path would let an index reach outside its folder.
    if (typeof file !== "string" || !/^[\w.-]+\.safetensors$/.test(file)) {
      throw new InputError(
        `${where}: tensor "${name}" is said to be in ${JSON.stringify(file)}, which is not a file name of a shard`,
      );
    }
    index.set(name, file);
  }
  return { files: [...new Set(index.values())].sort(), index };
}

async function openWeights(folder: Folder, file: string): Promise<Safetensors> {
  const source = await folder.open(file);
  if (source) return await Safetensors.open(source, `${folder.where}/${file}`);
  throw new InputError(
    file === weightFile
      ? `${folder.where}: neither ${weightFile} nor ${indexFile} there; expected weights as safetensors`
      : `${folder.where}/${file}: no such file, though ${indexFile} names it`,
  );
}

async function checkWeights(folder: Folder, config: QwenConfig): Promise<Placement> {
  const { files, index } = await weightFiles(folder);
  const expected = expectedTensors(config);
  const placement: Placement = new Map();
  for (const file of files) {
    const where = `${folder.where}/${file}`;
    const opened = await openWeights(folder, file);
    try {
      for (const [stored, { shape, dtype }] of opened.tensors) {
        const name = publishedName(stored);
        if (index && index.get(stored) !== file) {
          throw new InputError(`${where}: tensor "${stored}" is not listed for this file in ${indexFile}`);
        }
        if (isIgnored(name, config)) continue;
        const wanted = expected.get(name);
        if (!wanted) {
          throw new InputError(
            `${where}: unexpected tensor "${stored}" of shape [${
              shape.join(", ")
            }]; config.json asks for no such tensor`,
          );
        }
        if (wanted.join() !== shape.join()) {
          throw new InputError(
            `${where}: tensor "${stored}" has shape [${shape.join(", ")}], expected [${
              wanted.join(", ")
            }] by config.json`,
          );
        }
        if (dtype !== "F32" && dtype !== "F16" && dtype !== "BF16" && dtype !== "F64") {
          throw new InputError(
            `${where}: tensor "${stored}" is ${dtype}; expected F32, F16, BF16 or F64 (quantised weights cannot be loaded)`,
          );
        }
        if (placement.has(name)) {
          throw new InputError(`${where}: tensor "${name}" is there twice under different names`);
        }
        placement.set(name, { file, stored });
      }
    } finally {
      opened.close();
    }
  }
  const missing = [...expected.keys()].filter((name) => !placement.has(name));
  if (missing.length) {
    const more = missing.length > 1 ? ` and ${missing.length - 1} more` : "";
    throw new InputError(
      `${folder.where}: tensor "${missing[0]}" of shape [${
        expected.get(missing[0])!.join(", ")
      }]${more} is missing in ${files.join(", ")}`,
    );
  }
  return placement;
}

/** Tensors that may be there but are not weights: a tied head stored anyway, rotary frequencies. */
function isIgnored(name: string, config: QwenConfig): boolean {
  return (name === "lm_head.weight" && config.text.tied) || name.endsWith("rotary_emb.inv_freq") ||
    name.endsWith("rotary_pos_emb.inv_freq");
}

async function* readTensors(folder: Folder, placement: Placement): AsyncGenerator<NamedTensor> {
  for (const file of new Set([...placement.values()].map((p) => p.file))) {
    const opened = await openWeights(folder, file);
    try {
      for (const [name, { file: home, stored }] of placement) {
        if (home !== file) continue;
        const info = opened.tensors.get(stored);
        if (!info) {
          throw new InputError(`${folder.where}/${file}: tensor "${stored}" disappeared while the file was in use`);
        }
        yield { name, shape: info.shape, data: await opened.readFloat32(stored) };
      }
    } finally {
      opened.close();
      folder.forget(file);
    }
  }
}

/** What {@linkcode saveCheckpoint} writes. */
export interface CheckpointToSave {
  /** Weights by published name, written as float32 in this order. */
  tensors: Iterable<TensorToWrite> | AsyncIterable<TensorToWrite>;
  /** Text of the other files by name, as {@linkcode Checkpoint.files} has them. */
  configFiles: ReadonlyMap<string, string>;
}

/**
 * Writes a checkpoint that {@linkcode openCheckpoint} and transformers' `from_pretrained` load. All files go to
 * `<folder>.partial`, which is renamed last, so a crash never leaves half a checkpoint under the final name.
 *
 * @param folder Local path; an older checkpoint there is replaced (it stands under `<folder>.replaced` between two renames).
 */
export async function saveCheckpoint(folder: string, { tensors, configFiles }: CheckpointToSave): Promise<void> {
  const target = folder.replace(/(?<!^)\/+$/, "");
  const fresh = `${target}.partial`, old = `${target}.replaced`;
  await removeFolder(fresh);
  await Deno.mkdir(fresh, { recursive: true });
  for (const [name, text] of configFiles) {
    await Deno.writeTextFile(`${fresh}/${name}`, name === "config.json" ? statingFloat32(text) : text);
  }
  const all: TensorToWrite[] = [];
  for await (const tensor of tensors) all.push(tensor);
  await Deno.writeFile(`${fresh}/${weightFile}`, writeSafetensors(all));
  await removeFolder(old);
  try {
    await Deno.rename(target, old);
  } catch (error) {
    if (!isMissing(error)) throw error;
  }
  await Deno.rename(fresh, target);
  await removeFolder(old);
}

async function removeFolder(path: string): Promise<void> {
  try {
    await Deno.remove(path, { recursive: true });
  } catch (error) {
    if (!isMissing(error)) throw error;
  }
}

/**
 * config.json for float32 weights. from_pretrained casts to the stated type, which would round weights that were trained
 * from a half-precision checkpoint; a configuration that states float32 or nothing stays as it is, byte for byte.
 */
function statingFloat32(text: string): string {
  return text.replace(/("(?:torch_)?dtype"\s*:\s*")(?:bfloat16|float16)(")/g, "$1float32$2");
}
