/**
 * Values of the assembler: typed expressions of i32, f32, f64 and 128-bit vectors, and reads from memory. See `asm.ts`.
 *
 * @module
 */

/** The value types that kernels use. */
export type ValueType = "i32" | "f32" | "f64" | "v128";

/** How the binary names them. */
export const typeCodes: Record<ValueType, number> = { i32: 0x7f, f32: 0x7d, f64: 0x7c, v128: 0x7b };

type Code = readonly number[];

/** LEB128, the variable-length integers of the binary format. */
export function unsignedLeb(value: number): number[] {
  const bytes: number[] = [];
  let rest = value >>> 0;
  do {
    const low = rest & 0x7f;
    rest >>>= 7;
    bytes.push(rest === 0 ? low : low | 0x80);
  } while (rest !== 0);
  return bytes;
}

function signedLeb(value: number): number[] {
  const bytes: number[] = [];
  let rest = value | 0;
  while (true) {
    const low = rest & 0x7f;
    rest >>= 7;
    const done = (rest === 0 && (low & 0x40) === 0) || (rest === -1 && (low & 0x40) !== 0);
    bytes.push(done ? low : low | 0x80);
    if (done) return bytes;
  }
}

function floatBytes(value: number): number[] {
  return [...new Uint8Array(new Float32Array([value]).buffer)];
}

function doubleBytes(value: number): number[] {
  return [...new Uint8Array(new Float64Array([value]).buffer)];
}

/** Opcode bytes of a vector instruction. */
export const simd = (opcode: number): number[] => [0xfd, ...unsignedLeb(opcode)];

/** Whether the engine accepts a function (v128, v128, v128) -> v128 with this body. */
function accepts(...body: number[]): boolean {
  const header = [0, 97, 115, 109, 1, 0, 0, 0, 1, 8, 1, 0x60, 3, 0x7b, 0x7b, 0x7b, 1, 0x7b, 3, 2, 1, 0];
  return WebAssembly.validate(
    new Uint8Array([...header, 10, body.length + 4, 1, body.length + 2, 0, ...body, 0x0b]),
  );
}

/** Whether this engine knows relaxed SIMD; then {@link madd} is one fused instruction where the processor has it. */
export const hasRelaxedMadd: boolean = accepts(0x20, 0, 0x20, 1, 0x20, 2, 0xfd, 0x85, 0x02);

/** A 32-bit integer expression (also: an address in bytes, or a truth value). */
export class I32 {
  constructor(readonly code: Code) {}
  /** A constant. */
  static of(value: number | I32): I32 {
    return typeof value === "number" ? new I32([0x41, ...signedLeb(value)]) : value;
  }
  #with(other: I32 | number, opcode: number): I32 {
    return new I32([...this.code, ...I32.of(other).code, opcode]);
  }
  add(other: I32 | number): I32 {
    return other === 0 ? this : this.#with(other, 0x6a);
  }
  sub(other: I32 | number): I32 {
    return this.#with(other, 0x6b);
  }
  mul(other: I32 | number): I32 {
    return other === 1 ? this : this.#with(other, 0x6c);
  }
  divU(other: I32 | number): I32 {
    return this.#with(other, 0x6e);
  }
  and(other: I32 | number): I32 {
    return this.#with(other, 0x71);
  }
  or(other: I32 | number): I32 {
    return this.#with(other, 0x72);
  }
  shl(bits: I32 | number): I32 {
    return bits === 0 ? this : this.#with(bits, 0x74);
  }
  shrU(bits: I32 | number): I32 {
    return this.#with(bits, 0x76);
  }
  eq(other: I32 | number): I32 {
    return this.#with(other, 0x46);
  }
  ne(other: I32 | number): I32 {
    return this.#with(other, 0x47);
  }
  /** Signed comparison, as all orderings here. */
  lt(other: I32 | number): I32 {
    return this.#with(other, 0x48);
  }
  gt(other: I32 | number): I32 {
    return this.#with(other, 0x4a);
  }
  le(other: I32 | number): I32 {
    return this.#with(other, 0x4c);
  }
  ge(other: I32 | number): I32 {
    return this.#with(other, 0x4e);
  }
  /** This where `condition` holds, else `other`. */
  select(other: I32 | number, condition: I32): I32 {
    return new I32([...this.code, ...I32.of(other).code, ...condition.code, 0x1b]);
  }
  min(other: I32 | number): I32 {
    return this.select(other, this.lt(other));
  }
  toF32(): F32 {
    return new F32([...this.code, 0xb2]);
  }
}

