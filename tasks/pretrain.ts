/**
 * `deno task pretrain`: makes the tiny base policy that the project embeds.
 *
 * @module
 */
import { chooseBackend, describeBackend } from "../src/gpu/backend.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { useKernels } from "../src/policy/ops.ts";
import { initialPolicy, pretrain, type PretrainRecord, savedSeconds } from "../src/pretrain/pretrain.ts";
import { measure, modelCard, publish } from "../src/pretrain/publish.ts";
import { pretrainDefaults, stageNames } from "../src/pretrain/stages.ts";
import { InputError } from "../src/run/errors.ts";
import { helpText, optionTable, parseCommandLine, resolveOptions } from "../src/run/options.ts";
import { formatDuration, Progress } from "../src/run/progress.ts";
import { INTERRUPTED, listenForInterrupt, runTask } from "../src/run/tasks.ts";

const manifestPath = new URL("../src/policy/tiny_manifest.ts", import.meta.url).pathname;

const table = optionTable({
  run: {
    kind: "string",
    value: "DIR",
    default: "runs/pretrain",
    help: "folder of states, stage checkpoints and metrics",
  },
  resume: { kind: "boolean", default: false, help: "go on from the last saved state" },
  seed: { kind: "integer", min: 0, default: pretrainDefaults.seed, help: "seed of weights and data" },
  base: {
    kind: "string",
    value: "DIR",
    defaultText: "random weights",
    help: "checkpoint of an earlier stage to start from; leave that stage out with e.g. --see 0",
  },
  see: { kind: "integer", min: 0, default: pretrainDefaults.steps.see, help: "steps of the stage see" },
  use: { kind: "integer", min: 0, default: pretrainDefaults.steps.use, help: "steps of the stage use" },
  habit: { kind: "integer", min: 0, default: pretrainDefaults.steps.habit, help: "steps of the stage habit" },
  scenes: { kind: "integer", min: 100, default: pretrainDefaults.scenes, help: "scenes that pictures are made of" },
  freezeTower: {
    kind: "boolean",
    default: pretrainDefaults.freezeTower,
    help: "rest the vision tower in the stage use",
  },
  out: {
    kind: "string",
    value: "DIR",
    defaultText: "none",
    help: "folder to publish the finished policy to, with a model card; fixtures/tiny is the embedded one",
  },
  items: { kind: "integer", min: 1, default: 1000, help: "held-out scenes that the model card measures" },
  saveEvery: { kind: "integer", min: 1, default: 25, help: "steps between saved states" },
  backend: { kind: "choice", choices: ["auto", "webgpu", "wasm"], default: "auto", help: "where to compute" },
  kernels: {
    kind: "choice",
    choices: ["fused", "plain"],
    default: "fused",
    help: "own kernels, or plain tfjs operations",
  },
  help: { kind: "boolean", default: false, help: "show this help" },
});

function line({ stage, step, steps, seconds, losses }: PretrainRecord): string {
  const shown = Object.entries(losses).map(([name, value]) => `${name} ${value.toFixed(3)}`).join(" ");
  return `${stage} ${step}/${steps}  ${formatDuration(seconds)}  ${shown}`;
}

await runTask(async (args) => {
  const o = resolveOptions(table, parseCommandLine(table, args));
  if (o.help) {
    console.log(helpText("deno task pretrain [OPTIONS]", ["Options", table]));
    return 0;
  }
  if (!o.resume && await exists(`${o.run}/state.safetensors`)) {
    throw new InputError(`${o.run} holds a run already; add --resume to go on, or give another --run`);
  }
  const progress = new Progress();
  progress.log(describeBackend(await chooseBackend(o.backend)));
  useKernels(o.kernels);
  const policy = o.base === undefined ? await initialPolicy(o.seed) : await loadPolicy(o.base);
  const options = {
    seed: o.seed,
    steps: { see: o.see, use: o.use, habit: o.habit },
    scenes: o.scenes,
    freezeTower: o.freezeTower,
  };
  const interrupt = listenForInterrupt(() => progress.log("stopping after this step…"));
  const all = stageNames.reduce((sum, name) => sum + options.steps[name], 0);
  const log = await Deno.open(await folder(o.run) + "/metrics.jsonl", { append: true, create: true });
  try {
    for await (const record of pretrain(policy, o.run, options, { saveEvery: o.saveEvery, resume: o.resume })) {
      await log.write(new TextEncoder().encode(JSON.stringify(record) + "\n"));
      const before = stageNames.slice(0, stageNames.indexOf(record.stage)).reduce((s, n) => s + options.steps[n], 0);
      const done = before + record.step, rest = record.seconds / done * (all - done);
      progress.status(`${line(record)}  about ${formatDuration(rest)} left`);
      if (record.step % 10 === 0 || record.step === record.steps) progress.log(line(record));
      if (interrupt.requested) {
        progress.clear();
        console.log(`stopped; go on with: deno task pretrain --run ${o.run} --resume (and the same options)`);
        return INTERRUPTED;
      }
    }
    progress.clear();
    if (o.out !== undefined) {
      const measures = await measure(policy, o.items, (text) => progress.log(text));
      const parameters = [...policy.parameters.values()].reduce((sum, { size }) => sum + size, 0);
      const command = ["deno task pretrain", ...args.filter((arg) => arg !== "--resume")].join(" ");
      const card = modelCard(measures, options, command, await savedSeconds(o.run, options), parameters);
      await publish(policy, o.out, card, isEmbedded(o.out) ? manifestPath : undefined);
      progress.log(`published to ${o.out}`);
    }
  } finally {
    log.close();
    interrupt.stop();
    policy.dispose();
  }
  return 0;
});

/** Whether a folder is the one that the project embeds. */
function isEmbedded(folder: string): boolean {
  return Deno.realPathSync(folder.replace(/[^/]*\/?$/, "") || ".") + "/tiny" ===
      Deno.realPathSync(new URL("../fixtures", import.meta.url)) + "/tiny" && /(^|\/)tiny\/?$/.test(folder);
}

async function folder(path: string): Promise<string> {
  await Deno.mkdir(path, { recursive: true });
  return path;
}

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(path).then(() => true, () => false);
}
