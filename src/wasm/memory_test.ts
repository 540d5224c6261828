import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { MachineError, machineError, MemoryLimitError } from "../gpu/device_errors.ts";
import { MOST_WASM_BYTES } from "./memory.ts";

await chooseBackend("wasm");

interface Allocating {
  wasm: { _malloc(bytes: number): number; _free(address: number): void; asm: { memory: WebAssembly.Memory } };
}

Deno.test("full WebAssembly memory is one clear error, and what was there before still computes", async () => {
  const { wasm } = tf.backend() as unknown as Allocating, piece = 256 * 2 ** 20;
  const x = tf.tensor1d([1, 2, 3]), addresses: number[] = [];
  let failure: unknown;
  try {
    // Asked for and never touched, so that the system gives no memory for it.
    while (addresses.length < 17) addresses.push(wasm._malloc(piece));
  } catch (error) {
    failure = error;
  }
  try {
    assert.ok(failure instanceof MemoryLimitError, String(failure));
    assert.match(
      failure.message,
      /memory is full: 256 MiB more were asked for, it has grown to \d{4} of 4096 MiB; use/,
    );
    assert.ok(addresses.length * piece > 3 * 2 ** 30, "more than 3 GiB can be had");
    assert.ok(wasm.asm.memory.buffer.byteLength <= MOST_WASM_BYTES);
    // By an operation of TensorFlow.js, which otherwise writes to address 0.
    assert.throws(() => tf.fill([piece / 4], 1), MemoryLimitError);
    const told = await machineError(failure);
    assert.ok(told instanceof MachineError && told.message === failure.message && told.cause === failure);
    const sum = tf.tidy(() => tf.sum(tf.add(x, x)));
    assert.equal(sum.dataSync()[0], 12);
    sum.dispose();
  } finally {
    for (const address of addresses) wasm._free(address);
    x.dispose();
  }
});

Deno.test("what an error means: a breakdown of the module is full memory, anything else is left as it is", async () => {
  const abort = new WebAssembly.RuntimeError("Aborted(). Build with -sASSERTIONS for more info.");
  const told = await machineError(abort);
  assert.ok(told instanceof MachineError && told.cause === abort);
  assert.match(told.message, /WebAssembly backend broke down \(Aborted\(\).*\), as it does when its 4 GiB/);
  const other = new RangeError("x");
  assert.equal(await machineError(other), other);
});
