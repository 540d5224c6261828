/**
 * How sequences become packed tokens, `[N, …]` without padding: one after the other, as branches of their common beginnings,
 * or as continuations of what a prefix cache holds. Integers only; no tensors.
 *
 * Sharing beginnings is exact (arXiv 2506.05433): under causal attention a token's hidden state depends on what stands before
 * it only, so rollouts of one prompt have equal states over the prompt, and the gradients of all of them add up there.
 *
 * @module
 */
import type { QwenConfig } from "./config.ts";
import type { ImageInput, Sequence } from "./policy.ts";
import { type RopeIndex, ropeIndex } from "./rope_index.ts";

/** Packed tokens of several pieces of sequences. */
export interface Packed {
  ids: Int32Array;
  /** Tokens of each piece; a piece is a whole sequence unless beginnings are shared or cached. */
  lengths: number[];
  /** Row of the concatenated image features for image tokens, −1 for words. */
  featureRow: Int32Array;
  /** The distinct images, in the order of their features. */
  images: ImageInput[];
  /** Positions of each piece's tokens within their whole sequence. */
  index: RopeIndex[];
  /** What the tokens of a piece attend to; left out where that is their own piece. */
  keys?: KeyLayout;
  /** Rows of zeros behind the image features, see {@linkcode bucketed}. */
  spareFeatures?: number;
}

/** The keys that pieces attend to: each piece's end with the keys of its own tokens. */
export interface KeyLayout {
  /** Keys of each piece. */
  lengths: number[];
  /** For each key its row: first those of the cache, `cached` of them, then those of the packed tokens. */
  rows: Int32Array;
  /** Keys that come from a cache. */
  cached: number;
}

/** The tokens from `from` up to `to` of one of several sequences. */
export interface Piece {
  sequence: number;
  from: number;
  to: number;
}

/** Where an image's tokens stand. */
interface ImageSpan {
  start: number;
  tokens: number;
  image: ImageInput;
}

/** Tokens of an image. */
export function imageTokens({ grid_thw: [t, h, w] }: ImageInput, { vision }: QwenConfig): number {
  return (t * h * w) / vision.spatialMergeSize ** 2;
}

/** The images of a sequence that `ropeIndex` has accepted. */
function imageSpans({ ids, images }: Sequence, config: QwenConfig): ImageSpan[] {
  let at = 0;
  return images.map((image) => {
    const start = ids.indexOf(config.tokens.image, at), tokens = imageTokens(image, config);
    at = start + tokens;
    return { start, tokens, image };
  });
}

/**
 * Packs pieces of sequences; equal images are taken once. A piece must not begin or end inside an image.
 *
 * @throws {RangeError} The image tokens of a sequence do not fit its images.
 */
export function packPieces(config: QwenConfig, sequences: readonly Sequence[], pieces: readonly Piece[]): Packed {
  const whole = sequences.map(({ ids, images }) =>
    ropeIndex(ids, images.map((i) => i.grid_thw), config.tokens.image, config.vision.spatialMergeSize)
  );
  const spans = sequences.map((sequence) => imageSpans(sequence, config));
  const total = pieces.reduce((sum, { from, to }) => sum + to - from, 0);
  const ids = new Int32Array(total), featureRow = new Int32Array(total).fill(-1);
  const images: ImageInput[] = [], firstRow = new Map<string, number>();
  let at = 0, rows = 0;
  for (const { sequence, from, to } of pieces) {
    for (let t = from; t < to; t++) ids[at + t - from] = sequences[sequence].ids[t];
    for (const { start, tokens, image } of spans[sequence]) {
      if (start < from || start >= to) continue;
      if (!firstRow.has(image.key)) {
        firstRow.set(image.key, rows);
        images.push(image);
        rows += tokens;
      }
      const first = firstRow.get(image.key)!;
      for (let i = 0; i < tokens; i++) featureRow[at + start - from + i] = first + i;
    }
    at += to - from;
  }
  const index = pieces.map(({ sequence, from, to }): RopeIndex => {
    const { positions: [t, h, w], next } = whole[sequence];
    return { positions: [t.subarray(from, to), h.subarray(from, to), w.subarray(from, to)], next };
  });
  return { ids, lengths: pieces.map(({ from, to }) => to - from), featureRow, images, index };
}

/** Whole sequences, one after the other. */
export function packSequences(config: QwenConfig, sequences: readonly Sequence[]): Packed {
  return packPieces(config, sequences, sequences.map(({ ids }, sequence) => ({ sequence, from: 0, to: ids.length })));
}

/** How many tokens two sequences have in common at their beginnings; an image is in common as a whole or not at all. */
export function commonLength(a: Sequence, b: Sequence, config: QwenConfig): number {
  const most = Math.min(a.ids.length, b.ids.length);
  let at = 0, image = 0;
  while (at < most && a.ids[at] === b.ids[at]) {
    if (a.ids[at] !== config.tokens.image) at++;
    else {
      const [ours, theirs] = [a.images[image], b.images[image]];
      image++;
      if (!ours || ours.key !== theirs?.key || at + imageTokens(ours, config) > most) break;
      at += imageTokens(ours, config);
    }
  }
  return at;
}

