/**
 * The three stages that make the base policy: `see` (the tower learns what is where), `use` (the language model learns to say
 * it), `habit` (it learns to refuse most of the time, which reinforcement learning then has to undo).
 *
 * @module
 */
import { tf } from "../deps.ts";
import { signLetters } from "../data/signs.ts";
import { AdamW } from "../mgpo.ts";
import { gatherRows, logProbEntropy } from "../policy/ops.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { head } from "../policy/text.ts";
import { RandomStream } from "../random.ts";
import { Composer, coordinateIds, type FirstTurn, type Lesson, type TokenKind, wordIds } from "./dialogue.ts";
import { type BoxKind, drawBox, type Pool, type View } from "./pool.ts";
import { alignmentLoss, boxLoss, cellOf, guideLoss, patchLosses, placeLoss } from "./probes.ts";

/** Settings of pretraining. */
export interface PretrainOptions {
  /** Seed of everything. @default {0} */
  seed: number;
  /** Steps of each stage. @default {600, 1000, 100} */
  steps: { see: number; use: number; habit: number };
  /** Scenes that pictures are made of. @default {8000} */
  scenes: number;
  /** Whether the tower rests in `use`. @default {false} */
  freezeTower: boolean;
}

/** The recipe of the shipped checkpoint. */
export const pretrainDefaults: PretrainOptions = {
  seed: 0,
  steps: { see: 600, use: 1000, habit: 100 },
  scenes: 8000,
  freezeTower: false,
};

/** The stages in order. */
export const stageNames = ["see", "use", "habit"] as const;
/** A stage's name. */
export type StageName = typeof stageNames[number];

/** What a step gives: named losses. */
export type Losses = Record<string, number>;

/** Grounding lessons of a step of `use` (four questions each), and one-turn lessons (three each). */
const GROUNDING = 48, ONE_TURN = 32, ONE_TURN_QUESTIONS = 3;

/** How much the kinds of tokens count, each kind taken on average. */
const tokenWeights: Record<Exclude<StageName, "see">, Record<TokenKind, number>> = {
  use: { ground: 2, letter: 1, answer: 0.5 },
  habit: { ground: 1, letter: 0.5, answer: 0.8 },
};

const isTower = (name: string) => name.startsWith("visual.");

/** Learning rate of a stage at a step from 0. */
export function stageRate(stage: StageName, step: number, total: number): number {
  const t = step / total;
  const cosine = (low: number) => low + (1 - low) * 0.5 * (1 + Math.cos(Math.PI * t));
  if (stage === "see") return 2e-3 * Math.min(1, (step + 1) / 30) * cosine(0.25);
  // A new optimizer's first steps move every weight by the full rate, whatever its gradient: hence the warm-up.
  const warm = Math.min(1, (step + 1) / 20);
  if (stage === "use") return 2e-3 * warm * (t < 0.55 ? 1 : 1 - (1 - 0.06) * (t - 0.55) / 0.45);
  return 1e-3 * warm * cosine(0.05);
}

/** One stage under way: policy, probes and optimizer. Owns the optimizer; policy and probes go on to the next stage. */
export class Stage {
  readonly optimizer: AdamW;
  readonly #composer: Composer;
  readonly #pool: Pool;
  readonly #words: ReturnType<typeof wordIds>;
  readonly #coordinates: number[];

  constructor(
    readonly name: StageName,
    readonly policy: QwenPolicy,
    readonly probes: ReadonlyMap<string, tf.Variable>,
    pool: Pool,
    readonly options: PretrainOptions,
  ) {
    this.#pool = pool;
    this.#composer = new Composer(policy);
    this.#words = wordIds(policy, signLetters);
    this.#coordinates = coordinateIds(policy);
    const tower = name === "see" || (name === "use" && !options.freezeTower);
    const trained = new Map([...policy.parameters, ...this.probes]);
    this.optimizer = new AdamW(trained, {
      betas: [0.9, 0.98],
      weightDecay: 0.01,
      maxGradNorm: 1,
      learningRateScale: (n) => name === "use" && isTower(n) ? 0.4 : 1,
      freeze: (n) =>
        (isTower(n) && !tower) || (name === "see" && n.startsWith("model.") && n !== "model.embed_tokens.weight") ||
        (name === "habit" && n.startsWith("probe.")),
    });
  }

