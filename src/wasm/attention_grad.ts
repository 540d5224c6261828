/**
 * Gradient of `attention.ts`, recomputing the probabilities tile by tile.
 *
 * `MgpoAttentionGrad`: q, k, v, out, lse, cuSeqlens, cuSeqlensK as there, dout [N, H, d]; attributes `causal`, `scale` →
 * dq [N, H, d], dk and dv [M, Hkv, d]. With p_ij = exp(scale · q_i·k_j − lse_i) for pairs that meet, else 0:
 *
 * - dv_j = Σ_i p_ij · dout_i
 * - ds_ij = scale · p_ij · (dout_i·v_j − dout_i·out_i)
 * - dq_i = Σ_j ds_ij · k_j, dk_j = Σ_i ds_ij · q_i, summed over the query heads that share a key head.
 *
 * Key tiles are the outer loop, so that dk and dv of BK keys stay in cache until they are complete. Cost: 10·P·d operations and P
 * exponentials per head and segment, where P pairs meet: Lq·Lk, less Lq²/2 if causal.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { type Callable, type FunctionBuilder, type I32, load, type Local, madd, V128 } from "./asm.ts";
import {
  attentionPairs,
  attentionParts,
  attentionShape,
  BK,
  BQ,
  eachSegment,
  emitPackScaled,
  paddedBytes,
  paddedWidth,
  padScores,
  SCORE_STRIDE,
  validScores,
  work,
  zeroScores,
} from "./attention_tiles.ts";
import { eachVector, exp, sumLanes } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";
import { NR } from "./tiles.ts";

/** The kernel. */
export const attentionGrad: KernelFile = { emit, kernels: [{ name: "MgpoAttentionGrad", run: differentiate }] };

const i32x6 = ["i32", "i32", "i32", "i32", "i32", "i32"] as const;
const tileParameters = [...i32x6, ...i32x6, "f32"] as const;

/**
 * `softmax_grad_tile(rows, width, first, causal, d, scores, second, lse, lseStride, out, dout, stride, scale)`: scores become
 * p, `second` (dout·v) becomes ds.
 */
function emitTile(m: ModuleBuilder, parts: Parts): Callable<typeof tileParameters, undefined> {
  return m.function(
    "softmax_grad_tile",
    tileParameters,
    (f, rows, width, first, causal, d, scores, second, lse, lseStride, out, dout, stride, scale) => {
      const sum = f.v128();
      const factor = f.v128(scale.splat());
      f.for(0, rows, 1, (i) => {
        const filled = f.i32(padScores(f, scores, validScores(f, width, causal, first, i), width));
        zeroScores(f, second, filled.shrU(2), width);
        sum.set(V128.of(0));
        eachVector(f, parts, d, (at) => sum.set(madd(at.load(out), at.load(dout), sum)));
        const mean = f.v128(sumLanes(f, sum).splat());
        const top = f.v128(load.splat(lse));
        f.for(0, filled, 16, (x) => {
          const p = exp(f, load.v128(scores.add(x)).sub(top));
          f.storeV128(scores.add(x), p);
          f.storeV128(second.add(x), load.v128(second.add(x)).sub(mean).mul(p).mul(factor));
        });
        scores.set(scores.add(4 * SCORE_STRIDE));
        second.set(second.add(4 * SCORE_STRIDE));
        lse.set(lse.add(lseStride));
        out.set(out.add(stride));
        dout.set(dout.add(stride));
      });
    },
  );
}

/** Variable part of scratch, after `work.rest`: two packed query tiles, packed keys, sums of dk and dv. */
const restBytes = (d: number): number => 4 * paddedWidth(d) * (2 * BQ + 3 * BK);

interface HeadRest {
  readonly packedQ: Local<"i32">;
  readonly packedD: Local<"i32">;
  readonly keyRows: Local<"i32">;
  readonly dkSums: Local<"i32">;
  readonly dvSums: Local<"i32">;
}

function restAddresses(f: FunctionBuilder, base: I32, dBytes: I32): HeadRest {
  const packedQ = f.i32(base.add(work.rest));
  const packedD = f.i32(packedQ.add(dBytes.mul(BQ)));
  const keyRows = f.i32(packedD.add(dBytes.mul(BQ)));
  const dkSums = f.i32(keyRows.add(dBytes.mul(BK)));
  return { packedQ, packedD, keyRows, dkSums, dvSums: f.i32(dkSums.add(dBytes.mul(BK))) };
}

const headParameters = [...i32x6, ...i32x6, "i32", "i32", "i32", "f32"] as const;

/**
 * `attention_grad_head(tokens, keyTokens, d, causal, stride, lseStride, j, q, out, lse, dout, dq, keys, values, work, scale)`: what
 * one query head adds to the sums of the key tile at j, and its dq.
 */
