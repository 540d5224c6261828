import assert from "node:assert/strict";
import { escapeText, html, scriptJson } from "./markup.ts";

Deno.test("templates escape every value, and leave markup as it is", () => {
  const evil = `</b><script>alert("x")</script>&'`;
  const list = ["<1>", "2"].map((text) => html`<i>${text}</i>`);
  assert.equal(
    html`<b title="${evil}">${evil}</b>${list}${undefined}${false}${0}`.text,
    `<b title="&lt;/b&gt;&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;&#39;">` +
      `&lt;/b&gt;&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;&#39;</b><i>&lt;1&gt;</i><i>2</i>0`,
  );
  assert.equal(escapeText("a\ud800b"), "a\ufffdb");
});

Deno.test("JSON in a script can't end it, and comes out as it went in", () => {
  const value = { text: "</script><img src=x onerror=alert(1)><!--", half: "\udc00", line: "\u2028" };
  const { text } = scriptJson(value);
  assert.ok(!text.includes("<"));
  assert.deepEqual(JSON.parse(text), value);
});
