/**
 * One, two and three turns, at training and at test time; and two turns where conversations that never answer are left out of the
 * update (over-turn masking).
 *
 * @module
 */
import type { Experiment, Method } from "./experiment.ts";
import { base, grpo, mgpo, quickProtocols, source, splits } from "./main.ts";

const { one_turn, two_turn } = quickProtocols;

/** Training with one turn is GRPO's, with two MGPO's, of `main`. */
const methods: readonly Method[] = [
  { ...base, own: "two_turn" },
  { ...grpo, name: "trained-1-turn" },
  { ...mgpo, name: "trained-2-turns" },
  { name: "trained-3-turns", own: "three_turn", train: { ...mgpo.train, turns: 3 } },
  { name: "trained-2-turns+masking", own: "two_turn", train: { ...mgpo.train, overTurnMasking: true } },
];

/** See the module's text. */
export const turns: Experiment = {
  name: "turns",
  about: "one, two and three turns at training and at test time; over-turn masking",
  source,
  seeds: 3,
  methods,
  splits,
  protocols: { one_turn, two_turn, three_turn: { ...two_turn, turns: 3 } },
  comparisons: [
    { a: "trained-2-turns", b: "trained-1-turn" },
    { a: "trained-3-turns", b: "trained-2-turns" },
    { a: "trained-2-turns+masking", b: "trained-2-turns" },
    { a: "trained-2-turns", b: "trained-2-turns", metricOfB: "accuracy/three_turn" },
    { a: "trained-3-turns", b: "trained-3-turns", metricOfB: "accuracy/two_turn" },
  ],
};
