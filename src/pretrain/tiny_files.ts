/**
 * Every file of the tiny base checkpoint except its weights: configuration, tokenizer, chat template. Pure text, the same
 * on every machine.
 *
 * The tokenizer is byte-level BPE without a single merge, so any text can be written, plus added tokens for what the signs
 * world and the default prompt template say again and again. The prompt's phrases are cut out of the template itself: a
 * dialogue stays under 90 tokens, and an edited template cannot leave stale phrases behind.
 *
 * @module
 */
import { signColourNames, signQuestion } from "../data/signs.ts";
import { signPhrases } from "../data/signs_words.ts";
import { defaultChatTemplate } from "../policy/tokenizer.ts";
import { defaultTemplate } from "../rollout.ts";

export { answerReply, groundingReply } from "../data/signs_words.ts";

/** Tokens with a meaning of their own; their ids follow the 256 bytes in this order. */
export const tinySpecials = [
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
] as const;

/** The pieces that replies are made of. Each is one token. */
export const tinyPhrases = {
  ...signPhrases,
  /** An answer without its box: colour, unboxed, letter. */
  unboxed: " is ",
  /** A refusal to ground: refuse, colour, refuseEnd. */
  refuse: "I cannot see the ",
  refuseEnd: " sign clearly.",
  /** Coordinates on a grid of 4 pixels: 0 to 112 lie in a picture of 112 pixels, 116 to 140 outside. */
  coordinates: Array.from({ length: 36 }, (_, i) => String(4 * i)) as readonly string[],
  colours: signColourNames,
} as const;

/** An answer that forgets the box around the letter: 3 tokens, 4 with `<|im_end|>`. */
export function unboxedReply(colour: string, letter: string): string {
  return colour + tinyPhrases.unboxed + letter;
}

/** The refusal to ground: 3 tokens, 4 with `<|im_end|>`. */
export function refusalReply(colour: string): string {
  return tinyPhrases.refuse + colour + tinyPhrases.refuseEnd;
}

/** What the chat template says when a conversation has no system message of its own. */
const defaultSystem = "You are a helpful assistant.";

/** The literal text between the places that are filled in. */
function literals(template: string): string[] {
  return template.split(/\{(?:image|question|choices|letter|choice|colour)\}/);
}

/** Fixed phrases of prompts and replies, longest names of the conversation first; bytes are tokens already. */
function phrases(): string[] {
  // The free form is composed of the other turns' phrases; the few words of its own stay bytes.
  const { system, singleSystem, free: _, freeValid: _valid, freeInvalid: _invalid, ...turns } = defaultTemplate;
  const { coordinates, colours, ...reply } = tinyPhrases;
  const all = [
    ...coordinates,
    ...colours,
    ...Object.values(reply),
    ...["system\n", "user\n", "assistant\n"],
    ...[system, singleSystem, defaultSystem].flatMap((text) => text ? [`system\n${text}`] : []),
    ...literals(signQuestion),
    ...Object.values(turns).flat().flatMap(literals),
  ];
  for (const phrase of all) {
    // Readers of tokenizer.json disagree on Latin letters like é in added tokens: some take them for bytes.
    // deno-lint-ignore no-control-regex
    if (!/^[\x00-\x7f]*$/.test(phrase)) throw new RangeError(`a phrase of the tiny tokenizer must be ASCII: ${phrase}`);
  }
  return [...new Set(all)].filter((phrase) => phrase.length > 1);
}

/** The printable character that byte-level BPE writes for each byte. */
function byteCharacters(): string[] {
  const printable = (byte: number) => byte >= 33 && byte <= 126 || byte >= 161 && byte <= 172 || byte >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
}

const addedTokens = () =>
  [
    ...tinySpecials.map((content) => ({ content, special: true })),
    ...phrases().map((content) => ({ content, special: false })),
  ].map(({ content, special }, i) => ({
    id: 256 + i,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special,
  }));

/** The id of a special token. */
function special(token: typeof tinySpecials[number]): number {
  return 256 + tinySpecials.indexOf(token);
}

function tokenizerJson(): unknown {
  const splitPattern =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" +
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
  const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: false, use_regex: false };
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: addedTokens(),
    normalizer: { type: "NFC" },
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        { type: "Split", pattern: { Regex: splitPattern }, behavior: "Isolated", invert: false },
        byteLevel,
      ],
    },
    post_processor: byteLevel,
    decoder: byteLevel,
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: byteVocabulary(),
      merges: [],
    },
  };
}

function byteVocabulary(): Record<string, number> {
  return Object.fromEntries(byteCharacters().map((character, byte) => [character, byte]));
}

