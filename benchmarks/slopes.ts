/**
 * How does the cost of a step grow with the size of a group, the tokens of a picture, the length of a reply, and the parameters
 * of the language model? One of the four changes at a time. A step here is one turn: the replies of all rows, then the update;
 * pictures are drawn and cut before, their features are not kept.
 *
 * Rows `slopes/<backend>/<axis>/<x>` are seconds of a step; `slopes/<backend>/<axis>` is the slope of the straight line through them.
 *
 * @module
 */
import { signs } from "../src/data/signs.ts";
import { Trainer } from "../src/mgpo.ts";
import type { QwenConfig } from "../src/policy/config.ts";
import { ImageProcessor } from "../src/policy/image_processor.ts";
import type { Sequence } from "../src/policy/policy.ts";
import { loadPolicy } from "../src/policy/load.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { defaultTemplate, renderTurn } from "../src/rollout.ts";
import { type Benchmark, median, type Row } from "./benchmark.ts";
import { onRealGpu } from "./roof.ts";
import { randomPolicy, textParameters } from "./shapes.ts";

const PROMPTS = 4, ROUNDS = 3;

/** What a step's size is made of. */
interface Size {
  group: number;
  /** Side of a picture in pixels; a token is 28 of them wide. */
  side: number;
  /** Tokens of a reply. */
  reply: number;
  /** Width of the language model, a multiple of 96. */
  width: number;
}
interface Axis {
  name: string;
  unit: string;
  of: keyof Size;
  values: readonly number[];
  /** What the line is drawn over. */
  measure(value: number, config: QwenConfig): number;
}

/** A GPU is not filled by what a processor can do in a second. */
function plan(gpu: boolean): { base: Size; axes: Axis[] } {
  const pick = (large: readonly number[], small: readonly number[]) => gpu ? large : small;
  return {
    base: { group: gpu ? 16 : 4, side: 112, reply: gpu ? 32 : 8, width: 96 },
    axes: [
      {
        ...{ name: "group", unit: "s per rollout of a group", of: "group", measure: (group) => group },
        values: pick([8, 16, 32, 64], [2, 4, 8, 16]),
      },
      {
        ...{ name: "image", unit: "s per image token", of: "side", measure: (side) => (side / 28) ** 2 },
        values: pick([112, 224, 336, 448], [56, 112, 168, 224]),
      },
      {
        ...{ name: "reply", unit: "s per token of a reply", of: "reply", measure: (reply) => reply },
        values: pick([16, 32, 64, 128], [4, 8, 16, 32]),
      },
      {
        ...{
          name: "parameters",
          unit: "s per million",
          of: "width",
          values: pick([96, 384, 768, 1536], [96, 192, 288]),
        },
        measure: (_, config) => textParameters(config) / 1e6,
      },
    ],
  };
}

/** The embedded policy's shape with a language model of another width: more heads of the same size. */
function widened(tiny: QwenConfig, width: number): QwenConfig {
  const { text, vision } = tiny, times = width / text.hiddenSize;
  if (!Number.isInteger(times)) throw new RangeError(`width ${width} is no multiple of ${text.hiddenSize}`);
  const { heads, kvHeads, intermediateSize } = text;
  const sizes = { heads: times * heads, kvHeads: times * kvHeads, intermediateSize: times * intermediateSize };
  return { ...tiny, text: { ...text, ...sizes, hiddenSize: width }, vision: { ...vision, outHiddenSize: width } };
}

async function prompts(policy: QwenPolicy, { group, side }: Size): Promise<Sequence[]> {
  const world = signs(), processor = new ImageProcessor({}, { minPixels: side * side, maxPixels: side * side });
  const out: Sequence[] = [];
  for (let i = 0; i < PROMPTS; i++) {
    const sample = await world.get(i), images = [processor.prepare(await sample.picture())];
    const ids = policy.encodeChat([renderTurn(defaultTemplate.ground, sample.question, "")], images);
    for (let g = 0; g < group; g++) out.push({ ids, images });
  }
  return out;
}

/** Seconds of a step of that size. */
async function stepSeconds(policy: QwenPolicy, size: Size): Promise<number> {
  const rows = await prompts(policy, size), trainer = new Trainer(policy, { learningRate: 1e-9 });
  const step = async () => {
    policy.releaseFeatures();
    const replies = await policy.generate(rows, { maxNewTokens: size.reply, stopTokens: [] });
    const dialogues = rows.map(({ ids, images }, i) => ({
      ...{ prompt: Math.floor(i / size.group), images, ids: [...ids, ...replies[i].ids] },
      assistantMask: [...ids.map(() => 0), ...replies[i].ids.map(() => 1)],
      logprobs: [...ids.map(() => 0), ...replies[i].logprobs],
    }));
    await trainer.update(dialogues, rows.map((_, i) => i % 2));
  };
  await step();
  const values: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    const start = performance.now();
    await step();
    values.push((performance.now() - start) / 1000);
  }
  trainer.dispose();
  return median(values);
}

/** Slope of the least-squares line. */
export function slopeOf(points: readonly (readonly [x: number, y: number])[]): number {
  const mean = (axis: 0 | 1) => points.reduce((sum, point) => sum + point[axis], 0) / points.length;
  const [x0, y0] = [mean(0), mean(1)];
  const [xy, xx] = points.reduce(([xy, xx], [x, y]) => [xy + (x - x0) * (y - y0), xx + (x - x0) ** 2], [0, 0]);
  return xy / xx;
}

/** The policy of a width: the embedded one, or a wider one of random weights. */
async function policyOf(width: number): Promise<{ policy: QwenPolicy; release(): void }> {
  const tiny = await loadPolicy();
  if (width === tiny.config.text.hiddenSize) return { policy: tiny, release: () => tiny.dispose() };
  tiny.dispose();
  return await randomPolicy(`width ${width}`, (config) => widened(config, width), { vision: true });
}

async function along(axis: Axis, base: Size, backend: string, log: (line: string) => void): Promise<Row[]> {
  const name = `slopes/${backend}/${axis.name}`, points: [number, number][] = [], rows: Row[] = [];
  for (const value of axis.values) {
    const size = { ...base, [axis.of]: value };
    try {
      const { policy, release } = await policyOf(size.width);
      try {
        const x = axis.measure(value, policy.config), seconds = await stepSeconds(policy, size);
        points.push([x, seconds]);
        rows.push({ name: `${name}/${Number(x.toPrecision(3))}`, value: seconds, unit: "s", n: ROUNDS });
      } finally {
        release();
      }
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      log(`${name} at ${value} left out: ${error.message}`);
    }
  }
  if (points.length > 1) rows.push({ name, value: slopeOf(points), unit: axis.unit, n: points.length });
  return rows;
}

/** A benchmark an axis. */
export const slopes: readonly Benchmark[] = plan(false).axes.map(({ name }): Benchmark => ({
  names: ["webgpu", "wasm"].map((backend) => `slopes/${backend}/${name}`),
  async run(backend, log): Promise<Row[]> {
    const { base, axes } = plan(onRealGpu());
    return await along(axes.find((axis) => axis.name === name)!, base, backend, log);
  },
}));
