/**
 * `deno task train`: trains a policy and writes a run folder. `--help` lists the options.
 *
 * @module
 */
import { runTask } from "../src/run/tasks.ts";
import { runTraining } from "../src/run/training_run.ts";

if (import.meta.main) await runTask(runTraining);
