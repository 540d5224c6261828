import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { InputError } from "../run/errors.ts";
import { chooseBackend, decideBackend, describeBackend } from "./backend.ts";

const gpu = { vendor: "4318", device: "9009", description: "NVIDIA H100", isFallback: false };
const software = { vendor: "65541", device: "0", description: "llvmpipe (LLVM 15.0.6)", isFallback: true };

Deno.test("auto takes a real GPU and wasm otherwise, with the reason", () => {
  assert.equal(decideBackend("auto", gpu).backend, "webgpu");
  assert.equal(decideBackend("auto", gpu).notice, undefined);
  const fallback = decideBackend("auto", software);
  assert.equal(fallback.backend, "wasm");
  assert.match(fallback.reason, /llvmpipe/);
  assert.match(fallback.notice ?? "", /--backend webgpu/);
  const none = decideBackend("auto", undefined);
  assert.equal(describeBackend(none), "backend wasm: no WebGPU adapter was found");
});

Deno.test("an explicit backend is taken as asked, or refused in one line", () => {
  assert.equal(decideBackend("webgpu", software).backend, "webgpu");
  assert.equal(decideBackend("wasm", gpu).backend, "wasm");
  for (
    const [name, pattern] of [["webgpu", /no WebGPU adapter/], ["cuda", /--backend cuda: unknown backend/]] as const
  ) {
    assert.throws(() => decideBackend(name, undefined), (error: Error) => {
      assert.ok(error instanceof InputError);
      assert.match(error.message, pattern);
      assert.ok(!error.message.includes("\n"));
      return true;
    });
  }
});

Deno.test("the wasm backend starts and multiplies", async () => {
  const choice = await chooseBackend("wasm", { threads: 2 });
  assert.equal(choice.backend, "wasm");
  assert.equal(choice.threads, 2);
  assert.equal(choice.notice, undefined);
  assert.equal(describeBackend(choice), "backend wasm, 2 threads: asked for");
  assert.equal(tf.getBackend(), "wasm");
  const product = tf.tidy(() => tf.tensor2d([[1, 2], [3, 4]]).matMul(tf.tensor2d([[1, 0], [0, 2]])));
  assert.deepEqual(await product.array(), [[1, 4], [3, 8]]);
  product.dispose();
});
