/**
 * Every setting of training and evaluation, once as a typed record and once as the table that command lines, `--help` and checks
 * are made from. A test compares the two.
 *
 * @module
 */
import type { DatasetHints } from "./data/dataset.ts";
import type { AdvantageScale, LossType } from "./mgpo.ts";
import type { Policy } from "./policy/policy.ts";
import { type OptionSpec, type OptionTable, optionTable } from "./run/options.ts";

/** How conversations are sampled. */
export interface ConversationOptions {
  /** Assistant turns: 1 answers at once, 2 grounds first, more ground repeatedly. @default {by method: 2 for mgpo, else 1} */
  turns?: number;
  /** fixed: all turns but the last must ground; free: they may also answer, which ends the conversation. @default {"fixed"} */
  form?: "fixed" | "free";
  /** Softmax temperature while sampling. @default {1} */
  temperature?: number;
  /** Nucleus mass. @default {1} */
  topP?: number;
  /** The most tokens of a reply, turn by turn; the last number serves later turns. @default {the policy's own limit, or 256,512} */
  maxNewTokens?: readonly number[];
  /** Both sides of a valid box are longer than this, in pixels of the resized picture. @default {what the data asks for, or 28} */
  minBoxSide?: number;
  /** Long side : short side of a valid box is less than this. @default {100} */
  maxAspect?: number;
  /** Smallest side of a crop, in pixels of the original picture. @default {what the data asks for, or 0} */
  minCropSide?: number;
  /** Whether a crop's short side is grown to a square. @default {what the data asks for, or off} */
  squareCrop?: boolean;
}

/** Settings of a training run. */
export interface TrainOptions extends ConversationOptions {
  /** mgpo: ground, then answer; grpo: one turn, same reward and optimizer; sft: cross-entropy on good replies. @default {"mgpo"} */
  method?: "mgpo" | "grpo" | "sft";
  /** Seed of every draw. @default {0} */
  seed?: number;
  /** Training steps. @default {50} */
  steps?: number;
  /** Samples of a step. @default {12} */
  prompts?: number;
  /** Rollouts of a sample (not for sft). @default {8} */
  groupSize?: number;
  /** Full learning rate. @default {by method: 1e-4 for grpo, else 3e-4} */
  learningRate?: number;
  /** Shape of the learning rate over the run. @default {"constant"} */
  schedule?: "constant" | "linear" | "cosine";
  /** Steps of linear rise of the learning rate. @default {0} */
  warmup?: number;
  /** Where a decaying learning rate ends, as a share of the full one. @default {0} */
  minLearningRateRatio?: number;
  /** How token losses become one number. @default {"dapo"} */
  lossType?: LossType;
  /** What a centred reward is divided by; none is the paper's equation. @default {"group"} */
  advantageScale?: AdvantageScale;
  /** Probability ratios below 1 minus this earn nothing further. @default {0.2} */
  clipLow?: number;
  /** Probability ratios above 1 plus this earn nothing further. @default {0.2} */
  clipHigh?: number;
  /** Upper bound of a ratio where the advantage is negative. @default {none} */
  delta?: number;
  /** Weight of the KL to the base policy. @default {0} */
  beta?: number;
  /** Whether a probability ratio belongs to a token or to a whole conversation. @default {"token"} */
  importanceSampling?: "token" | "sequence";
  /** What carries loss: what the model wrote in all turns, in the last one, or every text token. @default {"all"} */
  lossOn?: "all" | "last" | "every";
  /** Whether conversations that used all turns without a boxed answer are left out of the update. @default {false} */
  overTurnMasking?: boolean;
  /** Whether the vision tower is trained too. @default {false} */
  trainVision?: boolean;
  /** Passes over the conversations of a step. @default {1} */
  iterations?: number;
  /** Optimizer steps in a pass. @default {1} */
  minibatches?: number;
  /** The most tokens of one forward pass: bounds memory, not the result. @default {8192} */
  tokensPerPass?: number;
  /** Whether the backward pass computes each decoder block again instead of keeping it: less memory, more time. @default {false} */
  gradientCheckpointing?: boolean;
  /** Decay rate of AdamW's first moment. @default {0.9} */
  beta1?: number;
  /** Decay rate of AdamW's second moment. @default {0.95} */
  beta2?: number;
  /** Added to the root of AdamW's second moment. @default {1e-8} */
  epsilon?: number;
  /** Decoupled weight decay. @default {0} */
  weightDecay?: number;
  /** Global norm that gradients are scaled down to. @default {1} */
  maxGradNorm?: number;
  /** Held-out evaluation after every so many steps; 0 for none. @default {10} */
  evalEvery?: number;
  /** Items of such an evaluation. @default {200} */
  evalItems?: number;
  /** Turns of evaluations: eval/accuracy is of the first number, eval/accuracy/N_turns of each further one. @default {as in training} */
  evalTurns?: readonly number[];
  /** Softmax temperature of evaluations; 0 is greedy. @default {1} */
  evalTemperature?: number;
  /** Items that are evaluated at once. @default {64} */
  evalBatch?: number;
}

