/**
 * Writes a WebAssembly module: its types, one imported memory, imported and own functions, exports.
 *
 * @module
 */
import { type Callable, FunctionBuilder, type Local, typeCodes, unsignedLeb as size, type ValueType } from "./asm.ts";

const text = (value: string): number[] => {
  const bytes = new TextEncoder().encode(value);
  return [...size(bytes.length), ...bytes];
};

/** Pages of 64 KiB that a memory can have. */
const MOST_PAGES = 65536;

interface Signature {
  readonly parameters: readonly ValueType[];
  readonly result: ValueType | undefined;
}

const signatureBytes = ({ parameters, result }: Signature): number[] => [
  0x60,
  ...size(parameters.length),
  ...parameters.map((type) => typeCodes[type]),
  ...(result === undefined ? [0] : [1, typeCodes[result]]),
];

/** Collects functions and writes the binary. Imports come first: declare them before the first own function. */
export class ModuleBuilder {
  #imports: { name: string; signature: Signature }[] = [];
  #functions: { name: string; signature: Signature; exported: boolean; bytes: number[] }[] = [];

  /**
   * Declares a function that the host supplies under `env.NAME`.
   *
   * @throws {RangeError} after the first own function: indices are given out in order.
   */
  import<const P extends readonly ValueType[], R extends ValueType | undefined>(
    name: string,
    parameters: P,
    result: R,
  ): Callable<P, R> {
    if (this.#functions.length > 0) throw new RangeError(`import ${name}: declare imports before functions`);
    const index = this.#imports.push({ name, signature: { parameters, result } }) - 1;
    return { index, parameters, result };
  }

  /** Adds a function; `emit` receives its builder and its parameters. A function with a result must end in `f.return(value)`. */
  function<const P extends readonly ValueType[], R extends ValueType | undefined = undefined>(
    name: string,
    parameters: P,
    emit: (f: FunctionBuilder, ...values: { [K in keyof P]: Local<P[K]> }) => void,
    options: { result?: R; exported?: boolean } = {},
  ): Callable<P, R> {
    const f = new FunctionBuilder(parameters);
    const values = parameters.map((type, index) => f.local(type, index));
    (emit as (f: FunctionBuilder, ...values: unknown[]) => void)(f, ...values);
    const result = options.result as R;
    // A function with a result leaves through `return`; what follows is never reached but must validate.
    const body = [...f.prologue, ...f.body, ...(result === undefined ? [] : [0x00])];
    const locals = [...size(f.locals.length), ...f.locals.flatMap((type) => [1, typeCodes[type]])];
    const bytes = [...locals, ...body, 0x0b];
    const exported = options.exported ?? false;
    const own = this.#functions.push({ name, signature: { parameters, result }, exported, bytes }) - 1;
    return { index: this.#imports.length + own, parameters, result };
  }

  /**
   * The binary.
   *
   * @param options.sharedMemory Whether the memory that it imports is shared between threads. @default {false}
   */
  bytes({ sharedMemory = false } = {}): Uint8Array<ArrayBuffer> {
    const section = (id: number, items: number[][]): number[] => {
      const content = [size(items.length), ...items].flat();
      return [id, ...size(content.length), ...content];
    };
    const signatures = [...this.#imports, ...this.#functions].map(({ signature }) => signatureBytes(signature));
    const kinds = [...new Set(signatures.map((bytes) => bytes.join()))];
    const kindOf = signatures.map((bytes) => size(kinds.indexOf(bytes.join())));
    // At least one page; shared memory must name its maximum too.
    const limits = sharedMemory ? [0x03, 0x01, ...size(MOST_PAGES)] : [0x00, 0x01];
    const memory = [...text("env"), ...text("memory"), 0x02, ...limits];
    const imports = this.#imports.map(({ name }, i) => [...text("env"), ...text(name), 0x00, ...kindOf[i]]);
    const exports = this.#functions.flatMap(({ name, exported }, i) =>
      exported ? [[...text(name), 0x00, ...size(this.#imports.length + i)]] : []
    );
    return new Uint8Array([
      ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00],
      ...section(1, kinds.map((kind) => kind.split(",").map(Number))),
      ...section(2, [memory, ...imports]),
      ...section(3, kindOf.slice(this.#imports.length)),
      ...section(7, exports),
      ...section(10, this.#functions.map(({ bytes }) => [...size(bytes.length), ...bytes])),
    ]);
  }
}
