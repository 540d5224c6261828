/**
 * How many tokens a second does the WebGPU generation engine decode, beside plain tfjs operations on the same backend? Prefill
 * is left out of both: a run of one token is subtracted.
 *
 * Run alone: `deno run --no-prompt --allow-read --allow-env=XDG_RUNTIME_DIR,IMAGESCRIPT_WASM_SIMD benchmarks/decode_engine.ts`
 *
 * @module
 */
import { chooseBackend, describeBackend } from "../src/gpu/backend.ts";
import { DecodeEngine } from "../src/gpu/decode/engine.ts";
import { prefill } from "../src/gpu/decode/testing.ts";
import { useKernels } from "../src/policy/ops.ts";
import { loadPolicy } from "../src/policy/load.ts";
import type { Sequence } from "../src/policy/policy.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { alternate, type Benchmark, median, type Row } from "./benchmark.ts";

const BATCHES = [1, 8, 64], TOKENS = 33, PLAIN_TOKENS = 9, ROUNDS = 3;

function prompts(policy: QwenPolicy, count: number): Sequence[] {
  const ids = policy.encode("which letter is on the red sign that stands left of the blue one?");
  return Array.from({ length: count }, (_, i) => ({ ids: ids.slice(0, ids.length - i % 5), images: [] }));
}

/** The engine on prompts that are prefilled once; release() frees them. */
function prepared(policy: QwenPolicy, engine: DecodeEngine, sequences: readonly Sequence[]) {
  const { release, ...inputs } = prefill(policy, sequences);
  const generate = (maxNewTokens: number) =>
    engine.generate({
      ...inputs,
      keys: sequences.map((_, i) => [0, i, 0] as const),
      seed: 0,
      temperature: 1,
      suppressed: new Uint8Array(policy.config.text.vocabSize),
      stop: new Set(),
      maxNewTokens,
      checkEvery: 64,
    });
  return { generate, release };
}

async function measure(policy: QwenPolicy, engine: DecodeEngine, batch: number): Promise<Row> {
  const sequences = prompts(policy, batch), { generate, release } = prepared(policy, engine, sequences);
  const plain = (maxNewTokens: number) => policy.generate(sequences, { maxNewTokens, stopTokens: [] });
  await generate(2);
  await plain(2);
  const one = await alternate(ROUNDS, () => generate(1), () => plain(1));
  const many = await alternate(ROUNDS, () => generate(TOKENS), () => plain(PLAIN_TOKENS));
  release();
  const value = (batch * (TOKENS - 1)) / (median(many.first) - median(one.first));
  const peer = (batch * (PLAIN_TOKENS - 1)) / (median(many.second) - median(one.second));
  return {
    name: `decode_engine/webgpu/b${batch}`,
    value,
    unit: "tokens/s",
    ratio: value / peer,
    peer: "plain tfjs on webgpu",
    n: ROUNDS,
  };
}

export const decodeEngine = {
  names: BATCHES.map((batch) => `decode_engine/webgpu/b${batch}`),
  async run(backend: string, log: (line: string) => void): Promise<Row[]> {
    if (backend !== "webgpu") return [];
    const policy = await loadPolicy(), why = DecodeEngine.unsupported(policy.config);
    if (why !== undefined) {
      log(`decode_engine left out: ${why}`);
      policy.dispose();
      return [];
    }
    const engine = new DecodeEngine(policy.config, policy.weights), rows: Row[] = [];
    useKernels("plain");
    try {
      for (const batch of BATCHES) rows.push(await measure(policy, engine, batch));
    } finally {
      useKernels("fused");
      engine.dispose();
      policy.dispose();
    }
    return rows;
  },
} satisfies Benchmark;

if (import.meta.main) {
  console.log(describeBackend(await chooseBackend("webgpu")));
  for (const { name, value, unit, ratio } of await decodeEngine.run("webgpu", console.log)) {
    console.log(`${name}: ${value.toFixed(0)} ${unit}, ${ratio?.toFixed(1)}× plain tfjs`);
  }
}