/** Settings of an evaluation. */
export interface EvaluateOptions extends ConversationOptions {
  /** Assistant turns: 1 answers at once, 2 grounds first, more ground repeatedly. @default {2} */
  turns?: number;
  /** How many items; all of a smaller dataset. @default {1000} */
  items?: number;
  /** Seed of the draws, and of the choice of items from a finite dataset. @default {0} */
  seed?: number;
  /** Items that are worked on at once. @default {64} */
  batchSize?: number;
  /** What is cut out after a grounding turn: the policy's own box, or always a random, the true, or the whole one. @default {"own"} */
  boxes?: "own" | "random" | "true" | "whole";
  /** Whether every picture is replaced by a grey one. @default {false} */
  blank?: boolean;
}

const conversation = optionTable({
  form: {
    kind: "choice",
    choices: ["fixed", "free"],
    default: "fixed",
    help: "fixed: all turns but the last must ground; free: they may also answer, which ends the conversation.",
  },
  temperature: { kind: "number", min: 0, default: 1, help: "Softmax temperature while sampling." },
  topP: { kind: "number", min: 0, above: true, max: 1, default: 1, help: "Nucleus mass." },
  maxNewTokens: {
    kind: "integers",
    min: 1,
    defaultText: "the policy's own limit, or 256,512",
    help: "The most tokens of a reply, turn by turn; the last number serves later turns.",
  },
  minBoxSide: {
    kind: "integer",
    min: 0,
    defaultText: "what the data asks for, or 28",
    help: "Both sides of a valid box are longer than this, in pixels of the resized picture.",
  },
  maxAspect: {
    kind: "number",
    min: 1,
    default: 100,
    help: "Long side : short side of a valid box is less than this.",
  },
  minCropSide: {
    kind: "integer",
    min: 0,
    defaultText: "what the data asks for, or 0",
    help: "Smallest side of a crop, in pixels of the original picture.",
  },
  squareCrop: {
    kind: "boolean",
    defaultText: "what the data asks for, or off",
    help: "Whether a crop's short side is grown to a square.",
  },
});

const turns = {
  kind: "integer",
  min: 1,
  max: 16,
  help: "Assistant turns: 1 answers at once, 2 grounds first, more ground repeatedly.",
} as const satisfies OptionSpec;
const seed = { kind: "integer", min: 0, default: 0 } as const;

