/**
 * How far does the binary reward get? MGPO against supervised training that is given what MGPO has to find out: the true boxes,
 * and the right answers after them. Once with as many sequences, once with as many seconds.
 *
 * @module
 */
import type { Experiment, Method } from "./experiment.ts";
import { base, main, mgpo, sft, source, splits } from "./main.ts";

/**
 * Steps of supervised training that take as long as MGPO's 50: it sees 96 pictures a step, MGPO 12 of which each is sampled eight
 * times. Measured alone on a core: 44 s for 50 steps against 21 s; the result's `seconds` say how well it fits.
 */
const stepsInTime = 24;

/** Two turns, the true box in the first. */
const demonstrated = { ...sft.train, turns: 2, evalTurns: [2] } as const;

const methods: readonly Method[] = [
  { ...base, own: "two_turn" },
  mgpo,
  { name: "sft-boxes", own: "two_turn", train: demonstrated },
  { name: "sft-boxes@seconds", own: "two_turn", train: { ...demonstrated, steps: stepsInTime } },
];
const metrics = ["accuracy", "valid_ratio", "hit_ratio", "plate_ratio"];

/** See the module's text. */
export const supervision: Experiment = {
  name: "supervision",
  about: "the binary reward against true boxes, at as many sequences and at as many seconds",
  source,
  seeds: 3,
  methods,
  splits,
  protocols: main.protocols,
  comparisons: [
    { a: "mgpo", b: "sft-boxes", metrics },
    { a: "mgpo", b: "sft-boxes@seconds", metrics },
    { a: "sft-boxes", b: "base", metrics },
  ],
};
