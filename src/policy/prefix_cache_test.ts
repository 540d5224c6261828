import assert from "node:assert/strict";
import type { Sample } from "../data/dataset.ts";
import { signs } from "../data/signs.ts";
import { tf } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { rollout, type RolloutOptions, type Trajectory } from "../rollout.ts";
import { loadPolicy } from "./load.ts";
import { useKernels } from "./ops.ts";
import type { Completion, GenerateOptions, Policy, Sequence } from "./policy.ts";
import type { QwenPolicy } from "./qwen.ts";
import { continued, goldenPolicy, noise, question, words } from "./testing.ts";

const adapter = await navigator.gpu?.requestAdapter();
if (!adapter) console.log("no WebGPU adapter on this machine: the prefix cache is tested on wasm alone");

/** Each way to decode: in place, by growing tensors, by recorded plans. */
type Way = readonly ["wasm" | "webgpu", "fused" | "plain"];
const ways: readonly Way[] = [["wasm", "fused"], ["wasm", "plain"], ["webgpu", "fused"]];

function onEachWay(name: string, check: () => Promise<void>, only: readonly Way[] = ways): void {
  for (const [backend, kernels] of only) {
    Deno.test({
      name: `${name} (${backend}, ${kernels})`,
      ignore: backend === "webgpu" && !adapter,
      fn: async () => {
        await chooseBackend(backend);
        useKernels(kernels);
        try {
          await check();
        } finally {
          useKernels("fused");
        }
      },
    });
  }
}

/** Runs `f` and gives the tokens of each prefill. */
async function prefills(policy: QwenPolicy, f: () => Promise<unknown>): Promise<number[]> {
  const seen: number[] = [], { hidden } = policy;
  policy.hidden = (...args) => {
    const [{ ids, lengths, spareFeatures }] = args;
    // A bucket's padding is the last piece.
    seen.push(ids.length - (spareFeatures === undefined ? 0 : lengths.at(-1)!));
    return hidden.apply(policy, args);
  };
  await f();
  policy.hidden = hidden;
  return seen;
}

function same(got: readonly Completion[], want: readonly Completion[]): void {
  got.forEach(({ ids, logprobs, finish }, r) => {
    assert.deepEqual([ids, finish], [want[r].ids, want[r].finish], `row ${r}`);
    logprobs.forEach((p, t) => assert.ok(Math.abs(p - want[r].logprobs[t]) < 1e-4, `row ${r}, token ${t}: ${p}`));
  });
}

/** Conversations with a cache and without one, and the tokens that each computed before decoding. */
async function play(policy: QwenPolicy, samples: readonly Sample[], options: RolloutOptions) {
  const trajectories: Trajectory[][] = [];
  const run = async () => void trajectories.push((await rollout(policy, samples, options)).trajectories);
  const cached = await prefills(policy, run);
  (policy as Policy).createPrefixCache = undefined;
  const whole = await prefills(policy, run);
  delete (policy as Policy).createPrefixCache;
  return { cached, whole, got: trajectories[0], want: trajectories[1] };
}

onEachWay("conversations of two and three turns are the same with a prefix cache", async () => {
  const policy = await loadPolicy(), world = signs({ split: "heldout" });
  const samples = await Promise.all([0, 1, 2].map((i) => world.get(i))), boxes = new Set<boolean>();
  const lengths = new Set<number>();
  // WebGPU compiles a kernel for each shape, so there two cases have to do: all tokens, and a nucleus.
  const cases = [[3, 1, 1], [2, 1.2, 0.8], [2, 0, 1], [3, 1, 0.9]].slice(0, tf.getBackend() === "webgpu" ? 2 : 4);
  for (const [turns, temperature, topP] of cases) {
    const options = { ...world.hints, groupSize: 4, maxNewTokens: [14, 8], turns, temperature, topP, seed: 4 };
    const { cached, whole, got, want } = await play(policy, samples, options);
    got.forEach((t, i) => {
      assert.deepEqual(t.ids, want[i].ids, `conversation ${i}`);
      same(t.turns, want[i].turns);
      for (const turn of t.turns.slice(0, -1)) boxes.add(turn.box !== undefined);
      lengths.add(t.turns[0].ids.length);
    });
    assert.equal(cached.length, turns);
    assert.equal(cached[0], whole[0]);
    for (let turn = 1; turn < turns; turn++) {
      assert.ok(cached[turn] < 0.7 * whole[turn], `turn ${turn} computed ${cached[turn]} of ${whole[turn]} tokens`);
    }
  }
  assert.deepEqual([boxes.size, lengths.size > 1], [2, true]);
  policy.dispose();
});

