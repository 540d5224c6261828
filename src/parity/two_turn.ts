/**
 * Group `parity`, first half: one conversation of two turns and two images through the whole model.
 *
 * @module
 */
import type { Message, Sequence } from "../policy/policy.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { patchPositions, windowIndex } from "../policy/rope_index.ts";
import { allLogProbs, belowArgmax, type Captured, captureForward } from "./forward.ts";
import { type Golden, tensor, type Tensors, traitsOf } from "./golden.ts";
import { parityProcessor, type SubImagesJson, type TwoTurnJson } from "./inputs.ts";
import { compareLogits, twoTurnSequence } from "./models.ts";
import type { Check, Report } from "./report.ts";
import { tolerances } from "./tolerances.ts";

/** The tensors that are inputs or exact integers, by what gives them. */
const integers = new Set([
  ...["input_ids", "attention_mask", "mm_token_type_ids", "assistant_mask", "position_ids", "rope_deltas"],
  ...["vision.window_index", "vision.cu_window_seqlens", "vision.cu_seqlens", "vision.position_ids_hw"],
]);

/** Every recorded forward pass `…two_turn.safetensors`, and the conversation's text and pictures. */
export async function checkTwoTurn(golden: Golden, report: Report): Promise<void> {
  await report.attempt("two_turn.json", () => checkConversation(golden, report));
  const stems = new Set(["two_turn"]);
  for (const name of await golden.list("parity")) {
    const stem = /^(.*two_turn)\.(json|safetensors)$/.exec(name)?.[1];
    if (stem !== undefined) stems.add(stem);
  }
  for (const stem of [...stems].sort((a, b) => a.length - b.length)) {
    await report.attempt(`${stem}.safetensors`, () => checkForward(golden, report, `${stem}.safetensors`));
  }
}

async function checkConversation(golden: Golden, report: Report): Promise<void> {
  const json = await golden.json<TwoTurnJson>("parity/two_turn.json");
  const file = "parity/two_turn.safetensors", tensors = await golden.tensors(file);
  const policy = await golden.policy(await golden.modelFor("two_turn.safetensors", traitsOf(tensors)));
  const { images } = await twoTurnSequence(golden);
  await report.check("two_turn: rendered text", (check) => {
    check.same(policy.tokenizer.renderChat(json.messages, { addGenerationPrompt: false }), json.text);
  });
  await report.check("two_turn: ids of the encoded conversation", (check) => {
    const ids = policy.encodeChat(json.messages, images, false);
    check.equal(ids, tensor(tensors, "input_ids", file).data);
    check.same(ids.length, json.length, "length");
  });
  await checkPictures(golden, report, json);
}

/** Crops are cut from the image they name; pixel values come out of the picture files. */
async function checkPictures(golden: Golden, report: Report, json: TwoTurnJson): Promise<void> {
  const recorded = await golden.tensors("parity/pixel_values.safetensors");
  await checkImageFiles(golden, report, "parity", recorded, json.image_files, json.image_files, json.crops ?? {});
}

/** The pictures of `grads/`, cut from those of `parity/`. */
export async function checkSubImages(golden: Golden, report: Report): Promise<void> {
  const { sub_images = {} } = await golden.json<SubImagesJson>("grads/grads.json");
  const { image_files } = await golden.json<TwoTurnJson>("parity/two_turn.json");
  const recorded = await golden.tensors("grads/pixel_values.safetensors");
  const files = Object.fromEntries(Object.entries(sub_images).map(([key, { file }]) => [key, file]));
  await checkImageFiles(golden, report, "grads", recorded, files, { ...image_files, ...files }, sub_images);
}

async function checkImageFiles(
  golden: Golden,
  report: Report,
  where: string,
  recorded: Tensors,
  files: Record<string, string>,
  sources: Record<string, string>,
  crops: Record<string, { of: string; box_ltrb: [number, number, number, number] }>,
): Promise<void> {
  if (Object.keys(crops).length > 0) {
    await report.check(`${where}: crops cut from the original picture`, async (check) => {
      for (const [key, { of, box_ltrb }] of Object.entries(crops)) {
        const cut = (await golden.picture(sources[of])).crop(box_ltrb);
        check.close(cut.data, (await golden.picture(files[key])).data, 0, key);
      }
    });
  }
  await report.check(`${where}: pixel values`, async (check) => {
    const processor = await parityProcessor(golden);
    for (const [key, { data }] of recorded) {
      check.close(processor.prepare(await golden.picture(files[key])).pixel_values, data, tolerances.pixels, key);
    }
  });
}

