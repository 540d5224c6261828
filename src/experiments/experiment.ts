/**
 * What an experiment is: a record that says which policies are trained how, on what they are measured, and what is compared.
 * Everything else (which runs there are, what is cached, the tables) follows from it.
 *
 * @module
 */
import type { TrainTaskOptions } from "../run/train_task.ts";
import type { EvaluateOptions, TrainOptions } from "../settings.ts";
import type { ItemMetric } from "./metrics.ts";

/** What a method trains and looks at, beside its settings: options of `deno task train` by their own names. */
export type Source = Partial<
  Pick<
    TrainTaskOptions,
    "policy" | "data" | "heldoutShare" | "minPixels" | "maxPixels" | "template" | "reward" | "saveRollouts"
  >
>;

/** One line of an experiment's tables: a policy, how it was made and how it is asked. */
export interface Method {
  /** Its name in the tables. */
  readonly name: string;
  /** How it is trained; the runner gives the seed. Without it the policy is measured as it is. */
  readonly train?: Omit<TrainOptions, "seed">;
  /** Where it differs from the experiment's own source. */
  readonly source?: Source;
  /**
   * Another method of the experiment whose trained policy it starts from, in place of `source.policy`. With `seed` always the one
   * of that seed, otherwise the one of its own.
   */
  readonly from?: { readonly method: string; readonly seed?: number };
  /** Whether it is only there for others to start from; it then has no evaluations and no rows. @default {false} */
  readonly isStage?: boolean;
  /** Its own way of being asked: a name in `protocols`. The metrics without a suffix are those of this protocol. */
  readonly own?: string;
  /** Ways of being asked by name. @default {the experiment's} */
  readonly protocols?: Protocols;
}

/** Ways of being asked, by the name that follows a metric's, as in `accuracy/two_turn`. */
export type Protocols = Readonly<Record<string, EvaluateOptions>>;

/** Held-out data that policies are measured on. */
export interface Split {
  /** A dataset as `--data` names it. */
  readonly data: string;
  /** Which samples of it. @default {"heldout"} */
  readonly split?: "train" | "heldout";
}

/** Two methods that are compared on the same items. */
export interface ComparisonSpec {
  /** The one that is expected to be better. */
  readonly a: string;
  /** What it is compared with. */
  readonly b: string;
  /** Metrics of both. @default {["accuracy"]} */
  readonly metrics?: readonly string[];
  /** Where `b` is looked at by another metric, as in `accuracy` of `a` against `accuracy/one_turn` of `b`. @default {as `a`} */
  readonly metricOfB?: string;
}

/** An experiment. */
export interface Experiment {
  /** What `deno task experiment` calls it, and the name of its result file. */
  readonly name: string;
  /** What it asks, in one line. */
  readonly about: string;
  /** What is trained and on what, unless a method says otherwise. */
  readonly source: Source;
  /** How many seeds, from 0 on. */
  readonly seeds: number;
  /** Policies in the order of the tables. */
  readonly methods: readonly Method[];
  /** Held-out data by the names of the tables. */
  readonly splits: Readonly<Record<string, Split>>;
  /** Ways of being asked, unless a method says otherwise. */
  readonly protocols: Protocols;
  /** Metrics beside the standard ones. @default {none} */
  readonly metrics?: readonly ItemMetric[];
  /** What is compared. */
  readonly comparisons: readonly ComparisonSpec[];
}
