/**
 * What does doing a pass of training (forward, loss, backward) from a recording spare, and how often does training find one?
 *
 * - `passes/webgpu/javascript`: milliseconds of JavaScript of a pass of 96 conversations from a recording, beside the same pass through
 *   the tape of TensorFlow.js with bind groups and uniforms found again. Packing is part of both; what the queue takes to accept
 *   commands is not, because a processor that plays the GPU computes meanwhile.
 * - `passes/webgpu/update`: seconds of the whole update with recordings at the sizes that passes share, beside the tape at sizes that are
 *   rounded up as little as possible: whether it pays on this adapter.
 * - `passes/webgpu/found`: percent of the updates of a training run with default settings that are done from a recording.
 *
 * @module
 */
import { signs } from "../src/data/signs.ts";
import { tf } from "../src/deps.ts";
import { webgpuBackend } from "../src/gpu/decode/memory.ts";
import { PassPlans } from "../src/gpu/pass_plans.ts";
import { Trainer } from "../src/mgpo.ts";
import { loadPolicy } from "../src/policy/load.ts";
import type { QwenPolicy } from "../src/policy/qwen.ts";
import { rollout } from "../src/rollout.ts";
import { train } from "../src/train.ts";
import { type Benchmark, median, type Row } from "./benchmark.ts";
import { onRealGpu } from "./roof.ts";

const PROMPTS = 12, GROUP = 8, ROUNDS = 7;
/** Steps of the run: its default, or fewer where a processor plays the GPU. */
const steps = (): number => onRealGpu() ? 50 : 20;

/** Milliseconds of each pass, but for those in which the queue takes commands. */
function timePasses(policy: QwenPolicy): number[] {
  const { queue } = webgpuBackend()!, submit = queue.submit.bind(queue), gradients = policy.gradients.bind(policy);
  const times: number[] = [];
  let submitting = 0;
  queue.submit = (commands) => {
    const start = performance.now();
    submit(commands);
    submitting += performance.now() - start;
  };
  policy.gradients = (request) => {
    const start = performance.now(), before = submitting, result = gradients(request);
    times.push(performance.now() - start - (submitting - before));
    return result;
  };
  return times;
}

/** The ways of doing an update that are compared. */
const ways = {
  recorded: { enabled: true, sharesSizes: true },
  taped: { enabled: false, sharesSizes: true },
  "taped, least sizes": { enabled: false, sharesSizes: false },
} as const;
type Way = keyof typeof ways;

/** Seconds of whole updates, and milliseconds of JavaScript of their passes, in turns. */
async function compare(plans: PassPlans): Promise<Record<Way, { update: number; script: number }>> {
  const policy = await loadPolicy(), world = signs();
  const samples = await Promise.all(Array.from({ length: PROMPTS }, (_, i) => world.get(i)));
  const hints = { ...world.hints, groupSize: GROUP, maxNewTokens: [14, 8] };
  const { trajectories } = await rollout(policy, samples, hints);
  const trainer = new Trainer(policy, { learningRate: 1e-9 }),
    passes = timePasses(policy),
    names = Object.keys(ways) as Way[];
  const seen = Object.fromEntries(names.map((way) => [way, { update: [] as number[], script: [] as number[] }]));
  for (let round = 0; round < ROUNDS + 2; round++) {
    for (const way of names) {
      Object.assign(plans, ways[way]);
      passes.length = 0;
      const start = performance.now();
      await trainer.update(trajectories, trajectories.map((_, i) => i % 2));
      // The first ones compile, record and fill pools.
      if (round < 2) continue;
      seen[way].update.push((performance.now() - start) / 1000);
      seen[way].script.push(passes.reduce((sum, time) => sum + time, 0));
    }
  }
  trainer.dispose();
  policy.dispose();
  const middle = (way: Way) => ({ update: median(seen[way].update), script: median(seen[way].script) });
  return { recorded: middle("recorded"), taped: middle("taped"), "taped, least sizes": middle("taped, least sizes") };
}

/** The share of a run's updates that were done from recordings. */
async function share(plans: PassPlans, log: (line: string) => void): Promise<number> {
  const policy = await loadPolicy();
  const counts = plans.counts, before = { ...counts };
  let size = 0, bytes = 0;
  for await (const { step } of train(policy, signs(), { steps: steps() })) {
    if (step === steps()) [size, bytes] = [plans.size, plans.bytes];
  }
  policy.dispose();
  const [plain, recorded, replayed] = (["plain", "recorded", "replayed"] as const).map((k) => counts[k] - before[k]);
  log(
    `passes of ${steps()} steps of ${PROMPTS} × ${GROUP}: ${replayed} from recordings, ${recorded} recorded, ${plain} ` +
      `neither; ${size} recordings hold ${(bytes / 2 ** 20).toFixed(0)} MiB in the end`,
  );
  return 100 * replayed / (plain + recorded + replayed);
}

/** Rows `passes/webgpu/…`. */
export const recordedPasses: Benchmark = {
  names: ["passes/webgpu/javascript", "passes/webgpu/update", "passes/webgpu/found"],
  async run(_backend, log): Promise<Row[]> {
    const plans = PassPlans.of(tf.backend())!, { enabled, sharesSizes, after } = plans;
    try {
      plans.after = 0;
      const { recorded, taped, "taped, least sizes": least } = await compare(plans);
      Object.assign(plans, ways.recorded);
      const found = await share(plans, log);
      return [
        {
          ...{ name: "passes/webgpu/javascript", value: recorded.script, unit: "ms", n: ROUNDS },
          ...{ ratio: taped.script / recorded.script, peer: "the same pass through the tape" },
        },
        {
          ...{ name: "passes/webgpu/update", value: recorded.update, unit: "s", n: ROUNDS },
          ...{ ratio: least.update / recorded.update, peer: "the tape, least sizes" },
        },
        { name: "passes/webgpu/found", value: found, unit: "%", n: steps() },
      ];
    } finally {
      Object.assign(plans, { enabled, sharesSizes, after });
      plans.forget();
    }
  },
};
