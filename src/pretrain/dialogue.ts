/**
 * Conversations to imitate: token sequences in exactly the form that rollouts have, with what is to be learnt from each token.
 *
 * @module
 */
import { signColourNames } from "../data/signs.ts";
import type { Scene } from "../data/signs.ts";
import type { ImageInput, Message, Sequence } from "../policy/policy.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { defaultTemplate, renderChoices, renderTurn } from "../rollout.ts";
import { gridStep, type View } from "./pool.ts";
import { answerReply, groundingReply, refusalReply, tinyPhrases, unboxedReply } from "./tiny_files.ts";

/** What a supervised token belongs to: a box, the letter of an answer, the words around it. */
export type TokenKind = "ground" | "letter" | "answer";

/** A sequence to imitate. */
export interface Lesson {
  sequence: Sequence;
  /** Positions of supervised tokens (they are predicted from the position before). */
  targets: { at: number; kind: TokenKind }[];
  /** Replies about a sign: where its colour is said, from where coordinates or the letter are predicted, which sign it is. */
  looks: { sign: number; label: number; from: number[] }[];
  /** Position of the first image token of each image. */
  imageStart: number[];
}

/** How the first turn of a two-turn lesson goes. */
export type FirstTurn = { box: [number, number, number, number]; crop: ImageInput } | { refuse: true } | {
  outside: [number, number, number, number];
};

/** Composes lessons; encoded prompts are kept, as there are few. */
export class Composer {
  #cache = new Map<string, number[]>();
  constructor(readonly policy: QwenPolicy) {}

