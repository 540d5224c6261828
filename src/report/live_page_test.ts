import assert from "node:assert/strict";
import { answer } from "./live_page.ts";

const page = { html: "<p>report", written: "2026-01-01" };

function ask(path = "/", init: RequestInit = {}, host = "127.0.0.1:8000") {
  return answer(new Request(`http://127.0.0.1:8000${path}`, { ...init, headers: { host, ...init.headers } }), page);
}

Deno.test("only GET of the one page, only from this machine", async () => {
  const whole = ask();
  assert.deepEqual([whole.status, await whole.text(), whole.headers.get("etag")], [200, "<p>report", '"2026-01-01"']);
  assert.equal(whole.headers.get("x-content-type-options"), "nosniff");
  assert.equal(ask("/?x=1", {}, "localhost:8000").status, 200);
  assert.equal(ask("/", { headers: { "if-none-match": '"2026-01-01"' } }).status, 304);
  assert.equal(ask("/", { headers: { "if-none-match": '"older"' } }).status, 200);
  for (const method of ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"]) {
    assert.equal(ask("/", { method }).status, 405, method);
  }
  for (const path of ["/run.json", "/../run.json", "//", "/index.html"]) assert.equal(ask(path).status, 404, path);
  for (const host of ["evil.example", "127.0.0.1.evil.example", "0.0.0.0:8000"]) {
    assert.equal(ask("/", {}, host).status, 403, host);
  }
});

Deno.test("before the first page, one that loads itself again", async () => {
  const response = answer(new Request("http://localhost:1/", { headers: { host: "localhost:1" } }), undefined);
  assert.equal(response.status, 200);
  assert.match(await response.text(), /http-equiv="refresh"/);
});
