import assert from "node:assert/strict";
import { close, gpuTest, integers, type Plain, run, values } from "./testing.ts";

/** Outputs and gradient in float64. */
function plain(
  { logits, target, suppress, dlogprob, dentropy }: Record<string, Plain>,
  temperature: number,
) {
  const [rows, vocabulary] = logits.shape, dlogits = new Float64Array(rows * vocabulary);
  const [logprob, entropy, lse] = [0, 1, 2].map(() => new Float64Array(rows));
  for (let i = 0; i < rows; i++) {
    const z = Array.from(
      { length: vocabulary },
      (_, j) => (logits.data[i * vocabulary + j] + (suppress?.data[j] ?? 0)) / temperature,
    );
    const top = Math.max(...z), t = target.data[i];
    lse[i] = top + Math.log(z.reduce((sum, value) => sum + Math.exp(value - top), 0));
    const log = z.map((value) => value - lse[i]);
    entropy[i] = log.reduce((sum, l) => sum - (l < -1e20 ? 0 : Math.exp(l) * l), 0);
    logprob[i] = t < 0 ? 0 : log[t];
    const slope = t < 0 ? 0 : dlogprob.data[i];
    for (let j = 0; j < vocabulary; j++) {
      const p = Math.exp(log[j]), pull = p === 0 ? 0 : dentropy.data[i] * p * (log[j] + entropy[i]);
      dlogits[i * vocabulary + j] = (slope * ((t === j ? 1 : 0) - p) - pull) / temperature;
    }
  }
  return { logprob, entropy, lse, dlogits };
}

for (const [rows, vocabulary] of [[1, 1], [3, 2], [5, 85], [67, 85], [4, 1031], [2, 9001]]) {
  gpuTest(`log-probabilities ${rows} × ${vocabulary}: within 1e-6 of float64, gradients within 3e-6`, async () => {
    for (const masked of [false, true]) {
      const target = integers(Array.from({ length: rows }, (_, i) => i === 3 ? -1 : (i * 5 + 1) % vocabulary));
      const suppressed = Float32Array.from(
        { length: vocabulary },
        (_, j) => masked && j % 3 === 2 && !target.data.includes(j) ? -1e30 : 0,
      );
      const suppress = { data: suppressed, shape: [vocabulary] };
      const inputs = { logits: values([rows, vocabulary], 1, 6), target, ...(masked ? { suppress } : {}) };
      for (const temperature of [1, 0.7]) {
        const grads = { dlogprob: values([rows], 2), dentropy: values([rows], 3) };
        const expected = plain({ ...inputs, ...grads }, temperature);
        const [logprob, entropy, lse] = await run("MgpoLogSoftmaxGather", inputs, { temperature });
        close(logprob, expected.logprob, [rows], 1e-6);
        close(entropy, expected.entropy, [rows], 1e-6);
        close(lse, expected.lse, [rows], 1e-6);
        const [dlogits] = await run("MgpoLogSoftmaxGatherGrad", { ...inputs, lse, entropy, ...grads }, { temperature });
        close(dlogits, expected.dlogits, [rows, vocabulary], 3e-6);
      }
    }
  });
}

gpuTest("log-probabilities: suppressed tokens get gradient 0, NaN is not hidden, bad inputs are named", async () => {
  const logits = values([1, 6], 1), target = integers([2]), temperature = 1;
  const suppress = { data: Float32Array.from([0, -Infinity, 0, -1e30, 0, 0]), shape: [6] };
  const [logprob, entropy, lse] = await run("MgpoLogSoftmaxGather", { logits, target, suppress }, { temperature });
  assert.ok([logprob, entropy, lse].every((x) => Number.isFinite(x.data[0])));
  const one = { data: Float32Array.of(1), shape: [1] };
  const inputs = { logits, target, suppress, lse, entropy, dlogprob: one, dentropy: one };
  const [dlogits] = await run("MgpoLogSoftmaxGatherGrad", inputs, { temperature });
  assert.ok(dlogits.data.every(Number.isFinite));
  assert.equal(Math.abs(dlogits.data[1]) + Math.abs(dlogits.data[3]), 0);
  logits.data[4] = NaN;
  assert.ok(Number.isNaN((await run("MgpoLogSoftmaxGather", { logits, target }, { temperature }))[0].data[0]));
  await assert.rejects(
    run("MgpoLogSoftmaxGather", { logits, target: integers([6]) }, { temperature }),
    /target\[0\] is 6/,
  );
  await assert.rejects(run("MgpoLogSoftmaxGather", { logits, target }, { temperature: 0 }), /temperature/);
});
