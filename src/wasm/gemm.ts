/**
 * C = op(A)·op(B) + bias for row-major f32 matrices of any size, blocked for the caches.
 *
 * Blocks of {@link KC} × {@link NC} of op(B) are packed into panels (they stay in the second-level cache), then {@link MC} rows of
 * op(A) at a time meet all panels. Sums over more than KC terms are added up block by block, which also keeps rounding
 * errors small. Scratch: see {@link gemmScratchBytes}. Cost: 2·M·N·K operations plus one copy of B per call.
 *
 * @module
 */
import { type Callable } from "./asm.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import { type Block, MR, NR } from "./tiles.ts";

/** Terms summed per block. */
export const KC = 256;
/** Columns packed at a time. */
export const NC = 512;
/** Rows of A per block: a multiple of {@link MR}. */
export const MC = 24 * MR;

/** Bytes of scratch that `gemm` needs: a row of zeros, one tile, one packed block. */
export function gemmScratchBytes(n: number, k: number): number {
  const columns = Math.min(NC, Math.ceil(n / NR) * NR);
  return 4 * (NC + MR * NR + Math.min(KC, k) * columns);
}

const six = ["i32", "i32", "i32", "i32", "i32", "i32"] as const;
const parameters = [...six, ...six, "i32"] as const;

/**
 * Adds `gemm(m, n, k, a, aStride, transposeA, b, bStride, transposeB, bias, c, cStride, scratch)`: strides in bytes from one row to
 * the next as stored, so that blocks of larger matrices can be multiplied; `bias` 0 means none; others are addresses. Each
 * element is summed in the same order whatever block it is computed with.
 */
export function emitGemm(m: ModuleBuilder, parts: Parts): Callable<typeof parameters, undefined> {
  return m.function(
    "gemm",
    parameters,
    (f, rows, columns, depth, a, aStride, transposeA, b, bStride, transposeB, bias, c, cStride, scratch) => {
      const edge = f.i32(scratch.add(4 * NC));
      const packed = f.i32(edge.add(4 * MR * NR));
      const init = f.i32();
      const initStride = f.i32();
      f.zero(scratch, f.i32(4 * NC));
      f.for(0, columns, NC, (j) => {
        const width = f.i32(columns.sub(j).min(NC));
        const cBlock = f.i32(c.add(j.shl(2)));
        f.for(0, depth, KC, (p) => {
          const terms = f.i32(depth.sub(p).min(KC));
          const panelStride = f.i32(terms.mul(4 * NR));
          f.if(
            transposeB,
            () => f.call(parts.packColumns, width, terms, b.add(j.mul(bStride)).add(p.shl(2)), bStride, packed),
            () => f.call(parts.packRows, width, terms, b.add(p.mul(bStride)).add(j.shl(2)), bStride, packed),
          );
          init.set(scratch);
          initStride.set(f.i32(0));
          f.if(bias, () => init.set(bias.add(j.shl(2))));
          f.if(p, () => {
            init.set(cBlock);
            initStride.set(cStride);
          });
          f.for(0, rows, MC, (i) => {
            const height = f.i32(rows.sub(i).min(MC));
            const from = f.i32(init.add(i.mul(initStride)));
            const to = f.i32(cBlock.add(i.mul(cStride)));
            const block = (part: Block, start: typeof from): void =>
              f.call(
                part,
                height,
                width,
                terms,
                start,
                aStride,
                packed,
                panelStride,
                from,
                initStride,
                to,
                cStride,
                edge,
              );
            f.if(
              transposeA,
              () => block(parts.blockColumns, f.i32(a.add(p.mul(aStride)).add(i.shl(2)))),
              () => block(parts.blockRows, f.i32(a.add(i.mul(aStride)).add(p.shl(2)))),
            );
          });
        });
      });
    },
    { exported: true },
  );
}