/** Prompts with and without pictures, two of them equal. */
function prompts(policy: QwenPolicy): Sequence[] {
  const [a, b] = [policy.prepareImage(noise(1, 150, 90)), policy.prepareImage(noise(2, 60, 120))];
  const one = question(policy, "What is it?", [a]);
  return [question(policy, "How many?"), one, question(policy, "And these two?", [b, a]), one];
}

onEachWay("rows that stop early keep their keys, whatever decodes; what was not kept is computed whole", async () => {
  const policy = await goldenPolicy(), first = prompts(policy), [a] = first[1].images;
  for (const sampling of [{ temperature: 0 }, { temperature: 1, seed: 3 }, { temperature: 1, topP: 0.9, seed: 5 }]) {
    const free = await policy.generate(first, { ...sampling, maxNewTokens: 20, stopTokens: [] });
    const options: GenerateOptions = { ...sampling, maxNewTokens: 20, stopTokens: [free[0].ids[2], free[2].ids[17]] };
    const cache = policy.createPrefixCache(), replies = await policy.generate(first, { ...options, cache });
    assert.ok(new Set(replies.map(({ ids }) => ids.length)).size > 1);
    const next = first.map((row, r) =>
      continued(row, [...replies[r].ids, ...question(policy, "Why?", r === 1 ? [a] : []).ids], r === 1 ? [a] : [])
    );
    const changed = { ...next[2], images: [next[2].images[0], { ...a, key: "another" }] };
    const short = { ids: first[1].ids.slice(0, -1), images: first[1].images };
    const rows = [next[3], next[1], changed, next[0], short, next[2]];
    let got: Completion[] = [];
    const seen = await prefills(policy, async () => void (got = await policy.generate(rows, { ...options, cache })));
    const fresh = (row: Sequence, r: number) => row.ids.length - first[r].ids.length - replies[r].ids.length + 1;
    const expected = [[next[3], 3], [next[1], 1], [next[0], 0], [next[2], 2]] as const;
    const kept = expected.reduce((sum, [row, r]) => sum + fresh(row, r), 0);
    assert.deepEqual(seen, [kept + changed.ids.length + short.ids.length]);
    same(got, await policy.generate(rows, options));
    cache.dispose();
  }
  policy.dispose();
}, [...ways, ["webgpu", "plain"]]);

onEachWay("a cache and its policy release every tensor, after a failure too", async () => {
  const before = tf.memory().numTensors, policy = await goldenPolicy(), first = prompts(policy);
  const round = async (failing: number) => {
    const cache = policy.createPrefixCache();
    let call = 0, rows = first;
    try {
      for (; call < 3; call++) {
        const onToken = (tokens: number) => {
          if (call === failing && tokens === 3) throw new Error("stop here");
        };
        const replies = await policy.generate(rows, { maxNewTokens: 5, cache, onToken, keepCache: call < 2 });
        rows = rows.map((row, r) => continued(row, [...replies[r].ids, ...words(policy, r, 6)]));
      }
      assert.equal(failing, 3);
    } catch (error) {
      assert.match(String(error), /stop here/);
      assert.equal(call, failing);
    } finally {
      cache.dispose();
    }
  };
  await round(3);
  const { numTensors } = tf.memory();
  for (const failing of [3, 0, 1, 2, 3]) {
    await round(failing);
    assert.equal(tf.memory().numTensors, numTensors);
  }
  const open = policy.createPrefixCache();
  await policy.generate(first, { maxNewTokens: 4, cache: open });
  const other = await goldenPolicy();
  await assert.rejects(other.generate(first, { maxNewTokens: 1, cache: open }), /of another policy/);
  other.dispose();
  policy.dispose();
  assert.equal(tf.memory().numTensors, before);
});

onEachWay("a call that is too large for one batch keeps all of them", async () => {
  const policy = await goldenPolicy();
  const long = [0, 1, 2].map((i) => ({ ids: words(policy, i, 3500 + 200 * i), images: [] }));
  const rows = [...long, ...prompts(policy), long[2], long[1]], cache = policy.createPrefixCache();
  const options = { maxNewTokens: 3, stopTokens: [], temperature: 0 };
  let replies: Completion[] = [];
  const seen = await prefills(policy, async () => void (replies = await policy.generate(rows, { ...options, cache })));
  assert.equal(seen.length, 2);
  const next = rows.map((row, r) => continued(row, [...replies[r].ids, 5, 6, 7]));
  const second = await prefills(
    policy,
    async () => void (replies = await policy.generate(next, { ...options, cache })),
  );
  assert.deepEqual([second.length, Math.max(...second) <= 4 * next.length], [2, true]);
  same(replies, await policy.generate(next, options));
  policy.dispose();
}, [["wasm", "fused"]]);
