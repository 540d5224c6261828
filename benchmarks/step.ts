/**
 * How long does one whole MGPO step take (64 rollouts of two turns, then the update), beside Hugging Face transformers' `generate`
 * and a PyTorch update on the processor, doing the same work with the same checkpoint? The tower rests, as in training.
 *
 * Both sides get the prompts, pictures and trajectories of one real rollout. No end token stops a row: a turn decodes as many tokens
 * as its longest reply had. That it is the same work is checked, not assumed: log-probs of the trajectories, greedy replies, and the
 * norm of the gradient must agree. What each side keeps within a step is its own affair: here features of equal pictures.
 *
 * @module
 */
import { fileURLToPath } from "node:url";
import { signs } from "../src/data/signs.ts";
import { groupAdvantages, Trainer } from "../src/mgpo.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { useKernels } from "../src/policy/ops.ts";
import type { Completion, ImageInput, Sequence } from "../src/policy/policy.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { writeSafetensors } from "../src/policy/safetensors.ts";
import { rollout, type Trajectory } from "../src/rollout.ts";
import { formatTable } from "../src/run/progress.ts";
import { type Benchmark, median, type Row } from "./benchmark.ts";
import { Peer, PeerAbsent } from "./peers/peer.ts";

const PROMPTS = 8, GROUP = 8, MAX_NEW_TOKENS = [14, 8], ROUNDS = 5, THREADS = 2;
const NAME = "step/transformers";
/** The recipe of training, with a rate so small that the policy stays the same from round to round. */
const recipe = { learningRate: 1e-9, betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0, maxGradNorm: 1 } as const;
const CLIP = 0.2;
/** Ways of computing attention that transformers has on a processor; the faster one counts. */
const attentions = ["eager", "sdpa"] as const;

/** Seconds of a step by phase. */
type Phases = Record<"turn1" | "turn2" | "update", number>;
const total = ({ turn1, turn2, update }: Phases): number => turn1 + turn2 + update;

/** A turn of all rows: what was asked, and how many tokens to decode. */
interface Turn {
  prompts: Sequence[];
  tokens: number;
}
/** What both sides do. */
interface Work {
  turns: Turn[];
  trajectories: Trajectory[];
  rewards: number[];
}

/** Options of {@linkcode stepBesideTransformers}. */
export interface StepOptions {
  /** A policy's folder. @default {the embedded policy} */
  policy?: string;
  /** The Python that has torch and transformers; a name on PATH or a path. @default {"python3"} */
  python?: string;
  /** Steps that each side is timed for. @default {5} */
  rounds?: number;
}

export const step: Benchmark = {
  names: [NAME],
  backends: ["wasm"],
  run: (_backend, log, { python }) => stepBesideTransformers({ python }, log),
};

/** Takes the row on the current backend; none, and a line that says why, where the peer cannot run. */
export async function stepBesideTransformers(options: StepOptions, log: (line: string) => void): Promise<Row[]> {
  const { policy: source, python = "python3", rounds = ROUNDS } = options;
  const folder = await Deno.makeTempDir({ prefix: "mgpo-step-" });
  let peer: Peer | undefined, ours: Ours | undefined;
  try {
    peer = startPeer(python, folder);
    const versions = await peer.answer<Versions>();
    if (versions.missing) throw new PeerAbsent(`${python}: ${versions.missing}; it needs torch and transformers`);
    const policy = await loadPolicy(source);
    ours = new Ours(policy, await prepare(policy));
    await handOver(policy, ours.work, folder);
    await peer.ask("load");
    await compare(ours, peer, log);
    return [await time(ours, peer, versions, rounds, log)];
  } catch (error) {
    if (!(error instanceof PeerAbsent)) throw error;
    log(`${NAME} left out: ${error.message}`);
    return [];
  } finally {
    await peer?.close();
    ours?.dispose();
    await Deno.remove(folder, { recursive: true });
  }
}

interface Versions {
  torch: string;
  transformers: string;
  /** Instead of versions: the package that is not there. */
  missing?: string;
}

