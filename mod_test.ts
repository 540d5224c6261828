import assert from "node:assert/strict";

/** Serves the repository's files on loopback, as a web server would, until stopped. */
function serveRepository(): { url: string; paths: Set<string>; stop(): Promise<void> } {
  const root = new URL("./", import.meta.url), paths = new Set<string>();
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    const { pathname } = new URL(request.url);
    paths.add(pathname);
    try {
      const type = pathname.endsWith(".ts") ? "application/typescript" : "application/octet-stream";
      return new Response(await Deno.readFile(new URL(`.${pathname}`, root)), { headers: { "content-type": type } });
    } catch {
      return new Response("not found", { status: 404 });
    }
  });
  return { url: `http://127.0.0.1:${server.addr.port}/`, paths, stop: () => server.shutdown() };
}

Deno.test("imported from a URL in a fresh folder: loads the embedded policy and makes one rollout", async () => {
  const server = serveRepository(), folder = await Deno.makeTempDir();
  try {
    const script = `
      import { binaryReward, chooseBackend, loadPolicy, rollout, signs } from "${server.url}mod.ts";
      await chooseBackend("wasm");
      const policy = await loadPolicy();
      const world = signs({ split: "heldout" }), sample = await world.get(0);
      const { trajectories } = await rollout(policy, [sample], { ...world.hints, groupSize: 2, maxNewTokens: [14, 8] });
      console.log(JSON.stringify(trajectories.map((t) => [t.turns.length, binaryReward(sample, t)])));
      policy.dispose();
    `;
    await Deno.writeTextFile(`${folder}/try.ts`, script);
    const host = new URL(server.url).host;
    const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      // deno-fmt-ignore
      args: ["run", "--no-prompt", "--no-lock", "--no-config", `--allow-import=${host}`, `--allow-net=${host}`, "--allow-read", "--allow-env", "try.ts"],
      cwd: folder,
    }).output();
    assert.ok(success, new TextDecoder().decode(stderr));
    const turns: [number, number][] = JSON.parse(new TextDecoder().decode(stdout).trim().split("\n").at(-1)!);
    assert.equal(turns.length, 2);
    for (const [count, reward] of turns) {
      assert.equal(count, 2);
      assert.ok(reward === 0 || reward === 1);
    }
    assert.ok(server.paths.has("/fixtures/tiny/model.safetensors"), "the weights came from the server");
  } finally {
    await server.stop();
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("the public API is what it was: a removed or renamed export is a decision, not an accident", async () => {
  const names = Object.keys(await import("./mod.ts")).sort();
  // deno-fmt-ignore
  assert.deepEqual(names, [
    "AdamW", "InputError", "Picture", "QwenPolicy", "Trainer", "Training", "binaryReward", "boxedAnswer", "chooseBackend",
    "combineRewards", "counting", "countingMetrics", "cropBox", "defaultTemplate", "describeBackend", "drawScene", "evaluate", "formatReward",
    "groupAdvantages", "hitReward", "invalidReasons", "iouReward", "isCorrect", "lengthPenalty", "loadPolicy", "makeScene",
    "matchPoints",    "openDataset", "openFolder", "parseBox", "parsePoints", "pointReward", "policyLoss", "rollout", "schedule", "signColours", "signLetters", "signShapes",
    "signs", "summarize", "tinyPolicyUrl", "toOriginal", "train", "trajectoryToJson", "useKernels", "validBoxReward",
  ]);
});
