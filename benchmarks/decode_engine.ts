/**
 * How many tokens a second does the WebGPU generation engine decode, beside plain tfjs operations on the same backend? Prefill
 * is left out of both: a run of one token is subtracted. And how many from a nucleus (`decode_nucleus`, topP 0.9), beside the host's
 * loop over the same kernels, which reads all logits back and sorts them for each token?
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

const BATCHES = [1, 8, 64], NUCLEUS_BATCHES = [8, 64], TOP_P = 0.9, TOKENS = 33, PLAIN_TOKENS = 9, ROUNDS = 3;

function prompts(policy: QwenPolicy, count: number): Sequence[] {
  const ids = policy.encode("which letter is on the red sign that stands left of the blue one?");
  return Array.from({ length: count }, (_, i) => ({ ids: ids.slice(0, ids.length - i % 5), images: [] }));
}

/** The engine on prompts that are prefilled once; release() frees them. */
function prepared(policy: QwenPolicy, engine: DecodeEngine, sequences: readonly Sequence[], topP = 1) {
  const { release, ...inputs } = prefill(policy, sequences);
  const generate = (maxNewTokens: number) =>
    engine.generate({
      ...inputs,
      keys: sequences.map((_, i) => [0, i, 0] as const),
      seed: 0,
      temperature: 1,
      topP,
      suppressed: new Uint8Array(policy.config.text.vocabSize),
      stop: new Set(),
      maxNewTokens,
      checkEvery: 64,
    });
  return { generate, release };
}

interface Case {
  /** First part of the row's name. */
  what: string;
  batch: number;
  topP: number;
  peer: string;
  /** The peer. */
  other: (sequences: readonly Sequence[], maxNewTokens: number) => Promise<unknown>;
}

async function measure(policy: QwenPolicy, engine: DecodeEngine, given: Case): Promise<Row> {
  const { what, batch, topP, peer, other } = given, sequences = prompts(policy, batch);
  const { generate, release } = prepared(policy, engine, sequences, topP);
  const plain = (maxNewTokens: number) => other(sequences, maxNewTokens);
  await generate(2);
  await plain(2);
  const one = await alternate(ROUNDS, () => generate(1), () => plain(1));
  const many = await alternate(ROUNDS, () => generate(TOKENS), () => plain(PLAIN_TOKENS));
  release();
  const value = (batch * (TOKENS - 1)) / (median(many.first) - median(one.first));
  const rate = (batch * (PLAIN_TOKENS - 1)) / (median(many.second) - median(one.second));
  return {
    name: `${what}/webgpu/b${batch}`,
    value,
    unit: "tokens/s",
    ratio: value / rate,
    peer,
    n: ROUNDS,
  };
}

export const decodeEngine = {
  names: ["decode_engine/webgpu", "decode_nucleus/webgpu"],
  async run(backend: string, log: (line: string) => void): Promise<Row[]> {
    if (backend !== "webgpu") return [];
    const policy = await loadPolicy(), why = DecodeEngine.unsupported(policy.config);
    if (why !== undefined) {
      log(`decode_engine left out: ${why}`);
      policy.dispose();
      return [];
    }
    const engine = new DecodeEngine(policy.config, policy.weights), rows: Row[] = [];
    const plain = (sequences: readonly Sequence[], maxNewTokens: number) => {
      useKernels("plain");
      return policy.generate(sequences, { maxNewTokens, stopTokens: [] }).finally(() => useKernels("fused"));
    };
    // What gives logits back draws on the host.
    const host = (sequences: readonly Sequence[], maxNewTokens: number) =>
      policy.generateWithLogits(sequences, { maxNewTokens, stopTokens: [], topP: TOP_P });
    const every = { what: "decode_engine", topP: 1, peer: "plain tfjs on webgpu", other: plain };
    const nucleus = { what: "decode_nucleus", topP: TOP_P, peer: "the host's loop on webgpu", other: host };
    try {
      for (const batch of BATCHES) rows.push(await measure(policy, engine, { ...every, batch }));
      for (const batch of NUCLEUS_BATCHES) rows.push(await measure(policy, engine, { ...nucleus, batch }));
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
  for (const { name, value, unit, ratio, peer } of await decodeEngine.run("webgpu", console.log)) {
    console.log(`${name}: ${value.toFixed(0)} ${unit}, ${ratio?.toFixed(1)}× ${peer}`);
  }
}
