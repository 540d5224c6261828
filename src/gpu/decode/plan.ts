/**
 * A recorded decode step: buffers for a number of rows and tokens, and the list of dispatches that make one token, five a layer
 * and two for the head (with a nucleus three for each 64 rows, and one), encoded again for each token.
 *
 * @module
 */
import type { QwenConfig } from "../../policy/config.ts";
import { attentionKernel, loneAttentionKernel } from "./attention.ts";
import { DRAW_PARTS, joinKernel, LOGITS_WORKGROUPS, logitsKernel } from "./draw.ts";
import { nucleusKernel } from "./nucleus.ts";
import {
  chooseTile,
  linearKernel,
  type LinearKind,
  outputWorkgroups,
  rowStride,
  type Tile,
  tileOutputs,
  tileRows,
} from "./linear.ts";
import type { DeviceMemory, Pipelines } from "./memory.ts";
import { type TableChunk, tableChunks, type WeightBuffers } from "./weights.ts";
import { type Kernel, ROW_WORDS, STEP_STRIDE } from "./wgsl.ts";

/** A dispatch with all that it binds. */
export interface Launch {
  pipeline: GPUComputePipeline;
  group: GPUBindGroup;
  stepped: boolean;
  x: number;
  y: number;
}

/** Encodes a list of dispatches for one step. */
export function encodeStep(pass: GPUComputePassEncoder, launches: readonly Launch[], step: number): void {
  const offset = [step * STEP_STRIDE];
  for (const { pipeline, group, stepped, x, y } of launches) {
    pass.setPipeline(pipeline);
    if (stepped) pass.setBindGroup(0, group, offset);
    else pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(x, y);
  }
}

/** What all plans of an engine share. */
export interface PlanParts {
  config: QwenConfig;
  memory: DeviceMemory;
  pipelines: Pipelines;
  weights: WeightBuffers;
  /** One bit an id that is never drawn. */
  suppressed: GPUBuffer;
  software: boolean;
  /** Bytes of the embedding or head that are bound at once. */
  tableBytes: number;
}

/** The packed keys and values of the prompts, a pair a layer. */
export interface PromptBuffers {
  k: readonly GPUBuffer[];
  v: readonly GPUBuffer[];
  /** Cosines and sines by position, `[P, 2, d / 2]`. */
  turns: GPUBuffer;
}

/** How a plan draws. */
export interface Drawing {
  /** The highest logit. */
  greedy: boolean;
  /** Ids of the nucleus only; never together with greedy. */
  nucleus: boolean;
}

/** What a plan has for a nucleus, made when one is asked for first. */
interface NucleusBuffers {
  /** Logits of a window of rows, `[min(slots, WINDOW_ROWS), V]`. */
  logits: GPUBuffer;
  /** The smallest logit of each row's nucleus. */
  floors: GPUBuffer;
  /** 0, 1, 2, …: the line of `logits` that is a row's. */
  lines: GPUBuffer;
}

/** How the head's product is dealt out: pieces of the table, each over some workgroups. */
interface HeadPart extends TableChunk {
  rounds: number;
  parts: number;
  firstPart: number;
}

/** Heads of rows in a workgroup of the lone attention: as many as a processor's vector holds. */
const LONE_THREADS = 8;
/** Wider heads make the lone attention's text, and the time to compile it, too long. */
const LONE_HEAD = 64;
/** Workgroups that the head's product is dealt to at most. */
const HEAD_WORKGROUPS = 1024;
/**
 * Rows whose logits are held at once where there is a nucleus. The head reads its weights once for as many rows anyway, and
 * bindings that begin at a multiple of 64 rows are aligned, whatever the width.
 */
const WINDOW_ROWS = 64;

/** Bytes of the largest binding that a nucleus needs: the logits of a window of rows. */
export const nucleusBytes = (vocab: number): number => 4 * vocab * WINDOW_ROWS;

function headParts(chunks: readonly TableChunk[], tile: Tile, rows: number): HeadPart[] {
  const most = Math.max(64, Math.floor(HEAD_WORKGROUPS / Math.ceil(rows / tileRows(tile))));
  let firstPart = 0;
  return chunks.map((chunk) => {
    const tiles = Math.ceil(chunk.rows / tileOutputs(tile)), rounds = Math.ceil(tiles / most);
    const part = { ...chunk, rounds, parts: Math.ceil(tiles / rounds) * tile.outputGroups, firstPart };
    firstPart += part.parts;
    return part;
  });
}
const totalParts = (parts: readonly HeadPart[]): number => parts.reduce((sum, p) => sum + p.parts, 0);

