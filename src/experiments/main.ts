/**
 * The paper's main table in miniature: base, SFT, GRPO and MGPO from the same base, on the same data, with the same number of
 * sequences, in distribution and out of it.
 *
 * @module
 */
import type { Experiment, Method, Protocols, Source, Split } from "./experiment.ts";

/** The embedded base on the signs world. A few rollouts are kept for the report. */
export const source: Source = { policy: "tiny", data: "signs" };

/** Held-out scenes in distribution, and of a world with other counts, sizes and backgrounds. */
export const splits: Readonly<Record<"id" | "ood", Split>> = {
  id: { data: "signs" },
  ood: { data: "signs-shifted" },
};

/** Answering at once, and grounding first; 1,000 items each, sampled at temperature 1. */
export const protocols: Protocols = {
  one_turn: { turns: 1, items: 1000, temperature: 1 },
  two_turn: { turns: 2, items: 1000, temperature: 1 },
};

/** The same with half the items, for experiments of many runs. */
export const quickProtocols: Protocols = {
  one_turn: { ...protocols.one_turn, items: 500 },
  two_turn: { ...protocols.two_turn, items: 500 },
};

/** The update budget that all methods share: 50 steps of 96 sequences. */
export const budget = { steps: 50, prompts: 12, groupSize: 8, evalEvery: 10, evalItems: 100 } as const;

/** One-turn methods are asked to ground, too, while they train (the paper's Figure 6). */
const evalTurns = [1, 2];

/** The base as it is, asked to answer at once. */
export const base: Method = { name: "base", own: "one_turn" };

/** Cross-entropy on the right answers, as many sequences a step as the others see; its rate is the better of 1e-4 and 3e-4. */
export const sft: Method = {
  name: "sft",
  own: "one_turn",
  train: { ...budget, evalTurns, method: "sft", prompts: 96, learningRate: 3e-4 },
};

/** One turn, the same reward and optimizer; its rate is the best of 1e-4, 3e-4 and 1e-3. */
export const grpo: Method = {
  name: "grpo",
  own: "one_turn",
  train: { ...budget, evalTurns, method: "grpo", learningRate: 1e-4 },
};

/** Grounding first, then the answer; loss on both. */
export const mgpo: Method = {
  name: "mgpo",
  own: "two_turn",
  train: { ...budget, method: "mgpo", learningRate: 3e-4 },
};

/** See the module's text. */
export const main: Experiment = {
  name: "main",
  about: "base, SFT, GRPO and MGPO at the same budget, in and out of distribution",
  source,
  seeds: 5,
  methods: [base, sft, grpo, mgpo],
  splits,
  protocols,
  comparisons: [
    { a: "mgpo", b: "grpo" },
    { a: "mgpo", b: "sft" },
    { a: "mgpo", b: "base", metrics: ["accuracy", "accuracy/two_turn", "valid_ratio", "hit_ratio", "plate_ratio"] },
    { a: "mgpo", b: "grpo", metrics: ["accuracy/two_turn", "valid_ratio", "hit_ratio", "plate_ratio"] },
    { a: "grpo", b: "base" },
    { a: "sft", b: "base" },
  ],
};
