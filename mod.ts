/**
 * **mgpo**: Multi-turn Grounding-based Policy Optimization (arXiv 2507.05920) for Qwen2.5-VL on TensorFlow.js, WebGPU or CPU.
 *
 * The way of the data: a {@linkcode Sample} → {@linkcode rollout} → a reward ({@linkcode binaryReward}) →
 * {@linkcode Trainer} (group advantages, clipped token objective, AdamW) → step records. {@linkcode train} is that loop,
 * {@linkcode evaluate} measures, {@linkcode loadPolicy} loads a policy: without an argument the embedded tiny one.
 *
 * @example Load the embedded policy and look at one conversation
 * ```ts
 * import { chooseBackend, loadPolicy, rollout, signs } from "./mod.ts";
 *
 * await chooseBackend("wasm");
 * const policy = await loadPolicy();
 * const world = signs({ split: "heldout" });
 * const { trajectories } = await rollout(policy, [await world.get(0)], {
 *   ...world.hints,
 *   groupSize: 2,
 *   maxNewTokens: [14, 8],
 * });
 * for (const { turns } of trajectories) for (const turn of turns) console.log(turn.text, turn.box ?? turn.invalid ?? "");
 * policy.dispose();
 * ```
 *
 * @example Train, step by step
 * ```ts
 * import { chooseBackend, loadPolicy, signs, train } from "./mod.ts";
 *
 * await chooseBackend("wasm");
 * const policy = await loadPolicy();
 * for await (const step of train(policy, signs(), { steps: 1, prompts: 2, groupSize: 4 })) {
 *   console.log(step.step, step["reward/mean"], step["grounding/valid_ratio"]);
 * }
 * policy.dispose();
 * ```
 *
 * @module
 */
export {
  type AdapterInfo,
  type BackendChoice,
  type BackendName,
  chooseBackend,
  describeBackend,
} from "./src/gpu/backend.ts";
export { type Kernels, useKernels } from "./src/policy/ops.ts";
export { type LoadOptions, loadPolicy, tinyPolicyUrl } from "./src/policy/load.ts";
export { QwenPolicy } from "./src/policy/qwen.ts";
export type { GenerationDefaults, QwenConfig, TextConfig, TokenIds, VisionConfig } from "./src/policy/config.ts";
export type { RenderOptions, Tokenizer } from "./src/policy/tokenizer.ts";
export type { ImageProcessor, ImageProcessorConfig, ImageProcessorOptions } from "./src/policy/image_processor.ts";
export type { Inspect } from "./src/policy/vision.ts";
export type { Scalar, Tensor, Tensor1D, Tensor2D, Variable } from "./src/tensors.ts";
export type {
  Completion,
  GenerateOptions,
  ImageInput,
  LogProbOptions,
  Message,
  MessagePart,
  Policy,
  PrefixCache,
  Sequence,
  TokenLogProbs,
} from "./src/policy/policy.ts";
export { type DecodeOptions, Picture } from "./src/policy/picture.ts";
export type { Box, Dataset, DatasetHints, Demonstration, Sample } from "./src/data/dataset.ts";
export {
  makeScene,
  type Rgb,
  type Scene,
  type Sign,
  type SignColour,
  signColours,
  type SignLetter,
  signLetters,
  signs,
  type SignShape,
  signShapes,
  type SignsOptions,
} from "./src/data/signs.ts";
export { counting, type CountingMetrics, countingMetrics } from "./src/data/counting.ts";
export { drawScene } from "./src/data/signs_draw.ts";
export { type FolderDataset, type FolderOptions, openFolder, type RowProblem } from "./src/data/folder.ts";
export { openDataset, type OpenDatasetOptions } from "./src/data/catalogue.ts";
export {
  cropBox,
  defaultTemplate,
  type InvalidReason,
  invalidReasons,
  parseBox,
  type PromptTemplate,
  rollout,
  type RolloutBatch,
  type RolloutOptions,
  type Size,
  summarize,
  toOriginal,
  type Trajectory,
  trajectoryToJson,
  type TurnRecord,
} from "./src/rollout.ts";
export {
  binaryReward,
  boxedAnswer,
  combineRewards,
  formatReward,
  hitReward,
  iouReward,
  isCorrect,
  lengthPenalty,
  matchPoints,
  parsePoints,
  type Point,
  pointReward,
  type RewardFunction,
  type RewardPart,
  type RewardValue,
  validBoxReward,
} from "./src/reward.ts";
export {
  AdamW,
  type AdamWOptions,
  type Advantages,
  type AdvantageScale,
  groupAdvantages,
  type LossInputs,
  type LossOptions,
  type LossType,
  type ObjectiveOptions,
  policyLoss,
  type PolicyMetrics,
  schedule,
  type ScheduleOptions,
  type StepMetrics,
  Trainer,
  type TrainerOptions,
  type TrainerState,
  type TrainingTrajectory,
  type UpdateMetrics,
} from "./src/mgpo.ts";
export {
  type StepProgress,
  type StepRollouts,
  train,
  Training,
  type TrainingState,
  type TrainParts,
  type TrainSettings,
} from "./src/train.ts";
export type { ConversationOptions, EvaluateOptions, TrainOptions } from "./src/settings.ts";
export {
  type Difference,
  evaluate,
  type EvaluateParts,
  type Evaluation,
  type EvaluationItem,
  type Proportion,
} from "./src/evaluate.ts";
export type { StepRecord } from "./src/run/metrics.ts";
export { InputError } from "./src/run/errors.ts";
