/**
 * What the tests and the benchmark of the generation engine share: a WebGPU backend or a reason to skip, and the engine run
 * behind the prefill of a policy.
 *
 * @module
 */
import { tf } from "../../deps.ts";
import { gatherRows, segmentsOf } from "../../policy/ops.ts";
import type { GenerateOptions, Sequence } from "../../policy/policy.ts";
import type { QwenPolicy } from "../../policy/qwen.ts";
import { head } from "../../policy/text.ts";
import { chooseBackend } from "../backend.ts";
import type { DecodeEngine, DecodeInput, DecodeOutput } from "./engine.ts";

/** Whether WebGPU runs now; says so where it does not. */
export async function startWebgpu(): Promise<boolean> {
  if (!await navigator.gpu?.requestAdapter()) {
    console.log("skipped: no WebGPU adapter; the software one of Mesa (mesa-vulkan-drivers) is enough");
    return false;
  }
  if (tf.getBackend() !== "webgpu") await chooseBackend("webgpu");
  return true;
}

/** The prompts' keys, values and last logits, as generation prefills them; {@linkcode release} frees them. */
export function prefill(policy: QwenPolicy, sequences: readonly Sequence[]) {
  const k: tf.Tensor3D[] = [], v: tf.Tensor3D[] = [], packed = policy.pack(sequences);
  const firstLogits = tf.tidy(() => {
    const keysValues = (_layer: number, key: tf.Tensor3D, value: tf.Tensor3D) => {
      k.push(tf.keep(key.clone()));
      v.push(tf.keep(value.clone()));
    };
    const hidden = policy.hidden(packed, false, { keysValues });
    const ends = segmentsOf(packed.lengths).cu.slice(1).map((end) => end - 1);
    return head(policy.config, policy.weights, gatherRows(hidden, ends));
  });
  const release = () => tf.dispose([...k, ...v, firstLogits]);
  return { k, v, firstLogits, lengths: packed.lengths, nextPosition: packed.index.map(({ next }) => next), release };
}

/** Generates as the policy does, with the engine in the place of its loop. */
export async function generateWith(
  engine: DecodeEngine,
  policy: QwenPolicy,
  sequences: readonly Sequence[],
  options: GenerateOptions & Pick<DecodeInput, "checkEvery">,
): Promise<DecodeOutput> {
  const suppressed = new Uint8Array(policy.config.text.vocabSize);
  for (const id of options.suppressTokens ?? policy.suppressTokens) suppressed[id] = 1;
  const { release, ...prompts } = prefill(policy, sequences);
  try {
    return await engine.generate({
      ...prompts,
      keys: options.keys ?? sequences.map((_, i) => [0, i, 0] as const),
      seed: options.seed ?? 0,
      temperature: options.temperature ?? 1,
      suppressed,
      stop: new Set(options.stopTokens ?? policy.stopTokens),
      maxNewTokens: options.maxNewTokens,
      checkEvery: options.checkEvery,
      onToken: options.onToken,
    });
  } finally {
    release();
  }
}
