import assert from "node:assert/strict";
import { checkGradient, close, integers, type Plain, ready, run, values } from "./testing.ts";

await ready();

const cases = [[1, 1], [3, 2], [5, 85], [4, 1031], [2, 4096]] as const;

/** Log-probability, entropy and log-sum-exp per row in float64. */
function plain(logits: ArrayLike<number>, target: Int32Array, suppress: ArrayLike<number>, temperature: number) {
  const vocabulary = suppress.length;
  const rows = Array.from(target, (token, i) => {
    const z = Array.from(suppress, (shift, j) => (logits[i * vocabulary + j] + shift) / temperature);
    const top = Math.max(...z);
    const total = z.reduce((sum, value) => sum + Math.exp(value - top), 0);
    const lse = top + Math.log(total);
    const entropy = z.reduce((sum, value) => sum - (value < -1e20 ? 0 : Math.exp(value - lse) * (value - lse)), 0);
    return { logprob: token < 0 ? 0 : z[token] - lse, entropy, lse };
  });
  return {
    logprob: rows.map((row) => row.logprob),
    entropy: rows.map((row) => row.entropy),
    lse: rows.map((row) => row.lse),
  };
}

function given(rows: number, vocabulary: number, masked: boolean) {
  const target = integers(Array.from({ length: rows }, (_, i) => (i * 5 + 1) % vocabulary));
  if (rows > 3) target.data[3] = -1;
  const suppress: Plain = {
    data: Float32Array.from(
      { length: vocabulary },
      (_, j) => masked && j % 3 === 2 && !target.data.includes(j) ? -1e30 : 0,
    ),
    shape: [vocabulary],
  };
  return { logits: values([rows, vocabulary], 1, 6), target, ...(masked ? { suppress } : {}), mask: suppress.data };
}

for (const [rows, vocabulary] of cases) {
  for (const masked of [false, true]) {
    const title = `${rows} × ${vocabulary}${masked ? ", some suppressed" : ""}`;
    Deno.test(`log-probabilities ${title}: within 1e-6 of float64, gradients within 1e-4 of differences`, () => {
      const { mask, ...inputs } = given(rows, vocabulary, masked);
      for (const temperature of [1, 0.7]) {
        const expected = plain(inputs.logits.data, inputs.target.data, mask, temperature);
        const [logprob, entropy, lse] = run("MgpoLogSoftmaxGather", inputs, { temperature });
        close(logprob, expected.logprob, [rows], 1e-6);
        close(entropy, expected.entropy, [rows], 1e-6);
        close(lse, expected.lse, [rows], 1e-6);
        const [dlogprob, dentropy] = [values([rows], 2), values([rows], 3)];
        const all = { ...inputs, lse, entropy, dlogprob, dentropy };
        const [dlogits] = run("MgpoLogSoftmaxGatherGrad", all, { temperature });
        const loss = (data: Float64Array): number => {
          const out = plain(data, inputs.target.data, mask, temperature);
          return out.logprob.reduce((sum, x, i) => sum + x * dlogprob.data[i] + out.entropy[i] * dentropy.data[i], 0);
        };
        checkGradient(inputs.logits, dlogits, loss, 1e-4);
        const total = [...dlogits.data].reduce((sum, x) => sum + x, 0);
        assert.ok(Math.abs(total) < 1e-5, "a gradient of softmax sums to 0");
      }
    });
  }
}

Deno.test("log-probabilities: suppressed tokens get gradient 0, −Infinity works too, NaN is not hidden", () => {
  const logits = values([1, 6], 1);
  const suppress = { data: Float32Array.from([0, -Infinity, 0, -1e30, 0, 0]), shape: [6] };
  const target = integers([2]);
  const [logprob, entropy, lse] = run("MgpoLogSoftmaxGather", { logits, target, suppress }, { temperature: 1 });
  assert.ok([logprob, entropy, lse].every((x) => Number.isFinite(x.data[0])));
  const ones = { data: Float32Array.of(1), shape: [1] };
  const inputs = { logits, target, suppress, lse, entropy, dlogprob: ones, dentropy: ones };
  const [dlogits] = run("MgpoLogSoftmaxGatherGrad", inputs, { temperature: 1 });
  assert.ok(dlogits.data.every(Number.isFinite));
  assert.equal(Math.abs(dlogits.data[1]) + Math.abs(dlogits.data[3]), 0);
  logits.data[4] = NaN;
  assert.ok(Number.isNaN(run("MgpoLogSoftmaxGather", { logits, target }, { temperature: 1 })[0].data[0]));
});

Deno.test("log-probabilities name a bad target and a bad temperature", () => {
  const logits = values([2, 4], 1);
  const attrs = { temperature: 1 };
  assert.throws(() => run("MgpoLogSoftmaxGather", { logits, target: integers([1, 4]) }, attrs), /target\[1\] is 4/);
  assert.throws(
    () => run("MgpoLogSoftmaxGather", { logits, target: integers([1, 3]) }, { temperature: 0 }),
    /temperature/,
  );
});
