/**
 * The safetensors file format: eight bytes of header length, a JSON header, then the tensors' bytes without gaps. Headers
 * come from strangers, so every statement in them is checked before a byte of data is read.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";

/** Bytes an element takes. */
// deno-fmt-ignore
const dtypeBytes = {
  F64: 8, F32: 4, F16: 2, BF16: 2, F8_E4M3: 1, F8_E5M2: 1,
  I64: 8, I32: 4, I16: 2, I8: 1, U64: 8, U32: 4, U16: 2, U8: 1, BOOL: 1,
} as const;

/** An element type of the format. */
export type Dtype = keyof typeof dtypeBytes;

/** Where a tensor lies and what it is. */
export interface TensorInfo {
  dtype: Dtype;
  shape: readonly number[];
  /** First byte, counted from the end of the header. */
  begin: number;
  /** One past the last byte. */
  end: number;
}

/** A tensor in memory. Half precision is widened to float32; integers of up to 32 bits become Int32Array. */
export interface LoadedTensor {
  name: string;
  shape: readonly number[];
  data: Float32Array | Int32Array;
}

/** A source of bytes that is read in pieces. */
export interface ByteSource {
  /** Total bytes. */
  readonly size: number;
  /** Reads a range; it lies inside the source. */
  read(offset: number, length: number): Promise<Uint8Array>;
  close(): void;
}

/** The largest header that is read: as in the reference implementation, so that a lie cannot ask for all memory. */
export const maxHeaderBytes = 100_000_000;

/** Bytes in memory as a source. */
export function bytesSource(bytes: Uint8Array): ByteSource {
  return {
    size: bytes.length,
    read: (offset, length) => Promise.resolve(bytes.subarray(offset, offset + length)),
    close() {},
  };
}

/**
 * A local file as a source, or undefined if there is none; only the ranges that are asked for are read.
 *
 * @throws {InputError} The file shrinks while it is read.
 */
