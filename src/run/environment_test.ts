import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";
import { describeEnvironment, readCommit } from "./environment.ts";

const commit = "0123456789abcdef0123456789abcdef01234567";

async function commitOf(files: Record<string, string>): Promise<string | undefined> {
  const folder = await Deno.makeTempDir();
  try {
    for (const [name, text] of Object.entries(files)) {
      const path = `${folder}/${name}`;
      await Deno.mkdir(path.slice(0, path.lastIndexOf("/")), { recursive: true });
      await Deno.writeTextFile(path, text);
    }
    return await readCommit(pathToFileURL(`${folder}/tree/`));
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("readCommit reads every layout of a repository", async () => {
  const head = "ref: refs/heads/main\n";
  assert.equal(await commitOf({ "tree/.git/HEAD": `${commit}\n` }), commit);
  assert.equal(await commitOf({ "tree/.git/HEAD": head, "tree/.git/refs/heads/main": `${commit}\n` }), commit);
  const packed = `# pack-refs with: peeled\n${
    commit.replaceAll("0", "f")
  } refs/heads/other\n${commit} refs/heads/main\n`;
  assert.equal(await commitOf({ "tree/.git/HEAD": head, "tree/.git/packed-refs": packed }), commit);
  const linked = {
    "tree/.git": "gitdir: ../main/.git/worktrees/tree\n",
    "main/.git/worktrees/tree/HEAD": head,
    "main/.git/worktrees/tree/commondir": "../..\n",
    "main/.git/refs/heads/main": `${commit}\n`,
  };
  assert.equal(await commitOf(linked), commit);
  assert.equal(await commitOf({ "tree/.git/HEAD": head }), undefined, "no commit yet");
  assert.equal(await commitOf({ "tree/file": "" }), undefined);
  assert.equal(await readCommit(new URL("https://example.com/")), undefined);
});

Deno.test("describeEnvironment is plain JSON with versions and the adapter", async () => {
  const environment = await describeEnvironment({ backend: "wasm", reason: "asked for" });
  assert.deepEqual(JSON.parse(JSON.stringify(environment)), environment);
  assert.equal(environment.deno, Deno.version.deno);
  assert.match(String(environment.tfjs), /^4\./);
  assert.equal(environment.backend, "wasm");
});
