/**
 * Keys and values that a generation leaves for the next one: a conversation's second turn begins with all of its first, so only
 * the tokens after it are computed, attending to what is kept here.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { gatherRows, segmentsOf } from "./ops.ts";
import { concatenated, type KeyLayout, type Packed, rangeOf } from "./packing.ts";
import type { PrefixCache, Sequence } from "./policy.ts";
import type { KeySource } from "./text.ts";

/** A sequence whose keys and values are kept. */
interface KeptRow {
  /** Its tokens, a copy: conversations grow in place. */
  readonly ids: readonly number[];
  /** Keys of its images. */
  readonly images: readonly string[];
  /** The row of each token in its bank. */
  readonly tokens: Int32Array;
}

/** What one batch of a generation left. Owns its tensors. */
export interface Bank {
  /** Per layer one or more tensors, `[n, Hkv·d]` or `[n, Hkv, d]`, that stand one after the other. */
  readonly k: readonly (readonly tf.Tensor[])[];
  /** As `k`. */
  readonly v: readonly (readonly tf.Tensor[])[];
  readonly rows: readonly KeptRow[];
}

/** A kept beginning of a sequence. */
export interface Found {
  readonly bank: Bank;
  readonly tokens: Int32Array;
}

const rowsOf = ({ k: [parts] }: Bank): number => parts.reduce((sum, { shape: [rows] }) => sum + rows, 0);

/** Describes a row of a bank: its sequence and what was sampled, but for the last token, which has no key yet. */
export function keptRow({ ids, images }: Sequence, sampled: readonly number[], tokens: Int32Array): KeptRow {
  return { ids: [...ids, ...sampled.slice(0, -1)], images: images.map(({ key }) => key), tokens };
}

function begins({ ids, images }: KeptRow, sequence: Sequence): boolean {
  return ids.length < sequence.ids.length && images.length <= sequence.images.length &&
    ids.every((id, t) => sequence.ids[t] === id) && images.every((key, i) => sequence.images[i].key === key);
}

/** The {@linkcode PrefixCache} of a `QwenPolicy`. */
export class KeptPrefixes implements PrefixCache {
  #banks: readonly Bank[] = [];
  #disposed = false;
  readonly #onDispose: (self: KeptPrefixes) => void;

  /** @param onDispose Called once, when it is disposed of. */
  constructor(onDispose: (self: KeptPrefixes) => void = () => {}) {
    this.#onDispose = onDispose;
  }

  /** Whether {@linkcode dispose} was called. */
  get disposed(): boolean {
    return this.#disposed;
  }

  /**
   * The kept beginning of a sequence, if there is one.
   *
   * @param place Where the sequence stands in its call: the row that stood there before is tried first, then the longest.
   */
  find(sequence: Sequence, place: number): Found | undefined {
    let longest: { bank: Bank; row: KeptRow } | undefined, at = place;
    for (const bank of this.#banks) {
      const row = bank.rows[at];
      if (row && at >= 0 && begins(row, sequence)) return { bank, tokens: row.tokens };
      at -= bank.rows.length;
    }
    for (const bank of this.#banks) {
      for (const row of bank.rows) {
        if (row.ids.length > (longest?.row.ids.length ?? 0) && begins(row, sequence)) longest = { bank, row };
      }
    }
    return longest && { bank: longest.bank, tokens: longest.row.tokens };
  }

  /** Holds these banks, which it then owns, instead of what it held. */
  replace(banks: readonly Bank[]): void {
    this.#banks.forEach(disposeBank);
    this.#banks = banks;
    if (this.#disposed) this.dispose();
  }

  dispose(): void {
    this.#banks.forEach(disposeBank);
    this.#banks = [];
    if (!this.#disposed) this.#onDispose(this);
    this.#disposed = true;
  }
}

/** Releases a bank's tensors. */
export function disposeBank({ k, v }: Bank): void {
  tf.dispose([...k.flat(), ...v.flat()]);
}

/** Lays packed ends of sequences behind their kept beginnings; gives what {@linkcode keySource} needs. */
export function extend(
  packed: Packed,
  found: readonly (Found | undefined)[],
): { keys: KeyLayout; banks: Bank[] } | undefined {
  const banks = [...new Set(found.flatMap((f) => f?.bank ?? []))], firsts = new Map<Bank, number>();
  if (banks.length === 0) return undefined;
  let cached = 0, end = 0;
  for (const bank of banks) {
    firsts.set(bank, cached);
    cached += rowsOf(bank);
  }
  const keys = packed.lengths.map((length, i) => {
    const own = rangeOf(cached + (end += length) - length, length), kept = found[i];
    return kept ? concatenated([kept.tokens.map((t) => t + firsts.get(kept.bank)!), own]) : own;
  });
  return { keys: { lengths: keys.map(({ length }) => length), rows: concatenated(keys), cached }, banks };
}

/**
 * Keys and values by their layout, from kept ones and those of the packed tokens. The gradient of a row that stands in several
 * places is the sum over them.
 */
export function keySource({ lengths, rows }: KeyLayout, banks: readonly Bank[] = []): KeySource {
  return {
    segments: segmentsOf(lengths),
    of(layer, own, what) {
      const [, heads, d] = own.shape, flat = (x: tf.Tensor) => tf.reshape(x, [x.shape[0], heads * d]) as tf.Tensor2D;
      const parts = [...banks.flatMap((bank) => bank[what][layer]), own].map(flat);
      const all = parts.length === 1 ? parts[0] : tf.concat(parts, 0);
      return tf.reshape(gatherRows(all, rows), [rows.length, heads, d]) as tf.Tensor3D;
    },
  };
}
