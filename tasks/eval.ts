/**
 * `deno task eval`: measures a policy on held-out samples. `--help` lists the options.
 *
 * @module
 */
import { runEvaluation } from "../src/run/evaluation_run.ts";
import { runTask } from "../src/run/tasks.ts";

if (import.meta.main) await runTask(runEvaluation);
