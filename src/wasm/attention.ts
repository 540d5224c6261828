/**
 * Attention within packed segments of unequal length, without ever holding an L × L matrix.
 *
 * `MgpoAttention`: q [N, H, d], k and v [M, Hkv, d], cuSeqlens int32 [S + 1] (0 = c₀ ≤ c₁ ≤ … = N) for the queries, cuSeqlensK
 * int32 [S + 1] (to M) for the keys, as cuSeqlens where absent; attributes `causal`, `scale`. Segment s has Lq queries and
 * Lk ≥ Lq keys (≥ 1 if not causal). Its query i and key j, both counted in the segment, meet iff not causal or
 * j ≤ i + Lk − Lq. Head h reads key head ⌊h·Hkv/H⌋. Outputs:
 *
 * - out [N, H, d] = Σ_j p_ij v_j with p_i = softmax_j(scale · q_i·k_j),
 * - lse [N, H] = ln Σ_j exp(scale · q_i·k_j), which the gradient needs.
 *
 * Per segment and key head, scale·Kᵀ and V are packed once. Then BQ queries at a time meet BK keys at a time: a tile of scores
 * (in the first-level cache), its exponentials under a running maximum, and its product with V added to rescaled sums.
 * Cost: 4·P·d operations and P exponentials per head and segment, where P pairs meet: Lq·Lk, less Lq²/2 if causal.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { type Callable, F32, type FunctionBuilder, type I32, invoke, load, V128 } from "./asm.ts";
import {
  attentionPairs,
  attentionParts,
  attentionShape,
  BK,
  BQ,
  eachSegment,
  emitPackScaled,
  LOWEST,
  paddedBytes,
  paddedWidth,
  padScores,
  SCORE_STRIDE,
  validScores,
  work,
} from "./attention_tiles.ts";
import { eachVector, exp, maxLane, sumLanes } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";
import { NR } from "./tiles.ts";

/** The kernel. */
export const attention: KernelFile = { emit, kernels: [{ name: "MgpoAttention", run: attend }] };

