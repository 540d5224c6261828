/**
 * A golden folder: reference values for a policy in plain files (safetensors, JSON, pictures), and the models that they were
 * made with. Nothing here knows the contents of one particular folder.
 *
 * @module
 */
import { fileURLToPath } from "node:url";
import { InputError } from "../run/errors.ts";
import { type Checkpoint, expectedTensors, openCheckpoint, parseJson } from "../policy/checkpoint.ts";
import type { QwenConfig } from "../policy/config.ts";
import { policyFromCheckpoint } from "../policy/load.ts";
import { Picture } from "../policy/picture.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { type LoadedTensor, readSafetensors } from "../policy/safetensors.ts";

/** The trimmed golden folder that comes with the project. */
export const trimmedGoldens: URL = new URL("../../fixtures/goldens/", import.meta.url);

/** Tensors of a golden file by name. */
export type Tensors = ReadonlyMap<string, LoadedTensor>;

/** What is known of the model that a golden file was made with. */
export interface ModelTraits {
  vocab?: number;
  hidden?: number;
  layers?: number;
  visionHidden?: number;
  visionDepth?: number;
  /** All parameters' shapes by published name. */
  shapes?: ReadonlyMap<string, readonly number[]>;
}

/** Read access to a golden folder; owns the policies that it has loaded. */
export class Golden {
  readonly path: string;
  readonly #files = new Map<string, Promise<Tensors>>();
  readonly #policies = new Map<string, QwenPolicy>();

  /** @param source A local folder. */
  constructor(source: string | URL) {
    const path = source instanceof URL ? fileURLToPath(source) : source;
    this.path = path.replace(/(?<!^)\/+$/, "");
  }

  /** Whether a file or folder is there. */
  async has(name: string): Promise<boolean> {
    try {
      await Deno.stat(`${this.path}/${name}`);
      return true;
    } catch (error) {
      if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return false;
      throw error;
    }
  }

  /** Names in a folder, sorted; none if it is not there. */
  async list(folder: string, kind: "file" | "folder" = "file"): Promise<string[]> {
    if (!await this.has(folder)) return [];
    const names: string[] = [];
    for await (const entry of Deno.readDir(`${this.path}/${folder}`)) {
      const { isDirectory } = entry.isSymlink ? await Deno.stat(`${this.path}/${folder}/${entry.name}`) : entry;
      if (isDirectory === (kind === "folder")) names.push(entry.name);
    }
    return names.sort();
  }

  /** A whole file. @throws {InputError} There is none. */
  async bytes(name: string): Promise<Uint8Array<ArrayBuffer>> {
    try {
      return await Deno.readFile(`${this.path}/${name}`);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      throw new InputError(`${name}: no such file in ${this.path}`);
    }
  }

  /** A text file. */
  async text(name: string): Promise<string> {
    return new TextDecoder().decode(await this.bytes(name));
  }

  /** A JSON file; its shape is taken on trust, a wrong one shows as a failing check. */
  async json<T>(name: string): Promise<T> {
    return parseJson(await this.text(name), name) as T;
  }

  /** All tensors of a safetensors file; read once. */
  tensors(name: string): Promise<Tensors> {
    let found = this.#files.get(name);
    if (!found) {
      found = this.bytes(name).then((bytes) => readSafetensors(bytes, name));
      this.#files.set(name, found);
    }
    return found;
  }

  /** A decoded picture. */
  async picture(name: string): Promise<Picture> {
    return await Picture.decode(await this.bytes(name), name);
  }

  /** Names of the model folders, shortest first: variants of a model have longer names than the model. */
  async models(): Promise<string[]> {
    const names: string[] = [];
    for (const name of await this.list("models", "folder")) {
      if (await this.has(`models/${name}/config.json`)) names.push(name);
    }
    return names.sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
  }

  /** Opens a model's checkpoint, with the set's own tokenizer and image settings where the folder has none. */
  async checkpoint(model: string): Promise<Checkpoint> {
    const checkpoint = await openCheckpoint(`${this.path}/models/${model}`);
    const files = new Map(checkpoint.files);
    if (!files.has("tokenizer.json")) {
      for (const name of ["tokenizer.json", "tokenizer_config.json", "chat_template.json"]) {
        if (await this.has(`tokenizer/${name}`)) files.set(name, await this.text(`tokenizer/${name}`));
      }
    }
    if (!files.has("tokenizer.json")) files.set("tokenizer.json", emptyTokenizer);
    if (!files.has("preprocessor_config.json")) files.set("preprocessor_config.json", "{}");
    return { ...checkpoint, files };
  }

