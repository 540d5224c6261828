/**
 * What the generation engine takes and gives, checked, and packed as its kernels read it.
 *
 * @module
 */
import type { tf } from "../../deps.ts";
import type { QwenConfig } from "../../policy/config.ts";
import { hashName } from "../../random.ts";
import { nucleusShare } from "./nucleus.ts";
import { ROW_WORDS, STEP_STRIDE } from "./wgsl.ts";

const PURPOSE = hashName("sample");

/** What `DecodeEngine.generate` needs. Tensors stay the caller's, and must live until the promise settles. */
export interface DecodeInput {
  /** Per layer the rotated keys of the prompts, packed `[N, Hkv, d]`. Read where they are. */
  k: readonly tf.Tensor3D[];
  /** Per layer the values of the prompts, packed `[N, Hkv, d]`. */
  v: readonly tf.Tensor3D[];
  /** Prompt length of each row; they sum to N unless `starts` is given. */
  lengths: readonly number[];
  /** First packed token of each row: rows with the same prompt may share it. @default {one row after the other} */
  starts?: readonly number[];
  /** Rotary position of each row's first generated token. */
  nextPosition: readonly number[];
  /** Logits of prompts' last tokens, `[D, V]`. */
  firstLogits: tf.Tensor2D;
  /** For each row its line of `firstLogits`: rows with the same prompt may share it. @default {row by row, D = B} */
  logitsRows?: readonly number[];
  /** Names each row's draws: three counters (each < 2³²; the third < 2¹²). */
  keys: readonly (readonly [number, number, number])[];
  seed: number;
  /** 0 is greedy. */
  temperature: number;
  /** Nucleus mass in (0, 1]. @default {1} */
  topP?: number;
  /** Vocabulary-sized; 1 at ids that are never drawn. */
  suppressed: Uint8Array;
  /** Ids that end a row. */
  stop: ReadonlySet<number>;
  maxNewTokens: number;
  /** Tokens between two looks at what was drawn. A look costs some 10 ms; until then finished rows go on. @default {16} */
  checkEvery?: number;
  /** Called for each token with the number of tokens done and rows still running, in order, at the looks. */
  onToken?: (tokens: number, running: number) => void;
  /** Whether the keys and values of sampled tokens are given back. @default {false} */
  keep?: boolean;
}

/** Keys and values of sampled tokens: row after row, all of a row's but those of its last token, which are never computed. */
export interface SampledKeys {
  /** Per layer `[n, Hkv·d]`, n at least the sum over rows; the caller's. */
  k: tf.Tensor2D[];
  /** Per layer `[n, Hkv·d]`; the caller's. */
  v: tf.Tensor2D[];
  /** Where each row begins. */
  starts: number[];
}

/** What was drawn, a list a row. */
export interface DecodeOutput {
  /** The drawn ids, the stop token included. */
  ids: number[][];
  /** ln p of each, over ids that are not suppressed, at the temperature (1 for greedy). */
  logprobs: number[][];
  finish: ("stop" | "length")[];
  /** What `keep` asked for; left out where no row has more than one token. */
  kept?: SampledKeys;
}

/**
 * Checks that the parts of an input fit each other and the adapter.
 *
 * @param limit Bytes that a kernel can bind.
 * @throws {RangeError} They do not.
 */
