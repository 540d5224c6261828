/**
 * Initial weights of the tiny policy.
 *
 * @module
 */
import { expectedTensors } from "../policy/checkpoint.ts";
import type { QwenConfig } from "../policy/config.ts";
import { RandomStream } from "../random.ts";

/** Frequencies of the coordinate words' sinusoids, in half turns over all coordinates. */
const FREQUENCIES = [1, 2, 3, 4, 6, 8, 12, 16];

/**
 * Linear layers and their biases uniform within 1/√fan_in, norms 1, words N(0, .15); coordinate words are sinusoids of their
 * value through a random basis, so that neighbours are similar.
 *
 * @param coordinates Ids of the coordinate words in order
 */
export function initialWeights(
  config: QwenConfig,
  coordinates: readonly number[],
  seed: number,
): { name: string; shape: number[]; data: Float32Array }[] {
  const shapes = expectedTensors(config);
  const out: { name: string; shape: number[]; data: Float32Array }[] = [];
  let index = 0;
  for (const [name, readonlyShape] of shapes) {
    const shape = [...readonlyShape], size = shape.reduce((a, b) => a * b, 1), data = new Float32Array(size);
    const random = new RandomStream(seed, "initial", index++);
    if (name === "model.embed_tokens.weight" || name === "lm_head.weight") {
      for (let i = 0; i < size; i++) data[i] = 0.15 * random.normal();
      fillCoordinates(data, shape[1], coordinates, random);
    } else if (/norm|ln_q/.test(name)) {
      data.fill(1);
    } else {
      const weight = shapes.get(name.replace(/bias$/, "weight"))!;
      const bound = 1 / Math.sqrt(weight.slice(1).reduce((a, b) => a * b, 1));
      for (let i = 0; i < size; i++) data[i] = random.uniform(-bound, bound);
    }
    out.push({ name, shape, data });
  }
  return out;
}

function fillCoordinates(table: Float32Array, width: number, ids: readonly number[], random: RandomStream): void {
  const features = 2 * FREQUENCIES.length;
  const basis = Float64Array.from({ length: features * width }, () => random.normal() / Math.sqrt(FREQUENCIES.length));
  ids.forEach((id, c) => {
    for (let d = 0; d < width; d++) {
      let v = 0;
      FREQUENCIES.forEach((f, j) => {
        const angle = Math.PI * f * c / ids.length;
        v += Math.sin(angle) * basis[2 * j * width + d] + Math.cos(angle) * basis[(2 * j + 1) * width + d];
      });
      table[id * width + d] = 0.3 * v + 0.03 * random.normal();
    }
  });
}