export async function fileSource(path: string | URL): Promise<ByteSource | undefined> {
  let file: Deno.FsFile;
  try {
    file = await Deno.open(path, { read: true });
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
  const { size } = await file.stat();
  return {
    size,
    async read(offset, length) {
      const out = new Uint8Array(length);
      await file.seek(offset, Deno.SeekMode.Start);
      for (let at = 0; at < length;) {
        const got = await file.read(out.subarray(at));
        if (got === null) throw new InputError(`${path}: the file became shorter while it was read`);
        at += got;
      }
      return out;
    },
    close: () => file.close(),
  };
}

/** An open safetensors file: a checked header, and tensors that are read one by one. */
export class Safetensors {
  /** Tensors by name, in the order of their bytes. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** The free text of `__metadata__`. */
  readonly metadata: Readonly<Record<string, string>>;
  readonly where: string;
  readonly #source: ByteSource;
  readonly #dataStart: number;

  private constructor(source: ByteSource, where: string, header: Header) {
    this.#source = source;
    this.where = where;
    this.tensors = header.tensors;
    this.metadata = header.metadata;
    this.#dataStart = header.dataStart;
  }

  /**
   * Reads and checks the header. Close it when done; if this throws, the source is closed already.
   *
   * @param where Names the file in errors.
   * @throws {InputError} One message for each way in which a header can be wrong.
   */
  static async open(source: ByteSource, where: string): Promise<Safetensors> {
    try {
      return new Safetensors(source, where, await readHeader(source, where));
    } catch (error) {
      source.close();
      throw error;
    }
  }

  /** The raw little-endian bytes of a tensor. @throws {RangeError} No such tensor. */
  async bytes(name: string): Promise<{ info: TensorInfo; bytes: Uint8Array }> {
    const info = this.tensors.get(name);
    if (!info) throw new RangeError(`${this.where} has no tensor "${name}"`);
    return { info, bytes: await this.#source.read(this.#dataStart + info.begin, info.end - info.begin) };
  }

  /**
   * Reads a tensor of a floating-point type as float32.
   *
   * @throws {InputError} The tensor is not F32, F16, BF16 or F64.
   */
  async readFloat32(name: string): Promise<Float32Array> {
    const { info, bytes } = await this.bytes(name);
    if (info.dtype !== "F32" && info.dtype !== "F16" && info.dtype !== "BF16" && info.dtype !== "F64") {
      throw new InputError(`${this.where}: tensor "${name}" is ${info.dtype}; expected F32, F16, BF16 or F64`);
    }
    return toFloat32(info.dtype, bytes);
  }

  /** Reads a tensor: floats as Float32Array, integers of up to 32 bits (and I64 that fits) as Int32Array. */
  async read(name: string): Promise<LoadedTensor> {
    const { info, bytes } = await this.bytes(name);
    const { dtype, shape } = info;
    const integer = dtype.startsWith("I") || dtype.startsWith("U") || dtype === "BOOL";
    return { name, shape, data: integer ? toInt32(dtype, bytes, this.where, name) : await this.readFloat32(name) };
  }

  close(): void {
    this.#source.close();
  }
}

/**
 * Reads a whole file that is in memory.
 *
 * @param where Names the file in errors.
 * @throws {InputError} As {@linkcode Safetensors.open}.
 */
export async function readSafetensors(bytes: Uint8Array, where: string): Promise<Map<string, LoadedTensor>> {
  const file = await Safetensors.open(bytesSource(bytes), where);
  const out = new Map<string, LoadedTensor>();
  for (const name of file.tensors.keys()) out.set(name, await file.read(name));
  return out;
}

interface Header {
  tensors: Map<string, TensorInfo>;
  metadata: Record<string, string>;
  dataStart: number;
}

async function readHeader(source: ByteSource, where: string): Promise<Header> {
  const fail = (what: string) => new InputError(`${where}: ${what}; the file is damaged or not a safetensors file`);
  if (source.size < 8) throw fail(`${source.size} bytes are too few for a header`);
  const first = await source.read(0, 8);
  const length = Number(new DataView(first.buffer, first.byteOffset, 8).getBigUint64(0, true));
  if (length > maxHeaderBytes) {
    throw fail(`the header claims ${length} bytes, more than the limit of ${maxHeaderBytes}`);
  }
  if (8 + length > source.size) throw fail(`the header claims ${length} bytes, but the file has ${source.size}`);
  let text: string, json: unknown;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await source.read(8, length));
  } catch {
    throw fail("the header is not UTF-8");
  }
  try {
    json = JSON.parse(text);
  } catch {
    throw fail("the header is not JSON");
  }
  if (!isRecord(json)) throw fail("the header is not a JSON object");
  const twice = repeatedKey(text);
  if (twice !== undefined) throw fail(`the header names ${JSON.stringify(twice)} twice`);
  const { __metadata__: metadata = {}, ...entries } = json;
  if (!isRecord(metadata) || !Object.values(metadata).every((v) => typeof v === "string")) {
    throw fail("__metadata__ is not a map from text to text");
  }
  const tensors = Object.entries(entries).map(([name, entry]) => [name, tensorInfo(name, entry, fail)] as const);
  tensors.sort(([, a], [, b]) => a.begin - b.begin || a.end - b.end);
  let at = 0;
  for (const [name, info] of tensors) {
    if (info.begin !== at) {
      throw fail(`tensor "${name}" starts at byte ${info.begin} of the data, but the one before it ends at ${at}`);
    }
    at = info.end;
  }
  const dataStart = 8 + length;
  if (dataStart + at !== source.size) {
    throw fail(`the tensors take ${at} bytes of data, but the file holds ${source.size - dataStart}`);
  }
  return { tensors: new Map(tensors), metadata: metadata as Record<string, string>, dataStart };
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function tensorInfo(name: string, entry: unknown, fail: (what: string) => InputError): TensorInfo {
  if (!isRecord(entry)) throw fail(`the header's entry for tensor "${name}" is not an object`);
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== "string" || !Object.hasOwn(dtypeBytes, dtype)) {
    throw fail(`tensor "${name}" has the unknown dtype ${JSON.stringify(dtype)}`);
  }
  const isSizes = (v: unknown): v is number[] => Array.isArray(v) && v.every((n) => Number.isSafeInteger(n) && n >= 0);
  if (!isSizes(shape)) throw fail(`tensor "${name}" has the impossible shape ${JSON.stringify(shape)}`);
  if (!isSizes(offsets) || offsets.length !== 2 || offsets[0] > offsets[1]) {
    throw fail(`tensor "${name}" has impossible data_offsets ${JSON.stringify(offsets)}`);
  }
  const [begin, end] = offsets;
  const bytes = shape.reduce((a, b) => a * b, dtypeBytes[dtype as Dtype]);
  if (bytes !== end - begin) {
    throw fail(
      `tensor "${name}" of shape [${shape.join(", ")}] and dtype ${dtype} needs ${bytes} bytes, but its range has ${
        end - begin
      }`,
    );
  }
  return { dtype: dtype as Dtype, shape, begin, end };
}

/** The first key that stands twice in the outermost object of valid JSON text: JSON.parse would keep the last silently. */
function repeatedKey(text: string): string | undefined {
  const seen = new Set<string>();
  let depth = 0;
  for (const match of text.matchAll(/"(?:[^"\\]|\\.)*"(\s*:)?|[{}[\]]/g)) {
    const token = match[0];
    if (token === "{" || token === "[") depth++;
    else if (token === "}" || token === "]") depth--;
    else if (depth === 1 && match[1]) {
      const key: string = JSON.parse(token.slice(0, token.length - match[1].length));
      if (seen.has(key)) return key;
      seen.add(key);
    }
  }
  return undefined;
}