/** A single-precision expression. */
export class F32 {
  constructor(readonly code: Code) {}
  /** A constant. */
  static of(value: number | F32): F32 {
    return typeof value === "number" ? new F32([0x43, ...floatBytes(value)]) : value;
  }
  #with(other: F32 | number, opcode: number): F32 {
    return new F32([...this.code, ...F32.of(other).code, opcode]);
  }
  add(other: F32 | number): F32 {
    return this.#with(other, 0x92);
  }
  sub(other: F32 | number): F32 {
    return this.#with(other, 0x93);
  }
  mul(other: F32 | number): F32 {
    return this.#with(other, 0x94);
  }
  div(other: F32 | number): F32 {
    return this.#with(other, 0x95);
  }
  max(other: F32 | number): F32 {
    return this.#with(other, 0x97);
  }
  neg(): F32 {
    return new F32([...this.code, 0x8c]);
  }
  sqrt(): F32 {
    return new F32([...this.code, 0x91]);
  }
  splat(): V128 {
    return new V128([...this.code, ...simd(19)]);
  }
  toF64(): F64 {
    return new F64([...this.code, 0xbb]);
  }
}

/** A double-precision expression, for long sums. */
export class F64 {
  constructor(readonly code: Code) {}
  /** A constant. */
  static of(value: number | F64): F64 {
    return typeof value === "number" ? new F64([0x44, ...doubleBytes(value)]) : value;
  }
  #with(other: F64 | number, opcode: number): F64 {
    return new F64([...this.code, ...F64.of(other).code, opcode]);
  }
  add(other: F64 | number): F64 {
    return this.#with(other, 0xa0);
  }
  sub(other: F64 | number): F64 {
    return this.#with(other, 0xa1);
  }
  mul(other: F64 | number): F64 {
    return this.#with(other, 0xa2);
  }
  div(other: F64 | number): F64 {
    return this.#with(other, 0xa3);
  }
  sqrt(): F64 {
    return new F64([...this.code, 0x9f]);
  }
  toF32(): F32 {
    return new F32([...this.code, 0xb6]);
  }
}

