import assert from "node:assert/strict";
import { tf } from "../deps.ts";
import { ModuleBuilder } from "./module.ts";
import { I32, load } from "./asm.ts";
import { useWasmThreads, wasmKernelNames, wasmThreads } from "./register.ts";
import { withSharedMemory } from "./shared_memory.ts";
import { integers, type Plain, ready, values } from "./testing.ts";
import { ThreadTeam } from "./threads.ts";

type Inputs = Record<string, Plain>;
type Case = [name: string, inputs: Inputs, attrs?: Record<string, unknown>];

/** Integers below `limit`, −1 among them. */
const indices = (count: number, limit: number): Plain =>
  integers(Array.from({ length: count }, (_, i) => (i * 7919 + (i >> 2)) % (limit + 1) - 1));

function* matmuls(): Generator<Case> {
  for (const [m, n, k] of [[1, 1, 1], [7, 65, 3], [64, 131, 257], [151, 9, 40], [1, 521, 33], [203, 16, 5]]) {
    for (const [transposeA, transposeB] of [[false, false], [true, false], [false, true], [true, true]]) {
      const a = values(transposeA ? [k, m] : [m, k], 1), b = values(transposeB ? [n, k] : [k, n], 2);
      yield ["MgpoMatMul", { a, b, ...(n % 2 ? { bias: values([n], 3) } : {}) }, { transposeA, transposeB }];
    }
  }
  yield ["MgpoMatMul", { a: values([5, 7, 11], 4), b: values([5, 11, 13], 5) }];
}

function* byRows(): Generator<Case> {
  for (const [rows, width] of [[1, 1], [3, 67], [64, 5], [65, 128], [331, 33], [1001, 3]]) {
    const [x, dy, w] = [values([rows, width], 1), values([rows, width], 2), values([width], 3)];
    const rstd = values([rows], 4);
    yield ["MgpoRmsNorm", { x, w }, { eps: 1e-6 }];
    yield ["MgpoRmsNormGrad", { x, w, rstd, dy }];
    yield ["MgpoColSum", { x }];
    yield ["MgpoGatherRows", { x, index: indices(2 * rows + 1, rows) }];
    yield ["MgpoScatterAddRows", { x, index: indices(rows, 7) }, { rows: 7 }];
    const target = indices(rows, width), vectors = { lse: rstd, entropy: rstd, dlogprob: rstd, dentropy: rstd };
    for (const suppress of [{}, { suppress: w }] as Inputs[]) {
      yield ["MgpoLogSoftmaxGather", { logits: x, target, ...suppress }, { temperature: 0.7 }];
      yield ["MgpoLogSoftmaxGatherGrad", { logits: x, target, ...suppress, ...vectors }, { temperature: 0.7 }];
    }
  }
  for (const [rows, heads, d] of [[1, 1, 2], [13, 3, 10], [67, 4, 32]]) {
    const inputs = { x: values([rows, heads, d], 1), cos: values([rows, d], 2), sin: values([rows, d], 3) };
    for (const inverse of [false, true]) yield ["MgpoRope", inputs, { inverse }];
  }
}

function* elementwise(): Generator<Case> {
  for (const size of [1, 63, 64, 65, 4099, 140001]) {
    const [x, dy, up, grad] = [1, 2, 3, 4].map((seed) => values([size], seed, 3));
    yield ["MgpoGelu", { x }];
    yield ["MgpoGeluGrad", { x, dy }];
    yield ["MgpoSwiGLU", { gate: x, up }];
    yield ["MgpoSwiGLUGrad", { gate: x, up, dy }];
    yield ["MgpoSumSquares", { x }];
    const rates = { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weightDecay: 0.1 };
    const v = { ...x, data: x.data.map((value) => value * value) };
    yield ["MgpoAdamW", { param: x, m: dy, v, grad }, {
      ...{ ...rates, correction1: 0.1, correction2: 0.01, clipScale: 0.5 },
    }];
  }
}

