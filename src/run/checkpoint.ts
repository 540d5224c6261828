/**
 * A checkpoint of a run: the policy as a Hugging Face style folder, with two more files from which training goes on exactly.
 *
 * `optimizer.safetensors` holds AdamW's moments, `state.json` the counters.
 *
 * @module
 */
import type { Policy } from "../policy/policy.ts";
import { readSafetensors, writeSafetensors } from "../policy/safetensors.ts";
import type { TrainingState } from "../train.ts";
import { InputError } from "./errors.ts";

/** A policy that can be written to a folder. */
export interface SavablePolicy extends Policy {
  /** Writes a Hugging Face style folder, replacing what is there. */
  save(folder: string): Promise<void>;
}

/** Writes a checkpoint into a folder that isn't in use yet. */
export async function saveTraining(folder: string, policy: SavablePolicy, state: TrainingState): Promise<void> {
  await policy.save(folder);
  const { trainer: { tensors, updates }, ...counters } = state;
  const moments = Array.from(tensors, ([name, data]) => ({ name, shape: [data.length], data }));
  await Deno.writeFile(`${folder}/optimizer.safetensors`, writeSafetensors(moments));
  await Deno.writeTextFile(`${folder}/state.json`, JSON.stringify({ ...counters, updates }, null, 2) + "\n");
}

/**
 * Reads what {@linkcode saveTraining} wrote, but for the policy.
 *
 * @throws {InputError} if a file is missing or damaged.
 */
export async function loadTraining(folder: string): Promise<TrainingState> {
  const path = `${folder}/optimizer.safetensors`;
  const damaged = (file: string, why: string) =>
    new InputError(`${file}: ${why}; remove ${folder} to go on from the checkpoint before it`);
  let counters: Record<"step" | "tokens" | "skipped" | "updates", number>, bytes: Uint8Array;
  try {
    counters = JSON.parse(await Deno.readTextFile(`${folder}/state.json`));
    bytes = await Deno.readFile(path);
  } catch (error) {
    if (error instanceof SyntaxError) throw damaged(`${folder}/state.json`, "not JSON");
    if (error instanceof Deno.errors.NotFound) throw damaged(folder, "the checkpoint is not complete");
    throw error;
  }
  const { step, tokens, skipped, updates } = counters;
  if (![step, tokens, skipped, updates].every(Number.isSafeInteger)) {
    throw damaged(`${folder}/state.json`, "must have the integers step, tokens, skipped and updates");
  }
  const moments = new Map<string, Float32Array>();
  for (const [name, { data }] of await readSafetensors(bytes, path)) {
    if (!(data instanceof Float32Array)) throw damaged(path, `tensor ${name} must be float32`);
    moments.set(name, data);
  }
  return { step, tokens, skipped, trainer: { tensors: moments, updates } };
}
