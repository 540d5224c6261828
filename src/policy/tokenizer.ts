/**
 * Text ↔ token ids and conversations → text, through Hugging Face's own tokenizer and Jinja packages, with the small
 * differences to the Python side levelled out.
 *
 * @module
 */
import { HFTokenizer, Template } from "../deps.ts";
import { InputError } from "../run/errors.ts";
import type { Message } from "./policy.ts";

/** Options of {@linkcode Tokenizer.renderChat}. */
export interface RenderOptions {
  /** Whether the opening of an assistant turn is appended. */
  addGenerationPrompt: boolean;
  /** Whether images are numbered, `Picture 1: `. @default {false} */
  addVisionId?: boolean;
}

/** The Qwen2.5-VL conversation format, for checkpoints that bring no chat template. */
export const defaultChatTemplate = [
  `{%- set seen = namespace(images=0, videos=0) -%}`,
  `{%- if messages[0].role != "system" -%}{{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}{%- endif -%}`,
  `{%- for message in messages -%}`,
  `{{- "<|im_start|>" ~ message.role ~ "\\n" -}}`,
  `{%- if message.content is string -%}{{- message.content -}}`,
  `{%- else -%}{%- for part in message.content -%}`,
  `{%- if part.type in ["image", "image_url"] or "image" in part or "image_url" in part -%}`,
  `{%- set seen.images = seen.images + 1 -%}{%- if add_vision_id -%}{{- "Picture " ~ seen.images ~ ": " -}}{%- endif -%}`,
  `{{- "<|vision_start|><|image_pad|><|vision_end|>" -}}`,
  `{%- elif part.type == "video" or "video" in part -%}`,
  `{%- set seen.videos = seen.videos + 1 -%}{%- if add_vision_id -%}{{- "Video " ~ seen.videos ~ ": " -}}{%- endif -%}`,
  `{{- "<|vision_start|><|video_pad|><|vision_end|>" -}}`,
  `{%- elif "text" in part -%}{{- part.text -}}{%- endif -%}`,
  `{%- endfor -%}{%- endif -%}{{- "<|im_end|>\\n" -}}`,
  `{%- endfor -%}`,
  `{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}`,
].join("");

/** Stands for a reply while a template is rendered: private-use characters, which no template looks at. */
const sentinel = "\uE000\uE001reply\uE001\uE000";

/** A tokenizer and its chat template. */
export class Tokenizer {
  readonly #tokenizer: HFTokenizer;
  readonly #template: Template;
  readonly #where: string;
  /** Special tokens by falling length, so that the first match is the longest. */
  readonly #special: readonly string[];
  /** Named tokens (`bos_token`, …), which templates may refer to. */
  readonly #names: Readonly<Record<string, string>>;

  private constructor(tokenizer: HFTokenizer, template: Template, names: Record<string, string>, where: string) {
    this.#tokenizer = tokenizer;
    this.#template = template;
    this.#names = names;
    this.#where = where;
    const added = [...tokenizer.get_added_tokens_decoder().values()];
    this.#special = added.filter((t) => t.special).map((t) => t.content).sort((a, b) => b.length - a.length);
  }

  /**
   * Makes a tokenizer of a checkpoint's files: `tokenizer.json`, `tokenizer_config.json` (may be missing), and the chat
   * template of `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, the first that has one.
   *
   * @param files Text by file name.
   * @param where Names the folder in errors.
   * @throws {InputError} A file is missing or malformed, or the template does not parse.
   */
  static fromFiles(files: ReadonlyMap<string, string>, where: string): Tokenizer {
    const json = readRecord(files, "tokenizer.json", where);
    if (!json) throw new InputError(`${where}: no tokenizer.json there; a policy needs it to read text`);
    const config = readRecord(files, "tokenizer_config.json", where) ?? {};
    let tokenizer: HFTokenizer;
    try {
      // The Python side never tidies spaces unless told to; this package would by default.
      tokenizer = new HFTokenizer(json, {
        ...config,
        clean_up_tokenization_spaces: config.clean_up_tokenization_spaces ?? false,
      });
    } catch (error) {
      throw new InputError(`${where}/tokenizer.json: not a tokenizer that can be loaded (${reason(error)})`);
    }
    const [source, text] = chatTemplate(files, config, where);
    let template: Template;
    try {
      template = new Template(text);
    } catch (error) {
      throw new InputError(`${where}/${source}: the chat template does not parse (${reason(error)})`);
    }
    return new Tokenizer(tokenizer, template, namedTokens(config), where);
  }

