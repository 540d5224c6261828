/**
 * What an experiment measures, as functions of an evaluation's items, so that seeds and items can be resampled.
 *
 * @module
 */
import type { EvaluationItem } from "../evaluate.ts";

/** A metric that is worked out from one value an item. */
export interface ItemMetric {
  /** Its name in the tables. */
  readonly name: string;
  /** Its value of an item; undefined where it doesn't apply, e.g. a box where none was asked for. */
  of(item: EvaluationItem): number | undefined;
  /** What the mean over items is turned into, e.g. its root. @default {left as it is} */
  finish?(mean: number): number;
  /** Whether each item's value is 0 or 1, so that tests and effect sizes of proportions apply. @default {false} */
  readonly isBinary?: boolean;
}

const share = (name: string, of: (item: EvaluationItem) => boolean | undefined): ItemMetric => ({
  name,
  isBinary: true,
  of: (item) => {
    const value = of(item);
    return value === undefined ? undefined : Number(value);
  },
});

/** Is the final answer right? */
export const accuracy: ItemMetric = share("accuracy", (item) => item.correct);

/** Metrics of every experiment; those of boxes only where boxes are asked for, `plate_ratio` only where the data has plates. */
export const standardMetrics: readonly ItemMetric[] = [
  accuracy,
  share("valid_ratio", (item) => item.valid),
  share("hit_ratio", (item) => item.hit),
  share("plate_ratio", (item) => item.regions?.plate),
];

/** The values of a metric over items; undefined unless it applies to every one. */
export function itemValues(metric: ItemMetric, items: readonly EvaluationItem[]): Float64Array | undefined {
  const values = new Float64Array(items.length);
  for (const [i, item] of items.entries()) {
    const value = metric.of(item);
    if (value === undefined) return undefined;
    values[i] = value;
  }
  return values;
}
