import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { Trainer } from "../mgpo.ts";
import { RandomStream } from "../random.ts";
import { loadPolicy } from "./load.ts";
import { type Kernels, useKernels } from "./ops.ts";
import { packShared } from "./packing.ts";
import { Picture } from "./picture.ts";
import type { LogProbOptions, Sequence } from "./policy.ts";
import type { QwenPolicy } from "./qwen.ts";
import { recomputed } from "./recompute.ts";

const adapter = await navigator.gpu?.requestAdapter();
if (!adapter) console.log("no WebGPU adapter on this machine: the tests of recomputing on WebGPU are skipped");
const backends = adapter ? ["wasm", "webgpu"] as const : ["wasm"] as const;
const open = () => loadPolicy(new URL("../../fixtures/goldens/models/tiny/", import.meta.url), { maxPixels: 20000 });

/** Two groups of three rollouts; those of a group begin with the same picture and question. */
function rollouts(policy: QwenPolicy): { sequences: Sequence[]; masks: number[][] } {
  const sequences = [0, 1].flatMap((group) => {
    const random = new RandomStream(1, "recompute_test", group), [width, height] = [[90, 60], [60, 90]][group];
    const pixels = Uint8Array.from({ length: width * height * 3 }, () => random.int(256));
    const images = [policy.prepareImage(Picture.fromRgb(pixels, width, height))];
    const ask = [{ type: "image" } as const, { type: "text", text: "How many windows?" } as const];
    const prompt = policy.encodeChat([{ role: "user", content: ask }], images);
    return [5, 9, 2].map((n) => ({ ids: [...prompt, ...Array.from({ length: n }, () => random.int(400))], images }));
  });
  const prompts = sequences.map((_, i) => sequences[i - i % 3].ids.length - 5);
  return { sequences, masks: sequences.map(({ ids }, i) => ids.map((_, t) => Number(t >= prompts[i]))) };
}

/** Loss and gradients by parameter name, and the most bytes that were alive at once. */
async function gradients(policy: QwenPolicy, options: LogProbOptions, trained: (name: string) => boolean) {
  const { sequences, masks } = rollouts(policy);
  const parameters = [...policy.parameters].filter(([name]) => trained(name));
  let found!: ReturnType<typeof tf.variableGrads>;
  const { peakBytes } = await tf.profile(() => {
    found = tf.variableGrads(() => {
      const { logprobs, entropy } = policy.logProbs(sequences, masks, options);
      return tf.add(tf.sum(logprobs), tf.sum(tf.mul(entropy, 0.1))) as tf.Scalar;
    }, parameters.map(([, variable]) => variable));
    return found.value;
  });
  const values = new Map<string, Float32Array>();
  for (const [name, variable] of parameters) {
    const grad = found.grads[variable.name];
    if (grad) values.set(name, Float32Array.from(await grad.data()));
  }
  const loss = (await found.value.data())[0];
  tf.dispose([found.value, ...Object.values(found.grads)]);
  return { loss, values, peakBytes };
}

const tower = (name: string) => name.startsWith("visual.");
const cases: { name: string; options: LogProbOptions; kernels?: Kernels; trained: (name: string) => boolean }[] = [
  { name: "frozen tower", options: {}, trained: (name) => !tower(name) },
  { name: "trained tower", options: { trainVision: true }, trained: () => true },
  { name: "no shared prefix", options: { sharePrefix: false }, trained: (name) => !tower(name) },
  { name: "plain kernels", options: {}, kernels: "plain", trained: (name) => !tower(name) },
  {
    name: "frozen weights",
    options: { temperature: 0.7 },
    trained: (name) => /layers\.1\.(mlp|self_attn\.k)/.test(name),
  },
];

