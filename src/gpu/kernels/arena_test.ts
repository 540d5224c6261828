import assert from "node:assert/strict";
import { tf } from "../../deps.ts";
import { AdamW, applyAdamW } from "../../mgpo.ts";
import { loadPolicy } from "../../policy/load.ts";
import { hasFused, useKernels } from "../../policy/ops.ts";
import { limitBindings } from "./runtime.ts";
import { call, gpuTest, type Plain, read, run, tensorsOf, values } from "./testing.ts";

const SHARE = 256;
const shapes = [[1], [7, 37], [16, 16], [257], [3, 5, 17], [1000], [0], [2, 128]];
const sizeOf = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 1);

/** Where tensors of these shapes begin in an arena, with a gap before the third, and its size. */
function layout(): { offsets: number[]; size: number } {
  const offsets: number[] = [];
  let size = 0;
  shapes.forEach((shape, i) => {
    if (i === 2) size += SHARE;
    offsets.push(size);
    size += Math.ceil(sizeOf(shape) / SHARE) * SHARE;
  });
  return { offsets, size };
}

/** Counts dispatches while it lives. */
class DispatchCount implements Disposable {
  readonly #real = GPUComputePassEncoder.prototype.dispatchWorkgroups;
  count = 0;
  constructor() {
    const { prototype } = GPUComputePassEncoder, real = this.#real;
    const add = () => this.count++;
    prototype.dispatchWorkgroups = function (...grid) {
      add();
      return real.apply(this, grid);
    };
  }
  [Symbol.dispose](): void {
    GPUComputePassEncoder.prototype.dispatchWorkgroups = this.#real;
  }
}

gpuTest("tensors are laid into an arena with zeros between them, whatever lay there before", async () => {
  const { offsets, size } = layout(), inputs = shapes.map((shape, i) => values(shape, i));
  const expected = new Float32Array(size);
  inputs.forEach(({ data }, i) => expected.set(data, offsets[i]));
  for (let round = 0; round < 2; round++) {
    // Its buffer goes back to the pool full of numbers.
    await run("MgpoGelu", { x: values([size], 5) });
    const [flat] = await run("MgpoFlatten", Object.fromEntries(inputs.map((x, i) => [`x${i}`, x])), { offsets, size });
    assert.deepEqual(flat.data, expected);
  }
});

gpuTest(
  "AdamW of an arena equals the kernel for one tensor bit for bit; the others and their moments stay",
  async () => {
    const { offsets, size } = layout();
    const params = shapes.map((shape, i) => values(shape, i)), used = [0, 1, 3, 4, 5, 6, 7];
    const [m, v] = [values([size], 20, 0.1), values([size], 21, 0.1)];
    v.data.forEach((value, i) => v.data[i] = Math.abs(value));
    const common = { beta1: 0.9, beta2: 0.98, eps: 1e-8, weightDecay: 0.1, clipScale: 0.7 };
    const cut = (x: Plain, i: number): Plain => ({
      data: x.data.slice(offsets[i], offsets[i] + sizeOf(shapes[i])),
      shape: shapes[i],
    });
    const whole = tensorsOf({ m, v }), together = params.map((param) => tensorsOf({ param }).param);
    const single = params.map((param, i) => tensorsOf({ param, m: cut(m, i), v: cut(v, i) }));
    for (let t = 1; t <= 3; t++) {
      const step = { ...common, correction1: 1 - 0.9 ** t, correction2: 1 - 0.98 ** t };
      const grads = shapes.map((shape, i) => tensorsOf({ grad: values(shape, 30 + 10 * t + i) }).grad);
      const given = Object.fromEntries(used.map((i, n) => [`x${n}`, grads[i]]));
      const at = used.map((i) => offsets[i]), lr = used.map((i) => 1e-2 * (i + 1));
      const [grad] = call("MgpoFlatten", given, { offsets: at, size });
      const list = Object.fromEntries(used.map((i, n) => [`param${n}`, together[i]]));
      tf.dispose([...call("MgpoAdamWAll", { ...list, ...whole, grad }, { ...step, offsets: at, lr }), grad]);
      used.forEach((i, n) => tf.dispose(call("MgpoAdamW", { ...single[i], grad: grads[i] }, { ...step, lr: lr[n] })));
      tf.dispose(grads);
      // Read every time, so that a copy on the host that outlived the change would show.
      const [first, second] = await read([whole.m, whole.v]), after = await read(together);
      for (const [i, { param, m, v }] of single.entries()) {
        const [p, one, two] = await read([param, m, v]);
        assert.deepEqual(after[i].data, p.data, `step ${t}, parameter ${i}`);
        assert.deepEqual([cut(first, i).data, cut(second, i).data], [one.data, two.data], `step ${t}, moments ${i}`);
      }
      assert.deepEqual(after[2].data, params[2].data);
    }
    tf.dispose([...Object.values(whole), ...together, ...single.flatMap((x) => Object.values(x))]);
  },
);