function emitHead(m: ModuleBuilder, parts: Parts): Callable<typeof headParameters, undefined> {
  const tile = emitTile(m, parts);
  return m.function(
    "attention_grad_head",
    headParameters,
    (f, tokens, keyTokens, d, causal, stride, lseStride, j, q, out, lse, dout, dq, keys, values, base, scale) => {
      const [zeros, edge, scores, second] = [work.zeros, work.edge, work.scores, work.second].map((x) => base.add(x));
      const dBytes = paddedBytes(f, d);
      const n = f.i32(dBytes.shrU(2));
      const rest = restAddresses(f, base, dBytes);
      const bk = f.i32(f.i32(keyTokens.sub(j)).min(BK));
      // The first query sees keys up to this one.
      const ahead = f.i32(keyTokens.sub(tokens));
      const wide = f.i32(4 * SCORE_STRIDE);
      const none = f.i32(0);
      const start = f.i32(0);
      // Queries before the tile's first key see none of it.
      f.if(causal.and(j.gt(ahead)), () => start.set(j.sub(ahead).divU(BQ).mul(BQ)));
      f.for(start, tokens, BQ, (i) => {
        const rows = f.i32(f.i32(tokens.sub(i)).min(BQ));
        const width = f.i32(bk);
        f.if(causal, () => width.set(f.i32(i.add(rows).add(ahead).sub(j)).min(bk)));
        const whole = width.add(NR - 1).and(-NR);
        const [qi, di, dqi] = [q, dout, dq].map((pointer) => f.i32(pointer.add(i.mul(stride))));
        const panel = f.i32(d.mul(4 * NR));
        const tall = f.i32(rows.mul(4 * NR));
        f.call(parts.packRows, d, rows, qi, stride, rest.packedQ);
        f.call(parts.packRows, d, rows, di, stride, rest.packedD);
        f.call(parts.blockRows, rows, whole, d, qi, stride, keys, panel, zeros, none, scores, wide, edge);
        f.call(parts.blockRows, rows, whole, d, di, stride, values, panel, zeros, none, second, wide, edge);
        const lseAt = lse.add(i.mul(lseStride));
        const outAt = out.add(i.mul(stride));
        const first = i.add(ahead).sub(j).add(1);
        f.call(tile, rows, width, first, causal, d, scores, second, lseAt, lseStride, outAt, di, stride, scale);
        const transposed = (a: I32, b: I32, sums: I32): void =>
          f.call(parts.blockColumns, width, n, rows, a, wide, b, tall, sums, dBytes, sums, dBytes, edge);
        transposed(scores, rest.packedD, rest.dvSums);
        transposed(second, rest.packedQ, rest.dkSums);
        const keyPanel = bk.mul(4 * NR);
        f.call(parts.blockRows, rows, d, width, second, wide, rest.keyRows, keyPanel, dqi, stride, dqi, stride, edge);
      });
    },
  );
}

const segmentParameters = [...i32x6, "i32", "i32", "f32", ...i32x6, ...i32x6] as const;

/**
 * `attention_grad_segment(tokens, keyTokens, heads, keyHeads, first, last, d, causal, scale, q, k, v, out, lse, dout, dq, dk, dv, keys,
 * values, work)`: key heads `first` to `last` (exclusive) of one segment, perhaps without queries; dq starts as zeros.
 */
function emitSegment(m: ModuleBuilder, parts: Parts): Callable<typeof segmentParameters, undefined> {
  const packScaled = emitPackScaled(m, parts);
  const head = emitHead(m, parts);
  return m.function(
    "attention_grad_segment",
    segmentParameters,
    (f, tokens, keyTokens, heads, keyHeads, firstHead, lastHead, d, causal, scale, ...addresses) => {
      const [q, k, v, out, lse, dout, dq, dk, dv, keys, values, base] = addresses;
      const keyStride = f.i32(keyHeads.mul(d).shl(2));
      const group = f.i32(heads.divU(keyHeads));
      const dBytes = paddedBytes(f, d);
      const rest = restAddresses(f, base, dBytes);
      f.zero(base, f.i32(4 * BK));
      f.for(firstHead, lastHead, 1, (keyHead) => {
        const from = f.i32(keyHead.mul(d).shl(2));
        f.call(packScaled, keyTokens, d, scale, k.add(from), keyStride, keys);
        f.call(parts.packColumns, keyTokens, d, v.add(from), keyStride, values);
        f.for(0, keyTokens, BK, (j) => {
          const bk = f.i32(f.i32(keyTokens.sub(j)).min(BK));
          const tileAt = f.i32(from.add(j.mul(keyStride)));
          f.call(parts.packRows, d, bk, k.add(tileAt), keyStride, rest.keyRows);
          f.zero(rest.dkSums, bk.mul(dBytes));
          f.zero(rest.dvSums, bk.mul(dBytes));
          f.for(0, group, 1, (g) => {
            const h = f.i32(keyHead.mul(group).add(g));
            const at = f.i32(h.mul(d).shl(2));
            const packedAt = f.i32(j.mul(d).shl(2));
            f.call(
              head,
              ...[tokens, keyTokens, d, causal, heads.mul(d).shl(2), heads.shl(2), j] as const,
              ...[q.add(at), out.add(at), lse.add(h.shl(2)), dout.add(at), dq.add(at)] as const,
              ...[keys.add(packedAt), values.add(packedAt), base, scale] as const,
            );
          });
          copyHead(f, parts, { rows: bk, d, dBytes, sums: rest.dkSums, to: dk.add(tileAt), stride: keyStride });
          copyHead(f, parts, { rows: bk, d, dBytes, sums: rest.dvSums, to: dv.add(tileAt), stride: keyStride });
        });
      });
    },
  );
}

