import assert from "node:assert/strict";
import { F32, F64, I32, invoke, load, madd, nmadd, V128 } from "./asm.ts";
import { ModuleBuilder } from "./module.ts";

type Exports = Record<string, (...values: number[]) => number>;

function instantiate(m: ModuleBuilder, env: Record<string, WebAssembly.ImportValue> = {}) {
  const memory = new WebAssembly.Memory({ initial: 1 });
  const instance = new WebAssembly.Instance(new WebAssembly.Module(m.bytes()), { env: { memory, ...env } });
  return { exports: instance.exports as Exports, memory };
}

Deno.test("constants of every encoded length survive", () => {
  const numbers = [
    0,
    1,
    -1,
    63,
    64,
    -64,
    -65,
    127,
    128,
    8191,
    8192,
    -8193,
    2 ** 20,
    -(2 ** 27),
    2 ** 31 - 1,
    -(2 ** 31),
  ];
  const m = new ModuleBuilder();
  for (const [i, value] of numbers.entries()) {
    m.function(`f${i}`, [], (f) => f.return(I32.of(value)), { result: "i32", exported: true });
  }
  m.function("double", [], (f) => f.return(F64.of(-1.1)), { result: "f64", exported: true });
  m.function("single", [], (f) => f.return(F32.of(0.1)), { result: "f32", exported: true });
  const { exports } = instantiate(m);
  assert.deepEqual(numbers.map((_, i) => exports[`f${i}`]()), numbers);
  assert.equal(exports.double(), -1.1);
  assert.equal(exports.single(), Math.fround(0.1));
});

Deno.test("loops, branches and calls", () => {
  const m = new ModuleBuilder();
  const square = m.function("square", ["i32"], (f, x) => f.return(x.mul(x)), { result: "i32" });
  m.function("sum", ["i32", "i32"], (f, from, to) => {
    const total = f.i32(0);
    f.for(from, to, 3, (i) =>
      f.if(
        i.and(1),
        () => total.set(total.add(invoke(square, i))),
        () => total.set(total.sub(1)),
      ));
    f.return(total);
  }, { result: "i32", exported: true });
  m.function("cut", ["i32"], (f, x) => f.return(x.min(7).select(-1, x.ge(0))), { result: "i32", exported: true });
  const { exports } = instantiate(m);
  assert.equal(exports.sum(1, 12), 1 - 1 + 49 - 1);
  assert.equal(exports.sum(5, 5), 0);
  assert.equal(exports.sum(-3, -1), 9);
  assert.deepEqual([-5, 3, 9].map((x) => exports.cut(x)), [-1, 3, 7]);
});

Deno.test("vectors: arithmetic, shuffles, masks, doubles, far offsets", () => {
  const m = new ModuleBuilder();
  m.function("work", ["i32"], (f, at) => {
    const [a, b] = [f.v128(load.v128(at)), f.v128(load.v128(at, 16))];
    f.storeV128(at, a.shuffle(b, [3, 4, 1, 6]), 32);
    f.storeV128(at, a.lt(b).and(V128.of(1)).or(b.gt(f.constant(9)).andNot(V128.of(0))), 48);
    f.storeV128(at, madd(a, b, 10), 64);
    f.storeV128(at, nmadd(a, b, V128.of(10)), 80);
    f.storeV128(at, load.splat(at, 8).withLane(2, b.lane(3)), 40_000);
    const sum = f.v128(a.promoteLow().doubleAdd(b.promoteLow()));
    f.storeF32(at, sum.doubleLane(0).mul(sum.doubleLane(1)).toF32(), 40_016);
    f.storeV128(at, a.pmax(b).sub(a.pmin(b)).neg().abs().sqrt().nearest(), 40_020);
  }, { exported: true });
  const { exports, memory } = instantiate(m);
  const data = new Float32Array(memory.buffer);
  data.set([1, 2, 3, 4, 5, 1, 3, 20]);
  exports.work(0);
  assert.deepEqual([...data.slice(8, 12)], [4, 5, 2, 3]);
  assert.deepEqual([...data.slice(12, 15)], [1, 0, 0]);
  assert.deepEqual([...data.slice(16, 20)], [15, 12, 19, 90]);
  assert.deepEqual([...data.slice(20, 24)], [5, 8, 1, -70]);
  assert.deepEqual([...data.slice(10_000, 10_005)], [3, 3, 20, 3, 18]);
  assert.deepEqual([...data.slice(10_005, 10_009)], [2, 1, 0, 4]);
});

Deno.test("imports: called with their index, and refused after the first function", () => {
  const m = new ModuleBuilder();
  const log = m.import("log", ["f64"], "f64");
  m.function("half", ["f64"], (f, x) => f.return(invoke(log, x).div(2)), { result: "f64", exported: true });
  assert.throws(() => m.import("late", [], undefined), /import late: declare imports before functions/);
  assert.equal(instantiate(m, { log: Math.log }).exports.half(9), Math.log(9) / 2);
});
