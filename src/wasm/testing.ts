/**
 * What the kernel tests share: running a kernel, seeded inputs, comparison with a float64 reference.
 *
 * @module
 */
import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { installWasmKernels } from "./register.ts";
import { startShared } from "./shared_memory.ts";

/** An input of a kernel, or an output, as plain data. */
export interface Plain {
  readonly data: Float32Array | Int32Array;
  readonly shape: readonly number[];
}

/** Selects the wasm backend with our kernels, on memory that threads could share. */
export async function ready(): Promise<void> {
  await startShared(() => tf.setBackend("wasm"));
  await tf.ready();
  installWasmKernels();
}

/** Runs a kernel and reads its outputs; nothing stays allocated. */
export function run(name: string, inputs: Record<string, Plain>, attrs: Record<string, unknown> = {}): Plain[] {
  return tf.tidy(() => {
    const tensors = Object.fromEntries(
      Object.entries(inputs).map(([key, { data, shape }]) => [
        key,
        tf.tensor(data, [...shape], data instanceof Int32Array ? "int32" : "float32"),
      ]),
    );
    const result = tf.engine().runKernel(name, tensors, attrs as never);
    const outputs: tf.Tensor[] = Array.isArray(result) ? result : [result as tf.Tensor];
    return outputs.map((tensor) => ({ data: tensor.dataSync<"float32">(), shape: tensor.shape }));
  });
}

/** Seeded values, roughly uniform in ±scale. */
export function values(shape: readonly number[], seed: number, scale = 1): Plain & { data: Float32Array } {
  let state = (seed * 2654435761) >>> 0;
  const data = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => {
    state = (Math.imul(state ^ (state >>> 15), 0x85ebca6b) + 0x9e3779b9) >>> 0;
    const mixed = Math.imul(state ^ (state >>> 13), 0xc2b2ae35) >>> 0;
    return scale * (2 * mixed / 2 ** 32 - 1);
  });
  return { data, shape };
}

/** Indices as an input. */
export function integers(list: readonly number[]): Plain & { data: Int32Array } {
  return { data: Int32Array.from(list), shape: [list.length] };
}

/** Asserts |actual − expected| ≤ tolerance · max(1, largest |expected|) everywhere, and the shape. */
export function close(actual: Plain, expected: ArrayLike<number>, shape: readonly number[], tolerance: number): void {
  assert.deepEqual([...actual.shape], [...shape]);
  assert.equal(actual.data.length, expected.length);
  let largest = 1;
  for (let i = 0; i < expected.length; i++) largest = Math.max(largest, Math.abs(expected[i]));
  for (let i = 0; i < expected.length; i++) {
    const error = Math.abs(actual.data[i] - expected[i]);
    if (!(error <= tolerance * largest)) {
      assert.fail(`element ${i}: ${actual.data[i]}, expected ${expected[i]} (error ${error} of ${largest})`);
    }
  }
}

/**
 * Compares a gradient with central differences of Σ weight·output in float64, at up to 40 positions of `input`.
 */
export function checkGradient(
  input: Plain,
  gradient: Plain,
  loss: (data: Float64Array) => number,
  tolerance: number,
): void {
  const data = Float64Array.from(input.data);
  const stride = Math.max(1, Math.floor(data.length / 40));
  for (let i = 0; i < data.length; i += stride) {
    const kept = data[i];
    const step = 1e-4;
    data[i] = kept + step;
    const above = loss(data);
    data[i] = kept - step;
    const below = loss(data);
    data[i] = kept;
    const expected = (above - below) / (2 * step);
    const error = Math.abs(gradient.data[i] - expected);
    if (!(error <= tolerance * Math.max(1, Math.abs(expected)))) {
      assert.fail(`gradient ${i}: ${gradient.data[i]}, by differences ${expected}`);
    }
  }
}