/** Buffers and dispatches for up to `slots` rows (a power of two) and `capacity` new tokens. */
export class DecodePlan {
  /** Descriptions of running rows. */
  readonly rows: GPUBuffer;
  /** The line of the first logits that each row begins with. */
  readonly lines: GPUBuffer;
  /** Step records. */
  readonly steps: GPUBuffer;
  /** Ids and log-probs, `[capacity, slots, 2]`. */
  readonly drawn: GPUBuffer;
  /** Where the host reads them. */
  readonly staging: GPUBuffer;
  /** The residual stream of running rows. */
  readonly x: GPUBuffer;
  readonly #qkv: GPUBuffer;
  readonly #mixed: GPUBuffer;
  readonly #act: GPUBuffer;
  readonly #draws: GPUBuffer;
  /** Keys and values of sampled tokens, `[2, slots, capacity, Hkv, d]` a layer. */
  readonly caches: readonly GPUBuffer[];
  /** Draws between rows of `#draws`. */
  readonly #stride: number;
  readonly #chunks: TableChunk[];
  #nucleus: NucleusBuffers | undefined;
  #version = -1;
  #groups = new Map<string, GPUBindGroup>();
  readonly #kernels = new Map<string, Kernel>();

  constructor(readonly parts: PlanParts, readonly slots: number, readonly capacity: number) {
    const { config: { text }, memory } = parts,
      { hiddenSize, heads, kvHeads, headDim, intermediateSize, layers } = text;
    this.#chunks = tableChunks(text.vocabSize, hiddenSize, parts.tableBytes);
    let stride = DRAW_PARTS;
    for (let n = 1; n <= slots; n *= 2) {
      stride = Math.max(stride, totalParts(headParts(this.#chunks, this.#tile(n, hiddenSize), n)));
    }
    this.#stride = stride;
    const { STORAGE, COPY_DST, COPY_SRC, UNIFORM, MAP_READ } = GPUBufferUsage, made: GPUBuffer[] = [];
    const make = (label: string, floats: number, usage: number) => {
      const buffer = memory.create(label, floats * 4, usage);
      made.push(buffer);
      return buffer;
    };
    try {
      this.x = make("residual stream", slots * rowStride(hiddenSize), STORAGE | COPY_DST);
      this.#qkv = make("queries, keys and values", slots * (heads + 2 * kvHeads) * headDim, STORAGE);
      this.#mixed = make("attention output", slots * rowStride(heads * headDim), STORAGE);
      this.#act = make("gated activations", slots * rowStride(intermediateSize), STORAGE);
      this.#draws = make("partial draws", slots * stride * 5, STORAGE);
      this.rows = make("row descriptions", slots * ROW_WORDS, STORAGE | COPY_DST);
      this.lines = make("lines of the first logits", slots, STORAGE | COPY_DST);
      this.steps = make("step records", (capacity * STEP_STRIDE) / 4, UNIFORM | COPY_DST);
      this.drawn = make("drawn tokens", capacity * slots * 2, STORAGE | COPY_SRC);
      this.staging = make("read-back of drawn tokens", capacity * slots * 2, MAP_READ | COPY_DST);
      const size = 2 * slots * capacity * kvHeads * headDim;
      this.caches = Array.from({ length: layers }, () => make("key-value cache of a layer", size, STORAGE | COPY_SRC));
    } catch (error) {
      for (const buffer of made) memory.release(buffer);
      throw error;
    }
  }

  #tile(rows: number, depth: number): Tile {
    return chooseTile(rows, depth, this.parts.software);
  }

  /** Layers are alike: a kernel's text is made for the first of them only. */
  #kernel(options: object, make: () => Kernel): Kernel {
    const key = JSON.stringify(options), kernel = this.#kernels.get(key) ?? make();
    this.#kernels.set(key, kernel);
    return kernel;
  }

  #launch(
    name: string,
    kernel: Kernel,
    resources: () => readonly (GPUBuffer | GPUBufferBinding)[],
    x: number,
    y: number,
  ): Launch {
    const { pipelines, weights } = this.parts, compiled = pipelines.get(kernel);
    if (this.#version !== weights.version) {
      this.#groups.clear();
      this.#version = weights.version;
    }
    let group = this.#groups.get(name);
    if (!group) {
      group = pipelines.bind(compiled, kernel, resources());
      this.#groups.set(name, group);
    }
    return { pipeline: compiled.pipeline, group, stepped: compiled.stepped, x, y };
  }

