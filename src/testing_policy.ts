/**
 * A policy for tests that says what it is told: its tokens are characters, its replies come from a function.
 *
 * @module
 */
import type { Picture } from "./policy/picture.ts";
import type { Completion, GenerateOptions, ImageInput, Message, Policy, Sequence } from "./policy/policy.ts";

const END = 1, IMAGE = 2;

/** What a {@linkcode ScriptedPolicy} is asked: all text so far, and the key of the draw. */
export type Script = (text: string, key: readonly [step: number, row: number, turn: number]) => string;

/** Answers by a script; can't be trained. */
export class ScriptedPolicy implements Policy {
  readonly name = "scripted";
  readonly stopTokens = [END];
  readonly suppressTokens = [IMAGE];
  readonly parameters = new Map();
  readonly #script: Script;

  constructor(script: Script) {
    this.#script = script;
  }
  prepareImage(picture: Picture): ImageInput {
    return { grid_thw: [1, 8, 8], pixel_values: new Float32Array(0), key: picture.fingerprint };
  }
  encodeChat(messages: readonly Message[]): number[] {
    return messages.flatMap(({ content }) =>
      typeof content === "string"
        ? this.encode(content)
        : content.flatMap((part) => part.type === "image" ? [IMAGE] : this.encode(part.text))
    );
  }
  encodeContinuation(_: readonly Message[], messages: readonly Message[]): number[] {
    return [END, ...this.encodeChat(messages)];
  }
  encode(text: string): number[] {
    return Array.from(text, (c) => c.codePointAt(0)!);
  }
  decode(ids: readonly number[]): string {
    return ids.filter((id) => id > IMAGE).map((id) => String.fromCodePoint(id)).join("");
  }
  generate(sequences: readonly Sequence[], { keys, maxNewTokens }: GenerateOptions): Promise<Completion[]> {
    return Promise.resolve(sequences.map(({ ids }, i) => {
      const reply = [...this.encode(this.#script(this.decode(ids), keys![i])), END].slice(0, maxNewTokens);
      return { ids: reply, logprobs: reply.map(() => -1), finish: reply.at(-1) === END ? "stop" : "length" };
    }));
  }
  logProbs(): never {
    throw new Error("a scripted policy has no log-probs");
  }
  dispose(): void {}
}
