/**
 * How close does generation come to what memory allows? A token of a lone row must read all weights of the language model and
 * the row's keys and values once; the share is that many bytes over the step's time over the measured bandwidth
 * (`roof/bandwidth`). Also tokens a second by batch and shape. Policies have random weights; steps are those of `policy.generate`,
 * its looks at what was drawn included, prefill subtracted.
 *
 * The row `decode/roof_share` is that of the largest shape that ran.
 *
 * @module
 */
import type { QwenConfig } from "../src/policy/config.ts";
import type { Sequence } from "../src/policy/policy.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { type Benchmark, median, type Row } from "./benchmark.ts";
import { measureBandwidth, onRealGpu } from "./roof.ts";
import { configOf, randomPolicy, type ShapeName, shapeNames, sizeOf, textTensors } from "./shapes.ts";

const PROMPT = 256, ROUNDS = 3, BATCHES = [1, 8, 64];
const NAME = "decode/roof_share";

/** Bytes that a step must read for a row with `context` tokens behind it. */
export function bytesOfStep(config: QwenConfig, context: number): number {
  const { layers, kvHeads, headDim, tied } = config.text;
  // Of an embedding that is not the head too, a step reads one row.
  const read = textTensors(config).filter(([name]) => tied || name !== "model.embed_tokens.weight");
  const weights = read.reduce((sum, [, shape]) => sum + sizeOf(shape), 0);
  return 4 * (weights + 2 * layers * kvHeads * headDim * context);
}

/** Seconds of a decode step of so many rows with one prompt: a long reply less its first token. */
async function stepSeconds(policy: QwenPolicy, batch: number, tokens: number): Promise<number> {
  const ids = Array.from({ length: PROMPT }, (_, i) => (i * 37) % 250), row: Sequence = { ids, images: [] };
  const rows = Array.from({ length: batch }, () => row);
  const seconds = async (maxNewTokens: number) => {
    const start = performance.now();
    await policy.generate(rows, { maxNewTokens, stopTokens: [] });
    return (performance.now() - start) / 1000;
  };
  await seconds(2);
  await seconds(tokens);
  const values: number[] = [];
  for (let i = 0; i < ROUNDS; i++) {
    const first = await seconds(1);
    values.push((await seconds(tokens) - first) / (tokens - 1));
  }
  return median(values);
}

async function shapeRows(shape: ShapeName, roof: number, log: (line: string) => void): Promise<Row[]> {
  const { policy, release } = await randomPolicy(shape, (tiny) => configOf(shape, tiny)), rows: Row[] = [];
  const tokens = onRealGpu() ? 129 : 33;
  let batch = 0;
  try {
    for (batch of BATCHES) {
      const seconds = await stepSeconds(policy, batch, tokens), n = ROUNDS;
      rows.push({ name: `decode/webgpu/${shape}/b${batch}`, value: batch / seconds, unit: "tokens/s", n });
      if (batch > 1) continue;
      const bytes = bytesOfStep(policy.config, PROMPT + (tokens + 1) / 2);
      const peer = `bandwidth ${(roof / 1e9).toFixed(0)} GB/s`;
      log(`${shape}: a step reads ${(bytes / 1e6).toFixed(1)} MB in ${(seconds * 1e3).toFixed(2)} ms`);
      rows.push({ name: `${NAME}/${shape}`, value: bytes / seconds / roof, unit: "of the roof", peer, n });
    }
  } catch (error) {
    // What was measured before the device ran out of room still counts.
    if (!(error instanceof RangeError)) throw error;
    log(`${NAME}/${shape} left out from batch ${batch} on: ${error.message}`);
  } finally {
    release();
  }
  return rows;
}

/**
 * The benchmark.
 *
 * @param shapes Sizes to imitate, in rising order. @default {all on a GPU, "tiny" on a software adapter}
 */
export function roofShare(shapes?: readonly ShapeName[]): Benchmark {
  return {
    names: [NAME, ...shapeNames.map((shape) => `${NAME}/${shape}`), ...shapeNames.map((s) => `decode/webgpu/${s}`)],
    backends: ["webgpu"],
    async run(_backend, log): Promise<Row[]> {
      const rows: Row[] = [];
      try {
        const { roof } = await measureBandwidth();
        for (const shape of shapes ?? (onRealGpu() ? shapeNames : ["tiny"] as const)) {
          try {
            rows.push(...await shapeRows(shape, roof, log));
          } catch (error) {
            if (!(error instanceof RangeError)) throw error;
            log(`${NAME}/${shape} left out: ${error.message}`);
          }
        }
      } catch (error) {
        if (!(error instanceof RangeError)) throw error;
        log(`${NAME} left out: ${error.message}`);
      }
      const largest = rows.findLast(({ name }) => name.startsWith(`${NAME}/`));
      if (largest) {
        rows.push({ ...largest, name: NAME, peer: `${largest.name.slice(NAME.length + 1)}, ${largest.peer}` });
      }
      return rows;
    },
  };
}
