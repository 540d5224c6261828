/**
 * Token sampling by the Gumbel-max trick over a counter-based generator: a draw depends on (seed, key, token index, vocabulary
 * index) only, so neither batch order nor other rows change it.
 *
 * @module
 */
import { hashName, philox4x32 } from "../random.ts";

/** How to sample. */
export interface SamplerOptions {
  /** 0 is greedy. */
  temperature: number;
  /** Nucleus mass in (0, 1]. */
  topP: number;
  seed: number;
  /** Vocabulary-sized; 1 at ids that are never sampled. */
  suppressed: Uint8Array;
}

/** A sampled token. */
export interface Draw {
  id: number;
  /** ln p at the sampling temperature (1 for greedy) over all ids that are not suppressed; top-p does not change it. */
  logprob: number;
}

const PURPOSE = hashName("sample");

/**
 * Where the nucleus ends: the smallest logit whose higher ones hold less than `topP` of the mass.
 *
 * @param scale 1 / temperature
 * @param logZ ln Σ exp(logit · scale) over ids that are not suppressed
 */
export function nucleusFloor(
  logits: Float32Array,
  suppressed: Uint8Array,
  topP: number,
  scale: number,
  logZ: number,
): number {
  const order: number[] = [];
  for (let v = 0; v < logits.length; v++) if (!suppressed[v]) order.push(v);
  order.sort((a, b) => logits[b] - logits[a] || a - b);
  let mass = 0, floor = -Infinity;
  for (const v of order) {
    if (mass >= topP) break;
    mass += Math.exp(logits[v] * scale - logZ);
    floor = logits[v];
  }
  return floor;
}

/**
 * Draws one token.
 *
 * @param logits `[V]` raw logits
 * @param key The sequence's name: three counters (each < 2³²; the third < 2¹²)
 * @param token Index of the token within its completion, < 2²⁰
 */
export function sampleToken(
  logits: Float32Array,
  key: readonly [number, number, number],
  token: number,
  { temperature, topP, seed, suppressed }: SamplerOptions,
): Draw {
  const scale = temperature > 0 ? 1 / temperature : 1, vocab = logits.length;
  let top = -Infinity, best = -1;
  for (let v = 0; v < vocab; v++) {
    if (!suppressed[v] && logits[v] > top) {
      top = logits[v];
      best = v;
    }
  }
  let sum = 0;
  for (let v = 0; v < vocab; v++) if (!suppressed[v]) sum += Math.exp((logits[v] - top) * scale);
  const logZ = top * scale + Math.log(sum);
  if (best < 0 || !Number.isFinite(logZ)) {
    throw new RangeError(`token ${token} of sequence [${key}]: the logits are not finite; the policy has diverged`);
  }
  if (temperature > 0) {
    const floor = topP < 1 ? nucleusFloor(logits, suppressed, topP, scale, logZ) : -Infinity;
    const words = new Uint32Array(4), k0 = ((seed >>> 0) ^ PURPOSE) >>> 0, k1 = Math.floor(seed / 4294967296) >>> 0;
    const c3 = ((key[2] << 20) | token) >>> 0;
    let highest = -Infinity;
    for (let v = 0; v < vocab; v++) {
      if ((v & 3) === 0) philox4x32(k0, k1, [v >>> 2, key[0] >>> 0, key[1] >>> 0, c3], words);
      if (suppressed[v] || logits[v] < floor) continue;
      const gumbel = -Math.log(-Math.log((words[v & 3] + 0.5) / 4294967296));
      const score = logits[v] * scale + gumbel;
      if (score > highest) {
        highest = score;
        best = v;
      }
    }
  }
  return { id: best, logprob: logits[best] * scale - logZ };
}
