/**
 * What attention and its gradient share: the sizes of score tiles, their scratch, and the packing of scaled keys.
 *
 * @module
 */
import { type Callable, type FunctionBuilder, type I32, load, type Local } from "./asm.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall } from "./runtime.ts";
import { MR, NR } from "./tiles.ts";

/** Queries per tile, a multiple of MR. */
export const BQ = 4 * MR;
/** Keys per tile, a multiple of NR. */
export const BK = 16 * NR;
/** Floats from one row of a score tile to the next: not a power of two, so that a column spreads over the cache. */
export const SCORE_STRIDE = BK + 16;
/** A score whose exponential is exactly 0 beside any real score. */
export const LOWEST = -1e30;

/** Byte offsets in the scratch of both directions; what depends on the head size follows at `rest`. */
export const work = {
  /** BK zeros: the starting value of scores. */
  zeros: 0,
  /** Room for one register tile. */
  edge: 4 * BK,
  scores: 4 * (BK + MR * NR),
  /** A second tile of scores (gradient), or two floats a query: running maximum and total (forward). */
  second: 4 * (BK + MR * NR + BQ * SCORE_STRIDE),
  rest: 4 * (BK + MR * NR + 2 * BQ * SCORE_STRIDE),
} as const;

/** d rounded up to whole panels. */
export const paddedWidth = (d: number): number => Math.ceil(d / NR) * NR;

/** The same in the module, in bytes. */
export const paddedBytes = (f: FunctionBuilder, d: I32): Local<"i32"> => f.i32(d.add(NR - 1).and(-NR).shl(2));

/**
 * Makes the scores of one row beyond the first `valid` harmless: LOWEST up to a full vector, zeros from there to `width`.
 * The result: bytes of the row up to the full vector.
 */
export function padScores(f: FunctionBuilder, scores: I32, valid: I32, width: I32): I32 {
  const filled = f.i32(valid.add(3).and(-4));
  f.for(valid, filled, 1, (j) => f.storeF32(scores.add(j.shl(2)), LOWEST));
  zeroScores(f, scores, filled, width);
  return filled.shl(2);
}

/** Zeros from score `filled` (a multiple of 4) to `width`. */
export function zeroScores(f: FunctionBuilder, scores: I32, filled: I32, width: I32): void {
  f.for(filled, width, 4, (j) => f.storeV128(scores.add(j.shl(2)), 0));
}

/** Valid scores of row i of a tile of `width` keys: `first + i` of them if causal, where `first` may be negative. */
export function validScores(f: FunctionBuilder, width: I32, causal: I32, first: I32, i: I32): Local<"i32"> {
  const valid = f.i32(width);
  f.if(causal, () => {
    valid.set(f.i32(first.add(i)).min(width));
    f.if(valid.lt(0), () => valid.set(valid.sub(valid)));
  });
  return valid;
}

const packParameters = ["i32", "i32", "f32", "i32", "i32", "i32"] as const;
/** `pack_scaled(tokens, d, scale, source, stride, to)`: scale · (rows of d)ᵀ as panels over the tokens. */
export type PackScaled = Callable<typeof packParameters, undefined>;

/** Adds {@link PackScaled}; scaling the keys once is cheaper than scaling the scores. */
export function emitPackScaled(m: ModuleBuilder, parts: Parts): PackScaled {
  return m.function("pack_scaled", packParameters, (f, tokens, d, scale, source, stride, to) => {
    f.call(parts.packColumns, tokens, d, source, stride, to);
    const factor = f.v128(scale.splat());
    const bytes = f.i32(tokens.add(NR - 1).divU(NR).mul(d).mul(4 * NR));
    f.for(0, bytes, 16, (x) => f.storeV128(to.add(x), load.v128(to.add(x)).mul(factor)));
  });
}

/** The sizes and segments of one call, checked. */
export interface AttentionShape {
  readonly tokens: number;
  readonly keyTokens: number;
  readonly heads: number;
  readonly keyHeads: number;
  readonly d: number;
  /** Segment s holds queries starts[s] to starts[s + 1]. */
  readonly starts: Int32Array;
  /** And keys keyStarts[s] to keyStarts[s + 1]. */
  readonly keyStarts: Int32Array;
  /** Byte offsets of both lists. */
  readonly startsAt: number;
  readonly keyStartsAt: number;
  /** Most keys of a segment. */
  readonly longest: number;
}

