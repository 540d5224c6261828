import assert from "node:assert/strict";
import { tf, tfwebgpu } from "../deps.ts";
import { chooseBackend } from "./backend.ts";
import { checkDevice, watchDevice } from "./device_errors.ts";
import { gpuTest } from "./kernels/testing.ts";
import { BOUND, DeviceMemoryUse, memoryUse, restartMemoryPeak } from "./memory.ts";

const MIB = 2 ** 20;

/** Runs `f` on a new device of its own, whose pool is bounded from `least` bytes on. */
async function onNewDevice(least: number, f: (use: DeviceMemoryUse, device: GPUDevice) => Promise<void>) {
  const adapter = await navigator.gpu.requestAdapter();
  const device = await adapter!.requestDevice();
  const backend = new tfwebgpu.WebGPUBackend(device), before = tf.getBackend();
  tf.registerBackend("webgpu-of-a-test", () => backend);
  for (const kernel of tf.getKernelsForBackend("webgpu")) {
    tf.registerKernel({ ...kernel, backendName: "webgpu-of-a-test" });
  }
  try {
    await tf.setBackend("webgpu-of-a-test");
    watchDevice(() => {});
    await f(DeviceMemoryUse.of(backend, least)!, device);
    await checkDevice();
  } finally {
    await tf.setBackend(before);
    for (const { kernelName } of tf.getKernelsForBackend("webgpu-of-a-test")) {
      tf.unregisterKernel(kernelName, "webgpu-of-a-test");
    }
    tf.removeBackend("webgpu-of-a-test");
    device.destroy();
  }
}

/** Sums of squares of vectors of ever new lengths, some alive together; the results are checked. */
async function changingLengths(rounds: number, each: (round: number) => void): Promise<void> {
  for (let round = 0; round < rounds; round++) {
    const n = 60_000 + 977 * round;
    const sum = tf.tidy(() => tf.sum(tf.square(tf.add(tf.fill([n], 1), tf.fill([n], 1)))));
    assert.equal((await sum.data())[0], 4 * n);
    sum.dispose();
    each(round);
  }
}

gpuTest("changing lengths: buffers that are kept stay within the bound, and would not without it", async () => {
  const held: number[] = [];
  await onNewDevice(
    Infinity,
    (use) => changingLengths(120, () => held.push(use.bytes)),
  );
  assert.ok(
    held[119] > 1.9 * held[59] && held[59] > 1.9 * held[29],
    "the pool of TensorFlow.js grows with each length",
  );

  await onNewDevice(2 * MIB, async (use, device) => {
    let most = 0, inUse = 0;
    await changingLengths(120, (round) => {
      inUse = Math.max(inUse, use.peakBytes);
      if (round > 20) most = Math.max(most, use.peakBytes);
      use.restartPeak();
      assert.equal(use.bytes >= use.poolBytes, true);
    });
    // Three vectors and a result live at once; the longest has 0.68 MiB.
    assert.ok(most <= Math.max(2 * MIB, BOUND * 4 * 0.68 * MIB), `${most / MIB} MiB`);
    assert.ok(most < held[119] / 10);
    // The count is that of the device: a buffer of our own is in it, once.
    const before = use.bytes, own = device.createBuffer({ size: 4096, usage: GPUBufferUsage.STORAGE });
    assert.equal(use.bytes, before + 4096);
    own.destroy();
    own.destroy();
    assert.equal(use.bytes, before);
  });
});

gpuTest("a buffer that an unsubmitted command uses is not let go", async () => {
  await onNewDevice(0, async (use) => {
    const backend = tf.backend() as InstanceType<typeof tfwebgpu.WebGPUBackend>;
    // Those of the second round take the buffers of the first, so their uploads are recorded copies; then they are freed at once.
    for (let i = 0; i < 20; i++) {
      const x = tf.tensor1d(new Float32Array(500_000 + i % 10).fill(i));
      backend.uploadToGPU(x.dataId);
      x.dispose();
    }
    const kept = use.poolBytes;
    assert.ok(kept > 20_000_000 && use.bytes > 40_000_000);
    // Asks for room while the copies are still to be submitted, then submits them.
    const y = tf.tidy(() => tf.add(tf.fill([1000], 1), 1));
    assert.ok(use.poolBytes >= kept);
    assert.equal((await y.data())[999], 2);
    y.dispose();
  });
});

gpuTest("the peak of a stretch of work is what lived at once, and begins anew", () => {
  const use = DeviceMemoryUse.of(tf.backend())!;
  restartMemoryPeak();
  const before = memoryUse()!.peakBytes;
  assert.equal(before, use.bytes);
  const x = tf.tidy(() => tf.fill([1_234_577], 1).add(1));
  const peak = memoryUse()!.peakBytes;
  assert.ok(peak >= before + 4 * 1_234_577, `${peak - before}`);
  x.dispose();
  assert.equal(memoryUse()!.peakBytes, peak);
});

Deno.test("on WebAssembly the memory in use is the linear memory", async () => {
  const before = tf.getBackend();
  await chooseBackend("wasm");
  try {
    const x = tf.fill([8 * MIB], 1), { peakBytes, poolBytes } = memoryUse()!;
    assert.ok(peakBytes >= 32 * MIB && peakBytes < 4096 * MIB);
    assert.equal(poolBytes, undefined);
    x.dispose();
  } finally {
    if (before) await tf.setBackend(before);
  }
});