function* attentions(): Generator<Case> {
  for (const [heads, keyHeads, d] of [[1, 1, 8], [4, 2, 24], [6, 3, 13]]) {
    for (const starts of [[0, 1], [0, 150], [0, 16, 16, 53, 117], [0, 3, 8, 9, 20, 21, 40]]) {
      const count = starts[starts.length - 1], wide = [count, heads, d], narrow = [count, keyHeads, d];
      const [q, k, v] = [values(wide, 1), values(narrow, 2), values(narrow, 3)], cuSeqlens = integers(starts);
      const [out, dout, lse] = [values(wide, 4), values(wide, 5), values([count, heads], 6, 5)];
      for (const causal of [false, true]) {
        yield ["MgpoAttention", { q, k, v, cuSeqlens }, { causal, scale: 0.3 }];
        yield ["MgpoAttentionGrad", { q, k, v, out, lse, dout, cuSeqlens }, { causal, scale: 0.3 }];
      }
    }
    for (const batch of [1, 7, 33]) {
      const [rows, capacity] = [batch + 2, 19];
      const token = {
        q: values([batch, heads, d], 1),
        k: values([batch, keyHeads, d], 2),
        v: values([batch, keyHeads, d], 3),
      };
      const [kCache, vCache] = [4, 5].map((seed) => values([rows, capacity, keyHeads, d], seed));
      const each = Array.from({ length: batch }, (_, b) => b);
      const [lengths, places] = [
        integers(each.map((b) => (b * 5) % capacity)),
        integers(each.map((b) => rows - 1 - b)),
      ];
      yield ["MgpoDecodeAttention", { ...token, kCache, vCache, lengths, rows: places }, { scale: 0.3 }];
    }
  }
}

const cases: Case[] = [...matmuls(), ...byRows(), ...elementwise(), ...attentions()];

/** The bits of all outputs, and of the inputs, which some kernels overwrite. */
function bits([name, inputs, attrs = {}]: Case): Int32Array[] {
  return tf.tidy(() => {
    const tensors = Object.values(inputs).map(({ data, shape }) =>
      tf.tensor(data, [...shape], data instanceof Int32Array ? "int32" : "float32")
    );
    const named = Object.fromEntries(Object.keys(inputs).map((key, i) => [key, tensors[i]]));
    const result = tf.engine().runKernel(name, named, attrs as never) as tf.Tensor | tf.Tensor[];
    return [...[result].flat(), ...tensors].map((tensor) => new Int32Array(tensor.dataSync().slice().buffer));
  });
}

Deno.test("every kernel gives the same bits with 1, 2 and 3 threads, over odd sizes", async () => {
  await ready();
  assert.deepEqual([...new Set(cases.map(([name]) => name))].sort(), [...wasmKernelNames].sort());
  assert.deepEqual(await useWasmThreads(1), { threads: 1 });
  const expected = cases.map(bits), shared = new Set<string>();
  for (const threads of [2, 3]) {
    assert.deepEqual(await useWasmThreads(threads, { leastCost: 0 }), { threads });
    const { numTensors } = tf.memory();
    for (const [i, one] of cases.entries()) {
      const before = wasmThreads()!.rounds, sizes = Object.values(one[1]).map(({ shape }) => shape.join("×"));
      const actual = bits(one), label = `${one[0]} of ${sizes.join(", ")} with ${threads} threads`;
      assert.equal(actual.length, expected[i].length);
      for (const [j, part] of actual.entries()) assert.ok(equal(part, expected[i][j]), `${label}: part ${j} differs`);
      if (wasmThreads()!.rounds > before) shared.add(one[0]);
    }
    assert.equal(tf.memory().numTensors, numTensors);
  }
  await useWasmThreads(1);
  assert.deepEqual([...shared].sort(), [...wasmKernelNames].sort(), "each kernel was shared out in some case");
});

function equal(a: Int32Array, b: Int32Array): boolean {
  return a.length === b.length && a.every((value, i) => value === b[i]);
}

Deno.test("with threads too, the first wrong index is named and work below the threshold stays on one thread", async () => {
  await ready();
  await useWasmThreads(3, { leastCost: 0 });
  const index = Array.from({ length: 90 }, (_, i) => i === 37 || i === 80 ? 9 : 0);
  const x = values([9, 2], 1), logits = values([90, 9], 2);
  assert.throws(() => bits(["MgpoGatherRows", { x, index: integers(index) }]), /index\[37\] is 9/);
  const wide = { x: values([90, 70], 3), index: integers(index) };
  assert.throws(() => bits(["MgpoScatterAddRows", wide, { rows: 9 }]), /index\[37\] is 9/);
  const target = integers(index);
  assert.throws(() => bits(["MgpoLogSoftmaxGather", { logits, target }, { temperature: 1 }]), /target\[37\] is 9/);
  await useWasmThreads(3);
  const { rounds } = wasmThreads()!;
  bits(["MgpoGelu", { x: values([1000], 1) }]);
  assert.equal(wasmThreads()!.rounds, rounds);
  bits(["MgpoGelu", { x: values([100000], 1) }]);
  assert.equal(wasmThreads()!.rounds, rounds + 1);
  await useWasmThreads(1);
});

Deno.test("threads see memory as soon as the backend has grown it", async () => {
  await ready();
  await useWasmThreads(2, { leastCost: 0 });
  const x = values([3000, 64], 1), index = integers(Array.from({ length: 3000 }, () => 1)), held: tf.Tensor[] = [];
  const one: Case = ["MgpoScatterAddRows", { x, index }, { rows: 3000 }], expected = bits(one);
  for (let i = 0; i < 12; i++) {
    held.push(tf.zeros([1_000_000]));
    assert.ok(bits(one).every((part, j) => equal(part, expected[j])), `after ${i + 1} × 4 MB more`);
  }
  tf.dispose(held);
  await useWasmThreads(1);
});

