/**
 * What a benchmark is: a question about speed, answered by rows of figures that are taken in one run beside a named peer.
 *
 * @module
 */

/** One figure. */
export interface Row {
  /** `what/backend/size`. */
  name: string;
  value: number;
  unit: string;
  /** How many times faster than the peer, measured in the same run. */
  ratio?: number;
  /** What the ratio compares with. */
  peer?: string;
  /** How many timings the value is the median of. */
  n: number;
}

/** What the command line settles for all benchmarks. */
export interface BenchmarkSettings {
  /** The Python that peers run in; a name on PATH or a path. */
  python: string;
}

/** A file under `benchmarks/`. */
export interface Benchmark {
  /** The names of its rows, or their common beginning; a user asks for it by any part of them. */
  readonly names: readonly string[];
  /** The backends that it runs on. @default {those that its names contain} */
  readonly backends?: readonly string[];
  /** Takes the figures. @param backend The backend that is running */
  run(backend: string, log: (line: string) => void, settings: BenchmarkSettings): Promise<Row[]>;
}

/** The middle of an odd number of values, the mean of the two middle ones of an even number. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/**
 * Times two ways of doing the same work in turns, so that a busy neighbour hurts both.
 *
 * @returns Seconds of each round.
 */
export async function alternate(
  rounds: number,
  first: () => Promise<unknown>,
  second: () => Promise<unknown>,
): Promise<{ first: number[]; second: number[] }> {
  const out = { first: [] as number[], second: [] as number[] };
  for (let round = 0; round < rounds; round++) {
    for (const [name, work] of [["first", first], ["second", second]] as const) {
      const start = performance.now();
      await work();
      out[name].push((performance.now() - start) / 1000);
    }
  }
  return out;
}
