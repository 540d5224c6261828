/**
 * Does the policy earn its reward by looking? `main`'s MGPO and base with the crop replaced: by a random box of the same size, by
 * the true one, by the whole picture; and with every picture blanked, where no more than chance (.25) is to be had.
 *
 * @module
 */
import type { Experiment, Protocols } from "./experiment.ts";
import { base, main, mgpo, source, splits } from "./main.ts";

const own = main.protocols.two_turn;

const protocols: Protocols = {
  own_boxes: own,
  random_boxes: { ...own, boxes: "random" },
  true_boxes: { ...own, boxes: "true" },
  whole_picture: { ...own, boxes: "whole" },
  blank: { ...own, blank: true },
};
const replaced = ["random_boxes", "true_boxes", "whole_picture", "blank"];

/** See the module's text. */
export const rewardHacking: Experiment = {
  name: "reward-hacking",
  about: "accuracy with boxes replaced by random, true and whole ones, and with the picture blanked",
  source,
  seeds: main.seeds,
  methods: [base, mgpo].map((method) => ({ ...method, own: "own_boxes" })),
  splits,
  protocols,
  comparisons: [
    ...replaced.map((name) => ({ a: "mgpo", b: "mgpo", metricOfB: `accuracy/${name}` })),
    ...replaced.map((name) => ({ a: "mgpo", b: "base", metrics: [`accuracy/${name}`] })),
  ],
};
