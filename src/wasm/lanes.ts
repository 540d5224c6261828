/**
 * Loops over f32 arrays four lanes at a time, sums across lanes, and the exponential.
 *
 * @module
 */
import {
  type Callable,
  F32,
  type F64,
  type FunctionBuilder,
  type I32,
  invoke,
  load,
  type Local,
  madd,
  nmadd,
  V128,
} from "./asm.ts";
import type { ModuleBuilder } from "./module.ts";
import { fitPolynomial } from "./polynomial.ts";

/** Functions for the last one to three floats of an array. */
export interface LaneParts {
  readonly loadPart: Callable<readonly ["i32", "i32", "f32"], "v128">;
  readonly storePart: Callable<readonly ["i32", "v128", "i32"], undefined>;
}

/** Adds the two functions; counts are 1 to 3. */
export function emitLaneParts(m: ModuleBuilder): LaneParts {
  const loadPart = m.function("load_part", ["i32", "i32", "f32"], (f, address, count, fill) => {
    const value = f.v128(fill.splat().withLane(0, load.f32(address)));
    f.if(count.gt(1), () => value.set(value.withLane(1, load.f32(address, 4))));
    f.if(count.gt(2), () => value.set(value.withLane(2, load.f32(address, 8))));
    f.return(value);
  }, { result: "v128" });
  const storePart = m.function("store_part", ["i32", "v128", "i32"], (f, address, value, count) => {
    f.storeF32(address, value.lane(0));
    f.if(count.gt(1), () => f.storeF32(address, value.lane(1), 4));
    f.if(count.gt(2), () => f.storeF32(address, value.lane(2), 8));
  });
  return { loadPart, storePart };
}

/** How a loop body reads and writes "its" four floats of an array that starts at `base`. */
export interface Access {
  /** Lanes beyond the end of the array hold `fill`. @default 0 */
  load(base: I32, fill?: number): V128;
  /** Lanes beyond the end are not written. */
  store(base: I32, value: V128): void;
}

/** Emits `body` for each four of `count` floats, and once more for the one to three left over. */
export function eachVector(
  f: FunctionBuilder,
  parts: LaneParts,
  count: I32,
  body: (at: Access) => void,
): void {
  const whole = f.i32(count.and(-4).shl(2));
  const offset = f.i32(0);
  f.if(whole, () =>
    f.doWhile(() => {
      body({
        load: (base) => load.v128(base.add(offset)),
        store: (base, value) => f.storeV128(base.add(offset), value),
      });
      offset.set(offset.add(16));
    }, () => offset.lt(whole)));
  const rest = f.i32(count.and(3));
  f.if(rest, () =>
    body({
      load: (base, fill = 0) => f.v128(invoke(parts.loadPart, base.add(offset), rest, F32.of(fill))),
      store: (base, value) => f.call(parts.storePart, base.add(offset), value, rest),
    }));
}

/** Sum of the four lanes, in a fixed order. */
export function sumLanes(f: FunctionBuilder, value: V128): F32 {
  const four = f.v128(value);
  const two = f.v128(four.add(four.shuffle(four, [2, 3, 0, 1])));
  return two.lane(0).add(two.lane(1));
}

/** Largest of the four lanes; lanes that are NaN do not count. */
export function maxLane(f: FunctionBuilder, value: V128): F32 {
  const four = f.v128(value);
  const two = f.v128(four.pmax(four.shuffle(four, [2, 3, 0, 1])));
  return two.pmax(two.shuffle(two, [1, 0, 3, 2])).lane(0);
}

/** Adds the four lanes to two pairs of f64 sums, so that long sums keep their digits. */
export function addToDoubles(f: FunctionBuilder, sums: [Local<"v128">, Local<"v128">], value: V128): void {
  const four = f.v128(value);
  sums[0].set(sums[0].doubleAdd(four.promoteLow()));
  sums[1].set(sums[1].doubleAdd(four.shuffle(four, [2, 3, 2, 3]).promoteLow()));
}

/** The total of {@link addToDoubles}. */
export function doubleTotal(f: FunctionBuilder, sums: [Local<"v128">, Local<"v128">]): F64 {
  const both = f.v128(sums[0].doubleAdd(sums[1]));
  return both.doubleLane(0).add(both.doubleLane(1));
}

/** 1/n! + r/(n+1)! + …: the rest of the exponential series from r^n on, over r^n. */
function series(n: number, r: number): number {
  let term = 1;
  for (let i = 2; i <= n; i++) term /= i;
  let sum = 0;
  for (let i = n; i < n + 16; i++, term *= r / i) sum += term;
  return sum;
}

// e^r = 1 + r + r²·tail(r) for |r| ≤ ln 2 / 2; the fit is better than 3e-9, so rounding decides.
const expTail = fitPolynomial(
  (r) => series(2, r),
  -0.347,
  0.347,
  4,
);
// ln 2 in two parts: the first has few digits, so that n times it is exact.
const LN2_HIGH = 0.693359375;
const LN2_LOW = Math.LN2 - LN2_HIGH;
/** Where {@link exp} goes to 0: the result would be subnormal. */
const EXP_LOWEST = -87.3;
/** Beyond this, {@link exp} stays at e^88 (1.65e38). */
const EXP_HIGHEST = 88;

/** `p[0] + p[1]·x + …` */
export function polynomial(f: FunctionBuilder, x: V128, coefficients: readonly number[]): Local<"v128"> {
  const sum = f.v128(f.constant(coefficients[coefficients.length - 1]));
  for (let i = coefficients.length - 2; i >= 0; i--) sum.set(madd(sum, x, f.constant(coefficients[i])));
  return sum;
}

/** e^x on four lanes: relative error ≤ 2e-7; 0 below −87.3, held at e^88 above 88, NaN stays NaN. */
export function exp(f: FunctionBuilder, x: V128): Local<"v128"> {
  const value = f.v128(x);
  const lowest = f.constant(EXP_LOWEST);
  const clamped = f.v128(value.pmin(f.constant(EXP_HIGHEST)).pmax(lowest));
  const n = f.v128(clamped.mul(f.constant(Math.LOG2E)).nearest());
  const r = f.v128(nmadd(n, f.constant(LN2_LOW), nmadd(n, f.constant(LN2_HIGH), clamped)));
  const tail = polynomial(f, r, expTail);
  const mantissa = f.v128(madd(r.mul(r), tail, r).add(f.constant(1)));
  // The bits of 2^n: n added to the exponent.
  const result = mantissa.intAdd(n.toInt().intShl(23));
  return f.v128(result.andNot(value.lt(lowest)));
}

/** 1 / (1 + e^−x) on four lanes, without overflow. */
export function sigmoid(f: FunctionBuilder, x: V128): Local<"v128"> {
  const one = f.constant(1);
  return f.v128(one.div(exp(f, x.neg()).add(one)));
}