async function checkForward(golden: Golden, report: Report, name: string): Promise<void> {
  const file = `parity/${name}`, tensors = await golden.tensors(file), stem = name.replace(/\.safetensors$/, "");
  const policy = await golden.policy(await golden.modelFor(name, traitsOf(tensors)));
  const sequence = await twoTurnSequence(golden);
  const captured = await captureForward(policy, sequence);
  const context = { policy, sequence, captured, tensors, file };
  // Inputs first, then in the order of the computation as far as the names tell.
  const names = [...tensors.keys()].sort((a, b) => stageOf(a) - stageOf(b) || (a < b ? -1 : 1));
  for (const key of names) {
    if (key === "image_grid_thw") continue;
    await report.check(`${stem}: ${key}`, (check) => compareTensor(check, key, context));
  }
}

function stageOf(name: string): number {
  if (integers.has(name)) return 0;
  if (name.startsWith("vision.")) return /embeds|merger/.test(name) ? 2 : 1;
  if (name.startsWith("text.")) return name.endsWith("norm") ? 4 : 3;
  return name.startsWith("logits") ? 5 : 6;
}

interface ForwardContext {
  policy: QwenPolicy;
  sequence: Sequence;
  captured: Captured;
  tensors: Tensors;
  file: string;
}

/** Compares one recorded tensor with what the policy makes of the same inputs. */
async function compareTensor(check: Check, key: string, context: ForwardContext): Promise<void> {
  const { policy, sequence, captured, tensors, file } = context;
  const expected = tensor(tensors, key, file).data, vocab = policy.config.text.vocabSize;
  if (integers.has(key)) return check.equal(integerTensor(key, policy, sequence), expected);
  if (/^logits(_last\d+)?$/.test(key)) {
    return compareLogits(check, captured.logits, new Map([[key, tensors.get(key)!]]), file, vocab);
  }
  if (key === "argmax") {
    // Where two logits are closer than the tolerance allows them to move, either may be the largest.
    for (const below of belowArgmax(captured.logits, vocab, expected)) check.error(below, 2 * tolerances.logits);
    return;
  }
  const scored = /^(logprobs|entropy)(?:_temperature_([\d.]+))?$/.exec(key);
  if (scored) {
    const { logprobs, entropy } = await allLogProbs(policy, [sequence], Number(scored[2] ?? 1));
    return scored[1] === "logprobs"
      ? check.close(logprobs[0], expected, tolerances.logprobs)
      : check.close(entropy[0], expected, tolerances.entropy);
  }
  const value = captured.values.get(key);
  if (!value) throw new RangeError(`no such intermediate result is known; it cannot be compared`);
  const tolerance = /\.rope_(cos|sin)$/.test(key)
    ? tolerances.rope
    : key.startsWith("vision.")
    ? tolerances.vision
    : tolerances.text;
  check.close(value, expected, tolerance);
}

function integerTensor(key: string, policy: QwenPolicy, sequence: Sequence): ArrayLike<number> {
  const { ids, images } = sequence, { vision, tokens } = policy.config;
  const grids = images.map((image) => image.grid_thw);
  const window = () => windowIndex(grids, vision.windowSize, vision.patchSize, vision.spatialMergeSize);
  const [index] = policy.pack([sequence]).index;
  switch (key) {
    case "input_ids":
      return ids;
    case "attention_mask":
      return ids.map(() => 1);
    case "mm_token_type_ids":
      return tokenTypes(ids, tokens.image, tokens.video);
    case "assistant_mask":
      return assistantMask(policy, ids);
    case "position_ids":
      return index.positions.flatMap((axis) => [...axis]);
    case "rope_deltas":
      return [index.next - ids.length];
    case "vision.window_index":
      return window().order;
    case "vision.cu_window_seqlens":
      return window().windows;
    case "vision.cu_seqlens":
      return window().frames;
    default: {
      const { h, w } = patchPositions(grids, vision.spatialMergeSize);
      return Array.from({ length: 2 * h.length }, (_, i) => i % 2 ? w[i >> 1] : h[i >> 1]);
    }
  }
}

/** 0 for text, 1 for image tokens, 2 for video tokens. */
export function tokenTypes(ids: readonly number[], image: number, video: number): number[] {
  return ids.map((id) => id === image ? 1 : id === video ? 2 : 0);
}

/** 1 from after the opening of an assistant turn to the token that ends it. */
function assistantMask(policy: QwenPolicy, ids: readonly number[]): number[] {
  const messages: Message[] = [{ role: "user", content: "" }];
  const render = (addGenerationPrompt: boolean) => policy.tokenizer.renderChat(messages, { addGenerationPrompt });
  const opening = policy.encode(render(true).slice(render(false).length));
  const mask = ids.map(() => 0);
  for (let t = opening.length; t < ids.length; t++) {
    if (!opening.every((id, i) => ids[t - opening.length + i] === id)) continue;
    while (t < ids.length) {
      mask[t] = 1;
      if (policy.stopTokens.includes(ids[t])) break;
      t++;
    }
  }
  return mask;
}