Deno.test("a different number of threads replaces the old ones, and many rounds leave nothing behind", async () => {
  await ready();
  const one: Case = ["MgpoMatMul", { a: values([40, 64], 1), b: values([64, 256], 2) }];
  await useWasmThreads(2, { leastCost: 0 });
  const team = wasmThreads()!, expected = bits(one);
  assert.deepEqual(await useWasmThreads(2, { leastCost: 0 }), { threads: 2 });
  assert.equal(wasmThreads(), team);
  const { numTensors, numBytes } = tf.memory();
  for (let i = 0; i < 100; i++) assert.ok(equal(bits(one)[0], expected[0]));
  assert.deepEqual({ numTensors, numBytes }, { numTensors: tf.memory().numTensors, numBytes: tf.memory().numBytes });
  assert.ok(team.rounds > 100);
  await useWasmThreads(3, { leastCost: 0 });
  assert.ok(team.isLost);
  assert.ok(equal(bits(one)[0], expected[0]));
  await useWasmThreads(1);
  assert.equal(wasmThreads(), undefined);
});

/** A module of its own; `name` works for about a millisecond on the main thread, whose scratch begins at 64; elsewhere `elsewhere` says. */
function miniature(name: string, elsewhere: "trap" | "hang") {
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true }), m = new ModuleBuilder();
  m.import("log", ["f64"], "f64");
  m.function(name, ["i32", "i32"], (f, value, scratch) => {
    const turns = f.i32(0);
    f.if(scratch.ne(64), () => {
      if (elsewhere === "trap") f.return(load.i32(I32.of(-8)));
      else f.doWhile(() => {}, () => load.i32(I32.of(0)).eq(0));
    });
    f.doWhile(() => turns.set(turns.add(1)), () => turns.lt(1_000_000));
    f.return(value);
  }, { result: "i32", exported: true });
  const module = new WebAssembly.Module(m.bytes({ sharedMemory: true }));
  const { exports } = new WebAssembly.Instance(module, { env: { memory, log: Math.log } });
  return { module, memory, functions: exports as Record<string, (...values: number[]) => number> };
}
const scratch = { address: 64, stride: 128, offsets: [0] };
const lists = Array.from({ length: 200 }, (_, i) => [i]);

Deno.test("a thread that fails ends the call with one clear error", async () => {
  const team = await ThreadTeam.start({ ...miniature("work", "trap"), threads: 2 });
  const failure =
    /^Error: thread 2 failed in work: .*out of bounds.* \(of 2 threads\); --threads 1 computes without them$/;
  assert.throws(() => team.run("work", lists, scratch), failure);
  assert.throws(() => team.run("work", lists, scratch), failure);
  assert.deepEqual(team.run("work", [], scratch), []);
  await team.stop();
  assert.throws(() => team.run("work", lists, scratch), /stopped/);
});

Deno.test("a thread that never finishes ends the call with one clear error, not a hang", async () => {
  const { memory, ...parts } = miniature("work", "hang");
  const team = await ThreadTeam.start({ ...parts, memory, threads: 2, naps: 1 });
  assert.throws(() => team.run("work", lists, scratch), /did not finish its call within 1 s .*--threads 1/);
  assert.throws(() => team.run("work", lists, scratch), /did not finish its call/);
  // Lets it go on, so that it can end.
  Atomics.store(new Int32Array(memory.buffer), 0, 1);
  await team.stop();
});

Deno.test("a module that a worker cannot start is refused with the reason", async () => {
  const { module, functions } = miniature("work", "trap");
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 1 });
  await assert.rejects(ThreadTeam.start({ module, memory, functions, threads: 3 }), /./);
});

Deno.test("a binary's memory is declared shared only where it has one with a maximum", () => {
  const header = [0, 97, 115, 109, 1, 0, 0, 0], type = [1, 4, 1, 0x60, 0, 0];
  const bounded = Uint8Array.from([...header, ...type, 5, 4, 1, 1, 1, 9]);
  assert.deepEqual([...withSharedMemory(bounded)!], [...header, ...type, 5, 4, 1, 3, 1, 9]);
  assert.ok(WebAssembly.validate(withSharedMemory(bounded)!));
  assert.equal(withSharedMemory(Uint8Array.from([...header, ...type, 5, 3, 1, 0, 1])), undefined);
  assert.equal(withSharedMemory(Uint8Array.from([...header, ...type])), undefined);
});

