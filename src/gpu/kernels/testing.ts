/**
 * What the tests of the WebGPU kernels share. Seeded inputs and comparisons are those of the WebAssembly kernels, whose
 * inputs and outputs are the same.
 *
 * @module
 */
import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import type { Plain } from "../../wasm/testing.ts";
import { installWebgpuKernels } from "./register.ts";

export { close, integers, type Plain, values } from "../../wasm/testing.ts";

const adapter = await navigator.gpu?.requestAdapter();
const errors: string[] = [];
let started = false;

async function start(): Promise<void> {
  if (started) return;
  started = true;
  // As the program does: the packed product of tfjs, the only one that always adds in the same order.
  tf.env().set("WEBGPU_MATMUL_PROGRAM_TYPE", 3);
  await tf.setBackend("webgpu");
  await tf.ready();
  installWebgpuKernels();
  (tf.backend() as unknown as { device: GPUDevice }).device.addEventListener("uncapturederror", (event) => {
    errors.push((event as GPUUncapturedErrorEvent).error.message);
  });
}

/** A test on the webgpu backend with our kernels; skipped, and named so, where there is no adapter. */
export function gpuTest(name: string, fn: () => Promise<void>): void {
  const run = async () => {
    await start();
    await fn();
    assert.deepEqual(errors, [], "the GPU reported errors");
  };
  const title = adapter ? name : `${name} (skipped: no WebGPU adapter)`;
  // The backend keeps its device and what it compiled beyond a test.
  Deno.test({ name: title, ignore: !adapter, fn: run, sanitizeResources: false, sanitizeOps: false });
}

/** Uploads inputs as tensors. */
export const tensorsOf = (inputs: Record<string, Plain>): Record<string, tf.Tensor> =>
  Object.fromEntries(
    Object.entries(inputs).map(([key, { data, shape }]) => [
      key,
      tf.tensor(data, [...shape], data instanceof Int32Array ? "int32" : "float32"),
    ]),
  );

/** Runs a kernel on tensors. */
export function call(name: string, inputs: Record<string, tf.Tensor>, attrs: Record<string, unknown> = {}) {
  const result = tf.engine().runKernel(name, inputs, attrs as never) as tf.Tensor | tf.Tensor[];
  return Array.isArray(result) ? result : [result];
}

/** Reads tensors. */
export const read = (tensors: readonly tf.Tensor[]): Promise<Plain[]> =>
  Promise.all(tensors.map(async (t) => ({ data: await t.data<"float32">(), shape: t.shape })));

/** Runs a kernel and reads its outputs; nothing stays allocated. */
export async function run(
  name: string,
  inputs: Record<string, Plain>,
  attrs: Record<string, unknown> = {},
): Promise<Plain[]> {
  const outputs = tf.tidy(() => call(name, tensorsOf(inputs), attrs));
  const plain = await read(outputs);
  tf.dispose(outputs);
  return plain;
}
