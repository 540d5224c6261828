/**
 * What a training run will take of the device's memory, worked out before it starts from the sizes of the policy and the settings.
 *
 * An estimate from above: every reply is as long as it may be, no group is skipped. It follows what the code keeps alive, part by part
 * (each part names its formula); numbers are float32. A tensor of n tokens (padded on WebGPU) and width w counts 4·n·w bytes. The symbols:
 * D, I, H, Hₖ, d, V: width, MLP width, heads, key heads, head width, vocabulary of the language model; Dᵥ, Iᵥ those of the tower.
 *
 * @module
 */
import { expectedTensors } from "./checkpoint.ts";
import type { QwenConfig } from "./config.ts";
import { bucketed } from "./packing.ts";
import { activationBytes } from "./pass.ts";
import { MOST_BYTES, SHARED } from "../gpu/pass_plans.ts";

/** How large the conversations of the data are at most. */
export interface ConversationSize {
  /** Tokens of the first prompt, picture included. */
  promptTokens: number;
  /** Tokens that each later turn adds before the reply, crop included. */
  turnTokens: number;
  /** Image tokens of one picture. */
  imageTokens: number;
}

/** The settings that decide; as in `TrainOptions`, all set. */
export interface PlanSettings {
  method: "mgpo" | "grpo" | "sft";
  turns: number;
  prompts: number;
  groupSize: number;
  maxNewTokens: readonly number[];
  minibatches: number;
  tokensPerPass: number;
  gradientCheckpointing: boolean;
  trainVision: boolean;
  lossOn: "all" | "last" | "every";
  /** Whether there is a second, frozen policy. */
  reference: boolean;
  /** Conversations of an evaluation at once; 0 for no evaluation. */
  evalBatch: number;
  /** Whether a nucleus is drawn from (top-p below 1). */
  nucleus: boolean;
  backend: "webgpu" | "wasm";
  kernels: "fused" | "plain";
}

/** A part of the peak. */
export interface PlanPart {
  /** What it is, with the numbers that decide it. */
  name: string;
  bytes: number;
  /** What makes it smaller. */
  advice: string;
}

/** A single buffer that the run needs. */
export interface PlannedBuffer extends PlanPart {
  /** Whether kernels can take it in windows, so that it may be larger than a binding. */
  windowed: boolean;
}

/** What a run will take. */
export interface MemoryPlan {
  /** The peak, with what allocators keep beside it. */
  totalBytes: number;
  /** What the peak is made of, largest first; they and `overheadBytes` sum to the total. */
  parts: PlanPart[];
  /** Kept free buffers (WebGPU), or gaps and the backend itself (wasm). */
  overheadBytes: number;
  /** The largest single buffers, largest first. */
  buffers: PlannedBuffer[];
}

/** What the allocator holds is at most this multiple of what is in use: on WebGPU `BOUND` of gpu/memory.ts, on wasm as measured. */
const OVERHEAD = { webgpu: 1.5, wasm: 1.75 } as const;
/** The pool of WebGPU is left alone below this (`LEAST_BOUND` of gpu/memory.ts); the wasm module begins with half of it. */
const LEAST_TOTAL = 32 * 2 ** 20, WASM_START = 16 * 2 ** 20;
/** Prompts are prefilled, and pictures encoded, in batches of at most this many tokens or patches (qwen.ts). */
const BATCH_TOKENS = 1 << 14;
/** Logits are made in pieces of at most this many elements (log_probs.ts). */
const MAX_LOGITS = 1 << 24;
/** Plans that the generation engine keeps. */
const MAX_PLANS = 3;
/** Parameters of at most this many numbers are stepped in arenas (mgpo.ts). */
const ARENA_MEMBER = 1 << 18;

const powerOfTwo = (n: number, least: number): number => Math.max(least, 2 ** Math.ceil(Math.log2(Math.max(1, n))));

const checkpointingAdvice = "turn on --gradient-checkpointing, lower --tokens-per-pass";
const rowsAdvice = "lower --prompts, --group-size or --max-new-tokens";

/** Widths of a model in floats, per token of one block. */
interface Widths {
  /** Everything that one block makes of a token in a forward pass, or in a step of the tape. */
  block: number;
  /** Its queries, keys, values and their attention. */
  kv: number;
}

/** Works out the plan of a run. */
export class MemoryPlanner {
  readonly #config: QwenConfig;
  readonly #size: ConversationSize;
  readonly #settings: PlanSettings;
  readonly #buffers: PlannedBuffer[] = [];
  readonly #text: Widths;
  readonly #tower: number;
  /** Tokens of a recorded pass; 0 where none is. */
  #passTokens = 0;

