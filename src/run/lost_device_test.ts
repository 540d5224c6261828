import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { tf, tfwebgpu } from "../deps.ts";
import { chooseBackend } from "../gpu/backend.ts";
import { MachineError } from "../gpu/device_errors.ts";
import { loadPolicy } from "../policy/load.ts";
import { loadTraining } from "./checkpoint.ts";
import { isTiming } from "./metrics.ts";
import { Progress } from "./progress.ts";
import { runTraining } from "./training_run.ts";

const started = await chooseBackend("webgpu", { onLost: () => {} }).then(() => true, () => false);
const golden = fileURLToPath(new URL("../../fixtures/goldens/models/tiny", import.meta.url));
const options =
  "--method sft --max-pixels 3136 --prompts 2 --steps 3 --eval-every 0 --final-items 0 --checkpoint-every 1 --max-new-tokens 3,2";

/** Trains on WebGPU; `at` is a text of a line of output at which `action` is called. */
async function train(folder: string, extra: string[] = [], at?: string, action = () => {}): Promise<string> {
  let out = "";
  const write = (text: string) => {
    out += text;
    if (at && text.includes(at)) action();
  };
  const args = ["--policy", golden, "--backend", "webgpu", ...options.split(" "), "--run", folder, ...extra];
  assert.equal(await runTraining(args, new Progress({ isTerminal: false, write })), 0);
  return out;
}

/** What is written of each step, but for timings, and memory: what a broken step leaves stays in this one process. */
async function metrics(folder: string): Promise<unknown[]> {
  const lines = (await Deno.readTextFile(`${folder}/metrics.jsonl`)).trimEnd().split("\n");
  return lines.map((line) =>
    Object.entries(JSON.parse(line)).filter(([name]) => !isTiming(name) && !name.startsWith("memory/"))
  );
}

/** Gives the backend a new device, as a new process would. */
async function restart(): Promise<void> {
  const { factory } = tf.engine().registryFactory.webgpu;
  tf.removeBackend("webgpu");
  tf.registerBackend("webgpu", factory, 3);
  await tf.setBackend("webgpu");
}

/** Loses the device at one of the next submissions. */
function loseDevice(submissions: number): void {
  const { device } = tf.backend() as InstanceType<typeof tfwebgpu.WebGPUBackend>, { queue } = device;
  const submit = queue.submit.bind(queue);
  queue.submit = (commands) => {
    if (submissions-- === 0) device.destroy();
    submit(commands);
  };
}

Deno.test({
  name: "a device that is lost in the middle of a run ends it with one error; the run goes on as if undisturbed" +
    (started ? "" : " (skipped: no WebGPU adapter)"),
  ignore: !started,
  fn: async () => {
    const root = await Deno.makeTempDir(), whole = `${root}/whole`, parts = `${root}/parts`;
    const breaks = async (extra: string[], at: string, submissions: number) => {
      let broken: unknown;
      await train(parts, extra, at, () => loseDevice(submissions)).catch((error) => broken = error);
      assert.ok(broken instanceof MachineError, String(broken));
      assert.match(broken.message, /^the GPU device was lost: .*; nothing computed after that was written, /);
      assert.ok(broken.message.includes("the checkpoint of step 1 is intact; go on with: deno task train --policy "));
      assert.match(broken.message, / --run \S+parts --resume$/);
      await restart();
      assert.equal((await loadTraining(`${parts}/checkpoints/step-1`)).step, 1);
    };
    try {
      await train(whole);
      // While the checkpoint of step 2 is read back, then within step 2.
      await breaks([], "step 2/3", 3);
      assert.deepEqual(await metrics(parts), (await metrics(whole)).slice(0, 2));
      await breaks(["--resume"], "going on after step 1 of 3", 5);
      assert.deepEqual(await metrics(parts), (await metrics(whole)).slice(0, 1));
      (await loadPolicy(`${parts}/checkpoints/step-1`)).dispose();

      assert.match(await train(parts, ["--resume"]), /going on after step 1 of 3/);
      assert.deepEqual(await metrics(parts), await metrics(whole));
      const file = "checkpoints/step-3/model.safetensors";
      assert.deepEqual(await Deno.readFile(`${parts}/${file}`), await Deno.readFile(`${whole}/${file}`));
    } finally {
      await Deno.remove(root, { recursive: true });
    }
  },
});
