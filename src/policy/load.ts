/**
 * Loading a policy: a Hugging Face style folder, local or on the web, onto the current backend.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { InputError } from "../run/errors.ts";
import { type Checkpoint, expectedTensors, openCheckpoint, parseJson, saveCheckpoint } from "./checkpoint.ts";
import { ImageProcessor } from "./image_processor.ts";
import { type QwenParts, QwenPolicy } from "./qwen.ts";
import { tinySha256 } from "./tiny_manifest.ts";
import { Tokenizer } from "./tokenizer.ts";

/** Options of {@linkcode loadPolicy}. */
export interface LoadOptions {
  /** Smallest number of pixels of a resized image. @default {the folder's preprocessor_config.json} */
  minPixels?: number;
  /** Largest number of pixels of a resized image: the pixel budget. @default {the folder's preprocessor_config.json} */
  maxPixels?: number;
  /** Called with the weights loaded so far and their number. */
  onProgress?: (done: number, total: number) => void;
}

/** Where the embedded tiny base policy lies, beside this module: a file or a web address. */
export const tinyPolicyUrl: URL = new URL("../../fixtures/tiny/", import.meta.url);

/**
 * Loads a Qwen2.5-VL policy onto the current TensorFlow.js backend (see `chooseBackend`).
 *
 * @param source A folder's path or address; nothing or `"tiny"` for the embedded base policy.
 * @throws {InputError} A file is missing, malformed, or does not fit the configuration; the message names it.
 *
 * @example
 * ```ts
 * import { chooseBackend } from "../gpu/backend.ts";
 * import { loadPolicy } from "./load.ts";
 *
 * await chooseBackend("wasm");
 * const policy = await loadPolicy();
 * console.log(policy.decode(policy.encode("which letter is on the red sign?")));
 * policy.dispose();
 * ```
 */
export async function loadPolicy(source: string | URL = "tiny", options: LoadOptions = {}): Promise<QwenPolicy> {
  const tiny = source === "tiny";
  const checkpoint = await openCheckpoint(tiny ? tinyPolicyUrl : source, tiny ? { sha256: tinySha256 } : {});
  return await policyFromCheckpoint(checkpoint, tiny ? "tiny" : String(source), options);
}

function fileJson(checkpoint: Checkpoint, name: string): unknown {
  const text = checkpoint.files.get(name);
  if (text === undefined) {
    throw new InputError(`${checkpoint.where}: no ${name} there; a policy needs it to read ${purpose[name]}`);
  }
  return parseJson(text, `${checkpoint.where}/${name}`);
}
const purpose: Record<string, string> = {
  "preprocessor_config.json": "pictures",
  "tokenizer.json": "text",
  "tokenizer_config.json": "text",
};

/** Makes a policy of an open checkpoint. The weights become variables that the policy owns. */
export async function policyFromCheckpoint(
  checkpoint: Checkpoint,
  name: string,
  options: LoadOptions = {},
): Promise<QwenPolicy> {
  const parts = withoutWeights(checkpoint, name, options);
  const parameters = new Map<string, tf.Variable>(), total = expectedTensors(checkpoint.config).size;
  try {
    for await (const { name, shape, data } of checkpoint.tensors()) {
      const initial = tf.tensor(data, [...shape], "float32");
      parameters.set(name, tf.variable(initial, true));
      initial.dispose();
      options.onProgress?.(parameters.size, total);
    }
  } catch (error) {
    for (const variable of parameters.values()) variable.dispose();
    throw error;
  }
  return new QwenPolicy({ ...parts, parameters });
}

/** A policy whose weights are not read: it prepares pictures and encodes text, and nothing else. */
export function encoderFromCheckpoint(checkpoint: Checkpoint, name: string, options: LoadOptions = {}): QwenPolicy {
  return new QwenPolicy(withoutWeights(checkpoint, name, options));
}

function withoutWeights(checkpoint: Checkpoint, name: string, options: LoadOptions): QwenParts {
  const { config, files } = checkpoint;
  const processor = new ImageProcessor(fileJson(checkpoint, "preprocessor_config.json"), {
    where: `${checkpoint.where}/preprocessor_config.json`,
    minPixels: options.minPixels,
    maxPixels: options.maxPixels,
  });
  const tokenizer = Tokenizer.fromFiles(files, checkpoint.where);
  return {
    name,
    config,
    stopTokens: config.tokens.eos,
    suppressTokens: [
      ...new Set([...config.generation.suppressTokens, config.tokens.image, config.tokens.video]),
    ].sort((a, b) => a - b),
    tokenizer,
    processor,
    parameters: new Map(),
    save: (folder, tensors) => saveCheckpoint(folder, { tensors, configFiles: files }),
  };
}
