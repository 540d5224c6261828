// Tests of GELU, sums, the optimizer step, and the exponential behind them.
import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { scaledTail } from "./gelu.ts";
import { ModuleBuilder } from "./module.ts";
import { eachVector, exp } from "./lanes.ts";
import { emitParts } from "./parts.ts";
import { fitPolynomial } from "./polynomial.ts";
import { close, type Plain, ready, run, values } from "./testing.ts";

await ready();

/** erf by its series of positive terms, in float64. */
function erf(x: number): number {
  let term = x;
  let sum = x;
  for (let n = 1; n < 400; n++) sum += term *= 2 * x * x / (2 * n + 1);
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

const normalBelow = (x: number): number => (1 + erf(x / Math.SQRT2)) / 2;

Deno.test("exp: relative error ≤ 2e-7 from −87 to 88; 0 below; NaN stays", () => {
  const m = new ModuleBuilder();
  const parts = emitParts(m);
  m.function("exp", ["i32", "i32", "i32"], (f, count, x, y) => {
    eachVector(f, parts, count, (at) => at.store(y, exp(f, at.load(x))));
  }, { exported: true });
  const memory = new WebAssembly.Memory({ initial: 16 });
  const env = { memory, log: Math.log };
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(m.bytes()), { env });
  const count = 50_001;
  const x = new Float32Array(memory.buffer, 1024, count);
  const y = new Float32Array(memory.buffer, 1024 + 4 * count, count);
  for (let i = 0; i < count; i++) x[i] = -87 + 175 * i / (count - 1);
  (exports.exp as (...values: number[]) => void)(count, x.byteOffset, y.byteOffset);
  let worst = 0;
  for (let i = 0; i < count; i++) worst = Math.max(worst, Math.abs(y[i] / Math.exp(x[i]) - 1));
  assert.ok(worst <= 2e-7, `worst relative error ${worst}`);
  x.set([0, -100, -1e30, -Infinity, NaN, 1000]);
  (exports.exp as (...values: number[]) => void)(6, x.byteOffset, y.byteOffset);
  assert.deepEqual([...y.slice(0, 5)], [1, 0, 0, 0, NaN]);
  assert.ok(y[5] > 1e38 && y[5] < Infinity);
});

Deno.test("polynomial fits and the normal tail in float64", () => {
  const fit = fitPolynomial(Math.exp, -0.5, 0.5, 8);
  for (let x = -0.5; x <= 0.5; x += 0.01) {
    const value = fit.reduceRight((sum, c) => sum * x + c, 0);
    assert.ok(Math.abs(value - Math.exp(x)) < 4e-11, `at ${x}`);
  }
  for (const a of [0, 0.5, 1, 2, 3]) {
    assert.ok(Math.abs(scaledTail(a) * Math.exp(-a * a / 2) - (1 - normalBelow(a))) < 1e-12, `at ${a}`);
  }
});

Deno.test("GELU within 5e-7 (|x| ≤ 8), its gradient within 1e-6", () => {
  for (const count of [1, 3, 20_001]) {
    const data = Float32Array.from({ length: count }, (_, i) => count < 10 ? i - 1.5 : -8 + 16 * i / (count - 1));
    const x = { data, shape: [count] };
    const [y] = run("MgpoGelu", { x });
    const dy = values([count], 2);
    const [dx] = run("MgpoGeluGrad", { x, dy });
    for (let i = 0; i < count; i++) {
      const below = normalBelow(data[i]);
      assert.ok(Math.abs(y.data[i] - data[i] * below) <= 5e-7, `gelu(${data[i]}) = ${y.data[i]}`);
      const slope = below + data[i] * Math.exp(-(data[i] ** 2) / 2) / Math.sqrt(2 * Math.PI);
      assert.ok(Math.abs(dx.data[i] - dy.data[i] * slope) <= 1e-6, `slope at ${data[i]}`);
    }
  }
  const far: Plain = { data: Float32Array.of(-50, 50, -1000, 1000, 0), shape: [5] };
  close(run("MgpoGelu", { x: far })[0], [0, 50, 0, 1000, 0], [5], 0);
});

Deno.test("column sums within 1e-6, sums of squares to the last f32 digit", () => {
  for (const [rows, width] of [[1, 1], [1, 7], [5, 4], [64, 13], [131, 96], [6912, 3]]) {
    const x = values([rows, width], 1, 3);
    const columns = Array.from({ length: width }, () => 0);
    let squares = 0;
    for (const [i, value] of x.data.entries()) {
      columns[i % width] += value;
      squares += value * value;
    }
    close(run("MgpoColSum", { x })[0], columns, [width], 1e-6);
    const [sum] = run("MgpoSumSquares", { x });
    assert.deepEqual(sum.shape, []);
    assert.ok(Math.abs(sum.data[0] / squares - 1) <= 6e-8, `${sum.data[0]} of ${squares}`);
  }
});

Deno.test("AdamW in place: three steps within 1e-6 of the formulas in float64, odd sizes", () => {
  const options = { lr: 0.01, beta1: 0.9, beta2: 0.98, eps: 1e-6, weightDecay: 0.1 };
  for (const size of [1, 6, 4097]) {
    const start = values([size], 1);
    const tensors = { param: tf.variable(tf.tensor1d(start.data)), m: tf.zeros([size]), v: tf.zeros([size]) };
    const p = Float64Array.from(start.data);
    const [m, v] = [new Float64Array(size), new Float64Array(size)];
    for (let t = 1; t <= 3; t++) {
      const given = values([size], 10 + t);
      const [correction1, correction2] = [1 - options.beta1 ** t, 1 - options.beta2 ** t];
      const grad = tf.tensor1d(given.data);
      const attrs = { ...options, correction1, correction2, clipScale: 0.5 };
      const dummy = tf.engine().runKernel("MgpoAdamW", { ...tensors, grad }, attrs) as tf.Tensor;
      tf.dispose([dummy, grad]);
      for (let i = 0; i < size; i++) {
        const g = given.data[i] * 0.5;
        p[i] *= 1 - options.lr * options.weightDecay;
        m[i] = options.beta1 * m[i] + (1 - options.beta1) * g;
        v[i] = options.beta2 * v[i] + (1 - options.beta2) * g * g;
        p[i] -= options.lr * (m[i] / correction1) / (Math.sqrt(v[i] / correction2) + options.eps);
      }
    }
    for (const [tensor, expected] of [[tensors.param, p], [tensors.m, m], [tensors.v, v]] as const) {
      close({ data: tensor.dataSync<"float32">(), shape: tensor.shape }, expected, [size], 1e-6);
    }
    tf.dispose([tensors.param, tensors.m, tensors.v]);
  }
});
