import assert from "node:assert/strict";
import { makeScene, signColourNames, signLetters } from "../data/signs.ts";
import { parseConfig, parseGenerationConfig } from "../policy/config.ts";
import { ImageProcessor } from "../policy/image_processor.ts";
import type { Message, MessagePart } from "../policy/policy.ts";
import { Tokenizer } from "../policy/tokenizer.ts";
import { RandomStream } from "../random.ts";
import { defaultTemplate } from "../rollout.ts";
import {
  answerReply,
  groundingReply,
  refusalReply,
  tinyFiles,
  tinyPhrases,
  tinySpecials,
  unboxedReply,
} from "./tiny_files.ts";

const files = tinyFiles();
const tokenizer = Tokenizer.fromFiles(new Map(Object.entries(files)), "tiny");
const id = (token: string) => tokenizer.tokenId(token);
const json = (name: string) => JSON.parse(files[name]);

Deno.test("the configuration is read back with the tokenizer's ids", () => {
  const config = parseGenerationConfig(
    json("generation_config.json"),
    "generation_config.json",
    parseConfig(json("config.json"), "config.json"),
  );
  assert.deepEqual(config.tokens, {
    image: id("<|image_pad|>"),
    video: id("<|video_pad|>"),
    visionStart: id("<|vision_start|>"),
    visionEnd: id("<|vision_end|>"),
    eos: [id("<|im_end|>")],
    pad: id("<|endoftext|>"),
    bos: id("<|endoftext|>"),
  });
  const never = tinySpecials.filter((token) => token !== "<|im_end|>").map(id);
  assert.deepEqual(config.generation.suppressTokens.toSorted(), never.toSorted());
  assert.ok(!config.generation.suppressTokens.includes(id("<|im_end|>")!));
  const { added_tokens, model } = json("tokenizer.json");
  const ids = [...Object.values<number>(model.vocab), ...added_tokens.map((token: { id: number }) => token.id)];
  assert.deepEqual(ids.toSorted((a, b) => a - b), Array.from({ length: config.text.vocabSize }, (_, i) => i));
  assert.ok(config.text.vocabSize < 400, "4 MB hold no larger vocabulary");
  assert.equal(config.text.intermediateSize, 176);
  assert.deepEqual(Object.keys(json("tokenizer_config.json").added_tokens_decoder).map(Number), ids.slice(256));
});

Deno.test("any text is its UTF-8 bytes, unless a phrase is in it", () => {
  const random = new RandomStream(1, "text of the test");
  const alphabet = [
    "E",
    "K",
    "é",
    "e\u0301",
    "ß",
    "日",
    "🎉",
    " ",
    "\n",
    "\r",
    "\u00a0",
    "\u00ad",
    "\0",
    "'s",
    "_",
    "5",
  ];
  for (let i = 0; i < 300; i++) {
    const text = Array.from({ length: random.int(12) }, () => random.choice(alphabet)).join("");
    assert.deepEqual(tokenizer.encode(text), [...new TextEncoder().encode(text.normalize("NFC"))]);
    assert.equal(tokenizer.decode(tokenizer.encode(text)), text.normalize("NFC"));
  }
  const mixed = "Größe 116 px, covered in red }4 \n(A) is 日本\n\n<|im_end|>which letter is on the sign?? user\nx";
  assert.equal(tokenizer.decode(tokenizer.encode(mixed), false), mixed);
});

Deno.test("replies have the lengths that pretraining counts on", () => {
  for (const colour of signColourNames) {
    assert.equal(tokenizer.encode(groundingReply(colour, [0, 4, 8, 140]) + "<|im_end|>").length, 12);
    assert.equal(tokenizer.encode(groundingReply(colour, [100, 16, 112, 36]) + "<|im_end|>").length, 12);
    assert.equal(tokenizer.encode(refusalReply(colour) + "<|im_end|>").length, 4);
    for (const letter of signLetters) {
      assert.equal(tokenizer.encode(answerReply(colour, letter) + "<|im_end|>").length, 5);
      assert.equal(tokenizer.encode(unboxedReply(colour, letter) + "<|im_end|>").length, 4);
    }
  }
  const reply = tokenizer.encode(groundingReply("green", [12, 16, 36, 140])).map((token) => tokenizer.decode([token]));
  const { open, middle, comma, close } = tinyPhrases;
  assert.deepEqual(reply, [open, "green", middle, "12", comma, "16", comma, "36", comma, "140", close]);
  assert.deepEqual(JSON.parse(groundingReply("green", [12, 16, 36, 40]).replace(/```(json)?/g, "")), [
    { label: "green", bbox_2d: [12, 16, 36, 40] },
  ]);
  assert.notEqual(tokenizer.encode(refusalReply("red"))[0], tokenizer.encode(open)[0]);
  const coordinates = tinyPhrases.coordinates.map((text) => tokenizer.encode(text));
  assert.ok(coordinates.every((ids) => ids.length === 1));
  assert.equal(new Set(coordinates.flat()).size, 36);
  for (const letter of signLetters) assert.deepEqual(tokenizer.encode(letter), [letter.charCodeAt(0)]);
});

/** The user message of a turn, as the default template words it. */
function user(parts: readonly string[]): Message {
  const { question, choices } = makeScene(0, 0);
  const shown = choices.map((choice) => defaultTemplate.listed.replace("{choice}", choice)).join("");
  const content = parts.map((part): MessagePart =>
    part === "{image}"
      ? { type: "image" }
      : { type: "text", text: part.replace("{question}", question).replace("{choices}", shown) }
  );
  return { role: "user", content };
}

function promptLength(messages: Message[]): number {
  const text = tokenizer.renderChat(messages, { addGenerationPrompt: true });
  const ids = tokenizer.encode(text);
  assert.equal(tokenizer.decode(ids, false), text);
  return ids.length + 15 * ids.filter((token) => token === id("<|image_pad|>")).length;
}

Deno.test("prompts of the default template are short", () => {
  const start: Message[] = [{ role: "system", content: defaultTemplate.system }, user(defaultTemplate.ground)];
  assert.equal(promptLength(start), 32);
  const reply: Message = { role: "assistant", content: groundingReply("red", [0, 4, 8, 12]) };
  for (const turn of [defaultTemplate.valid, defaultTemplate.invalid]) {
    // The reply with its end and line break, then the second turn. With the answer's 5 a dialogue has 87 tokens.
    assert.equal(promptLength([...start, reply, user(turn)]), 32 + 13 + 37);
  }
  for (const turn of [defaultTemplate.refine, defaultTemplate.retry]) {
    assert.equal(promptLength([...start, reply, user(turn)]), 32 + 13 + 29);
  }
  const single: Message[] = [{ role: "system", content: defaultTemplate.singleSystem }, user(defaultTemplate.single)];
  assert.equal(promptLength(single), 40);
  assert.equal(promptLength([user(defaultTemplate.single)]), 40, "the chat template's own system message");
});

Deno.test("pictures become 112 x 112 pixels", () => {
  const processor = new ImageProcessor(json("preprocessor_config.json"), { where: "preprocessor_config.json" });
  assert.deepEqual(processor.resizedSize(672, 672), [112, 112]);
});

Deno.test("the files are the same each time", () => {
  assert.deepEqual(tinyFiles(), files);
  for (const [name, text] of Object.entries(files)) assert.ok(text.endsWith("\n"), name);
});
