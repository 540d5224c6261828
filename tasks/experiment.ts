/**
 * `deno task experiment NAME`: repeats an experiment and writes its tables. `--list` names them, `--help` lists the options.
 *
 * @module
 */
import { runExperiments } from "../src/experiments/experiment_task.ts";
import { runTask } from "../src/run/tasks.ts";

if (import.meta.main) await runTask(runExperiments);