  constructor(config: QwenConfig, size: ConversationSize, settings: PlanSettings) {
    this.#config = config;
    this.#size = size;
    this.#settings = settings;
    const { text: t, vision: v } = config;
    // x, norm, q, k, v and the rotated q, k, attention, output, residual, norm, gate, up, their product, down, residual
    this.#text = {
      block: 7 * t.hiddenSize + (3 * t.heads + 3 * t.kvHeads) * t.headDim + 3 * t.intermediateSize + t.heads,
      kv: 2 * t.kvHeads * t.headDim,
    };
    this.#tower = 13 * v.hiddenSize + 3 * v.intermediateSize;
  }

  /** The estimate. */
  plan(): MemoryPlan {
    const always = this.#always(), arenas = this.#arenas();
    const update = this.#update(), rollouts = [...this.#rollouts(), ...this.#recordings()];
    // One after the other: what counts is the larger.
    const peak = sumOf(update) >= sumOf(rollouts) ? update : rollouts;
    const parts = [...always, ...arenas, ...peak].filter(({ bytes }) => bytes > 0).sort(bySize);
    const live = sumOf(parts), { backend } = this.#settings;
    const held = OVERHEAD[backend] * live;
    const totalBytes = backend === "wasm" ? WASM_START + held : Math.max(LEAST_TOTAL, held);
    return { totalBytes, parts, overheadBytes: totalBytes - live, buffers: this.#buffers.sort(bySize) };
  }

  #buffer(name: string, floats: number, advice: string, windowed: boolean): void {
    this.#buffers.push({ name, bytes: 4 * floats, advice, windowed });
  }

  /** Tokens as they are laid out. */
  #padded(tokens: number): number {
    return this.#settings.backend === "webgpu" ? bucketed(tokens + 1) : tokens;
  }

  /** Tokens of a pass as they are laid out, where passes are recorded; undefined where they are not (`sharedSizes` of packing.ts). */
  #recorded(tokens: number): number | undefined {
    const { backend, kernels, trainVision, gradientCheckpointing } = this.#settings,
      shared = powerOfTwo(tokens + 1, 256);
    const isRecorded = backend === "webgpu" && kernels === "fused" && !trainVision && !gradientCheckpointing &&
      activationBytes(this.#config, shared) <= MOST_BYTES;
    return isRecorded ? shared : undefined;
  }

  /** The buffers of recorded passes stay while rollouts are made; those of passes of several sizes are not quite the same. */
  #recordings(): PlanPart[] {
    const isRecorded = this.#passTokens > 0;
    const bytes = SHARED * Math.min(activationBytes(this.#config, this.#passTokens), MOST_BYTES);
    return isRecorded
      ? [{ name: `recorded passes of ${this.#passTokens} tokens`, bytes, advice: "lower --tokens-per-pass" }]
      : [];
  }

  /** The most tokens of a reply of a turn, from 0. */
  #limit(turn: number): number {
    const { maxNewTokens } = this.#settings;
    return maxNewTokens[Math.min(turn, maxNewTokens.length - 1)];
  }

  /** Tokens of a conversation before the reply of a turn. */
  #lengthAt(turn: number): number {
    let length = this.#size.promptTokens;
    for (let t = 0; t < turn; t++) length += this.#limit(t) + this.#size.turnTokens;
    return length;
  }

  /** Weights (ΣP, twice with a reference) and the optimizer's two moments (2·ΣP trained). */
  #always(): PlanPart[] {
    const { trainVision, reference } = this.#settings, { all, trained } = this.#parameters();
    for (const { name, size } of all) this.#buffer(`weight ${name}`, size, "take a smaller --policy", true);
    const total = sum(all.map(({ size }) => size)), count = sum(trained.map(({ size }) => size));
    return [
      {
        name: `weights${reference ? " of policy and reference" : ""} (${millions(total)} parameters)`,
        bytes: 4 * total * (reference ? 2 : 1),
        advice: `take a smaller --policy${reference ? ", or --beta 0" : ""}`,
      },
      {
        name: `two moments of AdamW (${millions(count)} trained parameters)`,
        bytes: 8 * count,
        advice: `take a smaller --policy${trainVision ? ", or leave out --train-vision" : ""}`,
      },
    ];
  }

  #parameters() {
    const shapes = [...expectedTensors(this.#config)];
    const all = shapes.map(([name, shape]) => ({ name, size: shape.reduce((a, b) => a * b, 1) }));
    return { all, trained: all.filter(({ name }) => this.#settings.trainVision || !name.startsWith("visual.")) };
  }

  /** The generation engine's plans on WebGPU: 2·slots·capacity·Hₖ·d a layer for keys and values, and activations of slots. */
  #arenas(): PlanPart[] {
    const { backend, kernels, turns, prompts, groupSize, method, evalBatch, nucleus } = this.#settings;
    const { text } = this.#config;
    if (backend !== "webgpu" || kernels === "plain") return [];
    const plans = new Map<string, number>();
    const add = (rows: number) => {
      for (let turn = 0; turn < turns && rows > 0; turn++) {
        const slots = powerOfTwo(this.#batch(rows, turn), 1), capacity = powerOfTwo(this.#limit(turn), 32);
        const layer = 2 * slots * capacity * text.kvHeads * text.headDim;
        this.#buffer(`keys and values that ${slots} rows add to a layer`, layer, rowsAdvice, false);
        const draws = 5 * 8192, widths = 3 * text.hiddenSize + this.#text.block + draws;
        plans.set(`${slots} ${capacity}`, 4 * (text.layers * layer + slots * widths + 64 * capacity));
      }
    };
    add(method === "sft" ? 0 : prompts * groupSize);
    add(evalBatch);
    // A nucleus is found in the logits of 64 rows at a time; where they don't fit a binding, the host draws.
    const logits = nucleus ? 4 * 64 * text.vocabSize : 0;
    const sizes = [...plans.values()].map((size) => size + logits).sort((a, b) => b - a).slice(0, MAX_PLANS);
    const name = `buffers of generation (${sizes.length} kept plans of rows × new tokens)`;
    return [{ name, bytes: sum(sizes), advice: rowsAdvice }];
  }

  /** Rows that are generated at once. */
  #batch(rows: number, turn: number): number {
    return Math.min(rows, Math.max(1, Math.floor(BATCH_TOKENS / this.#lengthAt(turn))));
  }

  /** The larger of the rollouts of training and of an evaluation. */
  #rollouts(): PlanPart[] {
    const { method, prompts, groupSize, evalBatch } = this.#settings;
    const training = method === "sft" ? [] : this.#rollout(prompts * groupSize, prompts);
    const evaluation = evalBatch > 0 ? this.#rollout(evalBatch, evalBatch) : [];
    return sumOf(training) >= sumOf(evaluation) ? training : evaluation;
  }

  #rollout(rows: number, prompts: number): PlanPart[] {
    const { turns } = this.#settings;
    const each = Array.from({ length: turns }, (_, turn) => this.#generation(rows, prompts, turn));
    return each.reduce((most, parts) => sumOf(parts) > sumOf(most) ? parts : most);
  }

  /**
   * One turn of a rollout: keys and values (2·L·Hₖ·d a token) of this turn and those kept of the one before; one block's
   * intermediates; first logits; the tower on new pictures.
   */
  #generation(rows: number, prompts: number, turn: number): PlanPart[] {
    const { text: t } = this.#config, { backend } = this.#settings, wasm = backend === "wasm";
    const batch = this.#batch(rows, turn), length = this.#lengthAt(turn), limit = this.#limit(turn);
    // The first prompts are computed once for each group; later ones differ from row to row.
    const distinct = turn === 0 ? Math.min(prompts, batch) : batch;
    const own = this.#padded(distinct * (turn === 0 ? length : this.#size.turnTokens + 1));
    const keys = this.#padded(distinct * length), kept = wasm ? batch * (length + limit) : keys + batch * limit;
    const before = turn === 0 ? 0 : rows * (this.#lengthAt(turn - 1) + this.#limit(turn - 1));
    const perToken = 4 * t.layers * this.#text.kv, gathered = turn === 0 ? 0 : before + own + keys;
    const images = turn === 0 ? prompts : rows;
    this.#buffer(`keys of ${keys} tokens`, keys * t.kvHeads * t.headDim, rowsAdvice, false);
    this.#buffer(`first logits of ${distinct} prompts`, distinct * t.vocabSize, rowsAdvice, false);
    this.#buffer(
      `activations of ${own} prompt tokens`,
      own * Math.max(t.intermediateSize, t.hiddenSize),
      rowsAdvice,
      true,
    );
    return [
      {
        name: `keys and values of turn ${turn + 1} (${batch} rows of ${length} + ${limit} tokens, ${t.layers} layers)`,
        bytes: perToken * (kept + before + batch * limit),
        advice: `${rowsAdvice}, or --max-pixels`,
      },
      {
        name: `prefill of ${own} tokens, a layer at a time`,
        bytes: 4 * (own * this.#text.block + gathered * this.#text.kv),
        advice: `${rowsAdvice}, or --max-pixels`,
      },
      {
        name: `logits of ${distinct} prompts and ${batch} rows over ${t.vocabSize} tokens`,
        bytes: 8 * (distinct + (wasm ? batch : 0)) * t.vocabSize,
        advice: rowsAdvice,
      },
      ...this.#features(prompts + (turn > 0 ? rows : 0), images),
    ];
  }

  /** Features of pictures (4·images·tokens·D), and the tower on at most {@link BATCH_TOKENS} patches, all blocks alive. */
  #features(known: number, fresh: number): PlanPart[] {
    const { vision: v, text: t } = this.#config, { imageTokens } = this.#size;
    const each = imageTokens * v.spatialMergeSize ** 2, patches = Math.min(fresh * each, Math.max(BATCH_TOKENS, each));
    return [
      {
        name: `image features (${known} pictures of ${imageTokens} tokens)`,
        // The cached ones, and the rows that go into a batch.
        bytes: 12 * known * imageTokens * t.hiddenSize,
        advice: "lower --max-pixels, --prompts or --group-size",
      },
      {
        name: `vision tower on ${patches} patches, ${v.depth} blocks`,
        bytes: 4 * this.#towerFloats(patches),
        advice: "lower --max-pixels, --prompts or --group-size",
      },
    ];
  }

  /** What the tower makes of patches: pixels, all blocks, and the merger (2 × Dᵥ and the result, per patch). */
  #towerFloats(patches: number): number {
    const { vision: v } = this.#config, pixels = v.inChannels * v.temporalPatchSize * v.patchSize ** 2;
    this.#buffer(
      `pixels of ${patches} patches`,
      patches * Math.max(pixels, v.intermediateSize),
      "lower --max-pixels",
      true,
    );
    return patches * (2 * pixels + v.depth * this.#tower + 6 * v.hiddenSize) + 3 * v.hiddenSize ** 2;
  }

  /** One forward and backward pass and the optimizer's step. */
  #update(): PlanPart[] {
    const { method, turns, prompts, groupSize, minibatches, tokensPerPass, lossOn } = this.#settings;
    const group = method === "sft" ? 1 : groupSize, step = Math.ceil(prompts / minibatches) * group;
    const length = this.#lengthAt(turns - 1) + this.#limit(turns - 1);
    const rows = Math.min(step, Math.max(1, Math.floor(tokensPerPass / length))), tokens = rows * length;
    const passes = Math.ceil(step * length / Math.max(tokensPerPass, length));
    // A group's prompt goes through the decoder once; a pass may begin and end within a group.
    const groups = Math.min(rows, Math.ceil(rows / group) + 1, prompts), isShared = group > 1 && rows > 1;
    const given = isShared ? groups * this.#size.promptTokens + rows * (length - this.#size.promptTokens) : tokens;
    const recorded = this.#recorded(given), packed = recorded ?? this.#padded(given);
    this.#passTokens = recorded ?? 0;
    const replies = sum(Array.from({ length: turns }, (_, turn) => this.#limit(turn)));
    const chosen = lossOn === "every" ? packed : rows * (lossOn === "last" ? this.#limit(turns - 1) : replies);
    return [
      this.#gradients(passes > 1),
      this.#activations(packed, isShared ? Math.max(this.#padded(tokens), 2 * (recorded ?? 0)) : 0, rows, length),
      this.#head(Math.max(this.#padded(chosen), (recorded ?? 0) / 2)),
      ...this.#picturesOf(groups, rows * (turns - 1)),
    ];
  }

  /** Gradients (ΣP trained; twice while passes are added), their copies in arenas, the largest and a tied table's twice more. */
  #gradients(isAdded: boolean): PlanPart {
    const { trained } = this.#parameters(), sizes = trained.map(({ size }) => size), total = sum(sizes);
    const small = sum(sizes.filter((size) => size <= ARENA_MEMBER)), largest = Math.max(...sizes);
    const floats = total * (isAdded ? 2 : 1) + small + Math.min(2 * small, 3 << 22) + 3 * largest;
    return {
      name: `gradients (${millions(total)} trained parameters${isAdded ? ", sum and one pass" : ""})`,
      bytes: 4 * floats,
      advice: isAdded
        ? "take a smaller --policy, or --tokens-per-pass large enough for one pass"
        : "take a smaller --policy",
    };
  }

  /**
   * Activations that the tape keeps and their gradients, which TensorFlow.js keeps until the end: per token and layer 6·D +
   * (2·H + 2·Hₖ)·d + 3·I + H, and 9·D + (3·H + 4·Hₖ)·d + 3·I; with gradient checkpointing 3·D, and the above of one layer. Keys
   * and values of shared prompts stand once for each row: 4·Hₖ·d.
   */
  #activations(tokens: number, keys: number, rows: number, length: number): PlanPart {
    const { text: t } = this.#config, { gradientCheckpointing, kernels } = this.#settings;
    const [heads, keyHeads] = [t.heads * t.headDim, t.kvHeads * t.headDim];
    const perToken = 15 * t.hiddenSize + 5 * heads + 6 * keyHeads + 6 * t.intermediateSize + t.heads;
    // Plain operations keep the scores of all pairs, and what a norm and a rotation are made of.
    const plain = kernels === "fused" ? 0 : tokens * (20 * t.hiddenSize + 6 * heads) + 5 * rows * t.heads * length ** 2;
    const layer = tokens * perToken + keys * 4 * keyHeads + plain;
    const floats = gradientCheckpointing
      ? layer + t.layers * tokens * 3 * t.hiddenSize
      : t.layers * layer + tokens * 4 * t.hiddenSize;
    const widest = Math.max(t.intermediateSize, t.hiddenSize);
    this.#buffer(`activations of ${tokens} tokens of a pass`, tokens * widest, "lower --tokens-per-pass", true);
    this.#buffer(
      `keys of ${keys || tokens} tokens of a pass`,
      (keys || tokens) * keyHeads,
      "lower --tokens-per-pass",
      false,
    );
    return {
      name: `activations and their gradients (${tokens} tokens of a pass, ${t.layers} layers` +
        `${gradientCheckpointing ? ", checkpointed" : ""})`,
      bytes: 4 * floats,
      advice: gradientCheckpointing ? "lower --tokens-per-pass" : checkpointingAdvice,
    };
  }

  /**
   * The head over the tokens that carry loss, at most {@link MAX_LOGITS} logits at a time: three tensors of a piece; hidden states;
   * and, where there are several pieces, three gradients of the table: the sum so far, that of a piece, the new sum.
   */
  #head(chosen: number): PlanPart {
    const { text: t } = this.#config, piece = Math.max(1, Math.floor(MAX_LOGITS / t.vocabSize));
    const pieces = Math.ceil(chosen / piece), rows = Math.min(chosen, piece);
    this.#buffer(`logits of ${rows} tokens`, rows * t.vocabSize, "lower --tokens-per-pass", true);
    const table = pieces > 1 ? 3 * t.vocabSize * t.hiddenSize : 0;
    return {
      name: `logits and their gradients (${chosen} tokens in ${pieces} piece${
        pieces === 1 ? "" : "s"
      }, ${t.vocabSize} words)`,
      bytes: 4 * (3 * rows * t.vocabSize + 8 * chosen * t.hiddenSize + table),
      advice: "lower --tokens-per-pass",
    };
  }

  /** Pictures of a pass: their features, and what the tape keeps of a tower that is trained. */
  #picturesOf(prompts: number, crops: number): PlanPart[] {
    const { trainVision } = this.#settings, { imageTokens } = this.#size;
    const { vision: v, text: t } = this.#config, images = prompts + crops;
    const name = `image features (${images} pictures of ${imageTokens} tokens)`, advice = "lower --max-pixels";
    const features = { name, bytes: 20 * images * imageTokens * t.hiddenSize, advice };
    if (!trainVision) return [features];
    const patches = images * imageTokens * v.spatialMergeSize ** 2;
    // Once for what is kept, and once for the gradients of it.
    return [features, {
      name: `trained vision tower (${patches} patches of a pass, ${v.depth} blocks)`,
      bytes: 8 * this.#towerFloats(patches),
      advice: "lower --tokens-per-pass or --max-pixels, or leave out --train-vision",
    }];
  }
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
const sumOf = (parts: readonly PlanPart[]): number => sum(parts.map(({ bytes }) => bytes));
const bySize = (a: PlanPart, b: PlanPart): number => b.bytes - a.bytes;
const millions = (n: number): string => n < 1e9 ? `${(n / 1e6).toPrecision(3)} M` : `${(n / 1e9).toPrecision(3)} G`;

/**
 * Estimates the peak of a run's memory.
 *
 * @param size How large conversations are.
 */
export function planMemory(config: QwenConfig, size: ConversationSize, settings: PlanSettings): MemoryPlan {
  return new MemoryPlanner(config, size, settings).plan();
}
