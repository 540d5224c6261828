/**
 * Group `tokenizer`: ids, text and rendered conversations, all exact.
 *
 * @module
 */
import { parseJson } from "../policy/checkpoint.ts";
import type { Message } from "../policy/policy.ts";
import { Tokenizer } from "../policy/tokenizer.ts";
import type { Golden } from "./golden.ts";
import type { Report } from "./report.ts";

interface Decoded {
  ids: number[];
  decoded: string;
  decoded_skip_special: string;
}
interface StringsJson {
  strings: (Decoded & { text: string; tokens: string[] })[];
  decode: Decoded[];
}
interface ConversationsJson {
  conversations: {
    messages: Message[];
    add_generation_prompt: boolean;
    add_vision_id?: boolean;
    image_tokens?: number[];
    text: string;
    ids: number[];
    ids_expanded: number[];
  }[];
}
interface SpecialIdsJson {
  ids: Record<string, number>;
  eos_token_id: number;
  pad_token_id: number;
  vocab_size: number;
}
interface TokenizerJson {
  model: { vocab: Record<string, number>; merges: (string | [string, string])[] };
  added_tokens: { id: number; content: string }[];
}

/** The files that may hold the chat template; each is checked on its own. */
const templateFiles = ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"];
/** The placeholder for an image in the text of the format. */
const imagePad = "<|image_pad|>";

/** Runs the group. */
export async function checkTokenizer(golden: Golden, report: Report): Promise<void> {
  const texts = new Map<string, string>();
  for (const name of await golden.list("tokenizer")) texts.set(name, await golden.text(`tokenizer/${name}`));
  const tokenizer = Tokenizer.fromFiles(texts, "tokenizer");
  const parsed = <T>(name: string) => golden.json<T>(`tokenizer/${name}`);

  await checkVocabulary(golden, report, tokenizer);
  await report.attempt("strings.json", async () => {
    const { strings, decode } = await parsed<StringsJson>("strings.json");
    await report.check(`strings: ids (${strings.length} texts)`, (check) => {
      for (const { text, ids } of strings) check.same(tokenizer.encode(text), ids, JSON.stringify(text));
    });
    await report.check(`strings: tokens (${strings.length} texts)`, (check) => {
      for (const { text, ids, tokens } of strings) {
        check.same(tokens.map((token) => tokenizer.tokenId(token)), ids, JSON.stringify(text));
      }
    });
    for (const [name, cases] of [["strings", strings], ["decode", decode]] as const) {
      await report.check(`${name}: decoded (${cases.length})`, (check) => {
        for (const { ids, decoded } of cases) check.same(tokenizer.decode(ids, false), decoded, `[${ids}]`);
      });
      await report.check(`${name}: decoded without special tokens (${cases.length})`, (check) => {
        for (const { ids, decoded_skip_special } of cases) {
          check.same(tokenizer.decode(ids, true), decoded_skip_special, `[${ids}]`);
        }
      });
    }
  });
  await report.attempt("conversations.json", async () => {
    const { ids: special } = await parsed<SpecialIdsJson>("special_ids.json");
    for (const source of templateFiles) {
      const text = texts.get(source);
      if (text === undefined || !hasTemplate(source, text)) continue;
      await checkConversations(
        report,
        source,
        onlyTemplate(texts, source),
        await parsed("conversations.json"),
        special,
      );
    }
  });
}

function hasTemplate(name: string, text: string): boolean {
  return name.endsWith(".jinja") || (parseJson(text, name) as { chat_template?: unknown }).chat_template !== undefined;
}

/** The files with the chat template of one of them only. */
function onlyTemplate(texts: ReadonlyMap<string, string>, source: string): Map<string, string> {
  const out = new Map(texts);
  for (const name of templateFiles) {
    const text = out.get(name);
    if (name === source || text === undefined) continue;
    if (name === "tokenizer_config.json") {
      out.set(name, JSON.stringify({ ...parseJson(text, name) as object, chat_template: undefined }));
    } else out.delete(name);
  }
  return out;
}

async function checkVocabulary(golden: Golden, report: Report, tokenizer: Tokenizer): Promise<void> {
  await report.check("special_ids.json", async (check) => {
    const special = await golden.json<SpecialIdsJson>("tokenizer/special_ids.json");
    for (const [token, id] of Object.entries(special.ids)) {
      check.same(tokenizer.tokenId(token), id, token);
      check.same(tokenizer.encode(token), [id], token);
    }
    const named = await golden.json<Record<string, unknown>>("tokenizer/tokenizer_config.json");
    for (const [key, id] of [["eos_token", special.eos_token_id], ["pad_token", special.pad_token_id]] as const) {
      const token = named[key] as string | { content: string };
      check.same(tokenizer.tokenId(typeof token === "string" ? token : token?.content), id, key);
    }
    const { model, added_tokens } = await golden.json<TokenizerJson>("tokenizer/tokenizer.json");
    const ids = new Set([...Object.values(model.vocab), ...added_tokens.map(({ id }) => id)]);
    check.same(ids.size, special.vocab_size, "vocab_size");
  });
  await report.check("vocab.json", async (check) => {
    const entries = Object.entries(await golden.json<Record<string, number>>("tokenizer/vocab.json"));
    check.equal(entries.map(([token]) => tokenizer.tokenId(token)), entries.map(([, id]) => id));
  });
  await report.check("merges.txt", async (check) => {
    const lines = (await golden.text("tokenizer/merges.txt")).split("\n");
    const { model } = await golden.json<TokenizerJson>("tokenizer/tokenizer.json");
    const merges = lines.filter((line) => line !== "" && !line.startsWith("#version"));
    check.equal(merges, model.merges.map((merge) => typeof merge === "string" ? merge : merge.join(" ")));
  });
}

async function checkConversations(
  report: Report,
  source: string,
  texts: ReadonlyMap<string, string>,
  { conversations }: ConversationsJson,
  special: Record<string, number>,
): Promise<void> {
  const tokenizer = Tokenizer.fromFiles(texts, "tokenizer");
  await report.check(`conversations: text, template of ${source}`, (check) => {
    for (const [i, { messages, text, ...flags }] of conversations.entries()) {
      const options = { addGenerationPrompt: flags.add_generation_prompt, addVisionId: flags.add_vision_id };
      check.same(tokenizer.renderChat(messages, options), text, `conversation ${i}`);
    }
  });
  await report.check(`conversations: ids, template of ${source}`, (check) => {
    for (const [i, { text, ids }] of conversations.entries()) {
      check.same(tokenizer.encode(text), ids, `conversation ${i}`);
    }
  });
  await report.check(`conversations: ids with image tokens, ${source}`, (check) => {
    for (const [i, { text, image_tokens, ids_expanded }] of conversations.entries()) {
      const ids = tokenizer.encodeWithImages(text, image_tokens ?? [], special[imagePad]);
      check.same(ids, ids_expanded, `conversation ${i}`);
    }
  });
}