/** The table of {@linkcode TrainOptions}. */
export const trainTable = optionTable({
  method: {
    kind: "choice",
    choices: ["mgpo", "grpo", "sft"],
    default: "mgpo",
    help: "mgpo: ground, then answer; grpo: one turn, same reward and optimizer; sft: cross-entropy on good replies.",
  },
  seed: { ...seed, help: "Seed of every draw." },
  steps: { kind: "integer", min: 1, default: 50, help: "Training steps." },
  prompts: { kind: "integer", min: 1, default: 12, help: "Samples of a step." },
  groupSize: { kind: "integer", min: 1, default: 8, help: "Rollouts of a sample (not for sft)." },
  turns: { ...turns, defaultText: "by method: 2 for mgpo, else 1" },
  ...conversation,
  temperature: { ...conversation.temperature, above: true },
  learningRate: {
    kind: "number",
    min: 0,
    above: true,
    defaultText: "by method: 1e-4 for grpo, else 3e-4",
    help: "Full learning rate.",
  },
  schedule: {
    kind: "choice",
    choices: ["constant", "linear", "cosine"],
    default: "constant",
    help: "Shape of the learning rate over the run.",
  },
  warmup: { kind: "integer", min: 0, default: 0, help: "Steps of linear rise of the learning rate." },
  minLearningRateRatio: {
    kind: "number",
    min: 0,
    max: 1,
    default: 0,
    help: "Where a decaying learning rate ends, as a share of the full one.",
  },
  lossType: {
    kind: "choice",
    choices: ["grpo", "bnpo", "dapo", "dr_grpo"],
    default: "dapo",
    help: "How token losses become one number.",
  },
  advantageScale: {
    kind: "choice",
    choices: ["group", "batch", "none"],
    default: "group",
    help: "What a centred reward is divided by; none is the paper's equation.",
  },
  clipLow: {
    kind: "number",
    min: 0,
    max: 1,
    default: 0.2,
    help: "Probability ratios below 1 minus this earn nothing further.",
  },
  clipHigh: {
    kind: "number",
    min: 0,
    default: 0.2,
    help: "Probability ratios above 1 plus this earn nothing further.",
  },
  delta: {
    kind: "number",
    min: 1,
    above: true,
    defaultText: "none",
    help: "Upper bound of a ratio where the advantage is negative.",
  },
  beta: { kind: "number", min: 0, default: 0, help: "Weight of the KL to the base policy." },
  importanceSampling: {
    kind: "choice",
    choices: ["token", "sequence"],
    default: "token",
    help: "Whether a probability ratio belongs to a token or to a whole conversation.",
  },
  lossOn: {
    kind: "choice",
    choices: ["all", "last", "every"],
    default: "all",
    help: "What carries loss: what the model wrote in all turns, in the last one, or every text token.",
  },
  overTurnMasking: {
    kind: "boolean",
    default: false,
    help: "Whether conversations that used all turns without a boxed answer are left out of the update.",
  },
  trainVision: { kind: "boolean", default: false, help: "Whether the vision tower is trained too." },
  iterations: { kind: "integer", min: 1, default: 1, help: "Passes over the conversations of a step." },
  minibatches: { kind: "integer", min: 1, default: 1, help: "Optimizer steps in a pass." },
  tokensPerPass: {
    kind: "integer",
    min: 1,
    default: 8192,
    help: "The most tokens of one forward pass: bounds memory, not the result.",
  },
  gradientCheckpointing: {
    kind: "boolean",
    default: false,
    help: "Whether the backward pass computes each decoder block again instead of keeping it: less memory, more time.",
  },
  beta1: { kind: "number", min: 0, max: 0.9999999, default: 0.9, help: "Decay rate of AdamW's first moment." },
  beta2: { kind: "number", min: 0, max: 0.9999999, default: 0.95, help: "Decay rate of AdamW's second moment." },
  epsilon: {
    kind: "number",
    min: 0,
    above: true,
    default: 1e-8,
    help: "Added to the root of AdamW's second moment.",
  },
  weightDecay: { kind: "number", min: 0, default: 0, help: "Decoupled weight decay." },
  maxGradNorm: {
    kind: "number",
    min: 0,
    above: true,
    default: 1,
    help: "Global norm that gradients are scaled down to.",
  },
  evalEvery: {
    kind: "integer",
    min: 0,
    default: 10,
    help: "Held-out evaluation after every so many steps; 0 for none.",
  },
  evalItems: { kind: "integer", min: 1, default: 200, help: "Items of such an evaluation." },
  evalTurns: {
    kind: "integers",
    min: 1,
    defaultText: "as in training",
    help: "Turns of evaluations: eval/accuracy is of the first number, eval/accuracy/N_turns of each further one.",
  },
  evalTemperature: {
    kind: "number",
    min: 0,
    default: 1,
    help: "Softmax temperature of evaluations; 0 is greedy.",
  },
  evalBatch: { kind: "integer", min: 1, default: 64, help: "Items that are evaluated at once." },
});

/** The table of {@linkcode EvaluateOptions}. */
export const evaluateTable = optionTable({
  turns: { ...turns, default: 2 },
  items: { kind: "integer", min: 1, default: 1000, help: "How many items; all of a smaller dataset." },
  seed: { ...seed, help: "Seed of the draws, and of the choice of items from a finite dataset." },
  batchSize: { kind: "integer", min: 1, default: 64, help: "Items that are worked on at once." },
  boxes: {
    kind: "choice",
    choices: ["own", "random", "true", "whole"],
    default: "own",
    help:
      "What is cut out after a grounding turn: the policy's own box, or always a random, the true, or the whole one.",
  },
  blank: { kind: "boolean", default: false, help: "Whether every picture is replaced by a grey one." },
  ...conversation,
});

/** The most tokens of a reply, where neither the user nor the policy's folder says: room for a box, and for reasoning. */
const MAX_NEW_TOKENS = [256, 512] as const;

/** The most tokens of a reply by turn: as given, else as the policy suggests, else enough for a large model. */
export function maxNewTokensFor(policy: Pick<Policy, "maxNewTokens">, given?: readonly number[]): number[] {
  if (given) return [...given];
  return policy.maxNewTokens === undefined ? [...MAX_NEW_TOKENS] : [policy.maxNewTokens];
}

/** A dataset's wishes where the user has none. */
export function withHints<T extends ConversationOptions>(settings: T, hints: DatasetHints = {}): T {
  const { minBoxSide, minCropSide, squareCrop } = settings;
  return {
    ...settings,
    minBoxSide: minBoxSide ?? hints.minBoxSide,
    minCropSide: minCropSide ?? hints.minCropSide,
    squareCrop: squareCrop ?? hints.squareCrop,
  };
}

/** The part of a record that a table knows, and the rest. */
export function splitByTable(table: OptionTable, record: object): [known: object, rest: object] {
  const entries = Object.entries(record);
  const pick = (inside: boolean) => Object.fromEntries(entries.filter(([key]) => Object.hasOwn(table, key) === inside));
  return [pick(true), pick(false)];
}