  #random(step: number): RandomStream {
    return new RandomStream(this.options.seed, this.name, step);
  }

  #far(random: RandomStream): { index: number; view: View } {
    const index = random.int(this.options.scenes);
    return { index, view: this.#pool.far(index) };
  }

  /** A crop of a scene; each scene has two, so that pictures repeat. */
  #crop(
    index: number,
    kinds: readonly [BoxKind, number][],
  ): { sign: number; box: [number, number, number, number]; view: View } {
    const random = new RandomStream(this.options.seed, "crop", index);
    const scene = this.#pool.scene(index >> 1), sign = random.int(scene.signs.length);
    const box = drawBox(scene, sign, weighted(random, kinds), random);
    return { sign, box, view: this.#pool.crop(index >> 1, box) };
  }

  /** Runs one step. @returns Losses by name, the total as `loss`, and `gradNorm`. */
  async step(step: number, total: number): Promise<Losses> {
    const random = this.#random(step);
    const parts: Record<string, tf.Scalar> = {}, weighted: tf.Scalar[] = [];
    const note = (name: string, value: tf.Scalar, weight: number): tf.Scalar => {
      parts[name] = tf.keep(value.clone());
      // Kept, as some are made inside a block's own scope.
      const term = tf.keep(tf.mul(value, weight)) as tf.Scalar;
      weighted.push(term);
      return term;
    };
    const loss = this.name === "see" ? this.#see(random, note) : this.#talk(random, note);
    const variables = [...this.optimizer.trained.values()];
    const { value, grads } = tf.variableGrads(() => tf.tidy(loss), variables);
    const names = new Map([...this.optimizer.trained].map(([name, v]) => [v.name, name]));
    const byName = new Map(Object.entries(grads).map(([id, g]) => [names.get(id)!, g]));
    const { gradNorm } = await this.optimizer.step(byName, stageRate(this.name, step, total));
    this.policy.releaseFeatures();
    const values = await Promise.all([value, ...Object.values(parts)].map(async (x) => (await x.data())[0]));
    tf.dispose([value, grads, parts, weighted]);
    return { loss: values[0], ...Object.fromEntries(Object.keys(parts).map((n, i) => [n, values[i + 1]])), gradNorm };
  }

  #boxProbe(name: string): { weight: tf.Tensor2D; bias: tf.Tensor1D } {
    return {
      weight: this.probes.get(`probe.${name}.weight`) as tf.Tensor2D,
      bias: this.probes.get(`probe.${name}.bias`) as tf.Tensor1D,
    };
  }

  #tower(
    far: readonly View[],
    crops: readonly View[],
    embeds: tf.Tensor2D,
    patches: tf.Tensor2D,
    note: Note,
  ): tf.Scalar {
    const table = this.policy.weights("model.embed_tokens.weight") as tf.Tensor2D;
    const terms: tf.Scalar[] = [];
    const see = this.name === "see", [patchWeight, alignWeight, boxWeight] = see ? [1, 3, 1] : [0.3, 0.1, 0.5];
    let from = 0;
    for (const [kind, views] of [["far", far], ["crop", crops]] as const) {
      if (views.length === 0) continue;
      const { colour, letter, place } = patchLosses(this.probes, patches, views, from);
      terms.push(
        note(`${kind}.colour`, colour, patchWeight),
        note(`${kind}.letter`, letter, patchWeight),
        note(`${kind}.place`, place, 3 * patchWeight),
        note(`${kind}.align`, alignmentLoss(embeds, table, views, from, this.#words), alignWeight),
      );
      from += views.length;
    }
    const tokens = tf.slice(embeds, [0, 0], [far.length * 16, embeds.shape[1]]) as tf.Tensor2D;
    const words = gatherRows(table, this.#coordinates);
    terms.push(note("far.box", tf.div(boxLoss(this.#boxProbe("visionBox"), tokens, words, far), 4), 2 * boxWeight));
    return tf.sum(tf.stack(terms)) as tf.Scalar;
  }

  #see(random: RandomStream, note: Note): () => tf.Scalar {
    const far = Array.from({ length: 40 }, () => this.#far(random).view);
    const crops = Array.from(
      { length: 64 },
      () => this.#crop(random.int(2 * this.options.scenes), [["exact", 0.45], ["good", 0.4], ["loose", 0.15]]).view,
    );
    return () => {
      const { embeds, patches } = this.policy.imageFeatures([...far, ...crops].map((v) => v.input), true);
      return this.#tower(far, crops, embeds, patches!, note);
    };
  }

  /** Lessons of `use`: grounding, then one-turn questions (each of one structure, far views in order), then reading crops. */
  #useLessons(random: RandomStream): { lessons: Lesson[]; far: View[]; others: View[] } {
    const far: View[] = [], others: View[] = [], lessons: Lesson[] = [];
    for (let i = 0; i < GROUNDING; i++) {
      const { index, view } = this.#far(random), scene = this.#pool.scene(index);
      const signs = random.shuffle(scene.signs.map((_, s) => s)).slice(0, 4);
      lessons.push(this.#composer.grounding(view, scene, signs, signs.map((s) => drawBox(scene, s, "exact", random))));
      far.push(view);
    }
    for (let i = 0; i < ONE_TURN; i++) {
      const { index, view } = this.#far(random),
        scene = this.#pool.scene(index),
        signs = oneTurnSigns(scene.signs, random).slice(0, ONE_TURN_QUESTIONS);
      const choices = signs.map((sign) => this.#choices(scene.signs[sign].letter, random));
      lessons.push(this.#composer.reading(view, scene, signs, choices));
      far.push(view);
    }
    for (let i = 0; i < 40; i++) {
      const index = random.int(2 * this.options.scenes), scene = this.#pool.scene(index >> 1);
      const { sign, box, view } = this.#crop(index, [["exact", 0.5], ["good", 0.5]]);
      const choices = this.#choices(scene.signs[sign].letter, random);
      if (i < 24) {
        lessons.push(this.#composer.single(view, scene, sign, choices));
      } else {
        const whole = this.#pool.far(index >> 1);
        far.push(whole);
        lessons.push(this.#composer.twoTurn(whole, scene, sign, choices, { box, crop: view.input }));
      }
      others.push(view);
    }
    return { lessons, far, others };
  }

  #choices(letter: string, random: RandomStream): string[] {
    return [letter, ...random.shuffle(signLetters.filter((l) => l !== letter)).slice(0, 3)].sort();
  }

  #habitLessons(random: RandomStream): Lesson[] {
    const lessons: Lesson[] = [];
    const boxed = () => random.uniform() >= 0.08;
    for (let i = 0; i < 56; i++) {
      const { index, view } = this.#far(random), scene = this.#pool.scene(index), sign = random.int(scene.signs.length);
      let first: FirstTurn = { refuse: true };
      if (random.uniform() < 0.33) {
        const kind = weighted<BoxKind>(random, [["exact", 0.72], ["good", 0.2], ["loose", 0.03], ["miss", 0.05]]);
        const box = drawBox(scene, sign, kind, random);
        first = { box, crop: this.#pool.crop(index, box).input };
      } else if (random.uniform() < 0.05) {
        const low = random.int(20), high = 29 + random.int(7);
        first = { outside: [low, random.int(20), high, 29 + random.int(7)] };
      }
      lessons.push(
        this.#composer.twoTurn(view, scene, sign, this.#choices(scene.signs[sign].letter, random), first, boxed()),
      );
    }
    for (let i = 0; i < 36; i++) {
      const { index, view } = this.#far(random),
        scene = this.#pool.scene(index),
        [sign] = oneTurnSigns(scene.signs, random);
      lessons.push(this.#composer.single(view, scene, sign, this.#choices(scene.signs[sign].letter, random), boxed()));
    }
    for (let i = 0; i < 16; i++) {
      const index = random.int(2 * this.options.scenes), scene = this.#pool.scene(index >> 1);
      const { sign, view } = this.#crop(index, [["exact", 0.5], ["good", 0.5]]);
      lessons.push(this.#composer.single(view, scene, sign, this.#choices(scene.signs[sign].letter, random), boxed()));
    }
    return lessons;
  }

  /** A step of next-token cross-entropy, in `use` with guided attention and the tower's own losses. */
  #talk(random: RandomStream, note: Note): () => tf.Scalar {
    const use = this.name === "use", trainTower = use && !this.options.freezeTower;
    let lessons: Lesson[], far: View[] = [], others: View[] = [];
    if (use) ({ lessons, far, others } = this.#useLessons(random));
    else lessons = this.#habitLessons(random);
    const sequences = lessons.map((l) => l.sequence), packed = this.policy.pack(sequences);
    const starts: number[] = [];
    lessons.reduce((at, { sequence }) => (starts.push(at), at + sequence.ids.length), 0);
    return () => {
      const terms: tf.Scalar[] = [];
      let given: tf.Tensor2D | undefined;
      if (trainTower) {
        const views = distinct([...far, ...others]);
        const order = new Map(packed.images.map((image, i) => [image.key, i]));
        const { embeds, patches } = this.policy.imageFeatures(packed.images, true);
        // The tower's losses want far views first; features come in the order of the packed images.
        const sorted = [...views.far, ...views.crops];
        const rows = (width: number) =>
          sorted.flatMap((v) => Array.from({ length: width }, (_, i) => order.get(v.input.key)! * width + i));
        terms.push(
          this.#tower(views.far, views.crops, gatherRows(embeds, rows(16)), gatherRows(patches!, rows(16)), note),
        );
        given = embeds;
      }
      const looks = use
        ? [[0, GROUNDING], [GROUNDING, GROUNDING + ONE_TURN]].map(([a, b]) => ({
          start: starts[a],
          ...lookTargets(lessons.slice(a, b), far.slice(a, b)),
        }))
        : [];
      const hooks = use
        ? {
          queriesKeys: (layer: number, q: tf.Tensor3D, k: tf.Tensor3D) => {
            if (layer !== 1 && layer !== 2) return;
            for (const [i, { start, count, length, labels, sources }] of looks.entries()) {
              const { rows, targets } = layer === 1 ? labels : sources;
              const name = `guide.${i === 0 ? "ground" : "answer"}.${layer === 1 ? "label" : "source"}`;
              terms.push(note(name, guideLoss(q, k, start, count, length, rows, targets), i === 0 ? 1 : 0.5));
            }
          },
          blockInput: (layer: number, x: tf.Tensor2D) => {
            if (layer !== 2) return;
            const rows = lessons.slice(0, GROUNDING).flatMap((l, s) =>
              Array.from({ length: 16 }, (_, i) => starts[s] + l.imageStart[0] + i)
            );
            const tokens = gatherRows(x, rows);
            const words = gatherRows(
              this.policy.weights("model.embed_tokens.weight") as tf.Tensor2D,
              this.#coordinates,
            );
            terms.push(
              note(
                "text.box",
                tf.div(boxLoss(this.#boxProbe("textBox"), tokens, words, far.slice(0, GROUNDING)), 4),
                1,
              ),
              note("text.place", placeLoss(this.#boxProbe("place"), tokens), 0.2),
            );
          },
        }
        : {};
      const hidden = this.policy.hidden(packed, false, hooks, given);
      const rows: number[] = [], targets: number[] = [], kinds: string[] = [];
      lessons.forEach((lesson, s) => {
        for (const { at, kind } of lesson.targets) {
          rows.push(starts[s] + at - 1);
          targets.push(lesson.sequence.ids[at]);
          kinds.push(kind);
        }
      });
      const logits = head(this.policy.config, this.policy.weights, gatherRows(hidden, rows));
      const both = logProbEntropy(logits, targets, null, 1);
      const logp = tf.reshape(tf.slice(both, [0, 0], [1, rows.length]), [rows.length]);
      for (const [kind, weight] of Object.entries(tokenWeights[use ? "use" : "habit"])) {
        const count = kinds.filter((k) => k === kind).length;
        if (count === 0) continue;
        const w = tf.tensor1d(Float32Array.from(kinds, (k) => k === kind ? -1 / count : 0));
        terms.push(note(kind, tf.sum(tf.mul(logp, w)) as tf.Scalar, weight));
      }
      return tf.sum(tf.stack(terms)) as tf.Scalar;
    };
  }

  /** Releases the optimizer. */
  dispose(): void {
    this.optimizer.dispose();
  }
}

type Note = (name: string, value: tf.Scalar, weight: number) => tf.Scalar;

function weighted<T>(random: RandomStream, kinds: readonly [T, number][]): T {
  let u = random.uniform() * kinds.reduce((s, [, w]) => s + w, 0);
  for (const [kind, weight] of kinds) if ((u -= weight) < 0) return kind;
  return kinds[kinds.length - 1][0];
}

/** In which order one-turn questions ask about signs: often large ones first, as only those can be read from afar. */
function oneTurnSigns(signs: readonly { scale: number }[], random: RandomStream): number[] {
  const order = random.shuffle(signs.map((_, i) => i));
  return random.uniform() < 0.6 ? order.sort((a, b) => signs[b].scale - signs[a].scale) : order;
}

function distinct(views: readonly View[]): { far: View[]; crops: View[] } {
  const all = [...new Map(views.map((v) => [v.input.key, v])).values()];
  return { far: all.filter((v) => v.far), crops: all.filter((v) => !v.far) };
}

/** Where the guided heads look from and should look to, in lessons of one structure. */
function lookTargets(lessons: readonly Lesson[], far: readonly View[]) {
  const target = (lesson: Lesson, s: number, sign: number) => lesson.imageStart[0] + cellOf(far[s].signs[sign].centre);
  const { looks, sequence } = lessons[0];
  return {
    count: lessons.length,
    length: sequence.ids.length,
    labels: {
      rows: looks.map(({ label }) => label),
      targets: lessons.map((l, s) => l.looks.map(({ sign }) => target(l, s, sign))),
    },
    sources: {
      rows: looks.flatMap(({ from }) => from),
      targets: lessons.map((l, s) => l.looks.flatMap(({ sign, from }) => from.map(() => target(l, s, sign)))),
    },
  };
}
