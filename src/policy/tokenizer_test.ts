import assert from "node:assert/strict";
import type { Message } from "./policy.ts";
import { Tokenizer } from "./tokenizer.ts";

const goldens = new URL("../../fixtures/goldens/tokenizer/", import.meta.url);
const text = (name: string) => Deno.readTextFile(new URL(name, goldens));

async function goldenFiles(): Promise<Map<string, string>> {
  const names = ["tokenizer.json", "tokenizer_config.json", "chat_template.json"];
  return new Map(await Promise.all(names.map(async (name) => [name, await text(name)] as const)));
}

/** The files with no chat template in them. */
async function withoutTemplate(): Promise<Map<string, string>> {
  const files = await goldenFiles();
  files.delete("chat_template.json");
  const { chat_template: _, ...config } = JSON.parse(files.get("tokenizer_config.json")!);
  return files.set("tokenizer_config.json", JSON.stringify(config));
}

interface GoldenText {
  text: string;
  ids: number[];
  decoded: string;
  decoded_skip_special: string;
}

interface GoldenConversation {
  messages: Message[];
  add_generation_prompt: boolean;
  add_vision_id?: boolean;
  image_tokens?: number[];
  text: string;
  ids: number[];
  ids_expanded: number[];
}

const imagePad = 496;

Deno.test("strings encode and decode as in the goldens", async () => {
  const tokenizer = Tokenizer.fromFiles(await goldenFiles(), "t");
  const { strings, decode }: { strings: GoldenText[]; decode: GoldenText[] } = JSON.parse(await text("strings.json"));
  assert.deepEqual([strings.length, decode.length], [71, 14]);
  for (const golden of strings) assert.deepEqual(tokenizer.encode(golden.text), golden.ids, golden.text);
  for (const { ids, decoded, decoded_skip_special } of [...strings, ...decode]) {
    assert.equal(tokenizer.decode(ids, false), decoded);
    assert.equal(tokenizer.decode(ids), decoded_skip_special);
  }
});

Deno.test("conversations render and encode as in the goldens, with the folder's template and with our own", async () => {
  const { conversations }: { conversations: GoldenConversation[] } = JSON.parse(await text("conversations.json"));
  assert.equal(conversations.length, 6);
  for (const files of [await goldenFiles(), await withoutTemplate()]) {
    const tokenizer = Tokenizer.fromFiles(files, "t");
    for (const golden of conversations) {
      const rendered = tokenizer.renderChat(golden.messages, {
        addGenerationPrompt: golden.add_generation_prompt,
        addVisionId: golden.add_vision_id,
      });
      assert.equal(rendered, golden.text);
      assert.deepEqual(tokenizer.encode(rendered), golden.ids);
      assert.deepEqual(tokenizer.encodeWithImages(rendered, golden.image_tokens ?? [], imagePad), golden.ids_expanded);
    }
  }
});

Deno.test("ids without a token decode to nothing", async () => {
  const tokenizer = Tokenizer.fromFiles(await goldenFiles(), "t");
  assert.equal(tokenizer.decode([]), "");
  assert.equal(tokenizer.decode([511]), "");
  assert.equal(tokenizer.decode([32, 511, 32]), "AA");
  assert.equal(tokenizer.tokenId("<|im_end|>"), 492);
  assert.equal(tokenizer.tokenId("<|nothing|>"), undefined);
});

Deno.test("a continuation is what the whole conversation has after the reply", async () => {
  const tokenizer = Tokenizer.fromFiles(await goldenFiles(), "t");
  const history: Message[] = [{ role: "user", content: [{ type: "image" }, { type: "text", text: "Where is it?" }] }];
  const more: Message[] = [{ role: "user", content: [{ type: "text", text: "Here: " }, { type: "image" }] }];
  const reply = "Over there.";
  const whole = tokenizer.renderChat([...history, { role: "assistant", content: reply }, ...more], {
    addGenerationPrompt: true,
  });
  const prompt = tokenizer.renderChat(history, { addGenerationPrompt: true });
  assert.equal(prompt + reply + tokenizer.continuation(history, more, false), whole);
  assert.equal(`${prompt}${reply}<|im_end|>${tokenizer.continuation(history, more, true)}`, whole);
  // A template that treats the first message in its own way must see the history.
  assert.equal(tokenizer.continuation([], more, true).includes("system"), false);
});

Deno.test("placeholders and images must be equally many", async () => {
  const tokenizer = Tokenizer.fromFiles(await goldenFiles(), "t");
  const two = "<|image_pad|> and <|image_pad|>";
  assert.equal(tokenizer.encodeWithImages(two, [3, 2], imagePad).filter((id) => id === imagePad).length, 5);
  assert.throws(
    () => tokenizer.encodeWithImages(two, [3], imagePad),
    /^InputError: .*2 image placeholders for 1 images/,
  );
  assert.throws(() => tokenizer.encodeWithImages(two, [3, 2, 1], imagePad), /2 image placeholders for 3 images/);
});

Deno.test("templates are found in the order in which transformers looks", async () => {
  const files = await goldenFiles();
  const render = () => Tokenizer.fromFiles(files, "t").renderChat([], { addGenerationPrompt: false });
  const config = JSON.parse(files.get("tokenizer_config.json")!);
  const list = [{ name: "tool", template: "no" }, { name: "default", template: "by name {{ eos_token }}" }];
  files.set("tokenizer_config.json", JSON.stringify({ ...config, chat_template: list, eos_token: { content: "<E>" } }));
  files.delete("chat_template.json");
  assert.equal(render(), "by name <E>");
  files.set("chat_template.json", JSON.stringify({ chat_template: "json" }));
  assert.equal(render(), "json");
  files.set("chat_template.jinja", "jinja");
  assert.equal(render(), "jinja");
});

Deno.test("files that are missing or malformed are named", async () => {
  const files = await goldenFiles();
  const make = (name: string, content: string) => () => Tokenizer.fromFiles(new Map(files).set(name, content), "dir");
  assert.throws(() => Tokenizer.fromFiles(new Map(), "dir"), /^InputError: dir: no tokenizer\.json there/);
  assert.throws(make("tokenizer.json", "{"), /^InputError: dir\/tokenizer\.json: not valid JSON/);
  assert.throws(make("tokenizer.json", "{}"), /^InputError: dir\/tokenizer\.json: not a tokenizer that can be loaded/);
  assert.throws(make("tokenizer_config.json", "[]"), /tokenizer_config\.json: must be a JSON object/);
  assert.throws(make("chat_template.jinja", "{% if %}"), /chat_template\.jinja: the chat template does not parse/);
  assert.throws(make("chat_template.json", `{"chat_template":3}`), /chat_template is neither text nor a list/);
  const refusing = make("chat_template.jinja", "{{ raise_exception('no system role') }}")();
  assert.throws(() => refusing.renderChat([], { addGenerationPrompt: true }), /cannot render .*no system role/);
  const forgetful = make("chat_template.jinja", "{{ messages | length }}")();
  assert.throws(() => forgetful.continuation([], [], true), /drops assistant replies/);
  const endless = make("chat_template.jinja", "{% for m in messages %}{{ m.content }}\n{% endfor %}")();
  assert.throws(() => endless.continuation([], [], true), /does not end an assistant's turn by a special token/);
  assert.equal(endless.continuation([], [], false), "\n");
});