/** A copy whose buffer starts at the first byte, so that typed arrays of any width can be laid over it. */
function aligned(bytes: Uint8Array, width: number): Uint8Array {
  return bytes.byteOffset % width ? bytes.slice() : bytes;
}

/**
 * Widens little-endian floats to float32. F32 data that lie aligned in memory are not copied.
 *
 * @param bytes A multiple of the element size.
 */
export function toFloat32(dtype: "F32" | "F16" | "BF16" | "F64", bytes: Uint8Array): Float32Array {
  const count = bytes.length / dtypeBytes[dtype];
  const { buffer, byteOffset } = aligned(bytes, dtypeBytes[dtype]);
  if (dtype === "F32") return new Float32Array(buffer, byteOffset, count);
  if (dtype === "F64") return Float32Array.from(new Float64Array(buffer, byteOffset, count));
  const half = new Uint16Array(buffer, byteOffset, count);
  const out = new Uint32Array(count);
  if (dtype === "BF16") { for (let i = 0; i < count; i++) out[i] = half[i] << 16; }
  else for (let i = 0; i < count; i++) out[i] = widenHalf(half[i]);
  return new Float32Array(out.buffer);
}

/** The bits of an IEEE half-precision number as those of a single. */
function widenHalf(h: number): number {
  const sign = (h & 0x8000) << 16;
  let exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent === 31) return sign | 0x7f800000 | fraction << 13;
  if (exponent === 0) {
    if (fraction === 0) return sign;
    // A subnormal: shift until the leading one is implicit.
    for (exponent = 1; !(fraction & 1024); exponent--) fraction <<= 1;
    fraction &= 1023;
  }
  return sign | (exponent + 112) << 23 | fraction << 13;
}

function toInt32(dtype: Dtype, bytes: Uint8Array, where: string, name: string): Int32Array {
  const count = bytes.length / dtypeBytes[dtype];
  const { buffer, byteOffset } = aligned(bytes, dtypeBytes[dtype]);
  if (dtype === "I32") return new Int32Array(buffer, byteOffset, count);
  const wide: ArrayLike<number | bigint> = dtype === "I64"
    ? new BigInt64Array(buffer, byteOffset, count)
    : dtype === "U64"
    ? new BigUint64Array(buffer, byteOffset, count)
    : dtype === "U32"
    ? new Uint32Array(buffer, byteOffset, count)
    : dtype === "I16"
    ? new Int16Array(buffer, byteOffset, count)
    : dtype === "U16"
    ? new Uint16Array(buffer, byteOffset, count)
    : dtype === "I8"
    ? new Int8Array(buffer, byteOffset, count)
    : new Uint8Array(buffer, byteOffset, count);
  const out = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    out[i] = Number(wide[i]);
    if (out[i] !== Number(wide[i])) {
      throw new InputError(`${where}: tensor "${name}" holds ${wide[i]}, which does not fit into 32 bits`);
    }
  }
  return out;
}

/** A tensor to be written. */
export interface TensorToWrite {
  name: string;
  shape: readonly number[];
  data: Float32Array | Int32Array;
}

/**
 * Lays tensors out as one safetensors file (F32 and I32), in the given order.
 *
 * @param metadata Free text; without `format: "pt"` transformers refuses the file. @default {{ format: "pt" }}
 * @throws {RangeError} A name stands twice, or a shape does not fit its data.
 */
export function writeSafetensors(
  tensors: Iterable<TensorToWrite>,
  metadata: Readonly<Record<string, string>> = { format: "pt" },
): Uint8Array<ArrayBuffer> {
  const all = [...tensors];
  const header: Record<string, unknown> = { __metadata__: metadata };
  let at = 0;
  for (const { name, shape, data } of all) {
    if (Object.hasOwn(header, name)) throw new RangeError(`tensor "${name}" is to be written twice`);
    if (shape.reduce((a, b) => a * b, 1) !== data.length) {
      throw new RangeError(`tensor "${name}" of shape [${shape.join(", ")}] has ${data.length} elements`);
    }
    header[name] = {
      dtype: data instanceof Int32Array ? "I32" : "F32",
      shape,
      data_offsets: [at, at + data.byteLength],
    };
    at += data.byteLength;
  }
  let json = new TextEncoder().encode(JSON.stringify(header));
  if (json.length % 8) {
    // Spaces after the header keep the data aligned to eight bytes.
    const padded = new Uint8Array(json.length + 8 - json.length % 8).fill(0x20);
    padded.set(json);
    json = padded;
  }
  const out = new Uint8Array(8 + json.length + at);
  new DataView(out.buffer).setBigUint64(0, BigInt(json.length), true);
  out.set(json, 8);
  at = 8 + json.length;
  for (const { data } of all) {
    out.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return out;
}
