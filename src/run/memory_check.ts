/**
 * Whether a training run will fit, asked before its weights are loaded.
 *
 * @module
 */
import type { Dataset, Sample } from "../data/dataset.ts";
import { tf, tfwebgpu } from "../deps.ts";
import type { BackendChoice } from "../gpu/backend.ts";
import { openCheckpoint } from "../policy/checkpoint.ts";
import { encoderFromCheckpoint, type LoadOptions, tinyPolicyUrl } from "../policy/load.ts";
import { type ConversationSize, type MemoryPlan, planMemory, type PlanSettings } from "../policy/memory_plan.ts";
import { currentKernels } from "../policy/ops.ts";
import { imageTokens } from "../policy/packing.ts";
import type { Policy } from "../policy/policy.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { type PromptTemplate, rollout, type Trajectory } from "../rollout.ts";
import { readSamples } from "../samples.ts";
import { settleTraining } from "../train.ts";
import type { TrainOptions } from "../settings.ts";
import { MOST_WASM_BYTES } from "../wasm/memory.ts";
import { InputError } from "./errors.ts";

/** Conversations that are looked at to know how long they are. */
const LOOKED_AT = 4;

/**
 * How large conversations of the data become with a policy's pictures and words: as many words as the longest of a few samples
 * spread over the data, asked once with the whole picture as crop and once with no valid box, and the largest pictures that the
 * pixel budget lets through, whatever those samples show.
 *
 * @param policy Its weights are not used.
 * @returns Undefined if none of these samples can be read.
 */
export async function conversationSize(
  policy: QwenPolicy,
  dataset: Dataset,
  { turns, template }: { turns: number; template?: Partial<PromptTemplate> },
): Promise<ConversationSize | undefined> {
  const count = Math.min(LOOKED_AT, dataset.size), apart = dataset.size === Infinity ? 1 : dataset.size / count;
  const positions = Array.from({ length: count }, (_, i) => Math.floor(i * apart));
  const samples = await readSamples(dataset, positions), size = { promptTokens: 0, turnTokens: 0, imageTokens: 0 };
  const { maxPixels, patchSize, mergeSize } = policy.processor.config;
  const most = Math.floor(maxPixels / (patchSize * mergeSize) ** 2);
  for (const cropInstead of [undefined, wholePicture]) {
    const { trajectories } = await rollout(silent(policy), samples, { turns, template, groupSize: 1, cropInstead });
    for (const { assistantMask, images } of trajectories) {
      const shown = images.map((image) => imageTokens(image, policy.config));
      const more = shown.map((tokens) => Math.max(0, most - tokens));
      const prompt = assistantMask.indexOf(1), given = assistantMask.filter((m) => m === 0).length;
      const later = given - prompt + more.slice(1).reduce((sum, tokens) => sum + tokens, 0);
      size.promptTokens = Math.max(size.promptTokens, prompt + more[0]);
      if (turns > 1) size.turnTokens = Math.max(size.turnTokens, Math.ceil(later / (turns - 1)) + 1);
      size.imageTokens = Math.max(size.imageTokens, most, ...shown);
    }
  }
  return size.promptTokens > 0 ? size : undefined;
}

const wholePicture = (_: Sample, { pictureSize: [width, height] }: Trajectory) => [0, 0, width, height] as const;

/** A policy that says nothing. */
function silent(policy: QwenPolicy): Policy {
  const { name, stopTokens, suppressTokens, maxNewTokens, parameters } = policy;
  const end = stopTokens.slice(0, 1);
  return {
    ...{ name, stopTokens, suppressTokens, maxNewTokens, parameters },
    prepareImage: (picture) => policy.prepareImage(picture),
    encodeChat: (...given) => policy.encodeChat(...given),
    encodeContinuation: (...given) => policy.encodeContinuation(...given),
    encode: (text) => policy.encode(text),
    decode: (...given) => policy.decode(...given),
    generate: (sequences) =>
      Promise.resolve(sequences.map(() => ({ ids: [...end], logprobs: end.map(() => 0), finish: "stop" as const }))),
    logProbs: () => {
      throw new TypeError("a silent policy has no log-probs");
    },
    dispose: () => {},
  };
}

/** What there is; undefined where nobody knows. */
export interface MemoryThere {
  /** Bytes of everything together. */
  total?: number;
  /** What sets `total`, in words. */
  totalName?: string;
  /** Bytes of a buffer. */
  buffer?: number;
  /** Bytes of a buffer that a kernel sees at once. */
  binding?: number;
}

/**
 * What memory the current backend has.
 *
 * @param limit What the user allows, in GiB.
 */
