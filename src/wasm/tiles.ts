/**
 * The inner part of all matrix products: C = A·B on register tiles, for a B that was packed into column panels.
 *
 * - Packed B: panels of {@link NR} columns; a panel is K rows of NR floats, columns beyond N are zero.
 * - A is read in place, in one of two layouts: "rows" (element (i, k) at `a + i·stride + 4k`) and "columns" (at `a + k·stride + 4i`),
 *   so that a transposed A needs no other loop.
 * - A tile of {@link MR} × NR sums lives in 12 vector registers; per k it takes 6 broadcasts and 2 loads for 12 multiply-adds,
 *   which keeps the multiply-add units, not the load units, busy (16 registers is what x86-64 has).
 * - The result is `C = init + A·B`, where `init` is C itself (accumulate), a row of zeros or a bias (row stride 0).
 *
 * Cost: 2·M·N·K operations; reads of A once per panel and of packed B once per MR rows.
 *
 * @module
 */
import { type Callable, type FunctionBuilder, type I32, load, type Local, madd } from "./asm.ts";
import type { ModuleBuilder } from "./module.ts";

/** Rows of a register tile. */
export const MR = 6;
/** Columns of a register tile and of a packed panel, in floats. */
export const NR = 8;

/** Terms per turn of the inner loop; a power of two. */
const UNROLL = 4;

type Layout = "rows" | "columns";
const tileParameters = ["i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;
type Tile = Callable<typeof tileParameters, undefined>;

/** `tile(k, a, aStride, b, init, initStride, c, cStride)` for a fixed number of rows; all strides in bytes. */
function emitTile(m: ModuleBuilder, layout: Layout, rows: number): Tile {
  return m.function(`tile_${layout}_${rows}`, tileParameters, (f, k, a, aStride, b, init, initStride, c, cStride) => {
    const vectors = NR / 4;
    const sums = Array.from({ length: rows }, () => Array.from({ length: vectors }, () => f.v128(0)));
    const pointers = layout === "columns" ? [a] : rowPointers(f, a, aStride, rows);
    const column = Array.from({ length: vectors }, () => f.v128());
    const value = f.v128();
    const step = (u: number): void => {
      for (let v = 0; v < vectors; v++) column[v].set(load.v128(b, 4 * (u * NR + 4 * v)));
      for (let i = 0; i < rows; i++) {
        value.set(layout === "columns" ? load.splat(a, 4 * i) : load.splat(pointers[i], 4 * u));
        for (let v = 0; v < vectors; v++) sums[i][v].set(madd(value, column[v], sums[i][v]));
      }
      if (layout === "columns") a.set(a.add(aStride));
    };
    const steps = (count: number): void => {
      for (let u = 0; u < count; u++) step(u);
      b.set(b.add(4 * count * NR));
      if (layout === "rows") { for (const pointer of pointers) pointer.set(pointer.add(4 * count)); }
    };
    f.for(UNROLL - 1, k, UNROLL, () => steps(UNROLL));
    f.for(k.sub(k.and(UNROLL - 1)), k, 1, () => steps(1));
    for (let i = 0; i < rows; i++) {
      for (let v = 0; v < vectors; v++) f.storeV128(c, load.v128(init, 16 * v).add(sums[i][v]), 16 * v);
      if (i + 1 < rows) {
        init.set(init.add(initStride));
        c.set(c.add(cStride));
      }
    }
  });
}

function rowPointers(f: FunctionBuilder, a: Local<"i32">, stride: I32, rows: number): Local<"i32">[] {
  const pointers = [a];
  for (let i = 1; i < rows; i++) pointers.push(f.i32(pointers[i - 1].add(stride)));
  return pointers;
}

const blockParameters = ["i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;
/** See {@link emitBlock}. */
export type Block = Callable<typeof blockParameters, undefined>;

/**
 * `block(m, n, k, a, aStride, b, panelStride, init, initStride, c, cStride, edge)`: any m, n, k ≥ 1, strides in bytes, `panelStride`
 * from one packed panel to the next. `edge` is room for one tile: where the last panel has columns beyond n, they are
 * computed there and only the first n reach C, so neither `init` nor C needs padding.
 */
export function emitBlock(m: ModuleBuilder, layout: Layout): Block {
  const tiles = Array.from({ length: MR }, (_, i) => emitTile(m, layout, i + 1));
  return m.function(
    `block_${layout}`,
    blockParameters,
    (f, rows, n, k, a, aStride, b, panelStride, init, initStride, c, cStride, edge) => {
      const cursors = { a: f.i32(), init: f.i32(), c: f.i32() };
      f.for(0, n, NR, (j) => {
        const partial = f.i32(n.sub(j).lt(NR));
        cursors.a.set(a);
        cursors.init.set(init);
        cursors.c.set(c);
        f.for(0, rows, MR, (i) => {
          const left = f.i32(rows.sub(i).min(MR));
          const tile = (from: I32, fromStride: I32, to: I32, toStride: I32): void => {
            const call = (size: number): void =>
              f.call(tiles[size - 1], k, cursors.a, aStride, b, from, fromStride, to, toStride);
            const smaller = (size: number): void => {
              if (size === 1) call(1);
              else f.if(left.eq(size), () => call(size), () => smaller(size - 1));
            };
            smaller(MR);
          };
          f.if(partial, () => {
            const valid = f.i32(n.sub(j).shl(2));
            const edgeStride = f.i32(4 * NR);
            copyRows(f, left, valid, edge, edgeStride, cursors.init, initStride);
            tile(edge, edgeStride, edge, edgeStride);
            copyRows(f, left, valid, cursors.c, cStride, edge, edgeStride);
          }, () => tile(cursors.init, initStride, cursors.c, cStride));
          cursors.a.set(layout === "rows" ? cursors.a.add(aStride.mul(MR)) : cursors.a.add(4 * MR));
          cursors.init.set(cursors.init.add(initStride.mul(MR)));
          cursors.c.set(cursors.c.add(cStride.mul(MR)));
        });
        b.set(b.add(panelStride));
        init.set(init.add(4 * NR));
        c.set(c.add(4 * NR));
      });
    },
  );
}

function copyRows(f: FunctionBuilder, rows: I32, bytes: I32, to: I32, toStride: I32, from: I32, fromStride: I32): void {
  f.for(0, rows, 1, (i) => {
    const target = f.i32(to.add(i.mul(toStride)));
    const source = f.i32(from.add(i.mul(fromStride)));
    f.for(0, bytes, 4, (x) => f.storeF32(target.add(x), load.f32(source.add(x))));
  });
}