function startPeer(python: string, folder: string): Peer {
  const script = new URL("./peers/transformers_step.py", import.meta.url);
  if (script.protocol !== "file:") throw new PeerAbsent("the peer's program is not in a local folder");
  return Peer.start(python, [fileURLToPath(script), folder, "--threads", String(THREADS)]);
}

/** One real rollout, taken apart into the prompts of its turns. */
async function prepare(policy: QwenPolicy): Promise<Work> {
  useKernels("fused");
  const world = signs(), samples = await Promise.all(Array.from({ length: PROMPTS }, (_, i) => world.get(i)));
  const conversation = { ...world.hints, groupSize: GROUP, maxNewTokens: MAX_NEW_TOKENS };
  const { trajectories } = await rollout(policy, samples, conversation);
  const turn = (n: 0 | 1): Turn => ({
    prompts: trajectories.map(({ ids, images, assistantMask, turns }) => ({
      ids: ids.slice(0, n === 0 ? assistantMask.indexOf(1) : ids.length - turns[1].ids.length),
      images: images.slice(0, n + 1),
    })),
    tokens: Math.max(...trajectories.map(({ turns }) => turns[n].ids.length)),
  });
  // Alternating rewards: no group is left out for want of an advantage.
  return { turns: [turn(0), turn(1)], trajectories, rewards: trajectories.map((_, i) => i % 2) };
}

/** Writes the checkpoint and the work for the peer. */
async function handOver(policy: QwenPolicy, { turns, trajectories, rewards }: Work, folder: string): Promise<void> {
  await policy.save(folder);
  const pictures = new Map<string, ImageInput>();
  for (const { images } of trajectories) for (const image of images) pictures.set(image.key, image);
  const order = [...pictures.keys()], all = [...pictures.values()];
  const numbers = (images: readonly ImageInput[]) => images.map(({ key }) => order.indexOf(key));
  const { advantages } = groupAdvantages(rewards, GROUP);
  const greedy: Completion[][] = [];
  for (const { prompts, tokens } of turns) {
    greedy.push(await policy.generate(prompts, { maxNewTokens: tokens, stopTokens: [], temperature: 0 }));
  }
  const work = {
    turns: turns.map(({ prompts, tokens }, n) => ({
      tokens,
      rows: prompts.map(({ ids, images }, b) => ({ ids, pictures: numbers(images), greedy: greedy[n][b].ids })),
    })),
    dialogues: trajectories.map(({ ids, images, assistantMask, logprobs }, b) => ({
      ...{ ids, pictures: numbers(images), mask: assistantMask, logprobs, advantage: advantages[b] },
    })),
    grids: all.map(({ grid_thw }) => grid_thw),
    suppress_tokens: policy.suppressTokens,
    stop_tokens: policy.stopTokens,
    learning_rate: recipe.learningRate,
    betas: recipe.betas,
    eps: recipe.eps,
    weight_decay: recipe.weightDecay,
    max_grad_norm: recipe.maxGradNorm,
    clip: CLIP,
  };
  const patches = all.reduce((sum, { grid_thw: [t, h, w] }) => sum + t * h * w, 0);
  const size = all.reduce((sum, { pixel_values }) => sum + pixel_values.length, 0), data = new Float32Array(size);
  let at = 0;
  for (const { pixel_values } of all) {
    data.set(pixel_values, at);
    at += pixel_values.length;
  }
  const tensor = { name: "pixel_values", shape: [patches, size / patches], data };
  await Deno.writeFile(`${folder}/pictures.safetensors`, writeSafetensors([tensor]));
  await Deno.writeTextFile(`${folder}/work.json`, JSON.stringify(work));
}

/** Our side. */
class Ours {
  readonly #trainer: Trainer;
  #round = 0;
  constructor(readonly policy: QwenPolicy, readonly work: Work) {
    this.#trainer = new Trainer(policy, { ...recipe, clipLow: CLIP, clipHigh: CLIP });
  }

