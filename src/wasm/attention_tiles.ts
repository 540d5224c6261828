/**
 * What attention and its gradient share: the sizes of score tiles, their scratch, and the packing of scaled keys.
 *
 * @module
 */
import { tf } from "../deps.ts";
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
  readonly heads: number;
  readonly keyHeads: number;
  readonly d: number;
  /** Segment s holds tokens starts[s] to starts[s + 1]. */
  readonly starts: Int32Array;
  readonly longest: number;
}

/** Reads q, k, v and cuSeqlens of a call. */
export function attentionShape(call: KernelCall): AttentionShape {
  const [tokens, heads, d] = call.input("q", [null, null, null]).shape;
  const keyHeads = call.input("k", [tokens, null, d]).shape[1];
  call.input("v", [tokens, keyHeads, d]);
  if (heads % keyHeads !== 0) throw call.error(`${heads} query heads are not a multiple of ${keyHeads} key heads`);
  const starts = call.integers(call.input("cuSeqlens", [null], "int32"));
  const ordered = starts.every((start, s) => s === 0 ? start === 0 : start >= starts[s - 1]);
  if (!ordered || starts[starts.length - 1] !== tokens) {
    throw call.error(
      `cuSeqlens must rise from 0 to the ${tokens} tokens, is [${starts.slice(0, 8)}${starts.length > 8 ? ", …" : ""}]`,
    );
  }
  const longest = starts.reduce((most, start, s) => s === 0 ? 0 : Math.max(most, start - starts[s - 1]), 0);
  return { tokens, heads, keyHeads, d, starts, longest };
}

/** Calls `run` with the byte offsets of each segment's tokens: `at(tensor, floatsPerToken)`. */
export function forSegments(
  call: KernelCall,
  shape: AttentionShape,
  run: (tokens: number, at: (tensor: tf.TensorInfo) => number) => void,
): void {
  for (let s = 0; s + 1 < shape.starts.length; s++) {
    const start = shape.starts[s];
    const tokens = shape.starts[s + 1] - start;
    if (tokens === 0) continue;
    run(tokens, (tensor) => call.address(tensor) + 4 * start * tf.util.sizeFromShape(tensor.shape.slice(1)));
  }
}
