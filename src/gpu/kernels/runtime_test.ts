import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { fold } from "./lanes.ts";
import { attach, KernelCall, runKernel, wgsl } from "./runtime.ts";
import { swiglu } from "./swiglu.ts";
import { call, gpuTest, read, values } from "./testing.ts";

Deno.test("long grids are folded within the limit of every device, and cover all workgroups", () => {
  for (const n of [0, 1, 65535, 65536, 1e6 + 3, 2 ** 31]) {
    const [x, y, z] = fold(n);
    assert.ok(x <= 65535 && y <= 65535 && z === 1 && x * y >= n);
    assert.ok(x * y < n + 65535 || n === 0);
  }
});

Deno.test("a shader declares its buffers in order and its uniforms", () => {
  const text = wgsl({
    storage: [{ name: "x", type: "f32" }, { name: "y", type: "i32", write: true }],
    uniforms: { size: "u32" },
    threads: 64,
    main: "y[0] = i32(x[u.size]);",
  });
  assert.match(text, /binding\(0\) var<storage, read> x: array<f32>/);
  assert.match(text, /binding\(1\) var<storage, read_write> y: array<i32>/);
  assert.match(text, /struct Uniforms \{ size: u32/);
});

gpuTest("a folded grid reaches every element of 4,200,001", async () => {
  const x = values([4_200_001], 1, 3), output = tf.tidy(() => call("MgpoGelu", { x: tf.tensor1d(x.data) }));
  const [y] = await read(output);
  tf.dispose(output);
  for (let i = 0; i < x.data.length; i++) {
    // x·Φ(x) lies between 0 and x, and on the far side of x/2.
    const [value, v] = [x.data[i], y.data[i]];
    if (value > 0 ? !(v >= value / 2 && v <= value) : !(v <= 0 && v >= value / 2)) {
      assert.fail(`element ${i}: gelu(${value}) is not ${v}`);
    }
  }
});

gpuTest("a tensor above the adapter's binding limit is refused with both sizes", () => {
  const real = attach(tf.backend() as object);
  const limits = { maxStorageBufferBindingSize: 1024, maxComputeWorkgroupsPerDimension: 65535 };
  const small = Object.create(real, { device: { value: { limits } } });
  const x = tf.zeros([300]);
  assert.throws(() => runKernel(swiglu[0], small, { gate: x, up: x }, {}), /\[300\] of 1200 bytes is above the 1024/);
  x.dispose();
});

gpuTest("a kernel call names missing and wrong inputs", () => {
  const x = tf.zeros([2, 3]), kernel = new KernelCall("Mgpo", attach(tf.backend() as object), { x }, { n: NaN });
  assert.throws(() => kernel.input("y"), /Mgpo: input y is missing/);
  assert.throws(() => kernel.input("x", [null, 4]), /shape \[\*, 4\], has \[2, 3\]/);
  assert.throws(() => kernel.input("x", undefined, "int32"), /int32/);
  assert.throws(() => kernel.number("n"), /finite/);
  assert.throws(() => attach({}), /tfjs-backend-webgpu 4.22/);
  x.dispose();
});