export function checkInput(input: DecodeInput, { text }: QwenConfig, limit: number): void {
  const {
    k,
    v,
    lengths,
    starts,
    nextPosition,
    firstLogits,
    logitsRows = lengths.map((_, i) => i),
    keys,
    suppressed,
    maxNewTokens,
    temperature,
    topP = 1,
    checkEvery = 1,
  } = input;
  const { layers, kvHeads, headDim, vocabSize } = text, count = lengths.length;
  const fail = (what: string) => {
    throw new RangeError(`generation: ${what}`);
  };
  if (count === 0) fail("there are no rows");
  if (k.length !== layers || v.length !== layers) {
    fail(`keys and values of ${layers} layers are needed, got ${k.length}, ${v.length}`);
  }
  if (nextPosition.length !== count || keys.length !== count || (starts && starts.length !== count)) {
    fail(
      `lengths, starts, positions and keys must be as many, got ${count}, ${starts?.length}, ${nextPosition.length}, ${keys.length}`,
    );
  }
  if (logitsRows.length !== count || firstLogits.shape[1] !== vocabSize) {
    fail(
      `the first logits of ${count} rows with ${vocabSize} ids are needed, got ${logitsRows.length}, [${firstLogits.shape}]`,
    );
  }
  const lines = firstLogits.shape[0], outside = logitsRows.find((line) => !(line >= 0 && line < lines));
  if (outside !== undefined) fail(`line ${outside} of ${lines} first logits is asked for`);
  const tokens = k[0].shape[0], wanted = `[${tokens}, ${kvHeads}, ${headDim}]`;
  for (const x of [...k, ...v]) {
    if (`[${x.shape.join(", ")}]` !== wanted) fail(`keys and values must be ${wanted}, got [${x.shape}]`);
  }
  let end = 0;
  lengths.forEach((n, i) => {
    end = (starts?.[i] ?? end) + n;
    if (!(n >= 1) || end > tokens) fail(`row ${i} has ${n} tokens that end at ${end} of ${tokens}`);
  });
  if (suppressed.length !== vocabSize) {
    fail(`the suppressed ids must be ${vocabSize} flags, got ${suppressed.length}`);
  }
  if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
    fail(`maxNewTokens must be a positive integer, got ${maxNewTokens}`);
  }
  if (!(temperature >= 0)) fail(`the temperature must be ≥ 0, got ${temperature}`);
  if (!(topP > 0 && topP <= 1)) fail(`topP must be in (0, 1], got ${topP}`);
  if (!(checkEvery >= 1)) fail(`checkEvery must be ≥ 1, got ${checkEvery}`);
  for (const [name, x] of [["first logits", firstLogits], ["keys of the prompts", k[0]]] as const) {
    if (x.size * 4 > limit) {
      fail(`the ${name} take ${x.size * 4} bytes, but the adapter binds ${limit}; generate fewer rows at a time`);
    }
  }
}

/** First packed token of each row. */
function startsOf({ lengths, starts }: DecodeInput): readonly number[] {
  let end = 0;
  return starts ?? lengths.map((n) => (end += n) - n);
}

/** The descriptions of the running rows, in that order. */
export function rowRecords(input: DecodeInput, running: readonly number[]): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(running.length * ROW_WORDS), starts = startsOf(input);
  running.forEach((row, i) => {
    const { lengths, nextPosition, keys } = input;
    words.set([row, starts[row], lengths[row], nextPosition[row], ...keys[row], running.length], i * ROW_WORDS);
  });
  return words;
}

/** The records of all steps. */
export function stepRecords(input: DecodeInput, slots: number): Uint32Array<ArrayBuffer> {
  const { seed, temperature, topP = 1, maxNewTokens } = input, k0 = ((seed >>> 0) ^ PURPOSE) >>> 0;
  const { share, fromTop } = nucleusShare(topP);
  const words = new Uint32Array((maxNewTokens * STEP_STRIDE) / 4), floats = new Float32Array(words.buffer);
  for (let step = 0; step < maxNewTokens; step++) {
    const at = (step * STEP_STRIDE) / 4;
    words.set([step, slots, k0, Math.floor(seed / 4294967296) >>> 0], at);
    floats[at + 4] = temperature > 0 ? 1 / temperature : 1;
    floats[at + 5] = share;
    words[at + 6] = Number(fromTop);
  }
  return words;
}

/** One bit an id, the lowest first. */
export function suppressedBits(suppressed: Uint8Array): Uint32Array<ArrayBuffer> {
  const bits = new Uint32Array(Math.ceil(suppressed.length / 32));
  for (let v = 0; v < suppressed.length; v++) if (suppressed[v]) bits[v >> 5] |= 1 << (v & 31);
  return bits;
}
