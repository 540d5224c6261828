/**
 * Group `parity`, second half: a batch of unequal prompts, recorded with left padding, and greedy generation from it. The
 * policy packs sequences without padding, so what was recorded at padding is not compared.
 *
 * @module
 */
import type { Message, Sequence } from "../policy/policy.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { allLogProbs, belowArgmax, packedLogits } from "./forward.ts";
import { type Golden, rowsOf, tensor, type Tensors, traitsOf } from "./golden.ts";
import { namedImages } from "./inputs.ts";
import type { Check, Report } from "./report.ts";
import { tolerances } from "./tolerances.ts";
import { tokenTypes } from "./two_turn.ts";

interface BatchJson {
  prompts: { messages: Message[]; images: string[]; length: number; left_pad: number }[];
  pixel_values: string[];
  generated_ids: number[][];
  generated_text?: string[];
  unpadded_generated_ids?: number[][];
  eos_run?: { eos_token_id: number | number[]; pad_token_id: number; generated_ids: number[][] };
}

/** The batch as recorded and as the policy takes it. */
interface Batch {
  policy: QwenPolicy;
  json: BatchJson;
  tensors: Tensors;
  sequences: Sequence[];
  /** Columns of the padded batch that hold each row's tokens. */
  columns: number[][];
  /** Columns of the padded batch. */
  width: number;
}

const file = "parity/batch.safetensors";

/** Runs the half. */
export async function checkBatch(golden: Golden, report: Report): Promise<void> {
  const batch = await readBatch(golden);
  await checkInputs(report, batch);
  await checkScores(report, batch);
  await checkGeneration(report, batch);
}

async function readBatch(golden: Golden): Promise<Batch> {
  const tensors = await golden.tensors(file), json = await golden.json<BatchJson>("parity/batch.json");
  const policy = await golden.policy(await golden.modelFor("batch.safetensors", await batchTraits(golden, tensors)));
  const ids = rowsOf(tensor(tensors, "input_ids", file)), masks = rowsOf(tensor(tensors, "attention_mask", file));
  const columns = masks.map((mask) => mask.flatMap((m, t) => m ? [t] : []));
  const images = await namedImages(golden, json.prompts.flatMap((prompt) => prompt.images), tensors, file);
  let at = 0;
  const sequences = ids.map((row, r) => ({
    ids: columns[r].map((t) => row[t]),
    images: images.slice(at, at += json.prompts[r].images.length),
  }));
  return { policy, json, tensors, sequences, columns, width: ids[0].length };
}

/** The batch's own tensors give little away; the conversation beside it was made with the same model. */
async function batchTraits(golden: Golden, tensors: Tensors) {
  const twoTurn = "parity/two_turn.safetensors";
  const other = await golden.has(twoTurn) ? traitsOf(await golden.tensors(twoTurn)) : {};
  const own = Object.entries(traitsOf(tensors)).filter(([, size]) => size !== undefined);
  return { ...other, ...Object.fromEntries(own) };
}

async function checkInputs(report: Report, batch: Batch): Promise<void> {
  const { policy, json, tensors, sequences, columns, width } = batch;
  await report.check("batch: ids of the encoded prompts, lengths, padding", (check) => {
    json.prompts.forEach(({ messages, length, left_pad }, r) => {
      check.equal(policy.encodeChat(messages, sequences[r].images, true), sequences[r].ids, `prompt ${r}`);
      check.same([sequences[r].ids.length, width - sequences[r].ids.length], [length, left_pad], `prompt ${r}`);
    });
    check.same(json.prompts.flatMap(({ images }) => images), json.pixel_values, "order of the images");
  });
  await report.check("batch: mm_token_type_ids", (check) => {
    const { image, video } = policy.config.tokens;
    rowsOf(tensor(tensors, "mm_token_type_ids", file)).forEach((types, r) => {
      check.equal(tokenTypes(sequences[r].ids, image, video), columns[r].map((t) => types[t]), `row ${r}`);
    });
  });
  const { index } = policy.pack(sequences);
  await report.check("batch: position_ids (3, B, L)", (check) => {
    const axes = index[0].positions.map((_, axis) =>
      columns.map((places, r) => {
        const row: number[] = new Array(width).fill(0);
        places.forEach((t, i) => row[t] = index[r].positions[axis][i]);
        return row;
      })
    );
    check.equal(axes.flat(2), tensor(tensors, "position_ids", file).data);
  });
  await report.check("batch: rope_deltas", (check) => {
    check.equal(index.map(({ next }, r) => next - sequences[r].ids.length), tensor(tensors, "rope_deltas", file).data);
  });
  await report.check("batch: decode_position_ids", (check) => {
    const expected = tensor(tensors, "decode_position_ids", file), steps = expected.shape.at(-1)!;
    const fed = index.map(({ next }) => Array.from({ length: steps }, (_, s) => next + s)).flat();
    check.equal([...fed, ...fed, ...fed], expected.data);
  });
}