  #linear(
    name: string,
    kind: LinearKind,
    depth: number,
    count: number,
    resources: () => (GPUBuffer | GPUBufferBinding)[],
  ) {
    const tile = this.#tile(count, depth),
      eps = this.parts.config.text.rmsNormEps,
      options = { kind, depth, eps, tile };
    const kernel = this.#kernel(options, () => linearKernel(options));
    return this.#launch(name, kernel, resources, outputWorkgroups(kind, tile), Math.ceil(count / tileRows(tile)));
  }

  /** Forgets the bind groups of the last prompts. */
  releasePrompts(): void {
    for (const name of [...this.#groups.keys()]) if (name.startsWith("prompt ")) this.#groups.delete(name);
  }

  #layer(i: number, count: number, prompt: PromptBuffers): Launch[] {
    const { config: { text }, weights, software } = this.parts, { hiddenSize, heads, kvHeads, headDim } = text;
    const w = weights.layers[i], width = heads * headDim, kvWidth = kvHeads * headDim;
    const { slots, capacity } = this,
      lone = software && headDim <= LONE_HEAD,
      sizes = { heads, kvHeads, headDim, slots, capacity };
    const options = { ...sizes, threads: lone ? LONE_THREADS : software ? 32 : 128 };
    const attention = this.#kernel(options, () => (lone ? loneAttentionKernel : attentionKernel)(options));
    return [
      this.#linear(
        `${i} qkv`,
        { op: "qkv", sizes: [width, kvWidth, kvWidth] },
        hiddenSize,
        count,
        () => [this.x, weights.vector(`${i}.norm`), weights.vector(`${i}.bias`), w.q, w.k, w.v, this.#qkv],
      ),
      this.#launch(
        `prompt ${i}`,
        attention,
        () => [
          this.#qkv,
          prompt.k[i],
          prompt.v[i],
          this.caches[i],
          prompt.turns,
          this.rows,
          this.#mixed,
          this.steps,
        ],
        lone ? Math.ceil((count * heads) / LONE_THREADS) : heads,
        lone ? 1 : count,
      ),
      this.#linear(`${i} o`, { op: "residual", outputs: hiddenSize }, width, count, () => [this.#mixed, w.o, this.x]),
      this.#linear(
        `${i} gate`,
        { op: "swiglu", outputs: text.intermediateSize },
        hiddenSize,
        count,
        () => [this.x, weights.vector(`${i}.norm2`), w.gate, w.up, this.#act],
      ),
      this.#linear(
        `${i} down`,
        { op: "residual", outputs: hiddenSize },
        text.intermediateSize,
        count,
        () => [this.#act, w.down, this.x],
      ),
    ];
  }

  /** The buffers of a nucleus; bounded by {@linkcode WINDOW_ROWS} rows of logits, however many rows run. */
  #nucleusBuffers(): NucleusBuffers {
    if (this.#nucleus) return this.#nucleus;
    const { config: { text }, memory } = this.parts, { STORAGE, COPY_DST } = GPUBufferUsage;
    const rows = Math.min(this.slots, WINDOW_ROWS), made: GPUBuffer[] = [];
    const make = (label: string, words: number, usage: number) => {
      const buffer = memory.create(label, words * 4, usage);
      made.push(buffer);
      return buffer;
    };
    try {
      const logits = make(`logits of ${rows} rows`, rows * text.vocabSize, STORAGE);
      const floors = make("floors of the nuclei", this.slots, STORAGE);
      const lines = make("lines of the logits", rows, STORAGE | COPY_DST);
      memory.device.queue.writeBuffer(lines, 0, Uint32Array.from({ length: rows }, (_, i) => i));
      return this.#nucleus = { logits, floors, lines };
    } catch (error) {
      for (const buffer of made) memory.release(buffer);
      throw error;
    }
  }

  /** A window of rows after the other: their logits, their floors, their partial draws. */
  #nucleusHead(count: number): Launch[] {
    const { config: { text }, weights } = this.parts, { logits, lines } = this.#nucleusBuffers();
    const launches: Launch[] = [];
    for (let from = 0; from < count; from += WINDOW_ROWS) {
      const rows = Math.min(WINDOW_ROWS, count - from), offset = from * rowStride(text.hiddenSize) * 4;
      headParts(this.#chunks, this.#tile(rows, text.hiddenSize), rows).forEach((part, c) => {
        const kind: LinearKind = {
          op: "logits",
          vocab: text.vocabSize,
          first: part.first,
          outputs: part.rows,
          rounds: part.rounds,
        };
        launches.push(this.#linear(`logits ${c} from ${from}`, kind, text.hiddenSize, rows, () => [
          { buffer: this.x, offset },
          weights.vector("norm"),
          this.#table(weights.head, c),
          logits,
        ]));
      });
      launches.push(...this.#nucleusDraws(`from ${from}`, logits, lines, from, rows));
    }
    return launches;
  }

  /** Floors and partial draws of `count` rows from row `from` on, whose logits are the `lines` of `logits`. */
  #nucleusDraws(name: string, logits: GPUBuffer, lines: GPUBuffer, from: number, count: number): Launch[] {
    const { config: { text: { vocabSize } }, suppressed, software } = this.parts;
    const floors = { buffer: this.#nucleusBuffers().floors, offset: from * 4 };
    const find = this.#kernel({ nucleus: vocabSize }, () => nucleusKernel(vocabSize, software ? 16 : 256));
    const draw = this.#kernel({ draw: vocabSize }, () => logitsKernel(vocabSize, false, this.#stride, true));
    return [
      this.#launch(`${name} floors`, find, () => [logits, lines, suppressed, floors, this.steps], count, 1),
      this.#launch(
        `${name} draws`,
        draw,
        () => [
          logits,
          lines,
          suppressed,
          { buffer: this.rows, offset: from * ROW_WORDS * 4 },
          floors,
          { buffer: this.#draws, offset: from * this.#stride * 20 },
          this.steps,
        ],
        LOGITS_WORKGROUPS,
        count,
      ),
    ];
  }

  /** The head: from the residual stream to partial draws. */
  #head(count: number, { greedy, nucleus }: Drawing): { launches: Launch[]; parts: number } {
    if (nucleus) return { launches: this.#nucleusHead(count), parts: DRAW_PARTS };
    const { config: { text }, weights, suppressed } = this.parts;
    const parts = headParts(this.#chunks, this.#tile(count, text.hiddenSize), count);
    const launches = parts.map(({ first, rows, rounds, firstPart }, c) => {
      const kind: LinearKind = {
        op: "head",
        vocab: text.vocabSize,
        first,
        outputs: rows,
        greedy,
        parts: this.#stride,
        firstPart,
        rounds,
      };
      return this.#linear(`head ${c}`, kind, text.hiddenSize, count, () => [
        this.x,
        weights.vector("norm"),
        this.#table(weights.head, c),
        suppressed,
        this.rows,
        this.#draws,
        this.steps,
      ]);
    });
    return { launches, parts: totalParts(parts) };
  }

  #table(buffer: GPUBuffer, chunk: number): GPUBufferBinding {
    const { first, rows } = this.#chunks[chunk], bytes = 4 * this.parts.config.text.hiddenSize;
    return { buffer, offset: first * bytes, size: rows * bytes };
  }

  /** Joins partial draws (`parts` > 0) and embeds the drawn ids. */
  #join(count: number, parts: number): Launch[] {
    const { weights, software, config } = this.parts, width = config.text.hiddenSize, threads = software ? 16 : 64;
    const resources = (chunk: number) => () => [
      this.#draws,
      this.rows,
      this.drawn,
      this.#table(weights.embedding, chunk),
      this.x,
      this.steps,
    ];
    const one = (parts: number, chunk: number, table: TableChunk | null) => {
      const kernel = joinKernel({ parts, stride: this.#stride, table, width, threads });
      return this.#launch(`join ${chunk}`, kernel, resources(chunk), count, 1);
    };
    if (this.#chunks.length === 1) return [one(parts, 0, this.#chunks[0])];
    const embeds = this.#chunks.map((table, c) => one(0, c, table));
    return parts ? [one(parts, 0, null), ...embeds] : embeds;
  }

  /** The dispatches that draw each row's first token from logits, `[D, V]`. */
  first(count: number, logits: GPUBuffer, { greedy, nucleus }: Drawing): Launch[] {
    if (nucleus) {
      return [...this.#nucleusDraws("prompt", logits, this.lines, 0, count), ...this.#join(count, DRAW_PARTS)];
    }
    const { config, suppressed } = this.parts, kernel = logitsKernel(config.text.vocabSize, greedy, this.#stride);
    const resources = () => [logits, this.lines, suppressed, this.rows, this.#draws, this.steps];
    return [
      this.#launch("prompt logits", kernel, resources, LOGITS_WORKGROUPS, count),
      ...this.#join(count, DRAW_PARTS),
    ];
  }

  /** The dispatches that draw the next token of `count` running rows. */
  step(count: number, prompt: PromptBuffers, drawing: Drawing): Launch[] {
    const launches: Launch[] = [];
    for (let i = 0; i < this.parts.config.text.layers; i++) launches.push(...this.#layer(i, count, prompt));
    const head = this.#head(count, drawing);
    return [...launches, ...head.launches, ...this.#join(count, head.parts)];
  }

  /** The dispatches that embed the last drawn ids of the rows that are described now. */
  embed(count: number): Launch[] {
    return this.#join(count, 0);
  }

  /** Releases the buffers. */
  dispose(): void {
    const { memory } = this.parts;
    this.#groups.clear();
    for (
      const b of [
        this.x,
        this.#qkv,
        this.#mixed,
        this.#act,
        this.#draws,
        this.rows,
        this.lines,
        this.steps,
        this.drawn,
        this.staging,
      ]
    ) {
      memory.release(b);
    }
    for (const buffer of [...this.caches, ...Object.values(this.#nucleus ?? {})]) memory.release(buffer);
    this.#nucleus = undefined;
  }
}