gpuTest("an arena that cannot be bound whole is stepped in windows, with the same result bit for bit", async () => {
  const { offsets, size } = layout(), params = shapes.map((shape, i) => values(shape, i));
  const moments = { m: values([size], 20, 0.1), v: { data: new Float32Array(size).fill(0.01), shape: [size] } };
  const rates = {
    beta1: 0.9,
    beta2: 0.98,
    eps: 1e-8,
    weightDecay: 0.1,
    clipScale: 0.7,
    correction1: 0.1,
    correction2: 0.02,
  };
  const step = async (limit?: number) => {
    const tensors = tensorsOf({ ...Object.fromEntries(params.map((x, i) => [`param${i}`, x])), ...moments });
    const { grad } = tensorsOf({ grad: values([size], 22) });
    using dispatches = new DispatchCount();
    limitBindings(limit);
    try {
      tf.dispose(
        call("MgpoAdamWAll", { ...tensors, grad }, { ...rates, offsets, lr: offsets.map((_, i) => 0.01 * (i + 1)) }),
      );
    } finally {
      limitBindings();
    }
    const { count } = dispatches, after = await read(Object.values(tensors));
    tf.dispose([grad, ...Object.values(tensors)]);
    return { count, after };
  };
  const whole = await step(), windowed = await step(4 * 4 * SHARE);
  assert.equal(whole.count, 1);
  assert.ok(windowed.count > 2);
  assert.deepEqual(windowed.after, whole.after);
});

gpuTest("lists that do not fit their arena are refused by name", async () => {
  const x = values([300], 1);
  await assert.rejects(
    run("MgpoFlatten", { x0: x }, { offsets: [0], size: 256 }),
    /x0 \[300\] does not fit at .* of 256/,
  );
  await assert.rejects(run("MgpoFlatten", { x0: x, x1: x }, { offsets: [0, 256], size: 1024 }), /x0 .* does not fit/);
  await assert.rejects(run("MgpoFlatten", { x0: x }, { offsets: [4], size: 1024 }), /offsets\[0\] = 4/);
  await assert.rejects(run("MgpoFlatten", { x0: x }, { offsets: [0, 512], size: 1024 }), /x1 is missing/);
  await assert.rejects(run("MgpoFlatten", { x0: x }, { offsets: [NaN], size: 1024 }), /list of finite numbers/);
});

/** Gradients of a step for some of the parameters. */
function gradients(params: ReadonlyMap<string, tf.Variable>, step: number, keep = (_: string) => true) {
  const chosen = [...params].filter(([name]) => keep(name));
  return new Map(
    chosen.map(([name, { shape }], i) => [name, tf.tensor(values(shape, 100 * step + i).data, shape) as tf.Tensor]),
  );
}
const numbers = async (params: ReadonlyMap<string, tf.Variable>) =>
  await Promise.all([...params.values()].map((x) => x.data<"float32">()));

gpuTest(
  "AdamW on the miniature: a handful of dispatches a step; weights and moments are those of one by one",
  async () => {
    const policy = await loadPolicy(), params = new Map([...policy.parameters] as [string, tf.Variable][]);
    const copies = new Map([...params].map(([name, x]) => [name, tf.tidy(() => tf.variable(tf.add(x, 0)))]));
    const zeros = () => new Map([...params].map(([name, x]) => [name, tf.tidy(() => tf.variable(tf.zeros(x.shape)))]));
    const [ms, vs] = [zeros(), zeros()], steps = new Map([...params.keys()].map((name) => [name, 0]));
    const learningRateScale = (name: string) => name.startsWith("visual.") ? 0.1 : 1;
    const optimizer = new AdamW(params, { weightDecay: 0.01, maxGradNorm: Infinity, learningRateScale });
    assert.ok(params.size > 80, `${params.size} parameters`);
    const held: number[] = [];
    for (let step = 1; step <= 3; step++) {
      // A text-only step has no gradient for the tower.
      const grads = gradients(params, step, (name) => step !== 2 || !name.startsWith("visual."));
      {
        using dispatches = new DispatchCount();
        await optimizer.step(grads, 1e-3);
        assert.equal(dispatches.count, 3, "partial sums of squares, their total, AdamW");
      }
      const betas = { beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.01, clipScale: 1 };
      const now = { ...betas, correction1: 1 - 0.9 ** step, correction2: 1 - 0.95 ** step };
      for (const [name, grad] of grads) {
        const slot = { param: copies.get(name)!, m: ms.get(name)!, v: vs.get(name)! };
        applyAdamW(slot, grad, { ...now, lr: 1e-3 * learningRateScale(name) });
        steps.set(name, step);
      }
      tf.dispose([...grads.values()]);
      held.push(tf.memory().numTensors);
    }
    assert.equal(held[2], held[0]);
    assert.deepEqual(await numbers(params), await numbers(copies));
    const state = await optimizer.state();
    for (const name of params.keys()) {
      assert.deepEqual(state.get(`m.${name}`), await ms.get(name)!.data(), name);
      assert.deepEqual(state.get(`v.${name}`), await vs.get(name)!.data(), name);
    }
    optimizer.dispose();
    tf.dispose([copies, ms, vs].flatMap((map) => [...map.values()]));
    policy.dispose();
  },
);

