/**
 * Checks the policy, its image processor and tokenizer, the losses, gradients and optimizer against a golden folder.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { checkBatch } from "./batch.ts";
import { Golden } from "./golden.ts";
import { checkGrads } from "./grads.ts";
import { checkGrpo } from "./grpo.ts";
import { checkImages } from "./images.ts";
import { checkModels } from "./models.ts";
import { Report } from "./report.ts";
import { checkTokenizer } from "./tokenizer.ts";
import { checkTwoTurn } from "./two_turn.ts";

type Group = (golden: Golden, report: Report) => Promise<void>;

/** Every group of the layout in the order they run; each is a folder. Those without a function are not checked yet. */
const groups: Readonly<Record<string, Group | undefined>> = {
  models: checkModels,
  tokenizer: checkTokenizer,
  images: checkImages,
  parity: async (golden, report) => {
    await report.attempt("two_turn", () => checkTwoTurn(golden, report));
    await report.attempt("batch", () => checkBatch(golden, report));
  },
  grads: checkGrads,
  grpo: checkGrpo,
  lora: undefined,
};

/** Names of the groups. */
export const groupNames: readonly string[] = Object.keys(groups);

/** Options of {@linkcode runParity}. */
export interface ParityOptions {
  /** Groups to run; one named here must be there. @default {all that are there} */
  only?: readonly string[];
  /** Takes each line of the report. @default {nothing is printed} */
  print?: (line: string) => void;
}

/**
 * Runs the checks on the current backend.
 *
 * @param source A golden folder.
 * @throws {InputError} There is no such folder, it has none of the groups, or a group is unknown.
 */
export async function runParity(source: string | URL, options: ParityOptions = {}): Promise<Report> {
  const { only } = options, report = new Report(options.print), golden = new Golden(source);
  const unknown = only?.find((name) => !groupNames.includes(name));
  if (unknown !== undefined) {
    throw new InputError(`--only ${unknown}: unknown group; use ${groupNames.join(", ")}`);
  }
  const present = await Promise.all(groupNames.map((name) => golden.has(name)));
  if (!present.includes(true)) {
    throw new InputError(`${golden.path}: no golden folder there; expected folders such as ${groupNames.join(", ")}`);
  }
  try {
    for (const [i, name] of groupNames.entries()) {
      if (only && !only.includes(name)) continue;
      const run = groups[name];
      if (!run) report.line(`\n${name}\n  skipped: not implemented yet`);
      else if (present[i]) await report.group(name, () => run(golden, report));
      else if (only) await report.group(name, () => Promise.reject(new InputError("no such folder")));
      else report.line(`\n${name}\n  skipped: no such folder`);
    }
  } finally {
    golden.dispose();
  }
  return report;
}
