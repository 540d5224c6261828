/**
 * Group `grads`: a batch of two-turn replies through policy, loss, backward pass and optimizer.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { AdamW, policyLoss, policyMetrics, type TokenRow } from "../mgpo.ts";
import type { Sequence } from "../policy/policy.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { take } from "./forward.ts";
import { type Golden, rowsOf, tensor, type Tensors } from "./golden.ts";
import { compareMetrics, type LossConfig, lossOptions, type Metrics } from "./grpo.ts";
import { namedImages } from "./inputs.ts";
import type { Check, Report } from "./report.ts";
import { tolerances } from "./tolerances.ts";
import { checkSubImages, tokenTypes } from "./two_turn.ts";

interface LossJson {
  config: LossConfig;
  temperature: number;
  max_completion_length: number;
  loss: number;
  metrics: Metrics;
  grad_global_norm: number;
  per_parameter: Record<string, { shape: number[]; l2: number; sum: number; max_abs: number }>;
}
interface AdamWJson {
  config: {
    lr: number;
    betas: [number, number];
    eps: number;
    weight_decay: number;
    max_norm: number | null;
  };
  /** Begins with the name of the loss. */
  loss: string;
  history: { step: number; loss_before?: number; grad_norm_before_clipping?: number }[];
  eager_vs_sdpa_parameter_noise?: Record<string, { per_parameter?: Record<string, { l2: number; sum: number }> }>;
}
interface GradsJson {
  pixel_values_order: string[];
  num_images: number[];
  num_items_in_batch: number;
  prompt_length: number;
  completion_length: number;
  losses: Record<string, LossJson>;
  adamw: AdamWJson;
}

/** The batch as the policy takes it: the completions' tokens in order, packed to the left. */
interface Batch {
  sequences: Sequence[];
  /** 1 at completion tokens of each sequence. */
  masks: number[][];
  /** Columns of the recorded `[B, C]` tensors that hold each row's completion tokens. */
  columns: number[][];
  /** Of those, 1 where the token carries loss. */
  lossMask: number[][];
  advantages: number[];
  old: number[][];
  ref: number[][];
}

/** One backward pass, read back. */
interface Pass {
  loss: number;
  /** Rows of completion tokens. */
  logprobs: number[][];
  entropy: number[][];
  /** Gradients by parameter name, owned by the caller. */
  grads: Map<string, tf.Tensor>;
}

const file = "grads/batch.safetensors";

/** What all checks of the group work on. */
interface Context {
  golden: Golden;
  report: Report;
  /** A policy of its own, as the optimizer changes it. */
  policy: QwenPolicy;
  json: GradsJson;
  /** `batch.safetensors`. */
  tensors: Tensors;
  batch: Batch;
}

/** Runs the group. */
export async function checkGrads(golden: Golden, report: Report): Promise<void> {
  await report.attempt("sub-images", () => checkSubImages(golden, report));
  const json = await golden.json<GradsJson>("grads/grads.json");
  const shapes = new Map(
    Object.entries(Object.values(json.losses)[0].per_parameter).map(([name, { shape }]) => [name, shape]),
  );
  const policy = await golden.freshPolicy(await golden.modelFor("grads.json", { shapes }));
  try {
    const tensors = await golden.tensors(file), batch = await readBatch(golden, tensors, json);
    const context = { golden, report, policy, json, tensors, batch };
    await checkMasks(context);
    for (const name of Object.keys(json.losses)) await report.attempt(name, () => checkLoss(context, name));
    await report.attempt("adamw", () => checkAdamW(context));
  } finally {
    policy.dispose();
  }
}

async function checkMasks({ report, policy, json, tensors, batch }: Context): Promise<void> {
  await report.check("batch: loss_mask = completion_mask · tool_mask", (check) => {
    const recorded = rowsOf(tensor(tensors, "loss_mask", file));
    const completion = rowsOf(tensor(tensors, "completion_mask", file));
    const tool = rowsOf(tensor(tensors, "tool_mask", file));
    check.same(completion.map((row, b) => row.map((m, t) => m * tool[b][t])), recorded);
    check.same(recorded.flat().reduce((a, b) => a + b), json.num_items_in_batch, "num_items_in_batch");
  });
  await report.check("batch: mm_token_type_ids, lengths", (check) => {
    const { image, video } = policy.config.tokens, promptLength = tensor(tensors, "prompt_ids", file).shape[1];
    const completionLength = tensor(tensors, "completion_ids", file).shape[1];
    check.same([promptLength, completionLength], [json.prompt_length, json.completion_length]);
    const prompts = places(tensors, "prompt_mask");
    rowsOf(tensor(tensors, "mm_token_type_ids", file)).forEach((types, b) => {
      const kept = [...prompts[b], ...batch.columns[b].map((t) => promptLength + t)].map((t) => types[t]);
      check.equal(tokenTypes(batch.sequences[b].ids, image, video), kept, `row ${b}`);
    });
  });
}

