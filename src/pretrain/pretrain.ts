/**
 * Pretraining as a resumable run: the stages one after the other, with everything that a later step depends on saved at
 * intervals.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { Checkpoint } from "../policy/checkpoint.ts";
import { parseConfig } from "../policy/config.ts";
import { policyFromCheckpoint } from "../policy/load.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { readSafetensors, writeSafetensors } from "../policy/safetensors.ts";
import { Tokenizer } from "../policy/tokenizer.ts";
import { InputError } from "../run/errors.ts";
import { writeAtomically } from "../run/run_folder.ts";
import { initialWeights } from "./initial.ts";
import { Pool } from "./pool.ts";
import { makeProbes } from "./probes.ts";
import { type Losses, type PretrainOptions, Stage, type StageName, stageNames } from "./stages.ts";
import { tinyFiles, tinyPhrases } from "./tiny_files.ts";

/** The tiny policy before any training. */
export async function initialPolicy(seed: number): Promise<QwenPolicy> {
  const files = new Map(Object.entries(tinyFiles())), where = "tiny";
  const config = parseConfig(JSON.parse(files.get("config.json")!), `${where}/config.json`);
  const tokenizer = Tokenizer.fromFiles(files, where);
  const weights = initialWeights(config, tinyPhrases.coordinates.map((word) => tokenizer.encode(word)[0]), seed);
  async function* tensors() {
    yield* weights;
  }
  const checkpoint: Checkpoint = { where, config, files, tensors };
  return await policyFromCheckpoint(checkpoint, where);
}

/** What a step reports. */
export interface PretrainRecord {
  stage: StageName;
  /** From 1, within the stage. */
  step: number;
  steps: number;
  seconds: number;
  losses: Losses;
}

/** Where a run stands: `done` steps of `stage` are behind it. */
interface Position {
  stage: StageName;
  done: number;
  seconds: number;
}

const stateFile = "state.safetensors";

/**
 * Runs the stages, yielding a record a step.
 *
 * @param folder Run folder: `state.safetensors` and, after each stage, a checkpoint named like it.
 * @param saveEvery Steps between saved states.
 * @param resume Whether to go on from the saved state.
 */
export async function* pretrain(
  policy: QwenPolicy,
  folder: string,
  options: PretrainOptions,
  { saveEvery = 25, resume = false }: { saveEvery?: number; resume?: boolean } = {},
): AsyncGenerator<PretrainRecord> {
  const { vision, text } = policy.config;
  const probes = makeProbes(vision.hiddenSize, text.hiddenSize, options.seed);
  const pool = new Pool(policy);
  const loaded = resume ? await readState(folder, options) : undefined;
  let seconds = loaded?.position.seconds ?? 0;
  await Deno.mkdir(folder, { recursive: true });
  try {
    if (loaded) restore(policy, probes, loaded.tensors);
    for (const name of stageNames.slice(loaded ? stageNames.indexOf(loaded.position.stage) : 0)) {
      const steps = options.steps[name];
      const here = loaded?.position.stage === name ? loaded : undefined;
      const stage = new Stage(name, policy, probes, pool, options);
      try {
        if (here && here.position.done < steps) stage.optimizer.load(optimizerPart(here.tensors));
        for (let step = here?.position.done ?? 0; step < steps; step++) {
          const start = performance.now();
          const losses = await stage.step(step, steps);
          seconds += (performance.now() - start) / 1000;
          if ((step + 1) % saveEvery === 0 || step + 1 === steps) {
            const position = { stage: name, done: step + 1, seconds };
            await writeState(folder, policy, probes, await stage.optimizer.state(), position, options);
          }
          yield { stage: name, step: step + 1, steps, seconds, losses };
        }
        if (steps > 0) await policy.save(`${folder}/${name}`);
      } finally {
        stage.dispose();
      }
    }
  } finally {
    for (const probe of probes.values()) probe.dispose();
  }
}

/** Seconds of computing behind a run's saved state. */
export async function savedSeconds(folder: string, options: PretrainOptions): Promise<number> {
  return (await readState(folder, options)).position.seconds;
}

function optimizerPart(tensors: ReadonlyMap<string, Float32Array>): Map<string, Float32Array> {
  const out = new Map<string, Float32Array>();
  for (const [name, data] of tensors) if (name.startsWith("optimizer.")) out.set(name.slice("optimizer.".length), data);
  return out;
}

function restore(
  policy: QwenPolicy,
  probes: ReadonlyMap<string, tf.Variable>,
  tensors: ReadonlyMap<string, Float32Array>,
): void {
  for (const [name, variable] of [...policy.parameters, ...probes]) {
    const data = tensors.get(`weight.${name}`);
    if (data?.length !== variable.size) throw new InputError(`saved pretraining state lacks ${name}; start afresh`);
    tf.tidy(() => variable.assign(tf.tensor(data, variable.shape)));
  }
}

async function writeState(
  folder: string,
  policy: QwenPolicy,
  probes: ReadonlyMap<string, tf.Variable>,
  optimizer: ReadonlyMap<string, Float32Array>,
  position: Position,
  options: PretrainOptions,
): Promise<void> {
  const tensors: { name: string; shape: number[]; data: Float32Array }[] = [];
  for (const [name, variable] of [...policy.parameters, ...probes]) {
    tensors.push({
      name: `weight.${name}`,
      shape: variable.shape,
      data: (await variable.data()).slice() as Float32Array,
    });
  }
  for (const [name, data] of optimizer) tensors.push({ name: `optimizer.${name}`, shape: [data.length], data });
  const metadata = { position: JSON.stringify(position), options: JSON.stringify(options) };
  await writeAtomically(`${folder}/${stateFile}`, writeSafetensors(tensors, metadata));
}

async function readState(
  folder: string,
  options: PretrainOptions,
): Promise<{ tensors: Map<string, Float32Array>; position: Position }> {
  const path = `${folder}/${stateFile}`;
  let bytes: Uint8Array;
  try {
    bytes = await Deno.readFile(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    throw new InputError(`${path}: nothing to resume; start without --resume`);
  }
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const loaded = await readSafetensors(bytes, path);
  const { __metadata__: metadata } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  if (metadata.options !== JSON.stringify(options)) {
    throw new InputError(
      `${path}: was made with other settings (${metadata.options}); use those or start without --resume`,
    );
  }
  const tensors = new Map([...loaded].map(([name, { data }]) => [name, data as Float32Array]));
  return { tensors, position: JSON.parse(metadata.position) };
}
