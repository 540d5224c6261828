/**
 * Generation of one batch: prefill of what no cache has, then tokens one a step, by the recorded plans of a WebGPU device or by
 * the host's loop.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { DecodeEngine } from "../gpu/decode/engine.ts";
import type { DecodeInput } from "../gpu/decode/input.ts";
import { KeyValueCache, type Prompt } from "./key_value_cache.ts";
import { checkPositions, type PolicyModel } from "./log_probs.ts";
import { gatherRows, segmentsOf } from "./ops.ts";
import { concatenated, type Packed, packPieces, padded, rangeOf } from "./packing.ts";
import type { Completion, GenerateOptions, Sequence } from "./policy.ts";
import { type Bank, extend, type Found, keptRow, keySource } from "./prefix_cache.ts";
import { sampleToken } from "./sampler.ts";
import { decodeStep, embed, head, type KeySource, type TextHooks } from "./text.ts";

/** The sampling options of a batch, resolved. */
export interface BatchOptions {
  maxNewTokens: number;
  temperature: number;
  topP: number;
  seed: number;
  /** Vocabulary-sized; 1 at ids that are never sampled. */
  suppressed: Uint8Array;
  stop: ReadonlySet<number>;
  /** A name a row, see {@linkcode GenerateOptions}. */
  keys: readonly (readonly [number, number, number])[];
  onToken?: GenerateOptions["onToken"];
  /** What decodes on the device, where it can. */
  engine?: DecodeEngine;
  /** The kept beginning of a sequence that stands at this row, if there is one. */
  find?: (sequence: Sequence, row: number) => Found | undefined;
  /** Whether keys and values are to be kept. */
  keep: boolean;
  /** Gets the logits of each step, `[B, V]` of the rows that still run; by the host's loop only. */
  inspectLogits?: (step: number, logits: Float32Array) => void;
}

/** What a batch gives. */
export interface BatchResult {
  completions: Completion[];
  /** Keys and values of all rows, the caller's now; where they were to be kept. */
  bank?: Bank;
}

/** A batch laid out for its prefill. */
interface Prefill {
  packed: Packed;
  /** What tokens attend to, where some of it comes from a cache. */
  keys?: KeySource;
  /** The place of each row's prompt among the keys. */
  prompts: Prompt[];
  /** Keys and values, padding included. */
  tokens: number;
  /** For each distinct prompt the packed row of its last token. */
  ends: number[];
  /** For each row its prompt among the distinct ones. */
  which: number[];
}

/** Leaves out sequences that were there before; `which[i]` is the place of sequence i among the distinct ones. */
function distinctSequences(
  sequences: readonly Sequence[],
): { distinct: Sequence[]; firsts: number[]; which: number[] } {
  const places = new Map<string, number>(), distinct: Sequence[] = [], firsts: number[] = [];
  const which = sequences.map((sequence, row) => {
    const name = `${sequence.ids.join()}|${sequence.images.map(({ key }) => key).join()}`;
    let place = places.get(name);
    if (place === undefined) {
      places.set(name, place = distinct.push(sequence) - 1);
      firsts.push(row);
    }
    return place;
  });
  return { distinct, firsts, which };
}

/** The rollouts of a group have one prompt: it is computed once, its keys and values are handed to each row. */
function layOut(model: PolicyModel, sequences: readonly Sequence[], options: BatchOptions): Prefill {
  const { config } = model, { distinct, firsts, which } = distinctSequences(sequences);
  const found = distinct.map((sequence, d) => options.find?.(sequence, firsts[d]));
  const pieces = distinct.map(({ ids }, sequence) => {
    return { sequence, from: found[sequence]?.tokens.length ?? 0, to: ids.length };
  });
  let packed = packPieces(config, distinct, pieces);
  checkPositions(config, packed, options.maxNewTokens);
  const extended = extend(packed, found);
  packed.keys = extended?.keys;
  if (tf.getBackend() === "webgpu") packed = padded(packed, config);
  const { cu } = segmentsOf((packed.keys ?? packed).lengths), lengths = distinct.map(({ ids }) => ids.length);
  const prompts = which.map((d) => ({ start: cu[d], length: lengths[d] }));
  const ends = [...segmentsOf(packed.lengths).cu.slice(1, distinct.length + 1)].map((end) => end - 1);
  const keys = packed.keys && keySource(packed.keys, extended!.banks);
  return { packed, keys, prompts, tokens: cu[cu.length - 1], ends, which };
}

/** Logits of each distinct prompt's last token, `[D, V]`, the caller's. */
function prefill(
  model: PolicyModel,
  { packed, keys, ends }: Prefill,
  keysValues: NonNullable<TextHooks["keysValues"]>,
): tf.Tensor2D {
  return tf.tidy(() => {
    const hidden = model.hidden(packed, false, { keysValues, keys });
    return head(model.config, model.weights, gatherRows(hidden, ends));
  });
}

/** Samples one completion for each sequence. */
export async function generateBatch(
  model: PolicyModel,
  sequences: readonly Sequence[],
  options: BatchOptions,
): Promise<BatchResult> {
  const batch = layOut(model, sequences, options);
  const { engine } = options;
  return engine
    ? await decodeOnDevice(engine, model, sequences, batch, options)
    : await decodeOnHost(model, sequences, batch, options);
}

