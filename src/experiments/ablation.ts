/**
 * Which part of the method carries the effect? Each variant is MGPO with one thing changed, with the same reward and optimizer.
 *
 * @module
 */
import type { TrainOptions } from "../settings.ts";
import type { Experiment, Method } from "./experiment.ts";
import { base, grpo, mgpo, quickProtocols, source, splits } from "./main.ts";

/** Without the fixed template: the model may ground or answer at once. */
const free = { turns: 2, items: 500, temperature: 1, form: "free" } as const;

function without(name: string, change: Partial<TrainOptions>): Method {
  return { name, own: change.form === "free" ? "free" : "two_turn", train: { ...mgpo.train, ...change } };
}

const variants: readonly Method[] = [
  without("free-form", { form: "free" }),
  without("every-token", { lossOn: "every" }),
  without("last-turn", { lossOn: "last" }),
  without("free-form+every-token", { form: "free", lossOn: "every" }),
  without("no-std", { advantageScale: "none" }),
  without("kl", { beta: 0.01 }),
];

/** The control of the other side: one turn with everything trained, the tower too, in case it is what stands in GRPO's way. */
const grpoTower: Method = {
  name: "grpo+tower",
  own: "one_turn",
  train: { ...grpo.train, trainVision: true },
  protocols: quickProtocols,
};

/** See the module's text. */
export const ablation: Experiment = {
  name: "ablation",
  about:
    "MGPO without its template, its restriction of the loss, the deviation in the advantage; with KL; GRPO with its tower trained",
  source,
  seeds: 3,
  methods: [{ ...base, own: "two_turn" }, mgpo, ...variants, grpoTower],
  splits,
  protocols: { two_turn: quickProtocols.two_turn, free },
  comparisons: [
    ...variants.map(({ name }) => ({ a: "mgpo", b: name, metrics: ["accuracy", "accuracy/two_turn", "valid_ratio"] })),
    ...[mgpo, ...variants].map(({ name }) => ({ a: name, b: "base" })),
    { a: "mgpo", b: "grpo+tower" },
  ],
};
