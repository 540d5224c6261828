/**
 * `deno task report RUN…`: writes one HTML file about runs. `--help` lists the options.
 *
 * @module
 */
import { runReport } from "../src/report/report_task.ts";
import { runTask } from "../src/run/tasks.ts";

if (import.meta.main) await runTask(runReport);
