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

Deno.test("vectors of integers: bytes widened, paired products, shifts, narrowing with saturation", () => {
  const m = new ModuleBuilder();
  m.function("work", ["i32"], (f, at) => {
    const [bytes, weights] = [f.v128(load.v128(at)), f.v128(load.v128(at, 16))];
    const low = f.v128(bytes.widenLow().dotPairs(weights)), high = f.v128(bytes.widenHigh().dotPairs(weights));
    f.storeV128(at, low, 32);
    f.storeV128(at, high, 48);
    f.storeV128(at, low.intShr(3), 64);
    f.storeV128(at, low.narrowToI16(high), 80);
    f.storeV128(at, low.narrowToI16(high).narrowToU8(weights), 96);
    f.storeV128(at, bytes.shuffleBytes(weights, [15, 0, 16, 31, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]), 112);
    f.storeI32(at, low.intLane(3), 128);
  }, { exported: true });
  const { exports, memory } = instantiate(m);
  const bytes = new Uint8Array(memory.buffer);
  bytes.set([0, 255, 128, 1, 2, 3, 200, 100, 255, 255, 4, 5, 0, 0, 7, 9]);
  new Int16Array(memory.buffer).set([1, -2, 1000, 1, -5, 7, -32768, 32767], 8);
  exports.work(0);
  const low = [-510, 128_001, 11, -3_276_900], high = [-255, 4005, 0, 65_527];
  assert.deepEqual([...new Int32Array(memory.buffer, 32, 12)], [...low, ...high, -64, 16_000, 1, -409_613]);
  const narrowed = [-510, 32_767, 11, -32_768, -255, 4005, 0, 32_767];
  assert.deepEqual([...new Int16Array(memory.buffer, 80, 8)], narrowed);
  assert.deepEqual([...bytes.slice(96, 112)], [0, 255, 11, 0, 0, 255, 0, 255, 1, 0, 255, 1, 0, 7, 0, 255]);
  assert.deepEqual([...bytes.slice(112, 117)], [9, 0, 1, 127, 255]);
  assert.equal(new Int32Array(memory.buffer, 128, 1)[0], low[3]);
});

Deno.test("imports: called with their index, and refused after the first function", () => {
  const m = new ModuleBuilder();
  const log = m.import("log", ["f64"], "f64");
  m.function("half", ["f64"], (f, x) => f.return(invoke(log, x).div(2)), { result: "f64", exported: true });
  assert.throws(() => m.import("late", [], undefined), /import late: declare imports before functions/);
  assert.equal(instantiate(m, { log: Math.log }).exports.half(9), Math.log(9) / 2);
});
