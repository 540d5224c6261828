/**
 * What the tests of the WebGPU kernels share. Seeded inputs and comparisons are those of the WebAssembly kernels, whose
 * inputs and outputs are the same.
 *
 * @module
 */
import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { InputError } from "../../run/errors.ts";
import type { Plain } from "../../wasm/testing.ts";
import { chooseBackend } from "../backend.ts";
import { installWebgpuKernels } from "./register.ts";

export { close, integers, type Plain, values } from "../../wasm/testing.ts";

const errors: string[] = [];

/** Makes webgpu the current backend, as the program does; false where there is no adapter. */
async function start(): Promise<boolean> {
  try {
    await chooseBackend("webgpu", { onLost: (message) => errors.push(message) });
  } catch (error) {
    if (error instanceof InputError && error.message.includes("no WebGPU adapter")) return false;
    throw error;
  }
  installWebgpuKernels();
  return true;
}
const started = await start();

/** A test on the webgpu backend with our kernels; skipped, and named so, where there is no adapter. */
export function gpuTest(name: string, fn: () => void | Promise<void>): void {
  Deno.test({
    name: started ? name : `${name} (skipped: no WebGPU adapter)`,
    ignore: !started,
    fn: async () => {
      await fn();
      assert.deepEqual(errors, [], "the GPU reported errors");
    },
  });
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