/** Runs a program as a user would, with the permissions of the tasks and no more, and waits for its end. */
async function program(text: string): Promise<{ success: boolean; out: string }> {
  const folder = await Deno.makeTempDir(), src = new URL("../", import.meta.url).href;
  try {
    await Deno.writeTextFile(`${folder}/try.ts`, text.replaceAll("$SRC/", src));
    const permissions = ["--allow-read", "--allow-env=XDG_RUNTIME_DIR,IMAGESCRIPT_WASM_SIMD"];
    const child = new Deno.Command(Deno.execPath(), {
      args: ["run", "--no-prompt", "--no-lock", "--no-config", "--no-check", ...permissions, "try.ts"],
      ...{ cwd: folder, stdout: "piped", stderr: "piped", signal: AbortSignal.timeout(60_000) },
    });
    const { success, stdout, stderr } = await child.output();
    const [out, error] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes).trim());
    return { success, out: success ? out : out + error };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

const multiply = `
  import { tf } from "$SRC/deps.ts";
  import { chooseBackend, describeBackend } from "$SRC/gpu/backend.ts";
  import { wasmThreads } from "$SRC/wasm/register.ts";
  const choice = await chooseBackend("wasm", { threads: 3 });
  const run = () => tf.engine().runKernel("MgpoMatMul", { a: tf.ones([300, 300]), b: tf.ones([300, 300]) }, {}).dataSync();
  const total = (values) => values.reduce((a, b) => a + b, 0);
`;

Deno.test("threads need no further permission and let the program end by itself, with or without an error", async () => {
  const good = await program(
    `${multiply} console.log(describeBackend(choice), total(run()), wasmThreads().rounds > 0);`,
  );
  assert.deepEqual(good, { success: true, out: "backend wasm, 3 threads: asked for 27000000 true" });
  const bad = await program(`${multiply} run(); throw new Error("of our own");`);
  assert.ok(!bad.success);
  assert.match(bad.out, /of our own/);
});

Deno.test("without shared memory there is one thread and one line of notice", async () => {
  const text = multiply.replace("const choice", "delete globalThis.SharedArrayBuffer;\n const choice");
  const { success, out } = await program(
    `${text} console.log(describeBackend(choice), total(run()), wasmThreads()); console.log(choice.notice);`,
  );
  assert.ok(success, out);
  assert.equal(
    out,
    "backend wasm, 1 thread: asked for 27000000 undefined\n" +
      "one thread: the wasm backend was started without shared memory",
  );
});

Deno.test("where a worker is refused, one thread computes and the notice says why", async () => {
  await ready();
  const { start } = ThreadTeam;
  ThreadTeam.start = () => Promise.reject(new Error("no more threads\nat the system's"));
  try {
    const notice = "one thread: the others could not be started (no more threads)";
    assert.deepEqual(await useWasmThreads(2), { threads: 1, notice });
  } finally {
    ThreadTeam.start = start;
  }
  assert.equal(wasmThreads(), undefined);
  bits(cases[0]);
});

Deno.test("a training step is the same to the last bit: one thread on plain memory, two on shared memory", async () => {
  const step = (threads: number) =>
    program(`
      import { chooseBackend } from "$SRC/gpu/backend.ts";
      import { isShared } from "$SRC/wasm/runtime.ts";
      import { wasmThreads } from "$SRC/wasm/register.ts";
      import { tf } from "$SRC/deps.ts";
      import { loadPolicy } from "$SRC/policy/load.ts";
      import { signs } from "$SRC/data/signs.ts";
      import { Trainer } from "$SRC/mgpo.ts";
      import { rollout } from "$SRC/rollout.ts";
      await chooseBackend("wasm", { threads: ${threads} });
      const policy = await loadPolicy(), world = signs(), samples = [await world.get(0), await world.get(1)];
      const { trajectories } = await rollout(policy, samples, { ...world.hints, groupSize: 4, maxNewTokens: [14, 8] });
      const trainer = new Trainer(policy, { learningRate: 1e-3 });
      await trainer.update(trajectories, trajectories.map((_, i) => i % 2));
      const texts = trajectories.map(({ turns }) => turns.map(({ text }) => text));
      const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", await new Blob([
        JSON.stringify(texts), ...[...policy.parameters.values()].map((weights) => weights.dataSync()),
      ]).arrayBuffer()));
      console.log(isShared(tf.backend().wasm.asm.memory), (wasmThreads()?.rounds ?? 0) > 0, hash.toHex());
    `);
  const [one, two] = [await step(1), await step(2)];
  assert.ok(one.success && two.success, one.out + two.out);
  assert.match(one.out, /^false false [0-9a-f]{64}$/);
  assert.match(two.out, /^true true [0-9a-f]{64}$/);
  assert.equal(two.out.split(" ")[2], one.out.split(" ")[2]);
});