export function memoryThere(backend: BackendChoice["backend"], limit?: number): MemoryThere {
  const allowed = limit === undefined ? Infinity : limit * 2 ** 30,
    own = backend === "wasm" ? MOST_WASM_BYTES : Infinity;
  const total = Math.min(allowed, own);
  const there: MemoryThere = total === Infinity ? {} : {
    total,
    totalName: allowed < own ? `--memory-limit ${limit}` : "WebAssembly can have",
  };
  const current = tf.backend();
  if (backend !== "webgpu" || !(current instanceof tfwebgpu.WebGPUBackend)) return there;
  const { maxBufferSize, maxStorageBufferBindingSize } = current.device.limits;
  return { ...there, buffer: maxBufferSize, binding: maxStorageBufferBindingSize };
}

/** Parts and buffers that a refusal names. */
const NAMED = 5;

/**
 * Refuses a run that will not fit.
 *
 * @throws {InputError} naming the sizes that decide it, largest first, and what makes each smaller.
 */
export function refuseTooLarge({ totalBytes, parts, overheadBytes, buffers }: MemoryPlan, there: MemoryThere): void {
  const { total = Infinity, totalName, buffer = Infinity, binding = Infinity } = there;
  const listed = (given: MemoryPlan["parts"]) =>
    given.slice(0, NAMED).map(({ name, bytes, advice }) => `${formatBytes(bytes)} ${name}: ${advice}`).join("; ");
  const large = buffers.filter(({ bytes, windowed }) => bytes > (windowed ? buffer : Math.min(buffer, binding)));
  if (large.length > 0) {
    throw new InputError(
      `the run does not fit this GPU, whose largest buffer is ${formatBytes(buffer)} and of which a kernel sees ` +
        `${formatBytes(binding)} at once, but needed are: ${listed(large)}`,
    );
  }
  if (totalBytes <= total) return;
  throw new InputError(
    `the run does not fit: it may take ${formatBytes(totalBytes)}, but ${totalName} allows ${formatBytes(total)}. ` +
      `Largest first: ${listed(parts)}; ${formatBytes(overheadBytes)} beside them for what the allocator keeps`,
  );
}

/** Bytes in MiB or GiB. */
export function formatBytes(bytes: number): string {
  return bytes < 2 ** 30
    ? `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 24 ? 1 : 0)} MiB`
    : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

/** What {@linkcode checkMemory} looks at. */
export interface MemoryQuestion {
  /** A policy's folder; `tiny` is the embedded one. */
  policy: string;
  pixels: Pick<LoadOptions, "minPixels" | "maxPixels">;
  dataset: Dataset;
  train: TrainOptions;
  template?: Partial<PromptTemplate>;
  /** Whether held-out items are asked. */
  isEvaluated: boolean;
  backend: BackendChoice["backend"];
  /** In GiB. */
  limit?: number;
}

/**
 * Refuses a run that will not fit, before its weights are loaded.
 *
 * @returns The plan; undefined if no sample could be read, which the run itself reports.
 * @throws {InputError} As {@linkcode refuseTooLarge}, and where the folder or an option is wrong.
 */
export async function checkMemory(question: MemoryQuestion): Promise<MemoryPlan | undefined> {
  const { policy: source, pixels, dataset, train, template, isEvaluated, backend, limit } = question;
  const checkpoint = await openCheckpoint(source === "tiny" ? tinyPolicyUrl : source);
  const encoder = encoderFromCheckpoint(checkpoint, source, pixels);
  try {
    const settings = settleTraining(encoder, dataset, train);
    const size = await conversationSize(encoder, dataset, { turns: settings.turns, template });
    if (!size) return undefined;
    const plan = planMemory(checkpoint.config, size, planSettings(settings, backend, isEvaluated));
    refuseTooLarge(plan, memoryThere(backend, limit));
    return plan;
  } finally {
    encoder.dispose();
  }
}

/** The settings of a run that its memory depends on. */
export function planSettings(
  settings: ReturnType<typeof settleTraining>,
  backend: BackendChoice["backend"],
  isEvaluated: boolean,
): PlanSettings {
  const { method, turns, prompts, groupSize, maxNewTokens, minibatches, tokensPerPass, ...rest } = settings;
  const { gradientCheckpointing, trainVision, lossOn, beta, evalBatch, topP } = rest;
  return {
    ...{ method, turns, prompts, groupSize, maxNewTokens, minibatches, tokensPerPass },
    ...{ gradientCheckpointing, trainVision, lossOn, backend, kernels: currentKernels() },
    reference: beta > 0,
    evalBatch: isEvaluated ? evalBatch : 0,
    nucleus: topP < 1,
  };
}
