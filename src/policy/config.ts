/**
 * The model configuration: `config.json` in the nested layout (`text_config`, `rope_parameters`) and in the flat one of the
 * published repositories (`rope_scaling`, `in_chans`), with `generation_config.json` on top.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";

/** The language model's half. */
export interface TextConfig {
  /** Rows of the embedding; may be more than the tokenizer has tokens. */
  vocabSize: number;
  /** Width of the residual stream. */
  hiddenSize: number;
  /** Width inside the gated MLP. */
  intermediateSize: number;
  /** Decoder blocks. */
  layers: number;
  /** Heads of queries. */
  heads: number;
  /** Heads of keys and values; divides `heads`. */
  kvHeads: number;
  /** hiddenSize / heads. */
  headDim: number;
  /** Added to the mean square in every norm. */
  rmsNormEps: number;
  /** Base of the rotary frequencies. */
  ropeTheta: number;
  /** Frequencies rotated by time, height and width; they sum to headDim / 2. */
  mropeSection: readonly [number, number, number];
  /** Whether the output head is the embedding matrix. */
  tied: boolean;
  /** Positions that the model was made for (`max_position_embeddings`); longer sequences are refused. @default {no limit} */
  maxPositions?: number;
}

/** The vision tower's half. */
export interface VisionConfig {
  /** Transformer blocks. */
  depth: number;
  /** Width of a patch's vector inside the tower. */
  hiddenSize: number;
  /** Width inside the gated MLP. */
  intermediateSize: number;
  /** Attention heads; queries, keys and values have equally many. */
  heads: number;
  /** hiddenSize / heads. */
  headDim: number;
  /** Colour channels that a patch has; pictures here have 3. */
  inChannels: number;
  /** Side of a patch in pixels. */
  patchSize: number;
  /** Patches a side that become one token. */
  spatialMergeSize: number;
  /** Frames in a patch; a still picture is repeated. */
  temporalPatchSize: number;
  /** Side of an attention window in pixels. */
  windowSize: number;
  /** Blocks that attend to the whole picture. */
  fullAttentionBlocks: readonly number[];
  /** Width of the tokens handed to the language model. */
  outHiddenSize: number;
  /** Fixed in the architecture, whatever the text model's is. */
  normEps: 1e-6;
  /** Fixed in the architecture. */
  ropeTheta: 10000;
}

/** Ids with a meaning. */
export interface TokenIds {
  /** Stands for one merged patch of an image. */
  image: number;
  /** Stands for one merged patch of a video; never used here, only kept from being sampled. */
  video: number;
  /** Opens the image tokens of a picture. */
  visionStart: number;
  /** Closes the image tokens of a picture. */
  visionEnd: number;
  /** Ids that end a reply, without repetition. */
  eos: readonly number[];
  /** Fills up rows in other implementations; kept from the file, unused here. */
  pad?: number;
  /** Begins a text in some vocabularies; kept from the file, unused here. */
  bos?: number;
}

/** Sampling defaults of generation_config.json; absent fields are undefined. */
export interface GenerationDefaults {
  /** Ids that are never sampled. */
  suppressTokens: readonly number[];
  /** Softmax temperature that the model's makers advise. */
  temperature?: number;
  /** Nucleus mass that the model's makers advise, 0 < topP ≤ 1. */
  topP?: number;
  /** The most tokens of a reply. */
  maxNewTokens?: number;
}

/** Everything that the architecture depends on. */
export interface QwenConfig {
  /** The language model. */
  text: TextConfig;
  /** The vision tower. */
  vision: VisionConfig;
  /** Special tokens by role. */
  tokens: TokenIds;
  /** What generation_config.json advises; empty without the file. */
  generation: GenerationDefaults;
}

/** A JSON object read field by field; every complaint names the file and the field. */
class Fields {
  readonly #json: Readonly<Record<string, unknown>>;
  readonly #where: string;
  readonly #path: string;