for (const backend of backends) {
  Deno.test(`on ${backend}: gradients of recomputed blocks are the plain ones within 1e-6, at a lower peak`, async () => {
    await chooseBackend(backend);
    const policy = await open(), { sequences } = rollouts(policy);
    assert.ok(packShared(policy.config, sequences, true).packed.keys, "the blocks must see keys of other pieces");
    for (const { name, options, kernels = "fused", trained } of cases) {
      // Hundreds of small shaders; wasm has shown it.
      if (backend === "webgpu" && kernels === "plain") continue;
      useKernels(kernels);
      const plain = await gradients(policy, options, trained);
      const again = await gradients(policy, { ...options, gradientCheckpointing: true }, trained);
      useKernels("fused");
      assert.equal(again.loss, plain.loss, name);
      assert.deepEqual([...again.values.keys()], [...plain.values.keys()]);
      assert.ok(plain.values.size >= 5);
      for (const [parameter, values] of plain.values) {
        const size = values.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
        again.values.get(parameter)!.forEach((v, i) =>
          assert.ok(Math.abs(v - values[i]) <= 1e-6 * size, `${name}: ${parameter}[${i}] is ${v}, plain ${values[i]}`)
        );
      }
      assert.ok(again.peakBytes < plain.peakBytes, `${name}: ${again.peakBytes} bytes, plain ${plain.peakBytes}`);
    }
    policy.dispose();
  });

  Deno.test(`on ${backend}: updates with recomputed blocks change the weights as plain ones do and leak nothing`, async () => {
    await chooseBackend(backend);
    const run = async (gradientCheckpointing: boolean) => {
      const policy = await open(),
        trainer = new Trainer(policy, { gradientCheckpointing, learningRate: 1e-3, eps: 1e-3 });
      const { sequences, masks } = rollouts(policy), counts: string[] = [];
      for (let step = 0; step < 3; step++) {
        await trainer.supervised(sequences.map((sequence, i) => ({ sequence, mask: masks[i] })));
        policy.releaseFeatures();
        const { numTensors, numDataBuffers, numBytes } = tf.memory();
        counts.push(`${numTensors} tensors, ${numDataBuffers} buffers, ${numBytes} bytes`);
      }
      assert.equal(counts[2], counts[1]);
      const weights = await Promise.all(
        [...policy.parameters.values()].map(async (w) => [...await w.data<"float32">()]),
      );
      trainer.dispose();
      policy.dispose();
      return weights.flat();
    };
    const plain = await run(false);
    (await run(true)).forEach((w, i) =>
      assert.ok(Math.abs(w - plain[i]) <= 1e-6, `weight ${i}: ${w}, plain ${plain[i]}`)
    );
  });
}

Deno.test("the peak grows with the depth by a block's input, not by its inside", async () => {
  await chooseBackend("wasm");
  const peak = async (recompute: boolean, depth: number) => {
    const w = tf.variable(tf.ones([64, 64])) as tf.Variable<tf.Rank.R2>, x = tf.ones([64, 64]) as tf.Tensor2D;
    const inside = (x: tf.Tensor2D) => {
      let y = x;
      for (let i = 0; i < 8; i++) y = tf.tanh(tf.matMul(y, w));
      return y;
    };
    const { peakBytes } = await tf.profile(() => {
      const { value, grads } = tf.variableGrads(() => {
        let y = x;
        for (let i = 0; i < depth; i++) {
          y = recompute ? recomputed(y, { weights: [w], constants: [] }, inside) : inside(y);
        }
        return tf.sum(y) as tf.Scalar;
      }, [w]);
      tf.dispose([value, grads]);
      return tf.scalar(0);
    });
    tf.dispose([w, x]);
    return peakBytes;
  };
  const bytes = 4 * 64 * 64;
  const more = async (recompute: boolean) => (await peak(recompute, 12) - await peak(recompute, 6)) / 6 / bytes;
  const recomputing = await more(true), keeping = await more(false);
  assert.ok(keeping >= 16, `plain: ${keeping} activations a block`);
  assert.ok(recomputing <= 3, `recomputed: ${recomputing} activations a block`);
});
