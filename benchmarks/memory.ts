/**
 * Does memory stay flat over training steps? Runs the default training loop without evaluations and prints resident set,
 * tensors and bytes a step, then the slope of the resident set after the first fifty steps (collected garbage settles by then) with its standard error:
 *
 * ```sh
 * deno run --allow-read --allow-env=XDG_RUNTIME_DIR,IMAGESCRIPT_WASM_SIMD benchmarks/memory.ts [STEPS]
 * ```
 *
 * @module
 */
import { signs } from "../src/data/signs.ts";
import { chooseBackend, describeBackend } from "../src/gpu/backend.ts";
import { loadPolicy } from "../src/policy/load.ts";
import { train } from "../src/train.ts";

const steps = Number(Deno.args[0] ?? 120), burnIn = 50;
console.log(describeBackend(await chooseBackend("auto")));
const policy = await loadPolicy(), resident: number[] = [], tensors = new Set<string>();
for await (const record of train(policy, signs(), { steps, evalEvery: 0 })) {
  const mib = Deno.memoryUsage().rss / 2 ** 20;
  resident.push(mib);
  tensors.add(`${record["memory/numTensors"]} tensors, ${record["memory/numBytes"]} bytes`);
  if (record.step % 10 === 0) {
    console.log(`step ${record.step}: ${mib.toFixed(0)} MiB resident, ${[...tensors].at(-1)}`);
  }
}
policy.dispose();

const y = resident.slice(burnIn), n = y.length, mx = (n - 1) / 2, my = y.reduce((a, b) => a + b, 0) / n;
const sxx = y.reduce((s, _, x) => s + (x - mx) ** 2, 0);
const slope = y.reduce((s, v, x) => s + (x - mx) * (v - my), 0) / sxx;
const rest = y.reduce((s, v, x) => s + (v - my - slope * (x - mx)) ** 2, 0);
console.log(
  `slope ${slope.toFixed(3)} ± ${Math.sqrt(rest / (n - 2) / sxx).toFixed(3)} MiB a step over steps ${
    burnIn + 1
  } to ${steps}; ` +
    `highest ${Math.max(...resident).toFixed(0)} MiB; tensor counts seen: ${[...tensors].join(" | ")}`,
);