/** Columns where a recorded mask is 1, row by row. */
function places(tensors: Tensors, name: string): number[][] {
  return rowsOf(tensor(tensors, name, file)).map((row) => row.flatMap((m, t) => m ? [t] : []));
}

async function readBatch(golden: Golden, tensors: Tensors, json: GradsJson): Promise<Batch> {
  const rows = (name: string) => rowsOf(tensor(tensors, name, file));
  const promptIds = rows("prompt_ids"), completionIds = rows("completion_ids");
  const prompts = places(tensors, "prompt_mask"), columns = places(tensors, "completion_mask");
  const pick = (name: string) => rows(name).map((row, b) => columns[b].map((t) => row[t]));
  const images = await namedImages(golden, json.pixel_values_order, tensors, file);
  let at = 0;
  const sequences = columns.map((own, b) => ({
    ids: [...prompts[b].map((t) => promptIds[b][t]), ...own.map((t) => completionIds[b][t])],
    images: images.slice(at, at += json.num_images[b]),
  }));
  return {
    sequences,
    masks: sequences.map(({ ids }, b) => ids.map((_, t) => t >= prompts[b].length ? 1 : 0)),
    columns,
    lossMask: pick("loss_mask"),
    advantages: [...tensor(tensors, "advantages", file).data],
    old: pick("old_per_token_logps"),
    ref: pick("ref_per_token_logps"),
  };
}

/** Forward and backward through the whole model, vision tower included. */
async function backward({ policy, batch, json }: Context, loss: LossJson): Promise<Pass> {
  const width = Math.max(...batch.columns.map((own) => own.length));
  const padded = (rows: readonly number[][]) => {
    const data = new Float32Array(rows.length * width);
    rows.forEach((row, b) => data.set(row, b * width));
    return tf.tensor2d(data, [rows.length, width]);
  };
  const options = lossOptions({
    num_items_in_batch: json.num_items_in_batch,
    max_completion_length: loss.max_completion_length,
    ...loss.config,
  });
  const kept: tf.Tensor[] = [];
  const { value, grads } = tf.variableGrads(() => {
    const scoring = { temperature: loss.temperature, trainVision: true, suppressTokens: [] };
    const { logprobs, entropy } = policy.logProbs(batch.sequences, batch.masks, scoring);
    kept.push(tf.keep(tf.clone(logprobs)), tf.keep(tf.clone(entropy)));
    return policyLoss({
      logprobs,
      oldLogprobs: padded(batch.old),
      refLogprobs: padded(batch.ref),
      advantages: tf.tensor1d(batch.advantages),
      mask: padded(batch.lossMask),
    }, options);
  }, [...policy.parameters.values()]);
  const [total, logprobs, entropy] = await Promise.all([value, ...kept].map(take));
  const unpadded = (x: Float32Array) =>
    batch.columns.map((own, b) => [...x.subarray(b * width, b * width + own.length)]);
  const named = new Map<string, tf.Tensor>();
  for (const [name, variable] of policy.parameters) {
    const grad = grads[variable.name];
    if (grad) named.set(name, grad);
  }
  return { loss: total[0], logprobs: unpadded(logprobs), entropy: unpadded(entropy), grads: named };
}

/** Compares rows of completion tokens with a recorded `[B, C]` tensor where completion_mask is 1. */
function compareRows(check: Check, rows: number[][], { batch, tensors }: Context, name: string, tolerance: number) {
  rowsOf(tensor(tensors, name, file)).forEach((expected, b) => {
    check.close(rows[b], batch.columns[b].map((t) => expected[t]), tolerance, `row ${b}`);
  });
}