/** Prefills, then lets the engine decode; the prompts' keys and values stay until it is done, or longer in a bank. */
async function decodeOnDevice(
  engine: DecodeEngine,
  model: PolicyModel,
  sequences: readonly Sequence[],
  batch: Prefill,
  options: BatchOptions,
): Promise<BatchResult> {
  const { prompts, packed, which, tokens } = batch, { keys, seed, temperature, topP, suppressed, stop, keep } = options;
  const k: tf.Tensor3D[] = [], v: tf.Tensor3D[] = [];
  let firstLogits: tf.Tensor2D | undefined, bank: Bank | undefined;
  try {
    firstLogits = prefill(model, batch, (_layer, keys, values) => {
      k.push(tf.keep(keys.clone()));
      v.push(tf.keep(values.clone()));
    });
    const input: DecodeInput = {
      ...{ k, v, firstLogits, logitsRows: which, keys, seed, temperature, topP, suppressed, stop, keep },
      ...{ maxNewTokens: options.maxNewTokens, onToken: options.onToken },
      ...{ starts: prompts.map((p) => p.start), lengths: prompts.map((p) => p.length) },
      nextPosition: which.map((d) => packed.index[d].next),
    };
    const { ids, logprobs, finish, kept } = await engine.generate(input);
    const completions = ids.map((row, i) => ({ ids: row, logprobs: logprobs[i], finish: finish[i] }));
    if (keep) {
      const both = (prompts: tf.Tensor[], sampled?: tf.Tensor[]) =>
        prompts.map((x, layer) => sampled ? [x, sampled[layer]] : [x]);
      const rows = sequences.map((sequence, r) => {
        const { start, length } = prompts[r];
        const sampled = rangeOf(tokens + (kept?.starts[r] ?? 0), ids[r].length - 1);
        return keptRow(sequence, ids[r], concatenated([rangeOf(start, length), sampled]));
      });
      bank = { k: both(k, kept?.k), v: both(v, kept?.v), rows };
    }
    return { completions, bank };
  } finally {
    tf.dispose([bank ? [] : [k, v], firstLogits ?? []]);
  }
}

/** Prefills, then draws each token on the host from logits that are read back. */
async function decodeOnHost(
  model: PolicyModel,
  sequences: readonly Sequence[],
  batch: Prefill,
  options: BatchOptions,
): Promise<BatchResult> {
  const { prompts, packed, which } = batch,
    { keys, maxNewTokens, stop, keep } = options,
    vocab = options.suppressed.length;
  const completions: Completion[] = sequences.map(() => ({ ids: [], logprobs: [], finish: "length" }));
  const cache = new KeyValueCache(model.config, prompts, maxNewTokens, keep);
  let logits: tf.Tensor2D | undefined;
  try {
    logits = prefill(model, batch, (_layer, k, v) => cache.fill(k, v));
    let running = sequences.map((_, i) => i);
    for (let step = 0; step < maxNewTokens; step++) {
      const values = await readback(logits);
      logits.dispose();
      // Only the first logits are those of the distinct prompts.
      const lines = running.map((row, i) => values.subarray(...lineAt(step === 0 ? which[row] : i, vocab)));
      options.inspectLogits?.(step, joined(lines));
      const kept: number[] = [];
      running.forEach((row, i) => {
        const { id, logprob } = sampleToken(lines[i], keys[row], step, options);
        completions[row].ids.push(id);
        completions[row].logprobs.push(logprob);
        if (stop.has(id)) completions[row].finish = "stop";
        else kept.push(i);
      });
      cache.compact(kept);
      running = kept.map((i) => running[i]);
      options.onToken?.(step + 1, running.length);
      if (running.length === 0 || step + 1 === maxNewTokens) break;
      logits = tf.tidy(() => {
        const x = embed(model.weights, running.map((row) => completions[row].ids[step]), [], null);
        const at = Int32Array.from(running, (row) => packed.index[which[row]].next + step);
        const table = model.ropeTensors([{ positions: [at, at, at], next: 0 }]);
        return head(model.config, model.weights, decodeStep(model.config, model.weights, x, table, cache));
      });
    }
    return { completions, bank: keep ? bankOf(cache, sequences, prompts, completions) : undefined };
  } finally {
    logits?.dispose();
    cache.dispose();
  }
}

function bankOf(
  cache: KeyValueCache,
  sequences: readonly Sequence[],
  prompts: readonly Prompt[],
  completions: readonly Completion[],
): Bank {
  const { k, v, starts } = cache.take();
  const rows = sequences.map((sequence, r) => {
    const { ids } = completions[r];
    return keptRow(sequence, ids, rangeOf(starts[r], prompts[r].length + ids.length - 1));
  });
  return { k: k.map((x) => [x]), v: v.map((x) => [x]), rows };
}

const lineAt = (row: number, width: number): [number, number] => [row * width, (row + 1) * width];

function joined(lines: readonly Float32Array[]): Float32Array {
  const out = new Float32Array(lines.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const line of lines) {
    out.set(line, at);
    at += line.length;
  }
  return out;
}

/** A copy of a float tensor's values. */
export async function readback(x: tf.Tensor): Promise<Float32Array> {
  return (tf.getBackend() === "webgpu" ? await x.data() : x.dataSync()).slice() as Float32Array;
}

/**
 * Checks sampling options.
 *
 * @throws {RangeError} One is out of its range.
 */
export function checkSampling({ maxNewTokens, temperature = 1, topP = 1 }: GenerateOptions): void {
  if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
    throw new RangeError(`maxNewTokens must be a positive integer, got ${maxNewTokens}`);
  }
  if (!(temperature >= 0)) throw new RangeError(`temperature must be ≥ 0, got ${temperature}`);
  if (!(topP > 0 && topP <= 1)) throw new RangeError(`topP must be in (0, 1], got ${topP}`);
}
