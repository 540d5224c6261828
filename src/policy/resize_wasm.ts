/**
 * The fast way of `resize.ts`: both passes in a WebAssembly module of their own, on memory of its own, so it does not
 * matter which backend computes the rest. Results are those of the plain way, bit for bit.
 *
 * A picture passes through in strips of rows: a strip is copied in and narrowed to the new width; a row of the result
 * is made as soon as the narrowed rows under its taps are there. So memory holds a strip and a window of narrowed rows,
 * however high a picture is.
 *
 * @module
 */
import { ModuleBuilder } from "../wasm/module.ts";
import { emitResample, ROWS_AT_ONCE, SLACK_BYTES, TAPS_AT_ONCE, type TapTable, tapTable } from "../wasm/resample.ts";
import { precision, type Taps } from "./bicubic.ts";

/** A strip is about so long, and not longer when narrowed: it stays in the processor's cache in between. */
const STRIP_BYTES = 128 * 1024;
/** Rows so long that more memory were needed are left to the plain way; what has been grown stays. */
const MOST_BYTES = 256 * 1024 * 1024;
const PAGE_BYTES = 65536;

interface Functions {
  readonly rows3: (...values: number[]) => void;
  readonly rows4: (...values: number[]) => void;
  readonly columns: (source: number, stride: number, entry: number, width: number, to: number) => void;
}

/** The tables of taps that are in use; as long-lived as the taps themselves. */
const tables = new WeakMap<Taps, TapTable>();

function tableOf(taps: Taps): TapTable {
  let table = tables.get(taps);
  if (!table) tables.set(taps, table = tapTable(taps));
  return table;
}

/** One after another from address 0, each on a 16-byte boundary. */
function place(...lengths: number[]): { addresses: number[]; end: number } {
  let end = 0;
  const addresses = lengths.map((length) => {
    const address = end;
    end += Math.ceil((length + SLACK_BYTES) / 16) * 16;
    return address;
  });
  return { addresses, end };
}

/** Resamples pictures on memory of its own, which grows as needed. */
export class Resampler {
  readonly #memory: WebAssembly.Memory;
  readonly #functions: Functions;
  #bytes: Uint8Array;

  private constructor(memory: WebAssembly.Memory, functions: Functions) {
    this.#memory = memory;
    this.#functions = functions;
    this.#bytes = new Uint8Array(memory.buffer);
  }

  /** Compiles the module; undefined where the engine cannot, for want of SIMD. */
  static create(): Resampler | undefined {
    const m = new ModuleBuilder();
    emitResample(m, precision);
    const binary = m.bytes();
    if (!WebAssembly.validate(binary)) return undefined;
    const memory = new WebAssembly.Memory({ initial: 1 });
    const instance = new WebAssembly.Instance(new WebAssembly.Module(binary), { env: { memory } });
    return new Resampler(memory, instance.exports as unknown as Functions);
  }

  /** Bytes of WebAssembly memory held. */
  get memoryBytes(): number {
    return this.#bytes.length;
  }

  /**
   * Resamples a picture to as many columns as `across` and as many rows as `down` has positions.
   *
   * @param source `[down.from, across.from, channels]`; a fourth channel is left out.
   * @param stripBytes How much of the picture is copied in at once, in whole rows, at least four. For tests.
   * @returns RGB bytes `[rows, columns, 3]`; undefined where rows are so long that the memory would become too large.
   */
  resize(
    source: Uint8Array,
    channels: 3 | 4,
    across: Taps,
    down: Taps,
    stripBytes = STRIP_BYTES,
  ): Uint8Array | undefined {
    const width = across.from, height = down.from, outWidth = across.first.length, outHeight = down.first.length;
    const rowTable = tableOf(across), columnTable = tableOf(down);
    const rowBytes = width * channels, stride = 4 * outWidth;
    const fitting = Math.min(Math.max(stripBytes / Math.max(rowBytes, stride), 1), height);
    const strip = Math.ceil(fitting / ROWS_AT_ONCE) * ROWS_AT_ONCE;
    // Taps of one row of the result, and a strip beyond them.
    const window = down.size + strip;
    const { addresses: [rowTableAt, columnTableAt, stripAt, windowAt, outAt], end } = place(
      rowTable.words.byteLength,
      columnTable.words.byteLength,
      strip * rowBytes,
      (window + TAPS_AT_ONCE) * stride,
      3 * outWidth,
    );
    if (!this.#reserve(end)) return undefined;
    const bytes = this.#bytes, narrow = channels === 3 ? this.#functions.rows3 : this.#functions.rows4;
    new Int32Array(bytes.buffer).set(rowTable.words, rowTableAt / 4);
    new Int32Array(bytes.buffer).set(columnTable.words, columnTableAt / 4);
    const out = new Uint8Array(outHeight * outWidth * 3), outRow = bytes.subarray(outAt, outAt + 3 * outWidth);
    // Of the source's rows, `windowStart` to `done` are narrowed and lie in the window.
    let windowStart = 0, done = 0;
    for (let y = 0; y < outHeight; y++) {
      const first = down.first[y], past = first + down.count[y];
      while (done < past) {
        if (done - windowStart + strip > window) {
          const at = windowAt + (first - windowStart) * stride;
          bytes.copyWithin(windowAt, at, windowAt + (done - windowStart) * stride);
          windowStart = first;
        }
        const rows = Math.min(strip, height - done), to = windowAt + (done - windowStart) * stride;
        bytes.set(source.subarray(done * rowBytes, (done + rows) * rowBytes), stripAt);
        narrow(stripAt, rowBytes, rows, rowTableAt, rowTable.entryBytes, outWidth, to, stride);
        done += rows;
      }
      const entry = columnTableAt + y * columnTable.entryBytes;
      this.#functions.columns(windowAt + (first - windowStart) * stride, stride, entry, outWidth, outAt);
      out.set(outRow, y * outRow.length);
    }
    return out;
  }

  /** Lets the memory have at least so many bytes; false where it may not or cannot. */
  #reserve(end: number): boolean {
    if (end <= this.#bytes.length) return true;
    if (end > MOST_BYTES) return false;
    try {
      this.#memory.grow(Math.ceil((end - this.#bytes.length) / PAGE_BYTES));
    } catch {
      return false; // no room in this process
    }
    this.#bytes = new Uint8Array(this.#memory.buffer);
    return true;
  }
}