  #cached(key: string, make: () => number[]): number[] {
    let ids = this.#cache.get(key);
    if (!ids) this.#cache.set(key, ids = make());
    return ids;
  }

  #question(scene: Scene, sign: number): string {
    return `which letter is on the ${scene.signs[sign].colour} sign?`;
  }

  #messages(turn: "ground" | "single", question: string, choices: string): Message[] {
    const system = turn === "ground" ? defaultTemplate.system : defaultTemplate.singleSystem;
    const user = renderTurn(defaultTemplate[turn], question, choices);
    return system === "" ? [user] : [{ role: "system", content: system }, user];
  }

  /** A reply's ids with the end-of-turn token. */
  #reply(text: string): number[] {
    return this.#cached(`reply ${text}`, () => [...this.policy.encode(text), this.policy.stopTokens[0]]);
  }

  #start(ids: readonly number[], images: readonly ImageInput[]): { lesson: Lesson; ids: number[] } {
    const all = [...ids];
    return { lesson: { sequence: { ids: all, images }, targets: [], looks: [], imageStart: [] }, ids: all };
  }

  #say(lesson: Lesson, ids: number[], text: string, kind: TokenKind): number {
    const from = ids.length;
    for (const id of this.#reply(text)) {
      lesson.targets.push({ at: ids.length, kind });
      ids.push(id);
    }
    return from;
  }

  #finish(lesson: Lesson): Lesson {
    const image = this.policy.config.tokens.image, { ids } = lesson.sequence;
    ids.forEach((id, i) => {
      if (id === image && ids[i - 1] !== image) lesson.imageStart.push(i);
    });
    return lesson;
  }

  /** Grounding replies are `open label middle x1 , y1 , x2 , y2 close`, a token each. */
  #ground(lesson: Lesson, ids: number[], scene: Scene, sign: number, box: readonly number[]): void {
    const pixels = box.map((v) => v * gridStep) as [number, number, number, number];
    const from = this.#say(lesson, ids, groundingReply(scene.signs[sign].colour, pixels), "ground");
    lesson.looks.push({ sign, label: from + 1, from: [from + 2, from + 4, from + 6, from + 8] });
  }

  /** Several grounding questions about one far view in one conversation. */
  grounding(view: View, scene: Scene, signs: readonly number[], boxes: readonly (readonly number[])[]): Lesson {
    const first = this.#question(scene, signs[0]);
    const prompt = this.#cached(
      `ground ${first}`,
      () => this.policy.encodeChat(this.#messages("ground", first, ""), [view.input]),
    );
    const { lesson, ids } = this.#start(prompt, [view.input]);
    this.#ground(lesson, ids, scene, signs[0], boxes[0]);
    const request = defaultTemplate.ground[defaultTemplate.ground.length - 1];
    for (let i = 1; i < signs.length; i++) {
      const question = this.#question(scene, signs[i]);
      ids.push(...this.#cached(`again ${question}`, () =>
        this.policy.encodeContinuation(
          this.#messages("ground", question, ""),
          [{ role: "user", content: question + request }],
          [],
          true,
        )));
      this.#ground(lesson, ids, scene, signs[i], boxes[i]);
    }
    return this.#finish(lesson);
  }

  #answer(lesson: Lesson, ids: number[], scene: Scene, sign: number, boxed: boolean): void {
    const { colour, letter } = scene.signs[sign];
    const from = this.#say(lesson, ids, boxed ? answerReply(colour, letter) : unboxedReply(colour, letter), "answer");
    lesson.targets[lesson.targets.findLastIndex(({ at }) => at === from + 2)].kind = "letter";
    lesson.looks.push({ sign, label: from, from: [from + 1] });
  }

  #choices(choices: readonly string[]): string {
    return renderChoices({ choices, choiceStyle: "listed" });
  }

  /** One turn: the question with its choices about one picture, and the answer. */
  single(view: View, scene: Scene, sign: number, choices: readonly string[], boxed = true): Lesson {
    return this.reading(view, scene, [sign], [choices], boxed);
  }

  /** Several one-turn questions about one picture in one conversation. */
  reading(
    view: View,
    scene: Scene,
    signs: readonly number[],
    choices: readonly (readonly string[])[],
    boxed = true,
  ): Lesson {
    const question = this.#question(scene, signs[0]), offered = this.#choices(choices[0]);
    const first = this.#messages("single", question, offered);
    const prompt = this.#cached(`single ${question}${offered}`, () => this.policy.encodeChat(first, [view.input]));
    const { lesson, ids } = this.#start(prompt, [view.input]);
    this.#answer(lesson, ids, scene, signs[0], boxed);
    for (let i = 1; i < signs.length; i++) {
      const [question, offered] = [this.#question(scene, signs[i]), this.#choices(choices[i])];
      const again = renderTurn(defaultTemplate.single.slice(1), question, offered);
      ids.push(...this.#cached(
        `read ${question}${offered}`,
        () => this.policy.encodeContinuation(first, [again], [], true),
      ));
      this.#answer(lesson, ids, scene, signs[i], boxed);
    }
    return this.#finish(lesson);
  }

  /** Two turns as in a rollout. */
  twoTurn(view: View, scene: Scene, sign: number, choices: readonly string[], first: FirstTurn, boxed = true): Lesson {
    const question = this.#question(scene, sign), offered = this.#choices(choices);
    const messages = this.#messages("ground", question, "");
    const prompt = this.#cached(`ground ${question}`, () => this.policy.encodeChat(messages, [view.input]));
    const valid = "crop" in first, second = valid ? first.crop : view.input;
    const { lesson, ids } = this.#start(prompt, [view.input, second]);
    if (valid) this.#ground(lesson, ids, scene, sign, first.box);
    else if ("outside" in first) this.#ground(lesson, ids, scene, sign, first.outside);
    else this.#say(lesson, ids, refusalReply(scene.signs[sign].colour), "ground");
    ids.push(...this.#cached(`${valid} ${question}${offered}`, () =>
      this.policy.encodeContinuation(
        messages,
        [renderTurn(defaultTemplate[valid ? "valid" : "invalid"], question, offered)],
        [second],
        true,
      )));
    this.#answer(lesson, ids, scene, sign, boxed);
    return this.#finish(lesson);
  }
}

/** Ids of the coordinate words, in order from 0. */
export function coordinateIds(policy: QwenPolicy): number[] {
  return tinyPhrases.coordinates.map((word) => policy.encode(word)[0]);
}

/** Ids of colour words and letters, in the world's order. */
export function wordIds(policy: QwenPolicy, letters: readonly string[]): { colours: number[]; letters: number[] } {
  return {
    colours: signColourNames.map((word) => policy.encode(word)[0]),
    letters: letters.map((letter) => policy.encode(letter)[0]),
  };
}
