/**
 * `deno task bench [NAME…] [--json FILE]`: runs the benchmarks and prints a table.
 *
 * @module
 */
import { bench } from "../benchmarks/all.ts";
import { runTask } from "../src/run/tasks.ts";

await runTask(bench);
