import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { call, close, gpuTest, type Plain, read, run, tensorsOf, values } from "./testing.ts";

const shapes = [[1, 1], [3, 7], [16, 20], [67, 33]];

gpuTest("SwiGLU and its gradient: within 1e-6 of float64", async () => {
  for (const shape of shapes) {
    const gate = values(shape, 1, 8), up = values(shape, 2), dy = values(shape, 3);
    const s = Float64Array.from(gate.data, (g) => 1 / (1 + Math.exp(-g)));
    const [y] = await run("MgpoSwiGLU", { gate, up });
    close(y, s.map((s, i) => gate.data[i] * s * up.data[i]), shape, 1e-6);
    const [dgate, dup] = await run("MgpoSwiGLUGrad", { gate, up, dy });
    close(dgate, s.map((s, i) => dy.data[i] * up.data[i] * s * (1 + gate.data[i] * (1 - s))), shape, 1e-6);
    close(dup, s.map((s, i) => dy.data[i] * gate.data[i] * s), shape, 1e-6);
  }
  const far = { data: Float32Array.of(-1000, 1000, -88, 88), shape: [4] },
    up = { data: Float32Array.of(1, 1, 1, 1), shape: [4] };
  close((await run("MgpoSwiGLU", { gate: far, up }))[0], [0, 1000, 0, 88], [4], 1e-6);
});

/** Φ(x) by Simpson's rule on the density from 0, in float64. */
function normal(x: number): number {
  const steps = 400, h = x / steps, density = (t: number) => Math.exp(-t * t / 2) / Math.sqrt(2 * Math.PI);
  let sum = density(0) + density(x);
  for (let i = 1; i < steps; i++) sum += density(i * h) * (i % 2 ? 4 : 2);
  return 0.5 + sum * h / 3;
}

gpuTest("GELU and its gradient: within 1e-6 of float64", async () => {
  for (const shape of shapes) {
    const x = values(shape, 1, 6), dy = values(shape, 2), phi = Float64Array.from(x.data, normal);
    close((await run("MgpoGelu", { x }))[0], phi.map((p, i) => x.data[i] * p), shape, 1e-6);
    const slope = phi.map((p, i) =>
      dy.data[i] * (p + x.data[i] * Math.exp(-(x.data[i] ** 2) / 2) / Math.sqrt(2 * Math.PI))
    );
    close((await run("MgpoGeluGrad", { x, dy }))[0], slope, shape, 1e-6);
  }
  const far = { data: Float32Array.of(-100, 100, 0), shape: [3] };
  close((await run("MgpoGelu", { x: far }))[0], [0, 100, 0], [3], 1e-6);
});

gpuTest("AdamW in place: three steps within 1e-6 of float64, seen by the host although it read before", async () => {
  for (const shape of [[1], [13, 5], [64, 8]]) {
    const [param, m, v] = [values(shape, 1), values(shape, 2, 0.1), values(shape, 3, 0.1)];
    v.data.forEach((value, i) => v.data[i] = Math.abs(value));
    const at = [param, m, v].map(({ data }) => Float64Array.from(data));
    const tensors = tensorsOf({ param, m, v });
    for (let t = 1; t <= 3; t++) {
      const grad = values(shape, 10 + t),
        [beta1, beta2, eps, lr, weightDecay, clipScale] = [0.9, 0.98, 1e-8, 1e-2, 0.1, 0.7];
      const [correction1, correction2] = [1 - beta1 ** t, 1 - beta2 ** t];
      for (let i = 0; i < at[0].length; i++) {
        const g = grad.data[i] * clipScale;
        at[1][i] = beta1 * at[1][i] + (1 - beta1) * g;
        at[2][i] = beta2 * at[2][i] + (1 - beta2) * g * g;
        const update = at[1][i] / correction1 / (Math.sqrt(at[2][i] / correction2) + eps);
        at[0][i] = at[0][i] * (1 - lr * weightDecay) - lr * update;
      }
      const attrs = { lr, beta1, beta2, eps, weightDecay, correction1, correction2, clipScale };
      const given = tensorsOf({ grad });
      tf.dispose([...call("MgpoAdamW", { ...tensors, ...given }, attrs), given.grad]);
      const after: Plain[] = await read([tensors.param, tensors.m, tensors.v]);
      after.forEach((plain, i) => close(plain, at[i], shape, 1e-6));
    }
    tf.dispose(Object.values(tensors));
  }
  await assert.rejects(run("MgpoAdamW", { param: values([2], 1), m: values([3], 1) }), RangeError);
});