/** Reads q, k, v, cuSeqlens and cuSeqlensK (absent: cuSeqlens) of a call. */
export function attentionShape(call: KernelCall): AttentionShape {
  const [tokens, heads, d] = call.input("q", [null, null, null]).shape;
  const cuKeys = call.optional("cuSeqlensK", [null], "int32");
  const [keyTokens, keyHeads] = call.input("k", [cuKeys === undefined ? tokens : null, null, d]).shape;
  call.input("v", [keyTokens, keyHeads, d]);
  if (heads % keyHeads !== 0) throw call.error(`${heads} query heads are not a multiple of ${keyHeads} key heads`);
  const starts = readStarts(call, "cuSeqlens", tokens);
  const keyStarts = cuKeys === undefined ? starts : readStarts(call, "cuSeqlensK", keyTokens);
  if (keyStarts !== starts) checkLengths(call, starts, keyStarts, call.flag("causal"));
  const longest = keyStarts.reduce((most, start, s) => s === 0 ? 0 : Math.max(most, start - keyStarts[s - 1]), 0);
  const startsAt = call.address(call.input("cuSeqlens", [null], "int32")),
    keyStartsAt = cuKeys ? call.address(cuKeys) : startsAt;
  return { tokens, keyTokens, heads, keyHeads, d, starts, keyStarts, startsAt, keyStartsAt, longest };
}

function readStarts(call: KernelCall, name: string, tokens: number): Int32Array {
  const starts = call.integers(call.input(name, [null], "int32"));
  const ordered = starts.every((start, s) => s === 0 ? start === 0 : start >= starts[s - 1]);
  if (!ordered || starts[starts.length - 1] !== tokens) {
    throw call.error(
      `${name} must rise from 0 to the ${tokens} tokens, is [${starts.slice(0, 8)}${starts.length > 8 ? ", …" : ""}]`,
    );
  }
  return starts;
}

function checkLengths(call: KernelCall, starts: Int32Array, keyStarts: Int32Array, causal: boolean): void {
  if (starts.length !== keyStarts.length) {
    throw call.error(`${starts.length - 1} segments of queries but ${keyStarts.length - 1} segments of keys`);
  }
  for (let s = 0; s + 1 < starts.length; s++) {
    const [queries, keys] = [starts, keyStarts].map((cu) => cu[s + 1] - cu[s]);
    if (keys < (causal ? queries : Math.min(queries, 1))) {
      throw call.error(`segment ${s} has ${queries} queries and ${keys} keys, too few`);
    }
  }
}

/** A part of the work: segments `from` to `to` (exclusive) and, of each, key heads `first` to `last`. */
export interface AttentionPart {
  readonly from: number;
  readonly to: number;
  readonly first: number;
  readonly last: number;
}

/**
 * Cuts the work for the threads into parts of about the same size: groups of whole segments, and long segments by their key heads. Each
 * output belongs to one segment and one key head.
 *
 * @param costs Rough nanoseconds of each segment.
 */
export function attentionParts(
  call: KernelCall,
  { keyHeads }: AttentionShape,
  costs: readonly number[],
): AttentionPart[] {
  const total = costs.reduce((sum, cost) => sum + cost, 0);
  const count = call.ranges(costs.length * keyHeads, total).length, share = total / count;
  if (count === 1) return [{ from: 0, to: costs.length, first: 0, last: keyHeads }];
  const parts: AttentionPart[] = [];
  let from = 0, sum = 0;
  const close = (to: number): void => {
    if (to > from) parts.push({ from, to, first: 0, last: keyHeads });
    from = to;
    sum = 0;
  };
  for (const [s, cost] of costs.entries()) {
    const pieces = Math.min(keyHeads, Math.round(cost / share));
    if (pieces > 1) {
      close(s);
      const cut = (piece: number): number => Math.floor(piece * keyHeads / pieces);
      for (let i = 0; i < pieces; i++) parts.push({ from: s, to: s + 1, first: cut(i), last: cut(i + 1) });
      from = s + 1;
    } else if ((sum += cost) >= share) close(s + 1);
  }
  close(costs.length);
  return parts;
}

/** Pairs of query and key that meet in each segment, summed over heads. */
export function attentionPairs({ starts, keyStarts, heads }: AttentionShape, causal: boolean): number[] {
  return Array.from({ length: starts.length - 1 }, (_, s) => {
    const [queries, keys] = [starts, keyStarts].map((cu) => cu[s + 1] - cu[s]);
    return heads * queries * (causal ? keys - queries / 2 : keys);
  });
}

/**
 * Emits `body` for each of `segments` segments with its numbers of queries and keys, and the byte offsets of its rows by query and
 * by key in arrays with one number a row; moves `starts` and `keyStarts` on.
 */
export function eachSegment(
  f: FunctionBuilder,
  segments: I32,
  starts: Local<"i32">,
  keyStarts: Local<"i32">,
  body: (tokens: Local<"i32">, keyTokens: Local<"i32">, queryAt: Local<"i32">, keyAt: Local<"i32">) => void,
): void {
  f.for(0, segments, 1, () => {
    const [first, firstKey] = [f.i32(load.i32(starts)), f.i32(load.i32(keyStarts))];
    const tokens = f.i32(load.i32(starts, 4).sub(first));
    const keyTokens = f.i32(load.i32(keyStarts, 4).sub(firstKey));
    f.if(keyTokens, () => body(tokens, keyTokens, f.i32(first.shl(2)), f.i32(firstKey.shl(2))));
    starts.set(starts.add(4));
    keyStarts.set(keyStarts.add(4));
  });
}
