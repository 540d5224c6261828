/**
 * Which samples a training step or an evaluation takes, as a function of seed and counters alone, and how unreadable ones are
 * carried along.
 *
 * @module
 */
import type { Dataset, Sample } from "./data/dataset.ts";
import { RandomStream } from "./random.ts";

/** Positions in an endless dataset are drawn below this. */
const ENDLESS = 2 ** 31;

/**
 * Positions of the samples of a training step. An endless dataset gives fresh samples each step; a finite one is gone through
 * in epochs, each in its own seeded order, without regard to where a step ends.
 *
 * @param size Samples in the dataset; `Infinity` for an endless one.
 * @param seed The run's seed.
 * @param step The step, from 1.
 * @param count Samples a step.
 * @throws {RangeError} if there are no samples.
 */
export function stepPositions(size: number, seed: number, step: number, count: number): number[] {
  if (!(size >= 1)) throw new RangeError(`a dataset must have at least one sample, got ${size}`);
  if (!Number.isFinite(size)) {
    const random = new RandomStream(seed, "sample", step);
    return Array.from({ length: count }, () => random.int(ENDLESS));
  }
  const orders = new Map<number, number[]>();
  return Array.from({ length: count }, (_, i) => {
    const place = (step - 1) * count + i, epoch = Math.floor(place / size);
    const order = orders.get(epoch) ?? epochOrder(size, seed, epoch);
    orders.set(epoch, order);
    return order[place % size];
  });
}

function epochOrder(size: number, seed: number, epoch: number): number[] {
  return new RandomStream(seed, "epoch", epoch).shuffle(Array.from({ length: size }, (_, i) => i));
}

/**
 * Positions of the items of an evaluation: the first ones of an endless dataset; of a finite one all, or a seeded choice,
 * because its rows may be sorted.
 */
export function evaluationPositions(size: number, items: number, seed: number): number[] {
  if (!Number.isFinite(size)) return Array.from({ length: items }, (_, i) => i);
  const all = Array.from({ length: size }, (_, i) => i);
  if (items >= size) return all;
  return new RandomStream(seed, "evaluation").shuffle(all).slice(0, items).sort((a, b) => a - b);
}

/**
 * Reads samples. One that can't be read is replaced by a sample without a picture, which a rollout skips and reports: its place
 * is kept, because the others' draws are named by theirs.
 */
export async function readSamples(dataset: Dataset, positions: readonly number[]): Promise<Sample[]> {
  const samples: Sample[] = [];
  for (const position of positions) {
    try {
      samples.push(await dataset.get(position));
    } catch (error) {
      const id = `${dataset.name} #${position}`;
      samples.push({ id, question: "", answer: "", picture: () => Promise.reject(error) });
    }
  }
  return samples;
}

/** Lets timers and signals through: a backend on the processor otherwise never returns to the event loop. */
export function yieldToEvents(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 0));
}