const i32x8 = ["i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;

/**
 * `softmax_tile(rows, width, first, causal, scores, state, sums, sumsStride)`: scores become exponentials under the running
 * maximum. Per row, `state` holds that maximum and the total so far, and `sums` the unnormalised output.
 */
function emitSoftmaxTile(m: ModuleBuilder): Callable<typeof i32x8, undefined> {
  return m.function("softmax_tile", i32x8, (f, rows, width, first, causal, scores, state, sums, sumsStride) => {
    const most = f.v128();
    const total = f.v128();
    f.for(0, rows, 1, (i) => {
      const filled = f.i32(padScores(f, scores, validScores(f, width, causal, first, i), width));
      const old = f.v128(load.splat(state));
      most.set(old);
      f.for(0, filled, 16, (x) => most.set(most.pmax(load.v128(scores.add(x)))));
      const top = f.v128(maxLane(f, most).splat());
      total.set(V128.of(0));
      f.for(0, filled, 16, (x) => {
        const p = exp(f, load.v128(scores.add(x)).sub(top));
        f.storeV128(scores.add(x), p);
        total.set(total.add(p));
      });
      rescale(f, { state, sums, sumsStride, old, top, total });
      scores.set(scores.add(4 * SCORE_STRIDE));
      state.set(state.add(8));
      sums.set(sums.add(sumsStride));
    });
  });
}

/** Moves a row's sums from the old running maximum to the new one and adds the tile's total. */
function rescale(
  f: FunctionBuilder,
  row: { state: I32; sums: I32; sumsStride: I32; old: V128; top: V128; total: V128 },
): void {
  const factor = exp(f, row.old.sub(row.top));
  f.storeF32(row.state, row.top.lane(0));
  f.storeF32(row.state, load.f32(row.state, 4).mul(factor.lane(0)).add(sumLanes(f, row.total)), 4);
  f.for(0, row.sumsStride, 16, (x) => f.storeV128(row.sums.add(x), load.v128(row.sums.add(x)).mul(factor)));
}

const i32x12 = [...i32x8, "i32", "i32", "i32", "i32"] as const;

/** `attention_head(tokens, keyTokens, d, causal, qStride, lseStride, q, keys, values, out, lse, work)` on packed keys and values. */
function emitHead(m: ModuleBuilder, parts: Parts): Callable<typeof i32x12, undefined> {
  const softmaxTile = emitSoftmaxTile(m);
  return m.function(
    "attention_head",
    i32x12,
    (f, tokens, keyTokens, d, causal, qStride, lseStride, q, keys, values, out, lse, base) => {
      const [zeros, edge, scores, state] = [work.zeros, work.edge, work.scores, work.second].map((x) => base.add(x));
      const width = f.i32();
      const dBytes = paddedBytes(f, d);
      const stride = f.i32(4 * SCORE_STRIDE);
      const sums = f.i32(base.add(work.rest));
      const ahead = f.i32(keyTokens.sub(tokens));
      f.for(0, tokens, BQ, (i) => {
        const rows = f.i32(tokens.sub(i).min(BQ));
        f.zero(sums, rows.mul(dBytes));
        f.for(0, rows.shl(3), 8, (x) => {
          f.storeF32(state.add(x), LOWEST);
          f.storeF32(state.add(x), 0, 4);
        });
        const end = f.i32(keyTokens);
        f.if(causal, () => end.set(i.add(rows).add(ahead)));
        f.for(0, end, BK, (j) => {
          width.set(f.i32(end.sub(j)).min(BK));
          const whole = width.add(NR - 1).and(-NR);
          const panel = f.i32(f.i32(keyTokens.sub(j)).min(BK).mul(4 * NR));
          const [none, from] = [f.i32(0), f.i32(keys.add(j.mul(d).shl(2)))];
          f.call(parts.blockRows, rows, whole, d, q, qStride, from, d.mul(4 * NR), zeros, none, scores, stride, edge);
          f.call(softmaxTile, rows, width, i.add(ahead).sub(j).add(1), causal, scores, state, sums, dBytes);
          from.set(values.add(j.mul(dBytes)));
          f.call(
            parts.blockRows,
            rows,
            dBytes.shrU(2),
            width,
            scores,
            stride,
            from,
            panel,
            sums,
            dBytes,
            sums,
            dBytes,
            edge,
          );
        });
        f.for(0, rows, 1, (row) => {
          const at = f.i32(state.add(row.shl(3)));
          const total = f.f32(load.f32(at, 4));
          f.storeF32(lse, load.f32(at).toF64().add(invoke(parts.log, total.toF64())).toF32());
          const scale = f.v128(F32.of(1).div(total).splat());
          const sum = f.i32(sums.add(row.mul(dBytes)));
          eachVector(f, parts, d, (at) => at.store(out, at.load(sum).mul(scale)));
          lse.set(lse.add(lseStride));
          out.set(out.add(qStride));
        });
        q.set(q.add(rows.mul(qStride)));
      });
    },
  );
}

const segmentParameters = [...i32x8, "f32", ...i32x8] as const;

/**
 * `attention_segment(tokens, keyTokens, heads, keyHeads, first, last, d, causal, scale, q, k, v, out, lse, keys, values, work)`: key heads
 * `first` to `last` (exclusive) of one segment.
 */
function emitSegment(m: ModuleBuilder, parts: Parts): Callable<typeof segmentParameters, undefined> {
  const packScaled = emitPackScaled(m, parts);
  const head = emitHead(m, parts);
  return m.function(
    "attention_segment",
    segmentParameters,
    (f, tokens, keyTokens, heads, keyHeads, first, last, d, causal, scale, q, k, v, out, lse, keys, values, base) => {
      const keyStride = f.i32(keyHeads.mul(d).shl(2));
      const group = f.i32(heads.divU(keyHeads));
      const dBytes = paddedBytes(f, d);
      const at = f.i32(first.mul(group).mul(d).shl(2));
      lse.set(lse.add(first.mul(group).shl(2)));
      f.zero(base, f.i32(4 * BK));
      f.for(first, last, 1, (keyHead) => {
        const from = f.i32(keyHead.mul(d).shl(2));
        f.call(packScaled, keyTokens, d, scale, k.add(from), keyStride, keys);
        f.for(0, keyTokens, BK, (j) => {
          const source = v.add(from).add(j.mul(keyStride));
          f.call(parts.packRows, d, f.i32(keyTokens.sub(j)).min(BK), source, keyStride, values.add(j.mul(dBytes)));
        });
        f.for(0, group, 1, () => {
          const [qStride, lseStride] = [heads.mul(d).shl(2), heads.shl(2)];
          const [from, to] = [q.add(at), out.add(at)];
          f.call(head, tokens, keyTokens, d, causal, qStride, lseStride, from, keys, values, to, lse, base);
          at.set(at.add(d.shl(2)));
          lse.set(lse.add(4));
        });
      });
    },
  );
}

/**
 * `attention(segments, heads, keyHeads, first, last, d, causal, scale, q, k, v, out, lse, starts, keyStarts, keys, values, work)`: key
 * heads `first` to `last` of segments that begin at the rows in `starts` and `keyStarts`.
 */
function emit(m: ModuleBuilder, parts: Parts): void {
  const segment = emitSegment(m, parts);
  m.function(
    "attention",
    ["i32", "i32", "i32", "i32", "i32", "i32", "i32", "f32", ...i32x8, "i32", "i32"] as const,
    (f, segments, heads, keyHeads, first, last, d, causal, scale, q, k, v, out, lse, starts, keyStarts, ...scratch) => {
      eachSegment(f, segments, starts, keyStarts, (tokens, keyTokens, queryAt, keyAt) => {
        const rows = f.i32(queryAt.mul(heads));
        const [wide, narrow] = [f.i32(rows.mul(d)), f.i32(keyAt.mul(keyHeads).mul(d))];
        const [qAt, kAt, vAt, outAt] = [q.add(wide), k.add(narrow), v.add(narrow), out.add(wide)];
        f.if(tokens, () =>
          f.call(
            segment,
            ...[tokens, keyTokens, heads, keyHeads, first, last, d, causal, scale] as const,
            ...[qAt, kAt, vAt, outAt, lse.add(rows), ...scratch] as const,
          ));
      });
    },
    { exported: true },
  );
}

/** Rough nanoseconds of a pair of query and key in one head. */
const cost = (d: number): number => 1 + d / 6;

function attend(call: KernelCall): tf.TensorInfo[] {
  const shape = attentionShape(call);
  const { tokens, heads, keyHeads, d } = shape;
  const [q, k, v] = ["q", "k", "v"].map((name) => call.input(name));
  const [causal, scale] = [call.flag("causal"), call.number("scale")];
  const out = call.output([tokens, heads, d]);
  const lse = call.output([tokens, heads]);
  const dBytes = 4 * paddedWidth(d);
  const keyBytes = 4 * d * Math.ceil(shape.longest / NR) * NR;
  const costs = attentionPairs(shape, causal).map((pairs) => pairs * cost(d));
  const addresses = [q, k, v, out, lse].map((tensor) => call.address(tensor));
  const calls = attentionParts(call, shape, costs).map(({ from, to, first, last }) => [
    ...[to - from, heads, keyHeads, first, last, d, Number(causal), scale, ...addresses],
    ...[shape.startsAt + 4 * from, shape.keyStartsAt + 4 * from],
  ]);
  const scratch = [keyBytes, shape.longest * dBytes, work.rest + BQ * dBytes];
  call.run("attention", calls, costs.reduce((sum, cost) => sum + cost, 0), scratch);
  return [out, lse];
}