  /** Encodes text; special tokens that are written in it become their ids, none is added. */
  encode(text: string): number[] {
    return text === "" ? [] : this.#tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /**
   * Decodes ids; bytes that are not UTF-8 become U+FFFD, ids without a token (padding rows of the embedding) nothing.
   *
   * @param skipSpecial Leave out special tokens. @default {true}
   */
  decode(ids: readonly number[], skipSpecial = true): string {
    const known = ids.filter((id) => this.#tokenizer.id_to_token(id) !== undefined);
    return known.length === 0 ? "" : this.#tokenizer.decode(known, { skip_special_tokens: skipSpecial });
  }

  /** The id of a token by its exact text, or undefined. */
  tokenId(token: string): number | undefined {
    return this.#tokenizer.token_to_id(token);
  }

  /**
   * Renders a conversation by the chat template, one placeholder an image.
   *
   * @throws {InputError} The template refuses the conversation.
   */
  renderChat(messages: readonly Message[], options: RenderOptions): string {
    try {
      return this.#template.render({
        ...this.#names,
        messages,
        add_generation_prompt: options.addGenerationPrompt,
        add_vision_id: options.addVisionId ?? false,
      });
    } catch (error) {
      throw new InputError(`${this.#where}: the chat template cannot render this conversation (${reason(error)})`);
    }
  }

  /**
   * Encodes text and repeats each image placeholder as often as its image has tokens.
   *
   * @param imageTokenCounts Merged patches of each image, in order.
   * @param imagePadId The id of the placeholder, `image_token_id` of the configuration.
   * @throws {InputError} The text has more or fewer placeholders than there are images.
   */
  encodeWithImages(text: string, imageTokenCounts: readonly number[], imagePadId: number): number[] {
    const out: number[] = [];
    let image = 0;
    for (const id of this.encode(text)) {
      if (id !== imagePadId) out.push(id);
      else for (let n = imageTokenCounts[image++] ?? 0; n > 0; n--) out.push(id);
    }
    if (image !== imageTokenCounts.length) {
      throw new InputError(
        `the conversation has ${image} image placeholders for ${imageTokenCounts.length} images; ` +
          "check for a placeholder token in the question's own text",
      );
    }
    return out;
  }

  /**
   * The text that follows an assistant's reply: the end of its turn, the new messages, the opening of the next assistant
   * turn. Rendered together with the history, as a template may treat the first message in its own way.
   *
   * @param history The messages up to and without the reply.
   * @param messages The new messages after the reply.
   * @param ended Whether the reply's own last token ended its turn, so that the text begins after that token.
   * @throws {InputError} The template changes or drops replies, so that they cannot be continued as sampled.
   */
  continuation(history: readonly Message[], messages: readonly Message[], ended: boolean): string {
    const reply: Message = { role: "assistant", content: sentinel };
    const text = this.renderChat([...history, reply, ...messages], { addGenerationPrompt: true });
    const at = text.lastIndexOf(sentinel);
    if (at < 0) {
      throw new InputError(`${this.#where}: the chat template drops assistant replies; it cannot be used in turns`);
    }
    const rest = text.slice(at + sentinel.length);
    if (!ended) return rest;
    const end = this.#special.find((token) => rest.startsWith(token));
    if (end === undefined) {
      throw new InputError(`${this.#where}: the chat template does not end an assistant's turn by a special token`);
    }
    return rest.slice(end.length);
  }
}

function reason(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).split("\n")[0];
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function readRecord(
  files: ReadonlyMap<string, string>,
  name: string,
  where: string,
): Record<string, unknown> | undefined {
  const text = files.get(name);
  if (text === undefined) return undefined;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new InputError(`${where}/${name}: not valid JSON (${reason(error)})`);
  }
  if (!isRecord(json)) throw new InputError(`${where}/${name}: must be a JSON object`);
  return json;
}

/** The chat template, and the file it comes from. */
function chatTemplate(
  files: ReadonlyMap<string, string>,
  config: Record<string, unknown>,
  where: string,
): [file: string, template: string] {
  const jinja = files.get("chat_template.jinja");
  if (jinja !== undefined) return ["chat_template.jinja", jinja];
  for (
    const [file, json] of [["chat_template.json", readRecord(files, "chat_template.json", where)], [
      "tokenizer_config.json",
      config,
    ]] as const
  ) {
    const value = json?.chat_template;
    if (value === undefined || value === null) continue;
    if (typeof value === "string") return [file, value];
    // Several templates by name: a list of { name, template }.
    const named = Array.isArray(value) ? value.find((t) => isRecord(t) && t.name === "default") : undefined;
    if (isRecord(named) && typeof named.template === "string") return [file, named.template];
    throw new InputError(`${where}/${file}: chat_template is neither text nor a list with a template named "default"`);
  }
  return ["the built-in template", defaultChatTemplate];
}

/** `bos_token` and the like, which stand in tokenizer_config.json as text or as `{ content }`. */
function namedTokens(config: Record<string, unknown>): Record<string, string> {
  const names: Record<string, string> = {};
  for (const name of ["bos_token", "eos_token", "pad_token", "unk_token"]) {
    const value = config[name];
    const text = isRecord(value) ? value.content : value;
    if (typeof text === "string") names[name] = text;
  }
  return names;
}