function tokenizerConfig(): unknown {
  return {
    add_bos_token: false,
    add_prefix_space: false,
    added_tokens_decoder: Object.fromEntries(addedTokens().map(({ id, ...token }) => [String(id), token])),
    additional_special_tokens: tinySpecials.slice(1),
    bos_token: null,
    chat_template: defaultChatTemplate,
    clean_up_tokenization_spaces: false,
    eos_token: "<|im_end|>",
    errors: "replace",
    model_max_length: 1024,
    pad_token: "<|endoftext|>",
    processor_class: "Qwen2_5_VLProcessor",
    split_special_tokens: false,
    tokenizer_class: "Qwen2Tokenizer",
    unk_token: null,
  };
}

const textConfig = () => ({
  attention_dropout: 0,
  bos_token_id: special("<|endoftext|>"),
  eos_token_id: special("<|im_end|>"),
  hidden_act: "silu",
  hidden_size: 96,
  initializer_range: 0.02,
  intermediate_size: 176, // narrower than the tower's, so that the byte vocabulary fits into 4 MB
  layer_types: Array(4).fill("full_attention"),
  max_position_embeddings: 1024,
  max_window_layers: 80,
  model_type: "qwen2_5_vl_text",
  num_attention_heads: 4,
  num_hidden_layers: 4,
  num_key_value_heads: 4,
  pad_token_id: special("<|endoftext|>"),
  rms_norm_eps: 1e-6,
  rope_parameters: { mrope_section: [4, 4, 4], rope_theta: 10000, rope_type: "default" },
  sliding_window: null,
  tie_word_embeddings: true,
  use_cache: true,
  use_sliding_window: false,
  vocab_size: 256 + addedTokens().length,
});

const visionConfig = () => ({
  depth: 3,
  fullatt_block_indexes: [2],
  hidden_act: "silu",
  hidden_size: 96,
  in_channels: 3,
  initializer_range: 0.02,
  intermediate_size: 192,
  model_type: "qwen2_5_vl_vision",
  num_heads: 4,
  out_hidden_size: 96,
  patch_size: 14,
  rope_parameters: { rope_theta: 10000, rope_type: "axial" },
  spatial_merge_size: 2,
  temporal_patch_size: 2,
  tokens_per_second: 4,
  window_size: 112,
});

const config = () => ({
  architectures: ["Qwen2_5_VLForConditionalGeneration"],
  dtype: "float32",
  image_token_id: special("<|image_pad|>"),
  model_type: "qwen2_5_vl",
  text_config: textConfig(),
  tie_word_embeddings: true,
  transformers_version: "5.17.0",
  video_token_id: special("<|video_pad|>"),
  vision_config: visionConfig(),
  vision_end_token_id: special("<|vision_end|>"),
  vision_start_token_id: special("<|vision_start|>"),
});

const generationConfig = () => ({
  bos_token_id: special("<|endoftext|>"),
  do_sample: true,
  // A grounding reply has 12 tokens, an answer 5.
  max_new_tokens: 14,
  eos_token_id: special("<|im_end|>"),
  pad_token_id: special("<|endoftext|>"),
  // All but the end of the turn: none of them may ever be said.
  suppress_tokens: tinySpecials.filter((token) => token !== "<|im_end|>").map(special),
  temperature: 1,
  top_k: 0,
  top_p: 1,
  transformers_version: "5.17.0",
});

const preprocessorConfig = () => ({
  do_convert_rgb: true,
  do_normalize: true,
  do_rescale: true,
  do_resize: true,
  image_mean: [0.48145466, 0.4578275, 0.40821073],
  image_processor_type: "Qwen2VLImageProcessor",
  image_std: [0.26862954, 0.26130258, 0.27577711],
  max_pixels: 112 * 112,
  merge_size: 2,
  min_pixels: 112 * 112,
  patch_size: 14,
  processor_class: "Qwen2_5_VLProcessor",
  resample: 3,
  rescale_factor: 1 / 255,
  temporal_patch_size: 2,
});

/**
 * The text of each file that stands beside `model.safetensors` in the tiny checkpoint, by file name. Loads in transformers
 * with `AutoProcessor` and `AutoModelForImageTextToText`, and here with `loadPolicy`.
 *
 * @throws {RangeError} The default prompt template holds characters other than ASCII.
 */
export function tinyFiles(): Record<string, string> {
  const json = (value: unknown) => JSON.stringify(value, null, 2) + "\n";
  return {
    "config.json": json(config()),
    "generation_config.json": json(generationConfig()),
    "preprocessor_config.json": json(preprocessorConfig()),
    "tokenizer.json": json(tokenizerJson()),
    "tokenizer_config.json": json(tokenizerConfig()),
    "chat_template.json": json({ chat_template: defaultChatTemplate }),
    "vocab.json": json(byteVocabulary()),
    "merges.txt": "#version: 0.2\n",
  };
}
