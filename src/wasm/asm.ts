/**
 * A small structured assembler for WebAssembly with 128-bit SIMD.
 *
 * Values are typed expression objects ({@link I32}, {@link F32}, {@link F64}, {@link V128}) that hold the code which leaves
 * the value on the stack; a {@link FunctionBuilder} takes statements (assignments, stores, loops, calls) and a
 * {@link ModuleBuilder} writes the binary. A module imports its memory, so its functions work in place on memory that somebody
 * else owns. The type checker of TypeScript takes the part of the WebAssembly validator: an i32 cannot be added to a vector.
 *
 * Expressions are code, not results: one that is used twice is computed twice. Put it into a local (`f.i32(expr)`) to share it.
 *
 * @module
 */
import { F32, F64, I32, simd, unsignedLeb, V128, type ValueType } from "./values.ts";

export * from "./values.ts";

type Class<T> = T extends "i32" ? I32 : T extends "f32" ? F32 : T extends "f64" ? F64 : V128;
/** A local variable: an expression that can be assigned. */
export type Local<T extends ValueType> = Class<T> & { set(value: Class<T>): void };
type Arguments<P extends readonly ValueType[]> = {
  [K in keyof P]: Class<P[K]> | (P[K] extends "i32" ? number : never);
};

/** A function of a module that others can call. */
export interface Callable<P extends readonly ValueType[], R extends ValueType | undefined> {
  readonly index: number;
  readonly parameters: P;
  readonly result: R;
}

const wrap = (type: ValueType, code: readonly number[]): I32 | F32 | F64 | V128 =>
  type === "i32" ? new I32(code) : type === "f32" ? new F32(code) : type === "f64" ? new F64(code) : new V128(code);

function argumentCode(values: readonly (I32 | F32 | F64 | V128 | number)[]): number[] {
  return values.flatMap((value) => [...(typeof value === "number" ? I32.of(value).code : value.code)]);
}

/** The value of calling `callee`, for functions that have a result. */
export function invoke<const P extends readonly ValueType[], R extends ValueType>(
  callee: Callable<P, R>,
  ...values: Arguments<P>
): Class<R> {
  const code = [...argumentCode(values as never), 0x10, ...unsignedLeb(callee.index)];
  return wrap(callee.result, code) as Class<R>;
}

/** Collects the statements of one function. */
export class FunctionBuilder {
  readonly body: number[] = [];
  readonly locals: ValueType[] = [];
  /** Assignments of {@link constant}s, before the body. */
  readonly prologue: number[] = [];
  #constants = new Map<number, V128>();
  #parameters: number;

  constructor(parameters: readonly ValueType[]) {
    this.#parameters = parameters.length;
  }

  /** The local at a position, parameters first. */
  local<T extends ValueType>(type: T, index: number): Local<T> {
    const set = (value: { code: readonly number[] }): void => {
      this.body.push(...value.code, 0x21, ...unsignedLeb(index));
    };
    return Object.assign(wrap(type, [0x20, ...unsignedLeb(index)]), { set }) as unknown as Local<T>;
  }

  #declare<T extends ValueType>(type: T, value?: { code: readonly number[] }): Local<T> {
    const index = this.#parameters + this.locals.push(type) - 1;
    if (value !== undefined) this.body.push(...value.code, 0x21, ...unsignedLeb(index));
    return this.local(type, index);
  }

  /** Declares a local and, where a value is given, assigns it here. Locals live as long as the function. */
  i32(value?: I32 | number): Local<"i32"> {
    return this.#declare("i32", value === undefined ? undefined : I32.of(value));
  }
  f32(value?: F32 | number): Local<"f32"> {
    return this.#declare("f32", value === undefined ? undefined : F32.of(value));
  }
  f64(value?: F64 | number): Local<"f64"> {
    return this.#declare("f64", value === undefined ? undefined : F64.of(value));
  }
  v128(value?: V128 | number): Local<"v128"> {
    return this.#declare("v128", value === undefined ? undefined : V128.of(value));
  }

  /**
   * The same number in all lanes, set once when the function starts. A constant vector inside a loop is built anew on each
   * turn (three instructions in V8), which can cost more than the arithmetic.
   */
  constant(value: number): V128 {
    let local = this.#constants.get(value);
    if (local === undefined) {
      const index = this.#parameters + this.locals.push("v128") - 1;
      this.prologue.push(...V128.of(value).code, 0x21, ...unsignedLeb(index));
      local = this.local("v128", index);
      this.#constants.set(value, local);
    }
    return local;
  }

  storeI32(address: I32, value: I32 | number, offset = 0): void {
    this.body.push(...address.code, ...I32.of(value).code, 0x36, 0, ...unsignedLeb(offset));
  }
  storeF32(address: I32, value: F32 | number, offset = 0): void {
    this.body.push(...address.code, ...F32.of(value).code, 0x38, 0, ...unsignedLeb(offset));
  }
  storeV128(address: I32, value: V128 | number, offset = 0): void {
    this.body.push(...address.code, ...V128.of(value).code, ...simd(11), 0, ...unsignedLeb(offset));
  }
  /** memory.fill with zero bytes. */
  zero(address: I32, bytes: I32): void {
    this.body.push(...address.code, 0x41, 0, ...bytes.code, 0xfc, 11, 0);
  }
  /** memory.copy; the ranges may overlap. */
  copy(to: I32, from: I32, bytes: I32): void {
    this.body.push(...to.code, ...from.code, ...bytes.code, 0xfc, 10, 0, 0);
  }

  if(condition: I32, then: () => void, otherwise?: () => void): void {
    this.body.push(...condition.code, 0x04, 0x40);
    then();
    if (otherwise !== undefined) {
      this.body.push(0x05);
      otherwise();
    }
    this.body.push(0x0b);
  }

  /** `do body while (condition)`; the body must make progress. */
  doWhile(body: () => void, condition: () => I32): void {
    this.body.push(0x03, 0x40);
    body();
    this.body.push(...condition().code, 0x0d, 0, 0x0b);
  }

  /** `for (i = from; i < to; i += step)`, signed; `to` is evaluated again on each turn. */
  for(from: I32 | number, to: I32 | number, step: I32 | number, body: (i: Local<"i32">) => void): void {
    const i = this.i32(from);
    this.if(i.lt(to), () =>
      this.doWhile(() => {
        body(i);
        i.set(i.add(step));
      }, () => i.lt(to)));
  }

  /** Calls a function that has no result. */
  call<const P extends readonly ValueType[]>(callee: Callable<P, undefined>, ...values: Arguments<P>): void {
    this.body.push(...argumentCode(values as never), 0x10, ...unsignedLeb(callee.index));
  }

  /** Ends the function, with its result if it has one. */
  return(value?: I32 | F32 | F64 | V128): void {
    if (value !== undefined) this.body.push(...value.code);
    this.body.push(0x0f);
  }
}