/** A branch costs the copies of all keys before it, so one that saves fewer tokens is not made. */
const MIN_SAVED = 16;
/** Beginnings are shared where that leaves out at least this share of all tokens. */
const MIN_SHARE = 0.1;

/** Sequences as branches of their common beginnings. */
interface Branches {
  pieces: Piece[];
  /** For each piece, the pieces that lead to it, itself included. */
  paths: number[][];
  /** For each sequence, the pieces that it is made of. */
  sequencePaths: number[][];
}

/** Branches wherever neighbouring sequences part, at any depth. */
function branchesOf(sequences: readonly Sequence[], config: QwenConfig): Branches {
  const out: Branches = { pieces: [], paths: [], sequencePaths: [] };
  const common = sequences.slice(1).map((sequence, i) => commonLength(sequences[i], sequence, config));
  const extend = (path: readonly number[], sequence: number, from: number, to: number): number[] => {
    if (from === to) return [...path];
    const longer = [...path, out.pieces.push({ sequence, from, to }) - 1];
    out.paths.push(longer);
    return longer;
  };
  // Sequences from `first` up to `last` agree up to `from`, where `path` ends.
  const visit = (first: number, last: number, from: number, path: number[]): void => {
    if (last - first === 1) {
      out.sequencePaths[first] = extend(path, first, from, sequences[first].ids.length);
      return;
    }
    const end = Math.min(...common.slice(first, last - 1));
    if ((end - from) * (last - first - 1) >= MIN_SAVED) {
      path = extend(path, first, from, end);
      from = end;
    }
    let start = first;
    for (let i = first + 1; i <= last; i++) {
      if (i < last && common[i - 1] > end) continue;
      visit(start, i, from, path);
      start = i;
    }
  };
  visit(0, sequences.length, 0, []);
  return out;
}

/** Sequences packed, and where their tokens lie. */
export interface Layout {
  packed: Packed;
  /** For each sequence the packed row of each of its tokens. */
  rows: Int32Array[];
}

/**
 * Packs sequences so that neighbours with the same beginning, images included, have it once; where that would save little, one
 * after the other.
 *
 * @param share Whether beginnings are shared at all. @default {true}
 */
export function packShared(config: QwenConfig, sequences: readonly Sequence[], share = true): Layout {
  const total = sequences.reduce((sum, { ids }) => sum + ids.length, 0);
  const { pieces, paths, sequencePaths } = share
    ? branchesOf(sequences, config)
    : { pieces: [], paths: [], sequencePaths: [] };
  const kept = pieces.reduce((sum, { from, to }) => sum + to - from, 0);
  if (!share || total - kept < MIN_SHARE * total) {
    let end = 0;
    const rows = sequences.map(({ ids: { length } }) => rangeOf((end += length) - length, length));
    return { packed: packSequences(config, sequences), rows };
  }
  const packed = packPieces(config, sequences, pieces);
  let end = 0;
  const own = packed.lengths.map((length) => rangeOf((end += length) - length, length));
  const along = (path: readonly number[]) => concatenated(path.map((p) => own[p]));
  const keys = paths.map(along);
  packed.keys = { lengths: keys.map(({ length }) => length), rows: concatenated(keys), cached: 0 };
  return { packed, rows: sequencePaths.map(along) };
}

/** `from`, `from + 1`, …: `length` integers. */
export function rangeOf(from: number, length: number): Int32Array {
  return Int32Array.from({ length }, (_, i) => from + i);
}