  /** A policy of a model, loaded once. Don't change its weights: use {@linkcode freshPolicy} for that. */
  async policy(model: string): Promise<QwenPolicy> {
    let policy = this.#policies.get(model);
    if (!policy) {
      policy = await this.freshPolicy(model);
      this.#policies.set(model, policy);
    }
    return policy;
  }

  /** A policy that the caller owns. */
  async freshPolicy(model: string): Promise<QwenPolicy> {
    return await policyFromCheckpoint(await this.checkpoint(model), model);
  }

  /**
   * The model that a golden file was made with: the one whose name begins the file's name (`some_model_x.safetensors` goes
   * with `some-model`), otherwise the first that the recorded sizes fit.
   *
   * @throws {InputError} None fits.
   */
  async modelFor(file: string, traits: ModelTraits): Promise<string> {
    const models = await this.models();
    const plain = (name: string) => name.replaceAll(/[^a-z0-9]+/gi, "_").toLowerCase();
    const named = models.filter((model) => plain(file).startsWith(`${plain(model)}_`)).at(-1);
    if (named !== undefined) return named;
    for (const model of models) if (fits((await this.checkpoint(model)).config, traits)) return model;
    throw new InputError(
      models.length === 0
        ? `${file}: models/ has no model folder, so nothing can be computed`
        : `${file}: none of the models (${models.join(", ")}) has the sizes that the file records`,
    );
  }

  /** Releases the policies. */
  dispose(): void {
    for (const policy of this.#policies.values()) policy.dispose();
    this.#policies.clear();
  }
}

/** Enough for a policy that is never given text. */
const emptyTokenizer = JSON.stringify({
  model: { type: "BPE", vocab: {}, merges: [] },
  added_tokens: [],
  normalizer: null,
  pre_tokenizer: null,
  post_processor: null,
  decoder: null,
});

/** Whether a configuration has the sizes that are known. */
export function fits(config: QwenConfig, traits: ModelTraits): boolean {
  const { text, vision } = config;
  const equal = (known: number | undefined, size: number) => known === undefined || known === size;
  if (!equal(traits.vocab, text.vocabSize) || !equal(traits.hidden, text.hiddenSize)) return false;
  if (!equal(traits.layers, text.layers)) return false;
  if (!equal(traits.visionHidden, vision.hiddenSize) || !equal(traits.visionDepth, vision.depth)) return false;
  if (!traits.shapes) return true;
  const expected = expectedTensors(config);
  return expected.size === traits.shapes.size &&
    [...traits.shapes].every(([name, shape]) => expected.get(name)?.join() === shape.join());
}

/** Sizes that the tensors of a forward pass give away. */
export function traitsOf(tensors: Tensors): ModelTraits {
  const last = (name: string | RegExp) => {
    const found = [...tensors].find(([key]) => typeof name === "string" ? key === name : name.test(key));
    return found?.[1].shape.at(-1);
  };
  // The highest number, as a trimmed file may lack some.
  const count = (pattern: RegExp) => {
    const numbers = [...tensors.keys()].flatMap((key) => pattern.exec(key)?.[1] ?? []).map(Number);
    return numbers.length ? Math.max(...numbers) + 1 : undefined;
  };
  return {
    vocab: last(/^logits(_last\d+)?$/),
    hidden: last(/^(text\.(inputs_embeds|norm)|vision\.image_embeds)$/),
    layers: count(/^text\.layer(\d+)$/),
    visionHidden: last("vision.patch_embed"),
    visionDepth: count(/^vision\.block(\d+)$/),
  };
}

/** A tensor of a file by name. @throws {InputError} There is none. */
export function tensor(tensors: Tensors, name: string, file: string): LoadedTensor {
  const found = tensors.get(name);
  if (!found) throw new InputError(`${file}: no tensor ${name}`);
  return found;
}

/** Rows of a `[B, L]` tensor. */
export function rowsOf({ shape, data }: LoadedTensor): number[][] {
  const width = shape.at(-1) ?? 1;
  return Array.from({ length: data.length / width }, (_, r) => [...data.subarray(r * width, (r + 1) * width)]);
}