  /** One step, as training makes it. Its first act is to forget the pictures: a real step's are new ones. */
  async step(): Promise<Phases & { gradNorm: number }> {
    const { turns, trajectories, rewards } = this.work, seed = ++this.#round;
    const marks = [performance.now()];
    this.policy.releaseFeatures();
    for (const { prompts, tokens } of turns) {
      await this.policy.generate(prompts, { maxNewTokens: tokens, stopTokens: [], seed });
      marks.push(performance.now());
    }
    const { grad_norm } = await this.#trainer.update(trajectories, rewards);
    marks.push(performance.now());
    const [turn1, turn2, update] = [0, 1, 2].map((i) => (marks[i + 1] - marks[i]) / 1000);
    return { turn1, turn2, update, gradNorm: grad_norm };
  }

  dispose(): void {
    this.#trainer.dispose();
    this.policy.dispose();
  }
}

/** Warms both sides up and makes sure that they do the same. */
async function compare(ours: Ours, peer: Peer, log: (line: string) => void): Promise<void> {
  const { turns, trajectories } = ours.work;
  const ids = trajectories.reduce((sum, t) => sum + t.ids.length, 0), rows = 2 * trajectories.length;
  const pictures = new Set(trajectories.flatMap(({ images }) => images.map(({ key }) => key))).size;
  log(
    `work: ${trajectories.length} rollouts, ${turns[0].tokens} + ${turns[1].tokens} tokens each; ` +
      `update of ${ids} tokens; ${pictures} different pictures`,
  );
  const { gradNorm } = await ours.step();
  for (const attention of attentions) {
    const seen = await peer.ask<{ logprob_difference: number; equal_greedy: number; grad_norm: number }>(
      `check ${attention}`,
    );
    log(
      `same work, ${attention}: log-probs differ by at most ${seen.logprob_difference.toExponential(1)}; ` +
        `greedy replies equal ${seen.equal_greedy}/${rows}; gradient norm ${seen.grad_norm.toFixed(5)}, ` +
        `ours ${gradNorm.toFixed(5)}`,
    );
    // A rare near-tie between two tokens may turn out otherwise; a wrong position or picture changes most replies.
    const same = seen.logprob_difference < 1e-3 && seen.equal_greedy >= 0.9 * rows &&
      Math.abs(seen.grad_norm - gradNorm) < 0.01 * gradNorm;
    if (!same) throw new Error(`${NAME}: the two sides do not do the same work (see the line above)`);
  }
}

/** Times both sides in turns, so that a busy neighbour hurts both. */
async function time(
  ours: Ours,
  peer: Peer,
  versions: Versions,
  rounds: number,
  log: (line: string) => void,
): Promise<Row> {
  const mine: Phases[] = [], theirs = attentions.map((name) => ({ name, steps: [] as (Phases & { tower: number })[] }));
  for (let round = 0; round < rounds; round++) {
    mine.push(await ours.step());
    for (const { name, steps } of theirs) steps.push(await peer.ask(`time ${name}`));
  }
  const phases = ["turn1", "turn2", "update"] as const;
  const line = (name: string, steps: readonly Phases[]) => [
    name,
    ...phases.map((phase) => median(steps.map((s) => s[phase])).toFixed(3)),
    median(steps.map(total)).toFixed(3),
  ];
  const text = formatTable([
    ["median seconds", "turn 1", "turn 2", "update", "step"],
    line("mgpo", mine),
    ...theirs.map(({ name, steps }) => line(`transformers, ${name}`, steps)),
  ]);
  for (const row of text.split("\n")) log(row);
  const seconds = theirs.map(({ steps }) => median(steps.map(total))), best = Math.min(...seconds);
  const fastest = theirs[seconds.indexOf(best)];
  const value = median(mine.map(total)), short = (version: string) => version.split(".").slice(0, 2).join(".");
  const tower = median(fastest.steps.map((s) => s.tower));
  log(
    `the tower is ${
      tower.toFixed(3)
    } s of transformers' step: it runs again in each phase, on each row's own pictures; ` +
      `were it free, the ratio would be ${((best - tower) / value).toFixed(2)}`,
  );
  const peerName = `transformers ${short(versions.transformers)} + PyTorch ${short(versions.torch)} CPU, ` +
    `${THREADS} threads, ${fastest.name}`;
  return { name: NAME, value, unit: "s", ratio: best / value, peer: peerName, n: rounds };
}
