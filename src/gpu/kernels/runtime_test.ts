import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { fold } from "./lanes.ts";
import { MemoryLimitError } from "../device_errors.ts";
import { ALIGNMENT, attach, KernelCall, limitBindings, wgsl } from "./runtime.ts";
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

gpuTest("what cannot be bound even in windows is refused with both sizes", () => {
  limitBindings(1024);
  const x = tf.zeros([40, 300]), w = tf.zeros([300]);
  try {
    assert.throws(() => call("MgpoRmsNorm", { x, w }, { eps: 1e-6 }), (error: Error) => {
      assert.ok(error instanceof MemoryLimitError);
      assert.match(
        error.message,
        /MgpoRmsNorm: 16 rows of 300 numbers, together of 19200 bytes is above the 1024 bytes/,
      );
      return true;
    });
  } finally {
    limitBindings();
    tf.dispose([x, w]);
  }
});

gpuTest("windows cover all rows, begin where bindings may, and are one where all fits", () => {
  const kernel = new KernelCall("Mgpo", attach(tf.backend() as object), {}, {});
  try {
    for (
      const [rows, widths, limit, multiple] of [[1000, [64], 65536, 1], [1000, [3, 192], 60_000, 4], [
        7,
        [5],
        256,
        1,
      ]] as const
    ) {
      limitBindings(limit);
      const runs = kernel.windows(rows, widths, multiple);
      let next = 0;
      for (const { first, count } of runs) {
        assert.equal(first, next);
        assert.ok(count > 0 && first % multiple === 0);
        for (const width of widths) assert.ok(first * width % ALIGNMENT === 0 && 4 * count * width <= limit);
        next += count;
      }
      assert.equal(next, rows);
      assert.equal(runs.length === 1, 4 * rows * Math.max(...widths) <= limit);
    }
  } finally {
    limitBindings();
  }
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