/** Four single-precision lanes; a few operations see them as integers of 32, 16 or 8 bits, two f64 or 128 bits. */
export class V128 {
  constructor(readonly code: Code) {}
  /** The same constant in all lanes. */
  static of(value: number | V128): V128 {
    if (typeof value !== "number") return value;
    const lane = floatBytes(value);
    return new V128([...simd(12), ...lane, ...lane, ...lane, ...lane]);
  }
  /** The same 32-bit integer in all lanes. */
  static ofBits(value: number): V128 {
    const lane = [...new Uint8Array(new Int32Array([value]).buffer)];
    return new V128([...simd(12), ...lane, ...lane, ...lane, ...lane]);
  }
  #with(other: V128 | number, opcode: number): V128 {
    return new V128([...this.code, ...V128.of(other).code, ...simd(opcode)]);
  }
  #unary(opcode: number): V128 {
    return new V128([...this.code, ...simd(opcode)]);
  }
  add(other: V128 | number): V128 {
    return this.#with(other, 228);
  }
  sub(other: V128 | number): V128 {
    return this.#with(other, 229);
  }
  mul(other: V128 | number): V128 {
    return this.#with(other, 230);
  }
  div(other: V128 | number): V128 {
    return this.#with(other, 231);
  }
  /** `other < this ? other : this`: one instruction, unlike the NaN-aware `min`. */
  pmin(other: V128 | number): V128 {
    return this.#with(other, 234);
  }
  /** `this < other ? other : this`: one instruction, unlike the NaN-aware `max`. */
  pmax(other: V128 | number): V128 {
    return this.#with(other, 235);
  }
  neg(): V128 {
    return this.#unary(225);
  }
  abs(): V128 {
    return this.#unary(224);
  }
  sqrt(): V128 {
    return this.#unary(227);
  }
  /** Rounded to the nearest integer, still as floats. */
  nearest(): V128 {
    return this.#unary(106);
  }
  /** All-ones lanes where `this < other`; false for NaN. */
  lt(other: V128 | number): V128 {
    return this.#with(other, 67);
  }
  /** All-ones lanes where `this > other`; false for NaN. */
  gt(other: V128 | number): V128 {
    return this.#with(other, 68);
  }
  and(other: V128): V128 {
    return this.#with(other, 78);
  }
  /** This where the bits of `mask` are zero. */
  andNot(mask: V128): V128 {
    return this.#with(mask, 79);
  }
  or(other: V128): V128 {
    return this.#with(other, 80);
  }
  xor(other: V128): V128 {
    return this.#with(other, 81);
  }
  /** Lanes as integers: converted with saturation. */
  toInt(): V128 {
    return this.#unary(248);
  }
  /** Sum of the lanes taken as i32. */
  intAdd(other: V128): V128 {
    return this.#with(other, 174);
  }
  /** Lanes taken as i32, shifted left. */
  intShl(bits: number): V128 {
    return new V128([...this.code, ...I32.of(bits).code, ...simd(171)]);
  }
  /** The lower eight bytes, each taken as 0..255, as eight i16. */
  widenLow(): V128 {
    return this.#unary(137);
  }
  /** The upper eight bytes, each taken as 0..255, as eight i16. */
  widenHigh(): V128 {
    return this.#unary(138);
  }
  /** Products of eight i16 and eight i16, summed by neighbours: four i32. */
  dotPairs(other: V128): V128 {
    return this.#with(other, 186);
  }
  /** Lanes taken as i32, shifted right with their sign. */
  intShr(bits: number): V128 {
    return new V128([...this.code, ...I32.of(bits).code, ...simd(172)]);
  }
  /** Lanes of this and of `other` taken as i32, held to what i16 can say: eight i16. */
  narrowToI16(other: V128): V128 {
    return this.#with(other, 133);
  }
  /** Eight i16 of this and eight of `other`, held to 0..255: sixteen bytes. */
  narrowToU8(other: V128): V128 {
    return this.#with(other, 102);
  }
  lane(index: 0 | 1 | 2 | 3): F32 {
    return new F32([...this.code, ...simd(31), index]);
  }
  /** A lane taken as i32. */
  intLane(index: 0 | 1 | 2 | 3): I32 {
    return new I32([...this.code, ...simd(27), index]);
  }
  withLane(index: 0 | 1 | 2 | 3, value: F32): V128 {
    return new V128([...this.code, ...value.code, ...simd(32), index]);
  }
  /** Lanes picked from this (0..3) and `other` (4..7). */
  shuffle(other: V128, lanes: readonly [number, number, number, number]): V128 {
    const bytes = lanes.flatMap((lane) => [4 * lane, 4 * lane + 1, 4 * lane + 2, 4 * lane + 3]);
    return new V128([...this.code, ...other.code, ...simd(13), ...bytes]);
  }
  /** Sixteen bytes picked from this (0..15) and `other` (16..31). */
  shuffleBytes(other: V128, bytes: readonly number[]): V128 {
    return new V128([...this.code, ...other.code, ...simd(13), ...bytes]);
  }
  /** The lower two lanes as f64. */
  promoteLow(): V128 {
    return this.#unary(95);
  }
  /** Sum of the lanes taken as f64. */
  doubleAdd(other: V128): V128 {
    return this.#with(other, 240);
  }
  /** Product of the lanes taken as f64. */
  doubleMul(other: V128): V128 {
    return this.#with(other, 242);
  }
  doubleLane(index: 0 | 1): F64 {
    return new F64([...this.code, ...simd(33), index]);
  }
}

/** `a·b + c` on four lanes, with one rounding where the engine and the processor offer it, else with two. */
export function madd(a: V128, b: V128 | number, c: V128 | number): V128 {
  if (!hasRelaxedMadd) return a.mul(b).add(c);
  return new V128([...a.code, ...V128.of(b).code, ...V128.of(c).code, ...simd(0x105)]);
}

/** `c − a·b` on four lanes; see {@link madd}. */
export function nmadd(a: V128, b: V128 | number, c: V128): V128 {
  if (!hasRelaxedMadd) return c.sub(a.mul(b));
  return new V128([...a.code, ...V128.of(b).code, ...c.code, ...simd(0x106)]);
}

/** Reads at `address + offset`; `offset` is a constant ≥ 0 in bytes. No alignment is required anywhere. */
export const load = {
  i32: (address: I32, offset = 0): I32 => new I32([...address.code, 0x28, 0, ...unsignedLeb(offset)]),
  f32: (address: I32, offset = 0): F32 => new F32([...address.code, 0x2a, 0, ...unsignedLeb(offset)]),
  v128: (address: I32, offset = 0): V128 => new V128([...address.code, ...simd(0), 0, ...unsignedLeb(offset)]),
  /** One f32 into all four lanes. */
  splat: (address: I32, offset = 0): V128 => new V128([...address.code, ...simd(9), 0, ...unsignedLeb(offset)]),
};