/** Lists of integers one after the other. */
export function concatenated(parts: readonly ArrayLike<number>[]): Int32Array {
  const out = new Int32Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

/** Sizes are rounded up to eighths of a power of two, and to a multiple of this. */
const LEAST_STEP = 16;

/**
 * The least bucket size from n on: a multiple of an eighth of the power of two below n, and of {@linkcode LEAST_STEP}. At most
 * eight sizes an octave, at most an eighth (or 15 tokens) more work. TensorFlow.js keeps freed WebGPU buffers for ever, by
 * their exact size: without buckets every new length of a step would leave its own buffers there.
 */
export function bucketed(n: number): number {
  const step = Math.max(LEAST_STEP, 2 ** (Math.floor(Math.log2(Math.max(n, 1))) - 3));
  return Math.ceil(n / step) * step;
}

/** The sizes of a pass: those of {@linkcode padded}, and what the log-probs of a pass add to them. */
export interface PassSizes {
  /** Tokens, at least one more than are packed. */
  readonly tokens: number;
  /** Keys, with one for each token of padding; none where the packed tokens are the keys. */
  readonly keys?: number;
  /** Rows of image features; 0 where there are no images. */
  readonly features: number;
  /** Pieces. */
  readonly pieces: number;
  /** Tokens whose log-probs are asked for. */
  readonly chosen: number;
  /** Sequences. */
  readonly rows: number;
  /** The most tokens of a sequence whose log-probs are asked for. */
  readonly width: number;
}

/** Rows of image features of packed tokens. */
export function featureRows({ images }: Packed, config: QwenConfig): number {
  return images.reduce((sum, image) => sum + imageTokens(image, config), 0);
}

/** How many of what a pass has beside its packed tokens. */
type PassCounts = Pick<PassSizes, "chosen" | "rows" | "width">;

/** Bucket sizes of everything in a pass, one by one: little is computed in vain, and passes seldom have equal sizes. */
export function bucketedSizes(packed: Packed, config: QwenConfig, { chosen, rows, width }: PassCounts): PassSizes {
  const tokens = bucketed(packed.ids.length + 1), more = tokens - packed.ids.length;
  return {
    tokens,
    keys: packed.keys && bucketed(packed.keys.rows.length + more),
    features: packed.images.length === 0 ? 0 : bucketed(featureRows(packed, config)),
    ...{ pieces: bucketed(packed.lengths.length + 1), chosen: bucketed(chosen) },
    ...{ rows: bucketed(rows), width: bucketed(width) },
  };
}

/** No size of {@linkcode sharedSizes} is smaller. */
const LEAST_SHARED = 256;
const LEAST_WIDTH = 32;

/**
 * Sizes that many passes have in common: a power of two of tokens, and of everything else a share or multiple of that which is hardly
 * ever too small. Up to half of the tokens are computed in vain (a third on average), and of the cheaper things more.
 */
export function sharedSizes(packed: Packed, config: QwenConfig, { chosen, rows, width }: PassCounts): PassSizes {
  const above = (n: number, least: number) => Math.max(least, 2 ** Math.ceil(Math.log2(n)));
  const tokens = above(packed.ids.length + 1, LEAST_SHARED), more = tokens - packed.ids.length;
  // The first of these shares of the tokens that holds n, or a power of two of the tokens.
  const share = (n: number, ...shares: number[]) =>
    tokens * (shares.find((s) => n <= s * tokens) ?? 2 ** Math.ceil(Math.log2(n / tokens)));
  return {
    tokens,
    keys: packed.keys && share(packed.keys.rows.length + more, 2),
    features: packed.images.length === 0 ? 0 : share(featureRows(packed, config), 1 / 2),
    pieces: share(packed.lengths.length + 1, 1 / 16, 1 / 4),
    chosen: share(chosen, 1 / 8, 1 / 2),
    rows: share(rows, 1 / 16, 1 / 4),
    width: above(width, LEAST_WIDTH),
  };
}

/** A whole number cut into parts that differ by one at most. */
function spread(total: number, parts: number): number[] {
  return Array.from({ length: parts }, (_, i) => Math.floor((i + 1) * total / parts) - Math.floor(i * total / parts));
}

/**
 * The same pieces and more, of at least one token together, that fill everything up to bucket sizes (with pieces no longer than the
 * longest there is: plain attention lays all pieces out as long as the longest) or to the sizes of a pass. Nothing attends to the padding, or is computed from it; whoever takes results leaves its rows out.
 *
 * Padding costs little more than its tokens, because it is spread: as attention goes with the square of a piece, over all spare
 * pieces, and as the gradient of a row is summed up one by one, over many rows.
 */
export function padded(packed: Packed, config: QwenConfig, sizes?: PassSizes): Packed {
  const { ids, lengths, featureRow, images, index, keys } = packed, tokens = ids.length;
  const length = (sizes?.tokens ?? bucketed(tokens + 1)) - tokens;
  const pieces = sizes ? sizes.pieces - lengths.length : Math.ceil(length / Math.max(...lengths));
  const own = spread(length, Math.max(1, pieces)), features = featureRows(packed, config);
  const out: Packed = {
    ids: concatenated([ids, rangeOf(0, length).map((i) => i % config.text.vocabSize)]),
    lengths: [...lengths, ...own],
    featureRow: concatenated([featureRow, new Int32Array(length).fill(-1)]),
    images,
    index: [
      ...index,
      ...own.map((n): RopeIndex => ({ positions: [new Int32Array(n), new Int32Array(n), new Int32Array(n)], next: 0 })),
    ],
    spareFeatures: features && (sizes?.features ?? bucketed(features)) - features,
  };
  if (keys) {
    const first = keys.cached + tokens, all = sizes?.keys ?? bucketed(keys.rows.length + length);
    const more = spread(all - keys.rows.length - length, own.length), rows = [keys.rows];
    let at = 0, spare = 0;
    own.forEach((n, p) => {
      rows.push(rangeOf(spare, more[p]).map((i) => first + i % length), rangeOf(first + at, n));
      [at, spare] = [at + n, spare + more[p]];
    });
    out.keys = { ...keys, lengths: [...keys.lengths, ...own.map((n, p) => n + more[p])], rows: concatenated(rows) };
  }
  return out;
}
