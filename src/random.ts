/**
 * Counter-based randomness: every draw is a pure function of (seed, purpose, counters), so it depends neither on the order
 * of calls nor on how a batch is laid out. Philox4x32-10 (Salmon et al., 2011) is the generator.
 *
 * @module
 */

/** The high 32 bits of the product of two unsigned 32-bit integers. */
function mulHigh(a: number, b: number): number {
  const al = a & 0xffff, ah = a >>> 16, bl = b & 0xffff, bh = b >>> 16;
  const low = al * bl;
  const mid = ah * bl + (low >>> 16);
  const mid2 = al * bh + (mid & 0xffff);
  return (ah * bh + Math.floor(mid / 65536) + Math.floor(mid2 / 65536)) >>> 0;
}

/**
 * One Philox4x32-10 block: four unsigned 32-bit words from a two-word key and a four-word counter, written to `out`.
 *
 * @param k0 Key word 0.
 * @param k1 Key word 1.
 * @param c Counter, four unsigned 32-bit words (not changed).
 * @param out Receives four unsigned 32-bit words from `offset` on.
 */
export function philox4x32(
  k0: number,
  k1: number,
  c: readonly [number, number, number, number],
  out: Uint32Array,
  offset = 0,
): void {
  let [c0, c1, c2, c3] = c;
  for (let round = 0; round < 10; round++) {
    const h0 = mulHigh(0xd2511f53, c0), l0 = Math.imul(0xd2511f53, c0) >>> 0;
    const h1 = mulHigh(0xcd9e8d57, c2), l1 = Math.imul(0xcd9e8d57, c2) >>> 0;
    c0 = (h1 ^ c1 ^ k0) >>> 0;
    c1 = l1;
    c2 = (h0 ^ c3 ^ k1) >>> 0;
    c3 = l0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  out[offset] = c0;
  out[offset + 1] = c1;
  out[offset + 2] = c2;
  out[offset + 3] = c3;
}

/** A 32-bit FNV-1a hash of a string; names a purpose in a {@linkcode RandomStream}. */
export function hashName(name: string): number {
  let h = 0x811c9dc5;
  for (let i = 0; i < name.length; i++) h = Math.imul(h ^ name.charCodeAt(i), 0x01000193);
  return h >>> 0;
}

/**
 * A stream of draws named by (seed, purpose, up to three counters). Two streams with the same name give the same draws; any
 * difference in the name gives unrelated ones.
 *
 * @example
 * ```ts
 * import { RandomStream } from "./random.ts";
 * const a = new RandomStream(7, "scene", 12);
 * const b = new RandomStream(7, "scene", 12);
 * if (a.uniform() !== b.uniform()) throw new Error("streams differ");
 * ```
 */
export class RandomStream {
  #k0: number;
  #k1: number;
  #counter: [number, number, number, number];
  #block = new Uint32Array(4);
  #at = 4;

  /**
   * @param seed The run's seed (an integer, 0 ≤ seed < 2⁵³).
   * @param purpose What the draws are for, e.g. `"sample"` or `"scene"`.
   * @param counters Up to three integers, 0 ≤ counter < 2³², e.g. step, prompt, rollout.
   */
  constructor(seed: number, purpose: string, ...counters: [number?, number?, number?]) {
    if (!Number.isSafeInteger(seed) || seed < 0) {
      throw new RangeError(`seed must be an integer from 0 to 2^53 - 1, got ${seed}`);
    }
    this.#k0 = ((seed >>> 0) ^ hashName(purpose)) >>> 0;
    this.#k1 = (Math.floor(seed / 4294967296) ^ Math.imul(hashName(purpose), 0x9e3779b1)) >>> 0;
    this.#counter = [0, (counters[0] ?? 0) >>> 0, (counters[1] ?? 0) >>> 0, (counters[2] ?? 0) >>> 0];
  }

  /** The next unsigned 32-bit integer. */
  next(): number {
    if (this.#at === 4) {
      philox4x32(this.#k0, this.#k1, this.#counter, this.#block);
      this.#counter[0] = (this.#counter[0] + 1) >>> 0;
      this.#at = 0;
    }
    return this.#block[this.#at++];
  }

  /** A float in [low, high), 32 random bits. */
  uniform(low = 0, high = 1): number {
    return low + (high - low) * (this.next() / 4294967296);
  }

  /** An integer in [0, n). */
  int(n: number): number {
    return Math.floor((this.next() / 4294967296) * n);
  }

  /** A standard normal draw (Box–Muller, one of the pair). */
  normal(): number {
    const u = (this.next() + 0.5) / 4294967296, v = this.next() / 4294967296;
    return Math.sqrt(-2 * Math.log(u)) * Math.cos(2 * Math.PI * v);
  }

  /** One element of a non-empty array. */
  choice<T>(items: readonly T[]): T {
    return items[this.int(items.length)];
  }

  /** A shuffled copy (Fisher–Yates). */
  shuffle<T>(items: readonly T[]): T[] {
    const out = items.slice();
    for (let i = out.length - 1; i > 0; i--) {
      const j = this.int(i + 1);
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  }
}
