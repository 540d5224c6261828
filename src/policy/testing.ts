/**
 * What the tests of the policy share: pictures and conversations named by a seed, for any backend.
 *
 * @module
 */
import { RandomStream } from "../random.ts";
import { loadPolicy } from "./load.ts";
import { Picture } from "./picture.ts";
import type { ImageInput, Message, Sequence } from "./policy.ts";
import type { QwenPolicy } from "./qwen.ts";

/** The policy of the goldens: three layers, 512 ids, grouped key-value heads. */
export const goldenPolicy = (): Promise<QwenPolicy> =>
  loadPolicy(new URL("../../fixtures/goldens/models/tiny/", import.meta.url), { maxPixels: 20000 });

/** A picture of noise. */
export function noise(seed: number, width: number, height: number): Picture {
  const random = new RandomStream(seed, "policy test");
  return Picture.fromRgb(Uint8Array.from({ length: width * height * 3 }, () => random.int(256)), width, height);
}

/** A question with pictures before it, as the model is asked. */
export function question(policy: QwenPolicy, text: string, images: readonly ImageInput[] = []): Sequence {
  const content: Message["content"] = [...images.map(() => ({ type: "image" }) as const), { type: "text", text }];
  return { ids: policy.encodeChat([{ role: "user", content }], images), images };
}

/** A conversation that goes on: more ids, more images. */
export function continued(
  { ids, images }: Sequence,
  more: readonly number[],
  shown: readonly ImageInput[] = [],
): Sequence {
  return { ids: [...ids, ...more], images: [...images, ...shown] };
}

/** Ids of words that carry no image. */
export function words(policy: QwenPolicy, seed: number, count: number): number[] {
  const random = new RandomStream(seed, "policy test words"), { image, video } = policy.config.tokens;
  return Array.from({ length: count }, () => random.int(Math.min(image, video)));
}
