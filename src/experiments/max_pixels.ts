/**
 * The paper's Table 2 in miniature: how much does each method lose or gain where the picture is shown at another size? Sides of
 * the resized picture around the base's own 112 pixels; the grid of image tokens is 3 × 3, 4 × 4 or 5 × 5.
 *
 * @module
 */
import type { ComparisonSpec, Experiment, Method } from "./experiment.ts";
import { base, grpo, mgpo, quickProtocols, sft, source, splits } from "./main.ts";

const sides = [84, 112, 140] as const;
/** The base's own side; there the runs are those of `main`. */
const ownSide = 112;

function at(side: number, method: Method): Method {
  const pixels = side === ownSide ? {} : { minPixels: side * side, maxPixels: side * side };
  return { ...method, name: `${method.name}@${side}px`, source: pixels };
}

/** See the module's text. */
export const maxPixels: Experiment = {
  name: "max-pixels",
  about: "all methods with the picture shown at 84, 112 and 140 pixels a side (Table 2)",
  source,
  seeds: 3,
  methods: sides.flatMap((side) => [base, sft, grpo, mgpo].map((method) => at(side, method))),
  splits,
  protocols: quickProtocols,
  comparisons: sides.flatMap((side): ComparisonSpec[] => [
    { a: `mgpo@${side}px`, b: `grpo@${side}px` },
    { a: `mgpo@${side}px`, b: `sft@${side}px` },
    { a: `mgpo@${side}px`, b: `base@${side}px` },
  ]),
};