/**
 * `attention_grad(segments, heads, keyHeads, first, last, d, causal, scale, q, k, v, out, lse, dout, dq, dk, dv, starts, keyStarts, keys,
 * values, work)`: key heads `first` to `last` of segments that begin at the rows in `starts` and `keyStarts`.
 */
function emit(m: ModuleBuilder, parts: Parts): void {
  const segment = emitSegment(m, parts);
  m.function(
    "attention_grad",
    [...i32x6, "i32", "f32", ...i32x6, ...i32x6, "i32", "i32"] as const,
    (f, segments, heads, keyHeads, first, last, d, causal, scale, ...addresses) => {
      const [q, k, v, out, lse, dout, dq, dk, dv, starts, keyStarts, keys, values, base] = addresses;
      eachSegment(f, segments, starts, keyStarts, (tokens, keyTokens, queryAt, keyAt) => {
        const rows = f.i32(queryAt.mul(heads));
        const [wide, narrow] = [f.i32(rows.mul(d)), f.i32(keyAt.mul(keyHeads).mul(d))];
        f.call(
          segment,
          ...[tokens, keyTokens, heads, keyHeads, first, last, d, causal, scale] as const,
          ...[q.add(wide), k.add(narrow), v.add(narrow), out.add(wide), lse.add(rows), dout.add(wide)] as const,
          ...[dq.add(wide), dk.add(narrow), dv.add(narrow), keys, values, base] as const,
        );
      });
    },
    { exported: true },
  );
}

/** Rough nanoseconds of a pair of query and key in one head. */
const cost = (d: number): number => 1.5 + d * 5 / 12;

/** The first d of each padded row of sums to its place between the other heads. */
function copyHead(
  f: FunctionBuilder,
  parts: Parts,
  move: { rows: I32; d: I32; dBytes: I32; sums: I32; to: I32; stride: I32 },
): void {
  const [from, to] = [f.i32(move.sums), f.i32(move.to)];
  f.for(0, move.rows, 1, () => {
    eachVector(f, parts, move.d, (at) => at.store(to, at.load(from)));
    from.set(from.add(move.dBytes));
    to.set(to.add(move.stride));
  });
}

function differentiate(call: KernelCall): tf.TensorInfo[] {
  const shape = attentionShape(call);
  const { tokens, keyTokens, heads, keyHeads, d } = shape;
  const [q, k, v] = ["q", "k", "v"].map((name) => call.input(name));
  const byQuery = [
    call.input("out", [tokens, heads, d]),
    call.input("lse", [tokens, heads]),
    call.input("dout", [tokens, heads, d]),
  ];
  const [causal, scale] = [call.flag("causal"), call.number("scale")];
  const dq = call.output([tokens, heads, d]);
  const [dk, dv] = [0, 1].map(() => call.output([keyTokens, keyHeads, d]));
  const packedBytes = 4 * d * Math.ceil(shape.longest / NR) * NR;
  const costs = attentionPairs(shape, causal).map((pairs) => pairs * cost(d));
  const addresses = [q, k, v, ...byQuery, dq, dk, dv].map((tensor) => call.address(tensor));
  const calls = attentionParts(call, shape, costs).map(({ from, to, first, last }) => [
    ...[to - from, heads, keyHeads, first, last, d, Number(causal), scale, ...addresses],
    ...[shape.startsAt + 4 * from, shape.keyStartsAt + 4 * from],
  ]);
  call.functions.zero(call.address(dq), 4 * tokens * heads * d);
  const scratch = [packedBytes, packedBytes, work.rest + restBytes(d)];
  call.run("attention_grad", calls, costs.reduce((sum, cost) => sum + cost, 0), scratch);
  return [dq, dk, dv];
}
