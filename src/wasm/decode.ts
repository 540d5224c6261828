/**
 * `MgpoDecodeAttention`: attention of one new token per sequence over its cached keys and values.
 *
 * Inputs: q [B, H, d], k and v [B, Hkv, d] (of the new token), kCache and vCache [R, C, Hkv, d], lengths int32 [B] (tokens already cached),
 * rows int32 [B] (the cache row of each sequence; each row at most once per call). Attribute `scale`. k and v are written **in place** at
 * position lengths[b] of row rows[b]; then q attends over lengths[b] + 1 tokens. Output [B, H, d]. A full row or a row
 * outside the cache is a RangeError, before anything is written.
 *
 * Cost: 4·d operations per cached token and head: the caches are read once per query head.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { type Callable, F32, load, madd, V128 } from "./asm.ts";
import { eachVector, exp, maxLane, sumLanes } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** The kernel. */
export const decode: KernelFile = { emit, kernels: [{ name: "MgpoDecodeAttention", run: decodeToken }] };

const headParameters = ["i32", "i32", "i32", "f32", "i32", "i32", "i32", "i32", "i32"] as const;

/** `decode_head(tokens, d, stride, scale, q, keys, values, out, scores)`: one query head; scores: room for tokens + 3 floats. */
function emitHead(m: ModuleBuilder, parts: Parts): Callable<typeof headParameters, undefined> {
  return m.function("decode_head", headParameters, (f, tokens, d, stride, scale, q, keys, values, out, scores) => {
    const [sum, most, total] = [f.v128(), f.v128(V128.of(-1e30)), f.v128(V128.of(0))];
    f.for(0, tokens, 1, (j) => {
      const key = f.i32(keys.add(j.mul(stride)));
      sum.set(V128.of(0));
      eachVector(f, parts, d, (at) => sum.set(madd(at.load(q), at.load(key), sum)));
      f.storeF32(scores.add(j.shl(2)), sumLanes(f, sum).mul(scale));
    });
    eachVector(f, parts, tokens, (at) => most.set(most.pmax(at.load(scores, -1e30))));
    const top = f.v128(maxLane(f, most).splat());
    eachVector(f, parts, tokens, (at) => {
      const p = exp(f, at.load(scores, -1e30).sub(top));
      at.store(scores, p);
      total.set(total.add(p));
    });
    const inverse = f.v128(F32.of(1).div(sumLanes(f, total)).splat());
    const value = f.i32();
    const p = f.i32();
    const end = f.i32(scores.add(tokens.shl(2)));
    eachVector(f, parts, d, (at) => {
      sum.set(V128.of(0));
      value.set(values);
      p.set(scores);
      f.doWhile(() => {
        sum.set(madd(load.splat(p), at.load(value), sum));
        value.set(value.add(stride));
        p.set(p.add(4));
      }, () => p.ne(end));
      at.store(out, sum.mul(inverse));
    });
  });
}