/** Parameters that fill more than one arena, and one that stands alone. */
function manyParameters(): Map<string, tf.Variable> {
  const sizes = [5, ...new Array(17).fill(1 << 18), (1 << 18) + 1, 3];
  return new Map(sizes.map((size, i) => [`p${i}`, tf.tidy(() => tf.variable(tf.sin(tf.range(0, size))))]));
}

gpuTest("AdamW over several arenas: the norm is that of all gradients, and clipping follows it", async () => {
  const params = manyParameters(), grads = new Map([...params].map(([name, { shape }]) => [name, tf.fill(shape, 0.5)]));
  const before = await numbers(params), optimizer = new AdamW(params, { betas: [0, 0], eps: 1, maxGradNorm: 100 });
  const { gradNorm } = await optimizer.step(grads, 1);
  const total = [...params.values()].reduce((sum, { size }) => sum + size, 0), norm = 0.5 * Math.sqrt(total);
  assert.ok(Math.abs(gradNorm / norm - 1) < 1e-6, `norm ${gradNorm}, expected ${norm}`);
  // Without memory the step is g / (|g| + eps), g clipped.
  const g = 0.5 * 100 / norm, step = g / (g + 1);
  const after = await numbers(params);
  after.forEach((values, i) => {
    for (let k = 0; k < values.length; k++) {
      if (!(Math.abs(before[i][k] - step - values[k]) <= 1e-6)) assert.fail(`p${i}[${k}] is ${values[k]}`);
    }
  });
  optimizer.dispose();
  tf.dispose([...params.values(), ...grads.values()]);
});

gpuTest("AdamW goes on from a saved state bit for bit on WebGPU, and without the kernels within 1e-6", async () => {
  assert.ok(hasFused("MgpoAdamWAll"));
  const train = async (change: "none" | "reload" | "plain") => {
    const variable = (shape: number[], i: number) => tf.tidy(() => tf.variable(tensorsOf({ x: values(shape, i) }).x));
    // Plain tfjs cannot sum what is empty.
    const params = new Map(shapes.filter(sizeOf).map((shape, i) => [`p${i}`, variable(shape, i)]));
    let optimizer = new AdamW(params, { weightDecay: 0.1, eps: 1e-3 });
    for (let step = 0; step < 4; step++) {
      const grads = gradients(params, step, (name) => name !== `p${step}`);
      await optimizer.step(grads, 0.05);
      tf.dispose([...grads.values()]);
      if (step !== 1) continue;
      if (change === "plain") useKernels("plain");
      if (change !== "reload") continue;
      const state = await optimizer.state();
      optimizer.dispose();
      optimizer = new AdamW(params, { weightDecay: 0.1, eps: 1e-3 });
      optimizer.load(state);
    }
    useKernels("fused");
    const weights = await numbers(params), state = await optimizer.state();
    optimizer.dispose();
    tf.dispose([...params.values()]);
    return { weights, state: [...state.values()] };
  };
  const start = tf.memory().numTensors, whole = await train("none");
  assert.deepEqual(await train("reload"), whole);
  const plain = await train("plain");
  for (const [i, values] of [...whole.weights, ...whole.state].entries()) {
    [...plain.weights, ...plain.state][i].forEach((x, k) => assert.ok(Math.abs(x - values[k]) <= 1e-6, `${i}[${k}]`));
  }
  assert.equal(tf.memory().numTensors, start);
});
