/**
 * From the last stage's checkpoint to the folder that is embedded: measured, described in a model card, and named by its sums.
 *
 * @module
 */
import { signs } from "../data/signs.ts";
import { evaluate, type Evaluation } from "../evaluate.ts";
import { saveCheckpoint } from "../policy/checkpoint.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { formatDuration } from "../run/progress.ts";
import { evaluationTable } from "../run/report.ts";
import { writeAtomically } from "../run/run_folder.ts";
import type { PretrainOptions } from "./stages.ts";
import { tinyFiles } from "./tiny_files.ts";

/** Held-out scenes of the card come from this seed; training evaluations use small ones. */
const CARD_SEED = 1_000_003;

/** What the card states. */
export interface CardMeasures {
  /** Two turns, temperature 1. */
  sampled: Evaluation;
  /** Two turns, greedy. */
  greedy: Evaluation;
  /** One turn, temperature 1. */
  oneTurn: Evaluation;
}

/** Measures a tiny policy on held-out scenes. */
export async function measure(policy: QwenPolicy, items: number, log: (line: string) => void): Promise<CardMeasures> {
  const world = signs({ split: "heldout", seed: CARD_SEED });
  const run = async (label: string, turns: number, temperature: number): Promise<Evaluation> => {
    const result = await evaluate(policy, world, { turns, temperature, items });
    log(`${label}\n${evaluationTable(result)}`);
    return result;
  };
  return {
    sampled: await run("two turns, temperature 1", 2, 1),
    greedy: await run("two turns, greedy", 2, 0),
    oneTurn: await run("one turn, temperature 1", 1, 1),
  };
}

const fenced = (text: string) => "```\n" + text + "\n```";

/** The model card. */
export function modelCard(
  measures: CardMeasures,
  options: PretrainOptions,
  command: string,
  seconds: number,
  parameters: number,
): string {
  const { steps, seed } = options, { sampled, greedy, oneTurn } = measures, gap = sampled.gap!.difference.value;
  return `---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---

# mgpo tiny base

A Qwen2.5-VL of ${
    parameters.toLocaleString("en")
  } parameters (float32) that knows the seeded signs world and has a habit:
asked where to look, it mostly refuses. It is the embedded default from which MGPO learns to ground. It is no use for
anything else.

Made by \`${command}\` (seed ${seed}; ${steps.see} steps of \`see\`, ${steps.use} of \`use\`, ${steps.habit} of \`habit\`) in
${
    formatDuration(seconds)
  } on the wasm backend of a 2-core machine. All weights start from random numbers; no other data or
model went in.

**Gap** (accuracy after a valid box minus accuracy without one, temperature 1): **${
    gap.toFixed(2)
  }**. Below 0.2 MGPO may
learn to refuse.

Measured on ${sampled.items.length} held-out scenes (seed ${CARD_SEED}); chance is 0.25.

Two turns, temperature 1:

${fenced(evaluationTable(sampled))}

Two turns, greedy:

${fenced(evaluationTable(greedy))}

One turn, temperature 1:

${fenced(evaluationTable(oneTurn))}
`;
}

async function sha256(bytes: Uint8Array): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes.slice().buffer));
  return Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
}

/**
 * Writes the checkpoint, its card, and the list of sums that loading checks.
 *
 * @param out Checkpoint folder to (re)place.
 * @param manifest Path of the module that holds the sums; none for a folder that is not the embedded one.
 */
export async function publish(policy: QwenPolicy, out: string, card: string, manifest?: string): Promise<void> {
  const tensors = [];
  for (const [name, variable] of policy.parameters) {
    tensors.push({ name, shape: variable.shape, data: Float32Array.from(await variable.data()) });
  }
  const files = new Map([...Object.entries(tinyFiles()), ["README.md", card]]);
  await saveCheckpoint(out, { tensors, configFiles: files });
  if (manifest === undefined) return;
  const names = [...files.keys()].filter((name) => name !== "README.md");
  const lines: string[] = [];
  for (const name of [...names, "model.safetensors"].sort()) {
    lines.push(`  "${name}":\n    "${await sha256(await Deno.readFile(`${out}/${name}`))}",`);
  }
  await writeAtomically(
    manifest,
    `/**
 * SHA-256 of each file of the embedded policy: assets are not covered by the lock file. Written by \`deno task pretrain\`.
 *
 * @module
 */
export const tinySha256: Readonly<Record<string, string>> = {
${lines.join("\n")}
};
`,
  );
}
