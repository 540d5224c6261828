import assert from "node:assert/strict";
import { signs } from "../data/signs.ts";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { DecodeEngine } from "../gpu/decode/engine.ts";
import { Trainer } from "../mgpo.ts";
import { rollout } from "../rollout.ts";
import { loadPolicy } from "./load.ts";
import { useKernels } from "./ops.ts";

const adapter = await navigator.gpu?.requestAdapter();
if (adapter) await chooseBackend("webgpu");
else console.log("no WebGPU adapter on this machine: the tests of the policy on WebGPU are skipped");

Deno.test({
  name: "on WebGPU: rollouts by the recorded plan equal those of plain operations; updates keep memory flat",
  ignore: !adapter,
  fn: async () => {
    const policy = await loadPolicy(), world = signs({ split: "heldout" });
    const samples = await Promise.all([0, 1].map((i) => world.get(i)));
    const options = { ...world.hints, groupSize: 4, maxNewTokens: [14, 8], seed: 3 };
    const play = () => rollout(policy, samples, options);
    const fused = (await play()).trajectories;
    useKernels("plain");
    const plain = (await play()).trajectories;
    useKernels("fused");
    fused.forEach((t, i) => {
      assert.deepEqual(t.ids, plain[i].ids, `conversation ${i}`);
      t.logprobs.forEach((p, n) => assert.ok(Math.abs(p - plain[i].logprobs[n]) < 1e-4));
    });
    const trainer = new Trainer(policy, { learningRate: 1e-4 }), memory: string[] = [];
    for (let step = 0; step < 3; step++) {
      const update = await trainer.update(fused, fused.map((_, i) => i % 2));
      if (step === 0) assert.ok(update["rollout/logprob_diff_max"] < 1e-4);
      assert.ok(Number.isFinite(update.policy_loss) && update.grad_norm > 0);
      policy.releaseFeatures();
      const { numTensors, numBytes } = tf.memory();
      memory.push(`${numTensors} tensors, ${numBytes} bytes`);
    }
    assert.equal(memory[2], memory[1]);
    // The plan reads the weights where they are: after updates it must follow them.
    const after = (await play()).trajectories;
    const masks = after.map((t) => t.assistantMask);
    const { logprobs, entropy } = policy.logProbs(after, masks);
    const values = await logprobs.data(), width = logprobs.shape[1];
    after.forEach((t, i) => {
      const recorded = t.logprobs.filter((_, n) => t.assistantMask[n] === 1);
      recorded.forEach((p, n) => assert.ok(Math.abs(p - values[i * width + n]) < 1e-4, `conversation ${i} token ${n}`));
    });
    tf.dispose([logprobs, entropy]);
    trainer.dispose();
    policy.dispose();
  },
});

Deno.test({
  name: "on WebGPU: where the generation engine cannot run, one line says why, once, and the host decodes the same",
  ignore: !adapter,
  fn: async () => {
    const policy = await loadPolicy(), { unsupported } = DecodeEngine, { warn } = console, lines: string[] = [];
    const rows = ["which letter is on the red sign?", "where is it?"].map((text) => ({
      ids: policy.encode(text),
      images: [],
    }));
    const generate = () => policy.generate(rows, { maxNewTokens: 3, temperature: 0, stopTokens: [] });
    const want = await generate();
    console.warn = (line: string) => lines.push(line);
    DecodeEngine.unsupported = () => "heads of 4096 are too wide for the adapter";
    try {
      for (let i = 0; i < 2; i++) assert.deepEqual((await generate()).map((c) => c.ids), want.map((c) => c.ids));
    } finally {
      console.warn = warn;
      DecodeEngine.unsupported = unsupported;
      policy.dispose();
    }
    assert.equal(lines.length, 1);
    assert.match(lines[0], /^tiny: generation takes the slow way.*heads of 4096 are too wide/);
  },
});

Deno.test({
  name:
    "on WebGPU: a nucleus is drawn by the recorded plan, or by the host, with one line, where its logits cannot be bound",
  ignore: !adapter,
  fn: async () => {
    const policy = await loadPolicy(), { unsupported } = DecodeEngine, { warn } = console, lines: string[] = [];
    const { generate: decode } = DecodeEngine.prototype, rows = [{ ids: policy.encode("where is it?"), images: [] }];
    const options = { maxNewTokens: 3, temperature: 1, topP: 0.9, seed: 2, stopTokens: [] };
    let decoded = 0;
    DecodeEngine.prototype.generate = function (input) {
      decoded++;
      return decode.call(this, input);
    };
    console.warn = (line: string) => lines.push(line);
    try {
      const [want] = await policy.generate(rows, options);
      assert.deepEqual([decoded, lines], [1, []]);
      DecodeEngine.unsupported = (config, nucleus) =>
        nucleus ? "the logits of a nucleus (topP < 1) take too much" : unsupported(config);
      for (let i = 0; i < 2; i++) assert.deepEqual((await policy.generate(rows, options))[0].ids, want.ids);
      assert.equal(decoded, 1);
      for (const more of [{ topP: 1 }, { temperature: 0 }]) await policy.generate(rows, { ...options, ...more });
      assert.equal(decoded, 3);
    } finally {
      console.warn = warn;
      DecodeEngine.unsupported = unsupported;
      DecodeEngine.prototype.generate = decode;
      policy.dispose();
    }
    assert.equal(lines.length, 1);
    assert.match(lines[0], /^tiny: generation takes the slow way.*the logits of a nucleus/);
  },
});