async function checkLoss(context: Context, name: string): Promise<void> {
  const { golden, report, batch } = context, loss = context.json.losses[name];
  const pass = await backward(context, loss);
  const values = await readGradients(pass.grads);
  await report.check(`${name}: logprobs of the start model`, (check) => {
    compareRows(check, pass.logprobs, context, "logprobs", tolerances.logprobs);
  });
  await report.check(`${name}: entropy of the start model`, (check) => {
    compareRows(check, pass.entropy, context, "entropy", tolerances.entropy);
  });
  await report.check(`${name}: loss`, (check) => check.number(pass.loss, loss.loss, tolerances.loss));
  await report.check(`${name}: metrics`, (check) => {
    compareMetrics(check, policyMetrics(tokenRows(batch, pass), lossOptions(loss.config)), loss.metrics, name, true);
  });
  await report.check(`${name}: global gradient norm`, (check) => {
    const norm = Math.sqrt([...values.values()].reduce((sum, x) => sum + stats(x).l2 ** 2, 0));
    check.number(norm, loss.grad_global_norm, tolerances.gradNorm * loss.grad_global_norm);
  });
  for (const key of ["l2", "sum", "max_abs"] as const) {
    await report.check(`${name}: ${key} of all parameters' gradients`, (check) => {
      check.equal([...values.keys()].sort(), Object.keys(loss.per_parameter).sort(), "parameters");
      for (const [parameter, recorded] of Object.entries(loss.per_parameter)) {
        const own = values.get(parameter) ?? new Float32Array(0);
        check.number(stats(own)[key], recorded[key], statTolerance(key, recorded, own.length), parameter);
      }
    });
  }
  const expected = await golden.tensors(`grads/grads_${name}.safetensors`);
  for (const [parameter, { data }] of expected) {
    await report.check(`${name}: d ${parameter}`, (check) => {
      check.close(values.get(parameter) ?? [], data, tolerances.gradient * stats(data).max_abs);
    });
  }
}

/** What the elements' tolerance allows of a statistic: noise of independent elements adds up as a root of their number. */
function statTolerance(key: "l2" | "sum" | "max_abs", recorded: { l2: number; max_abs: number }, size: number): number {
  if (key === "l2") return tolerances.gradient * recorded.l2;
  return tolerances.gradient * recorded.max_abs * (key === "sum" ? Math.sqrt(size) : 1);
}

function stats(values: ArrayLike<number>): { l2: number; sum: number; max_abs: number } {
  let squares = 0, sum = 0, max_abs = 0;
  for (let i = 0; i < values.length; i++) {
    squares += values[i] ** 2;
    sum += values[i];
    max_abs = Math.max(max_abs, Math.abs(values[i]));
  }
  return { l2: Math.sqrt(squares), sum, max_abs };
}

async function readGradients(grads: ReadonlyMap<string, tf.Tensor>): Promise<Map<string, Float32Array>> {
  const read = [...grads].map(async ([name, grad]) => [name, await take(grad)] as const);
  return new Map(await Promise.all(read));
}

/** The loss-carrying tokens of each row, as the metrics take them. */
function tokenRows(batch: Batch, pass: Pass): TokenRow[] {
  return batch.lossMask.map((mask, b) => {
    const pick = (row: readonly number[]) => row.filter((_, t) => mask[t]);
    return {
      logprobs: pick(pass.logprobs[b]),
      old: pick(batch.old[b]),
      ref: pick(batch.ref[b]),
      entropy: pick(pass.entropy[b]),
      advantage: batch.advantages[b],
    };
  });
}

/** What was recorded of the optimizer's steps. */
interface Recorded {
  /** Files of parameters by the number of steps made before. */
  files: Map<number, string>;
  /** Tensors of log-probs by the number of steps made before. */
  logprobs: Map<number, string>;
  /** Steps to make. */
  last: number;
}

