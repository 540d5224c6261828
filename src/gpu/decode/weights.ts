/**
 * The language model's weights as bindings: matrices are the buffers of the policy's variables themselves; norms and biases, a
 * few kilobytes, are copied side by side before each generation, because a kernel may bind eight buffers only.
 *
 * @module
 */
import type { tf, tfwebgpu } from "../../deps.ts";
import type { QwenConfig } from "../../policy/config.ts";
import type { Weights } from "../../policy/vision.ts";
import { type DeviceMemory, tensorBuffer } from "./memory.ts";

/** Bindings start at multiples of this many floats. */
const ALIGN = 64;
const aligned = (n: number): number => Math.ceil(n / ALIGN) * ALIGN;

/** Rows of the output head or embedding that are bound at once. */
export interface TableChunk {
  first: number;
  rows: number;
}

/** Cuts a `[rows, width]` table so that each piece fits a binding of `limit` bytes. */
export function tableChunks(rows: number, width: number, limit: number): TableChunk[] {
  // Multiples of 64 rows: their bytes are a multiple of 256, as the offset of a binding must be.
  const most = Math.max(ALIGN, Math.floor(limit / (4 * width) / ALIGN) * ALIGN);
  const chunks: TableChunk[] = [];
  for (let first = 0; first < rows; first += most) chunks.push({ first, rows: Math.min(most, rows - first) });
  return chunks;
}

/** The tensors of a layer that are bound themselves. */
export interface LayerWeights {
  q: GPUBuffer;
  k: GPUBuffer;
  v: GPUBuffer;
  o: GPUBuffer;
  gate: GPUBuffer;
  up: GPUBuffer;
  down: GPUBuffer;
}

const matrices = {
  q: "self_attn.q_proj.weight",
  k: "self_attn.k_proj.weight",
  v: "self_attn.v_proj.weight",
  o: "self_attn.o_proj.weight",
  gate: "mlp.gate_proj.weight",
  up: "mlp.up_proj.weight",
  down: "mlp.down_proj.weight",
} as const;

/** Follows the policy's variables: an optimizer's `assign` gives them other buffers. */
export class WeightBuffers {
  layers: LayerWeights[] = [];
  embedding!: GPUBuffer;
  head!: GPUBuffer;
  /** Grows whenever a buffer changed, so that bind groups know when they are stale. */
  version = 0;
  readonly #vectors: GPUBuffer;
  readonly #places = new Map<string, { offset: number; size: number }>();

  constructor(readonly config: QwenConfig, readonly weights: Weights, memory: DeviceMemory) {
    const { layers, heads, kvHeads, headDim, hiddenSize } = config.text;
    let at = 0;
    const place = (name: string, parts: readonly (readonly [string, number])[]) => {
      const start = at;
      for (const [tensor, size] of parts) {
        this.#places.set(tensor, { offset: at, size });
        at += size;
      }
      this.#places.set(name, { offset: start, size: aligned(at - start) });
      at = start + aligned(at - start);
    };
    for (let i = 0; i < layers; i++) {
      const layer = `model.layers.${i}`;
      place(`${i}.norm`, [[`${layer}.input_layernorm.weight`, hiddenSize]]);
      place(`${i}.bias`, [
        [`${layer}.self_attn.q_proj.bias`, heads * headDim],
        [`${layer}.self_attn.k_proj.bias`, kvHeads * headDim],
        [`${layer}.self_attn.v_proj.bias`, kvHeads * headDim],
      ]);
      place(`${i}.norm2`, [[`${layer}.post_attention_layernorm.weight`, hiddenSize]]);
    }
    place("norm", [["model.norm.weight", hiddenSize]]);
    this.#vectors = memory.create("norms and biases", at * 4, GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST);
  }

  /** The binding of a layer's `norm`, `bias` or `norm2`, or of the final norm. */
  vector(name: string): GPUBufferBinding {
    const { offset, size } = this.#places.get(name)!;
    return { buffer: this.#vectors, offset: offset * 4, size: size * 4 };
  }

  /** Takes the variables' present buffers and records the copies of norms and biases. */
  refresh(backend: InstanceType<typeof tfwebgpu.WebGPUBackend>, encoder: GPUCommandEncoder): void {
    const { layers: count, tied } = this.config.text;
    const buffer = (name: string) => tensorBuffer(backend, this.weights(name) as tf.Tensor);
    const layers = Array.from({ length: count }, (_, i) => {
      const entries = Object.entries(matrices).map(([key, name]) => [key, buffer(`model.layers.${i}.${name}`)]);
      return Object.fromEntries(entries) as LayerWeights;
    });
    const embedding = buffer("model.embed_tokens.weight"), head = tied ? embedding : buffer("lm_head.weight");
    const same = this.embedding === embedding && this.head === head && layers.length === this.layers.length &&
      layers.every((layer, i) =>
        (Object.keys(matrices) as (keyof LayerWeights)[]).every((m) => layer[m] === this.layers[i][m])
      );
    if (!same) this.version++;
    Object.assign(this, { layers, embedding, head });
    for (const [name, { offset, size }] of this.#places) {
      if (name.startsWith("model.")) encoder.copyBufferToBuffer(buffer(name), 0, this.#vectors, offset * 4, size * 4);
    }
  }
}
