/**
 * The paper's Table 3 in miniature: the share of crops that contain what answers the question. `hit_ratio` asks for the whole
 * sign, `plate_ratio` for the plate with its letter, which is what answers. The runs are those of `main`.
 *
 * @module
 */
import type { Experiment } from "./experiment.ts";
import { base, grpo, main, mgpo, source, splits } from "./main.ts";

const metrics = ["hit_ratio", "plate_ratio", "valid_ratio"];

/** See the module's text. */
export const hitRatio: Experiment = {
  name: "hit-ratio",
  about: "share of crops that contain what answers the question (Table 3)",
  source,
  seeds: main.seeds,
  methods: [base, grpo, mgpo].map((method) => ({ ...method, own: "two_turn" })),
  splits,
  protocols: { two_turn: main.protocols.two_turn },
  comparisons: [{ a: "mgpo", b: "base", metrics }, { a: "mgpo", b: "grpo", metrics }, {
    a: "grpo",
    b: "base",
    metrics,
  }],
};