const parameters = ["i32", "i32", "i32", "f32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;

/** `decode_one(heads, keyHeads, d, scale, length, q, k, v, kRow, vRow, out, scores)` for one sequence; kRow, vRow: its cache row. */
function emit(m: ModuleBuilder, parts: Parts): void {
  const head = emitHead(m, parts);
  const one = m.function(
    "decode_one",
    [...parameters, "i32"] as const,
    (f, heads, keyHeads, d, scale, length, q, k, v, kRow, vRow, out, scores) => {
      const width = f.i32(keyHeads.mul(d));
      const stride = f.i32(width.shl(2));
      const tokens = f.i32(length.add(1));
      const bytes = f.i32(d.shl(2));
      for (const [row, token] of [[kRow, k], [vRow, v]]) {
        const target = f.i32(row.add(length.mul(stride)));
        eachVector(f, parts, width, (at) => at.store(target, at.load(token)));
      }
      f.for(0, keyHeads, 1, () => {
        f.for(0, heads.divU(keyHeads), 1, () => {
          f.call(head, tokens, d, stride, scale, q, kRow, vRow, out, scores);
          q.set(q.add(bytes));
          out.set(out.add(bytes));
        });
        kRow.set(kRow.add(bytes));
        vRow.set(vRow.add(bytes));
      });
    },
  );
  emitBatch(m, one);
}

const batchParameters = [...parameters, "i32", "i32", "i32"] as const;

/**
 * `decode(count, heads, keyHeads, d, scale, cacheRow, q, k, v, kCache, vCache, lengths, rows, out, scores)` for `count` sequences;
 * cacheRow: bytes of a cache row.
 */
function emitBatch(m: ModuleBuilder, one: Callable<readonly [...typeof parameters, "i32"], undefined>): void {
  m.function(
    "decode",
    ["i32", ...batchParameters] as const,
    (f, count, heads, keyHeads, d, scale, cacheRow, q, k, v, kCache, vCache, lengths, rows, out, scores) => {
      const queryBytes = f.i32(heads.mul(d).shl(2));
      const keyBytes = f.i32(keyHeads.mul(d).shl(2));
      f.for(0, count, 1, () => {
        const row = f.i32(load.i32(rows).mul(cacheRow));
        const [kRow, vRow] = [kCache, vCache].map((cache) => cache.add(row));
        f.call(one, heads, keyHeads, d, scale, load.i32(lengths), q, k, v, kRow, vRow, out, scores);
        for (const pointer of [q, out]) pointer.set(pointer.add(queryBytes));
        for (const pointer of [k, v]) pointer.set(pointer.add(keyBytes));
        for (const pointer of [lengths, rows]) pointer.set(pointer.add(4));
      });
    },
    { exported: true },
  );
}

/** Rough nanoseconds per cached token, head and element. */
const COST = 0.3;

function decodeToken(call: KernelCall): tf.TensorInfo {
  const q = call.input("q", [null, null, null]);
  const [batch, heads, d] = q.shape;
  const k = call.input("k", [batch, null, d]);
  const keyHeads = k.shape[1];
  const v = call.input("v", [batch, keyHeads, d]);
  const kCache = call.input("kCache", [null, null, keyHeads, d]);
  const [cacheRows, capacity] = kCache.shape;
  const vCache = call.input("vCache", kCache.shape);
  const [lengths, rows] = ["lengths", "rows"].map((name) => call.input(name, [batch], "int32"));
  const scale = call.number("scale");
  if (heads % keyHeads !== 0) throw call.error(`${heads} query heads are not a multiple of ${keyHeads} key heads`);
  const lengthList = call.integers(lengths);
  checkPlaces(call, lengthList, call.integers(rows), cacheRows, capacity);
  const out = call.output(q.shape);
  const [qAt, kAt, vAt, kCacheAt, vCacheAt] = [q, k, v, kCache, vCache].map((tensor) => call.address(tensor));
  const [lengthsAt, rowsAt, outAt] = [lengths, rows, out].map((tensor) => call.address(tensor));
  const [queryBytes, keyBytes] = [4 * heads * d, 4 * keyHeads * d];
  const cost = COST * heads * d * lengthList.reduce((sum, length) => sum + length + 1, 0);
  const calls = call.ranges(batch, cost).map(([from, to]) => [
    ...[to - from, heads, keyHeads, d, scale, capacity * keyBytes],
    ...[qAt + from * queryBytes, kAt + from * keyBytes, vAt + from * keyBytes, kCacheAt, vCacheAt],
    ...[lengthsAt + 4 * from, rowsAt + 4 * from, outAt + from * queryBytes],
  ]);
  call.run("decode", calls, cost, [4 * (capacity + 3)]);
  return out;
}

function checkPlaces(
  call: KernelCall,
  lengths: Int32Array,
  rows: Int32Array,
  cacheRows: number,
  capacity: number,
): void {
  const seen = new Set<number>();
  for (let b = 0; b < rows.length; b++) {
    if (rows[b] < 0 || rows[b] >= cacheRows || seen.has(rows[b])) {
      throw call.error(`rows[${b}] is ${rows[b]}, must be a cache row below ${cacheRows} that no other sequence uses`);
    }
    seen.add(rows[b]);
    if (lengths[b] < 0 || lengths[b] >= capacity) {
      throw call.error(`lengths[${b}] is ${lengths[b]}, must be at least 0 and below the cache's ${capacity} places`);
    }
  }
}