  constructor(json: unknown, where: string, path = "") {
    if (typeof json !== "object" || json === null || Array.isArray(json)) {
      throw new InputError(`${where}: ${path ? `"${path}"` : "the file"} must be a JSON object, got ${show(json)}`);
    }
    this.#json = json as Record<string, unknown>;
    this.#where = where;
    this.#path = path;
  }

  error(key: string, what: string): InputError {
    return new InputError(`${this.#where}: ${this.#path ? `${this.#path}.` : ""}${key} ${what}`);
  }

  /** The first of the names that has a value other than null. */
  find(...keys: string[]): unknown {
    for (const key of keys) if (this.#json[key] !== undefined && this.#json[key] !== null) return this.#json[key];
    return undefined;
  }

  object(key: string): Fields | undefined {
    const value = this.find(key);
    return value === undefined ? undefined : new Fields(value, this.#where, this.#path ? `${this.#path}.${key}` : key);
  }

  #required(keys: readonly string[], fallback: unknown): unknown {
    const value = this.find(...keys) ?? fallback;
    if (value === undefined) throw this.error(keys.join(" or "), "is missing");
    return value;
  }

  int(keys: readonly string[], least: number, fallback?: number): number {
    const value = this.#required(keys, fallback);
    if (typeof value !== "number" || !Number.isSafeInteger(value) || value < least) {
      throw this.error(keys[0], `must be an integer of at least ${least}, got ${show(value)}`);
    }
    return value;
  }

  optionalInt(key: string, least: number): number | undefined {
    return this.find(key) === undefined ? undefined : this.int([key], least);
  }

  positive(key: string, fallback?: number): number {
    const value = this.#required([key], fallback);
    if (typeof value !== "number" || !(value > 0) || value === Infinity) {
      throw this.error(key, `must be a positive number, got ${show(value)}`);
    }
    return value;
  }

  boolean(key: string, fallback: boolean): boolean {
    const value = this.find(key) ?? fallback;
    if (typeof value !== "boolean") throw this.error(key, `must be true or false, got ${show(value)}`);
    return value;
  }

  ints(key: string): number[] | undefined {
    const value = this.find(key);
    if (value === undefined) return undefined;
    const list = Array.isArray(value) ? value : [value];
    if (!list.every((v): v is number => Number.isSafeInteger(v) && v >= 0)) {
      throw this.error(key, `must be a list of integers of at least 0, got ${show(value)}`);
    }
    return list;
  }

  /** Refuses every value but the expected ones; a missing field is as expected. */
  only(key: string, expected: readonly unknown[], why: string): void {
    const value = this.find(key);
    if (value !== undefined && !expected.includes(value)) {
      throw this.error(key, `is ${show(value)}, but only ${expected.map(show).join(" or ")} is supported${why}`);
    }
  }
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

/**
 * Reads `config.json`.
 *
 * @param json The parsed file, in either layout.
 * @param where Names the file in errors.
 * @throws {InputError} A field is missing, of the wrong type, contradicts another, or asks for what is not supported.
 */
export function parseConfig(json: unknown, where: string): QwenConfig {
  const root = new Fields(json, where);
  const type = root.find("model_type");
  if (type !== "qwen2_5_vl") {
    throw root.error(
      "model_type",
      `must be "qwen2_5_vl", got ${show(type)}; only Qwen2.5-VL checkpoints can be loaded`,
    );
  }
  const nested = root.object("text_config");
  const text = parseText(nested ?? root, root);
  const visionFields = root.object("vision_config");
  if (!visionFields) throw root.error("vision_config", "is missing; a text-only model cannot look at pictures");
  const vision = parseVision(visionFields);
  if (vision.outHiddenSize !== text.hiddenSize) {
    throw visionFields.error(
      "out_hidden_size",
      `is ${vision.outHiddenSize}, but hidden_size of the text is ${text.hiddenSize}`,
    );
  }
  const tokens = parseTokens(root, nested ?? root, text.vocabSize);
  return {
    text,
    vision,
    tokens,
    generation: { suppressTokens: [], temperature: undefined, topP: undefined, maxNewTokens: undefined },
  };
}

function parseText(fields: Fields, root: Fields): TextConfig {
  fields.only("hidden_act", ["silu"], "");
  fields.only("use_sliding_window", [false], "; sliding-window attention is not implemented");
  const layerTypes = fields.find("layer_types");
  if (Array.isArray(layerTypes) && layerTypes.some((type) => type !== "full_attention")) {
    throw fields.error("layer_types", `must all be "full_attention", got ${show(layerTypes)}`);
  }
  const hiddenSize = fields.int(["hidden_size"], 1);
  const heads = fields.int(["num_attention_heads"], 1);
  const kvHeads = fields.int(["num_key_value_heads"], 1, heads);
  if (hiddenSize % heads) {
    throw fields.error("num_attention_heads", `= ${heads} does not divide hidden_size = ${hiddenSize}`);
  }
  if (heads % kvHeads) {
    throw fields.error("num_key_value_heads", `= ${kvHeads} does not divide num_attention_heads = ${heads}`);
  }
  const headDim = hiddenSize / heads;
  const stated = fields.optionalInt("head_dim", 1);
  if (stated !== undefined && stated !== headDim) {
    throw fields.error("head_dim", `is ${stated}, but hidden_size / num_attention_heads is ${headDim}`);
  }
  if (headDim % 2) {
    throw fields.error("hidden_size", `/ num_attention_heads = ${headDim} must be even for rotary positions`);
  }
  return {
    vocabSize: fields.int(["vocab_size"], 1),
    hiddenSize,
    intermediateSize: fields.int(["intermediate_size"], 1),
    layers: fields.int(["num_hidden_layers"], 1),
    heads,
    kvHeads,
    headDim,
    rmsNormEps: fields.positive("rms_norm_eps", 1e-6),
    ...parseRope(fields, headDim),
    tied: (root.find("tie_word_embeddings") === undefined ? fields : root).boolean("tie_word_embeddings", false),
    maxPositions: fields.optionalInt("max_position_embeddings", 1),
  };
}

/** The rotary settings, which newer files keep in `rope_parameters` and older ones in `rope_scaling` and `rope_theta`. */
function parseRope(fields: Fields, headDim: number): Pick<TextConfig, "ropeTheta" | "mropeSection"> {
  const key = fields.find("rope_parameters") !== undefined ? "rope_parameters" : "rope_scaling";
  const rope = fields.object(key);
  if (!rope) throw fields.error("rope_parameters or rope_scaling", "is missing; it holds mrope_section");
  for (const name of ["type", "rope_type"]) rope.only(name, ["mrope", "default"], "");
  const section = rope.ints("mrope_section");
  if (!section) throw rope.error("mrope_section", "is missing");
  const sum = section.reduce((a, b) => a + b, 0);
  if (section.length !== 3 || sum !== headDim / 2) {
    throw rope.error(
      "mrope_section",
      `must be three numbers that sum to head_dim / 2 = ${headDim / 2}, got ${show(section)}`,
    );
  }
  const theta = rope.find("rope_theta") !== undefined
    ? rope.positive("rope_theta")
    : fields.positive("rope_theta", 1e6);
  return { ropeTheta: theta, mropeSection: [section[0], section[1], section[2]] };
}

function parseVision(fields: Fields): VisionConfig {
  fields.only("hidden_act", ["silu"], "");
  const hiddenSize = fields.int(["hidden_size"], 1);
  const heads = fields.int(["num_heads"], 1);
  // Positions rotate rows and columns by half a head each, in pairs: so a head is a multiple of 4 wide.
  if (hiddenSize % heads || (hiddenSize / heads) % 4) {
    throw fields.error("num_heads", `= ${heads} must divide hidden_size = ${hiddenSize} into heads of a multiple of 4`);
  }
  const depth = fields.int(["depth"], 1);
  const patchSize = fields.int(["patch_size", "spatial_patch_size"], 1);
  const spatialMergeSize = fields.int(["spatial_merge_size"], 1, 2);
  const windowSize = fields.int(["window_size"], 1, 112);
  if (windowSize % (patchSize * spatialMergeSize)) {
    throw fields.error("window_size", `= ${windowSize} must be a multiple of patch_size * spatial_merge_size`);
  }
  const fullAttentionBlocks = fields.ints("fullatt_block_indexes");
  if (!fullAttentionBlocks) throw fields.error("fullatt_block_indexes", "is missing");
  if (fullAttentionBlocks.some((block) => block >= depth)) {
    throw fields.error("fullatt_block_indexes", `must be below depth = ${depth}, got ${show(fullAttentionBlocks)}`);
  }
  return {
    depth,
    hiddenSize,
    intermediateSize: fields.int(["intermediate_size"], 1),
    heads,
    headDim: hiddenSize / heads,
    inChannels: fields.int(["in_channels", "in_chans"], 1, 3),
    patchSize,
    spatialMergeSize,
    temporalPatchSize: fields.int(["temporal_patch_size"], 1, 2),
    windowSize,
    fullAttentionBlocks,
    outHiddenSize: fields.int(["out_hidden_size"], 1),
    normEps: 1e-6,
    ropeTheta: 10000,
  };
}

function parseTokens(root: Fields, text: Fields, vocabSize: number): TokenIds {
  const id = (key: string): number => {
    const value = root.int([key], 0);
    if (value >= vocabSize) throw root.error(key, `= ${value} is outside the vocabulary of ${vocabSize}`);
    return value;
  };
  const optional = (key: string): number | undefined => root.optionalInt(key, 0) ?? text.optionalInt(key, 0);
  return {
    image: id("image_token_id"),
    video: id("video_token_id"),
    visionStart: id("vision_start_token_id"),
    visionEnd: id("vision_end_token_id"),
    eos: [...new Set(root.ints("eos_token_id") ?? text.ints("eos_token_id") ?? [])],
    pad: optional("pad_token_id"),
    bos: optional("bos_token_id"),
  };
}

/**
 * Merges `generation_config.json` into a configuration: its ids go before those of `config.json`.
 *
 * @param json The parsed file.
 * @param where Names the file in errors.
 * @throws {InputError} A field has the wrong type or an id is outside the vocabulary.
 */
export function parseGenerationConfig(json: unknown, where: string, config: QwenConfig): QwenConfig {
  const fields = new Fields(json, where);
  const { tokens, text } = config;
  const ids = (key: string): number[] | undefined => {
    const list = fields.ints(key);
    const outside = list?.find((id) => id >= text.vocabSize);
    if (outside !== undefined) throw fields.error(key, `names ${outside}, outside the vocabulary of ${text.vocabSize}`);
    return list && [...new Set(list)];
  };
  const number = (key: string): number | undefined =>
    fields.find(key) === undefined || fields.find(key) === 0 ? undefined : fields.positive(key);
  return {
    ...config,
    tokens: {
      ...tokens,
      eos: ids("eos_token_id") ?? tokens.eos,
      pad: ids("pad_token_id")?.[0] ?? tokens.pad,
      bos: ids("bos_token_id")?.[0] ?? tokens.bos,
    },
    generation: {
      suppressTokens: ids("suppress_tokens") ?? config.generation.suppressTokens,
      temperature: number("temperature") ?? config.generation.temperature,
      topP: number("top_p") ?? config.generation.topP,
      maxNewTokens: fields.optionalInt("max_new_tokens", 1) ?? config.generation.maxNewTokens,
    },
  };
}
