import assert from "node:assert/strict";
import { InputError } from "./errors.ts";
import { errorText } from "./tasks.ts";

Deno.test("errors that a user can act on are one line, defects keep their stack", async () => {
  assert.equal(errorText(new InputError("--steps 0: must be\n  more")), "error: --steps 0: must be more");
  const defect = errorText(new TypeError("oops"));
  assert.match(defect, /^unexpected error: TypeError: oops\n +at /);
  const missing = await Deno.readTextFile("does/not/exist").catch(errorText);
  assert.match(missing, /^error: not found: .*does\/not\/exist/);
});

Deno.test({
  name: "a missing permission says which flag gives it",
  permissions: { read: true, write: false },
  async fn() {
    const text = await Deno.writeTextFile("nowhere", "").catch(errorText);
    assert.match(text ?? "", /^error: no permission for write access to "nowhere"; run Deno with --allow-write$/);
  },
});
