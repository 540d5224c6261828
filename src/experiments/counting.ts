/**
 * Counting (paper's appendix): one turn in which the policy points at each thing and then says how many there are. GRPO with the
 * binary reward alone, and with the point reward beside it: the share of points that match reference points one to one.
 *
 * The embedded base has never counted, so a short supervised warm-up on demonstrations comes first; its policy is the base here,
 * the same for all seeds.
 *
 * @module
 */
import { countingError } from "../data/counting.ts";
import type { EvaluationItem } from "../evaluate.ts";
import type { Experiment, Method } from "./experiment.ts";
import type { ItemMetric } from "./metrics.ts";

/** Room for six points and the number. */
const maxNewTokens = [48] as const;

const warmUp: Method = {
  name: "warm-up",
  isStage: true,
  train: {
    ...{ method: "sft", steps: 300, prompts: 64, learningRate: 1e-3, schedule: "cosine", trainVision: true },
    ...{ maxNewTokens, evalEvery: 0 },
  },
};
const from = { method: warmUp.name, seed: 0 } as const;
/** The rate is the best of 1e-5, 3e-5, 1e-4 and 3e-4 for both rewards; the last one undoes the warm-up. */
const grpo = {
  ...{ method: "grpo", steps: 100, prompts: 12, groupSize: 8, learningRate: 3e-5 },
  ...{ maxNewTokens, evalEvery: 10, evalItems: 100 },
} as const satisfies Method["train"];

const error = (item: EvaluationItem) => countingError(item);
const absolute: ItemMetric = { name: "mae", of: (item) => Math.abs(error(item)) };
const squared: ItemMetric = { name: "rmse", of: (item) => error(item) ** 2, finish: Math.sqrt };
const metrics = ["accuracy", "mae", "rmse"];

/** See the module's text. */
export const counting: Experiment = {
  name: "counting",
  about: "points in the answer, with and without the point reward (Appendix)",
  source: { policy: "tiny", data: "counting" },
  seeds: 5,
  methods: [
    warmUp,
    { name: "base", from },
    { name: "grpo", from, train: grpo },
    { name: "grpo+points", from, train: grpo, source: { reward: "binary=1,point=1" } },
  ],
  splits: { id: { data: "counting" } },
  protocols: { one_turn: { turns: 1, items: 1000, temperature: 1, maxNewTokens } },
  metrics: [absolute, squared],
  comparisons: [
    { a: "grpo", b: "base", metrics },
    { a: "grpo+points", b: "base", metrics },
    { a: "grpo+points", b: "grpo", metrics },
  ],
};