async function checkScores(report: Report, { policy, tensors, sequences, columns, width }: Batch): Promise<void> {
  const vocab = policy.config.text.vocabSize;
  const logits = await packedLogits(policy, sequences);
  const starts = sequences.map((_, r) => sequences.slice(0, r).reduce((sum, { ids }) => sum + ids.length, 0));
  const row = (r: number, i: number) => logits.subarray((starts[r] + i) * vocab, (starts[r] + i + 1) * vocab);
  for (const [name, { data, shape }] of tensors) {
    if (!/^logits(_last\d+)?$/.test(name)) continue;
    await report.check(`batch: ${name}`, (check) => {
      const kept = shape[1], from = width - kept;
      columns.forEach((places, r) => {
        places.forEach((t, i) => {
          if (t < from) return;
          const at = (r * kept + t - from) * vocab;
          check.close(row(r, i), data.subarray(at, at + vocab), tolerances.logits, `row ${r}, token ${t}`);
        });
      });
    });
  }
  await report.check("batch: argmax", (check) => {
    rowsOf(tensor(tensors, "argmax", file)).forEach((tokens, r) => {
      columns[r].forEach((t, i) => {
        // Where two logits are closer than the tolerance allows them to move, either may be the largest.
        check.error(belowArgmax(row(r, i), vocab, [tokens[t]])[0], 2 * tolerances.logits, `row ${r}, token ${t}`);
      });
    });
  });
  await report.check("batch: logprobs", async (check) => {
    const { logprobs } = await allLogProbs(policy, sequences, 1);
    rowsOf(tensor(tensors, "logprobs", file)).forEach((expected, r) => {
      const wanted = columns[r].slice(1).map((t) => expected[t - 1]);
      check.close(logprobs[r], wanted, tolerances.logprobs, `row ${r}`);
    });
  });
}

async function checkGeneration(report: Report, { policy, json, tensors, sequences }: Batch): Promise<void> {
  const golden = tensor(tensors, "generated_ids", file), maxNewTokens = golden.shape[1];
  const greedy = { maxNewTokens, temperature: 0, stopTokens: [], suppressTokens: [] };
  const { completions, logits } = await policy.generateWithLogits(sequences, greedy);
  await report.check(`batch: generated_ids (greedy, ${maxNewTokens} tokens)`, (check) => {
    rowsOf(golden).forEach((ids, r) => check.equal(completions[r].ids, ids, `row ${r}`));
    check.same(rowsOf(golden), json.generated_ids, "batch.json");
  });
  await report.check("batch: generated_logits", (check) => compareSteps(check, logits, tensors));
  await report.check("batch: generated_logprobs", (check) => {
    rowsOf(tensor(tensors, "generated_logprobs", file)).forEach((expected, r) => {
      check.close(completions[r].logprobs, expected, tolerances.logprobs, `row ${r}`);
    });
  });
  const { generated_text, unpadded_generated_ids, eos_run } = json;
  if (generated_text) {
    await report.check("batch: generated_text", (check) => {
      // Recorded with or without special tokens.
      const texts = [false, true].map((skip) => completions.map(({ ids }) => policy.decode(ids, skip)));
      check.equal(texts.find((t) => t.join("\0") === generated_text.join("\0")) ?? texts[0], generated_text);
    });
  }
  if (unpadded_generated_ids) {
    await report.check("batch: unpadded_generated_ids (one prompt at a time)", async (check) => {
      for (const [r, ids] of unpadded_generated_ids.entries()) {
        const [alone] = await policy.generate([sequences[r]], { ...greedy, maxNewTokens: ids.length });
        check.equal(alone.ids, ids, `row ${r}`);
      }
    });
  }
  if (eos_run) {
    await report.check("batch: eos_run", async (check) => {
      const stopTokens = [eos_run.eos_token_id].flat();
      const stopped = await policy.generate(sequences, { ...greedy, stopTokens });
      eos_run.generated_ids.forEach((ids, r) => {
        const { ids: own, finish } = stopped[r];
        check.equal([...own, ...new Array(ids.length - own.length).fill(eos_run.pad_token_id)], ids, `row ${r}`);
        check.same(finish, ids.some((id) => stopTokens.includes(id)) ? "stop" : "length", `row ${r}`);
      });
    });
  }
}

/** Logits of each decoding step, `[B, V]` each, against `[B, steps, V]`. */
function compareSteps(check: Check, logits: readonly Float32Array[], tensors: Tensors): void {
  const { data, shape: [rows, steps, vocab] } = tensor(tensors, "generated_logits", file);
  for (let s = 0; s < steps; s++) {
    for (let r = 0; r < rows; r++) {
      const at = (r * steps + s) * vocab;
      const own = logits[s].subarray(r * vocab, (r + 1) * vocab);
      check.close(own, data.subarray(at, at + vocab), tolerances.logits, `row ${r}, step ${s + 1}`);
    }
  }
}