async function recordedSteps({ golden, report, json, tensors }: Context): Promise<Recorded> {
  const byStep = (names: Iterable<string>, pattern: RegExp) =>
    new Map([...names].flatMap((name) => {
      const step = pattern.exec(name)?.[1];
      return step === undefined ? [] : [[Number(step), name] as const];
    }));
  const files = byStep(await golden.list("grads"), /^params_after_step(\d+)\.safetensors$/);
  const logprobs = byStep(tensors.keys(), /^logprobs_after_(\d+)_steps?$/);
  const { history, eager_vs_sdpa_parameter_noise: noise = {} } = json.adamw;
  for (const step of Object.keys(noise).filter((step) => !files.has(Number(step)))) {
    await report.check(`params_after_step${step}.safetensors`, (check) => check.same("missing", "there"));
  }
  const made = history.map((h) => h.grad_norm_before_clipping === undefined ? h.step - 1 : h.step);
  return { files, logprobs, last: Math.max(...made, ...files.keys(), ...logprobs.keys()) };
}

async function checkAdamW(context: Context): Promise<void> {
  const { report, policy, json: { adamw: { config, loss: named }, losses } } = context;
  const loss = losses[Object.keys(losses).find((name) => named.startsWith(name)) ?? Object.keys(losses)[0]];
  const recorded = await recordedSteps(context);
  const optimizer = new AdamW(policy.parameters, {
    betas: config.betas,
    eps: config.eps,
    weightDecay: config.weight_decay,
    maxGradNorm: config.max_norm ?? Infinity,
  });
  try {
    for (let made = 0; made <= recorded.last; made++) {
      const pass = await backward(context, loss);
      try {
        await checkState(context, recorded, made, pass);
        if (made === recorded.last) break;
        const { gradNorm } = await optimizer.step(pass.grads, config.lr);
        const norm = context.json.adamw.history.find((h) => h.step === made + 1)?.grad_norm_before_clipping;
        if (norm === undefined) continue;
        await report.check(`AdamW: gradient norm of step ${made + 1}`, (check) => {
          check.number(gradNorm, norm, tolerances.gradNorm * norm);
        });
      } finally {
        tf.dispose([...pass.grads.values()]);
      }
    }
  } finally {
    optimizer.dispose();
  }
}

/** Parameters, loss and log-probs after a number of steps. */
async function checkState(context: Context, recorded: Recorded, made: number, pass: Pass): Promise<void> {
  const { golden, report, policy, json: { adamw } } = context;
  const file = recorded.files.get(made), name = recorded.logprobs.get(made);
  if (file) await compareParameters(report, policy, file, await golden.tensors(`grads/${file}`));
  const all = adamw.eager_vs_sdpa_parameter_noise?.[made]?.per_parameter;
  if (all) await compareParameterStats(report, policy, made, all);
  const loss = adamw.history.find((h) => h.step === made + 1)?.loss_before;
  if (loss !== undefined) {
    await report.check(`AdamW: loss after step ${made}`, (check) => check.number(pass.loss, loss, tolerances.loss));
  }
  if (name) {
    await report.check(`AdamW: ${name}`, (check) => {
      compareRows(check, pass.logprobs, context, name, tolerances.logprobs);
    });
  }
}

async function readParameter(policy: QwenPolicy, name: string): Promise<ArrayLike<number>> {
  return await policy.parameters.get(name)?.data() ?? [];
}

async function compareParameters(report: Report, policy: QwenPolicy, file: string, expected: Tensors): Promise<void> {
  const errors: number[] = [];
  await report.check(`AdamW: ${file}, every element`, async (check) => {
    for (const [name, { data }] of expected) {
      const own = await readParameter(policy, name);
      check.close(own, data, tolerances.parameters, name);
      for (let i = 0; i < data.length; i++) errors.push(Math.abs(own[i] - data[i]));
    }
  });
  await report.check(`AdamW: ${file}, 99.9 % of the elements`, (check) => {
    errors.sort((a, b) => a - b);
    check.error(errors[Math.max(0, Math.ceil(errors.length * 0.999) - 1)], tolerances.mostParameters);
  });
}

/** All parameters, also those that are not recorded whole. */
async function compareParameterStats(
  report: Report,
  policy: QwenPolicy,
  step: number,
  expected: Record<string, { l2: number; sum: number }>,
): Promise<void> {
  await report.check(`AdamW: l2 and sum of all parameters after step ${step}`, async (check) => {
    for (const [name, { l2, sum }] of Object.entries(expected)) {
      const own = await readParameter(policy, name), found = stats(own);
      const tolerance = tolerances.parameters * Math.sqrt(own.length);
      check.number(found.l2, l2, tolerance, `${name}: l2`);
      check.number(found.sum, sum, tolerance, `${name}: sum`);
    }
  });
}
