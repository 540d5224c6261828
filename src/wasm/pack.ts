/**
 * Copies a matrix into the panels that `tiles.ts` reads: panels of NR columns, K rows of NR floats each, missing columns zero.
 *
 * @module
 */
import { type Callable, type FunctionBuilder, type I32, load, type Local, V128 } from "./asm.ts";
import type { ModuleBuilder } from "./module.ts";
import { NR } from "./tiles.ts";

const parameters = ["i32", "i32", "i32", "i32", "i32"] as const;
/** `pack(n, k, source, stride, to)`; `to` needs `k · NR · ceil(n / NR)` floats. */
export type Pack = Callable<typeof parameters, undefined>;

/** Element (k, n) at `source + k·stride + 4n`. */
export function emitPackRows(m: ModuleBuilder): Pack {
  return m.function("pack_rows", parameters, (f, n, k, source, stride, to) => {
    const from = f.i32();
    f.for(0, n, NR, (j) => {
      from.set(source);
      f.if(n.sub(j).ge(NR), () =>
        f.for(0, k, 1, () => {
          for (let v = 0; v < NR / 4; v++) f.storeV128(to, load.v128(from, 16 * v), 16 * v);
          from.set(from.add(stride));
          to.set(to.add(4 * NR));
        }), () => {
        const valid = f.i32(n.sub(j).shl(2));
        f.for(0, k, 1, () => {
          for (let v = 0; v < NR / 4; v++) f.storeV128(to, 0, 16 * v);
          f.for(0, valid, 4, (x) => f.storeF32(to.add(x), load.f32(from.add(x))));
          from.set(from.add(stride));
          to.set(to.add(4 * NR));
        });
      });
      source.set(source.add(4 * NR));
    });
  });
}

/** Element (k, n) at `source + n·stride + 4k`: rows of the source become columns. */
export function emitPackColumns(m: ModuleBuilder): Pack {
  return m.function("pack_columns", parameters, (f, n, k, source, stride, to) => {
    const from = f.i32();
    f.for(0, n, NR, (j) => {
      const panel = f.i32(to);
      f.if(n.sub(j).lt(NR), () => f.zero(to, k.mul(4 * NR)));
      for (let v = 0; v < NR / 4; v++) {
        f.if(n.sub(j).ge(4 * v + 4), () => {
          const rows = [f.i32(source.add(stride.mul(4 * v)))];
          for (let i = 1; i < 4; i++) rows.push(f.i32(rows[i - 1].add(stride)));
          to.set(panel);
          f.for(3, k, 4, () => {
            transpose4(f, rows, to, 16 * v);
            for (const row of rows) row.set(row.add(16));
            to.set(to.add(16 * NR));
          });
          f.for(k.sub(k.and(3)), k, 1, () => {
            for (let i = 0; i < 4; i++) {
              f.storeF32(to, load.f32(rows[i]), 16 * v + 4 * i);
              rows[i].set(rows[i].add(4));
            }
            to.set(to.add(4 * NR));
          });
        }, () =>
          f.for(4 * v, n.sub(j), 1, (i) => {
            from.set(source.add(i.mul(stride)));
            to.set(panel.add(i.shl(2)));
            f.for(0, k, 1, () => {
              f.storeF32(to, load.f32(from));
              from.set(from.add(4));
              to.set(to.add(4 * NR));
            });
          }));
      }
      to.set(panel.add(k.mul(4 * NR)));
      source.set(source.add(stride.mul(NR)));
    });
  });
}

/** Four floats of each of four rows, stored as four vectors NR floats apart. */
function transpose4(f: FunctionBuilder, rows: Local<"i32">[], to: I32, offset: number): void {
  const [a, b, c, d] = rows.map((row) => f.v128(load.v128(row)));
  const interleave = (x: V128, y: V128, high: boolean): Local<"v128"> =>
    f.v128(x.shuffle(y, high ? [2, 6, 3, 7] : [0, 4, 1, 5]));
  const low = [interleave(a, b, false), interleave(c, d, false)];
  const high = [interleave(a, b, true), interleave(c, d, true)];
  for (const [half, [x, y]] of [low, high].entries()) {
    f.storeV128(to, x.shuffle(y, [0, 1, 4, 5]), offset + 4 * NR * 2 * half);
    f.storeV128(to, x.shuffle(y, [2, 3, 6, 7]), offset + 4 * NR * (2 * half + 1));
  }
}
