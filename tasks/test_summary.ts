/**
 * The last line of `deno task test`: `N passed, N failed`, read from the report that `deno test` wrote. Exits with status 1 if
 * a test failed or if there is no report.
 *
 * @module
 */
const path = Deno.args[0];

let report: string;
try {
  report = Deno.readTextFileSync(path);
} catch (error) {
  console.error(`error: the tests left no report at ${path} (${error instanceof Error ? error.message : error})`);
  Deno.exit(1);
}
const [, tests, failures, errors] = /<testsuites[^>]*\btests="(\d+)"[^>]*\bfailures="(\d+)"[^>]*\berrors="(\d+)"/
  .exec(report) ?? [];
const failed = Number(failures) + Number(errors), skipped = (report.match(/<skipped\b/g) ?? []).length;
const passed = Number(tests) - failed - skipped;
if (!(passed > 0)) {
  console.error(`error: ${path} reports no test that passed`);
  Deno.exit(1);
}
if (skipped > 0) console.log(`${skipped} skipped`);
console.log(`${passed} passed, ${failed} failed`);
Deno.exit(failed > 0 ? 1 : 0);
