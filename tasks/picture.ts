/**
 * `deno task picture`: draws one held-out conversation of several policies, e.g. the README's picture.
 *
 * @module
 */
import { openDataset } from "../src/data/catalogue.ts";
import { chooseBackend } from "../src/gpu/backend.ts";
import { loadPolicy } from "../src/policy/load.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { rollout } from "../src/rollout.ts";
import { InputError } from "../src/run/errors.ts";
import { helpText, optionTable, parseCommandLine, resolveOptions } from "../src/run/options.ts";
import { type PictureRow, rolloutPicture } from "../src/run/rollout_picture.ts";
import { writeAtomically } from "../src/run/run_folder.ts";
import { runTask } from "../src/run/tasks.ts";

const table = optionTable({
  policies: { kind: "string", value: "DIR,…", default: "tiny", help: "policies, a row each, with commas between" },
  titles: { kind: "string", value: "TEXT,…", defaultText: "the policies' names", help: "titles of the rows" },
  data: { kind: "string", value: "NAME|DIR", default: "signs", help: "signs, signs:SIZE, or a folder" },
  item: { kind: "integer", min: 0, default: 0, help: "which held-out item" },
  temperature: { kind: "number", min: 0, default: 0, help: "softmax temperature; 0 is greedy" },
  out: { kind: "string", value: "FILE", default: "rollout.svg", help: "where to write the SVG" },
  help: { kind: "boolean", default: false, help: "show this help" },
});

await runTask(async (args) => {
  const o = resolveOptions(table, parseCommandLine(table, args));
  if (o.help) {
    console.log(helpText("deno task picture [OPTIONS]", ["Options", table]));
    return 0;
  }
  const sources = o.policies.split(","), titles = o.titles?.split(",") ?? sources;
  if (titles.length !== sources.length) {
    throw new InputError(`--titles has ${titles.length} entries but --policies ${sources.length}; give one for each`);
  }
  await chooseBackend("auto");
  const world = await openDataset(o.data, "heldout", {}), sample = await world.get(o.item);
  const rows: PictureRow[] = [];
  let policy: QwenPolicy | undefined;
  for (const [i, source] of sources.entries()) {
    policy?.dispose();
    policy = await loadPolicy(source);
    const options = {
      ...world.hints,
      groupSize: 1,
      temperature: o.temperature,
      maxNewTokens: policy.maxNewTokens ?? 256,
    };
    const { trajectories: [trajectory], skipped: [problem] } = await rollout(policy, [sample], options);
    if (problem) throw new InputError(`${problem.sampleId}: ${problem.error}`);
    rows.push({ title: titles[i], trajectory });
  }
  await writeAtomically(o.out, await rolloutPicture(policy!, sample, rows));
  policy!.dispose();
  console.log(`wrote ${o.out}`);
  return 0;
});
