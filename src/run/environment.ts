/**
 * What `run.json` says of where a run was made: enough to make it again.
 *
 * @module
 */
import { tf } from "../deps.ts";
import type { BackendChoice } from "../gpu/backend.ts";

/** The project's own folder. */
const root = new URL("../../", import.meta.url);

/**
 * Describes the program and the machine.
 *
 * - `commit`: of the project's repository; null if this isn't one. `lock`: SHA-256 of deno.lock; null if there is none.
 */
export async function describeEnvironment(backend: BackendChoice): Promise<Record<string, unknown>> {
  return {
    started: new Date().toISOString(),
    commit: await readCommit(root) ?? null,
    lock: await hashFile(new URL("deno.lock", root)) ?? null,
    deno: Deno.version.deno,
    typescript: Deno.version.typescript,
    tfjs: tf.version_core,
    system: `${Deno.build.os} ${Deno.build.arch}`,
    cores: navigator.hardwareConcurrency,
    backend: backend.backend,
    threads: backend.threads ?? null,
    reason: backend.reason,
    adapter: backend.adapter ?? null,
  };
}

/**
 * The commit that a working tree is at, read from its `.git` without running git.
 *
 * @param folder The working tree, with a slash at its end.
 * @returns 40 (or 64) hexadecimal digits; undefined without a repository or commit.
 */
export async function readCommit(folder: URL): Promise<string | undefined> {
  if (folder.protocol !== "file:") return undefined;
  let git = new URL(".git/", folder);
  // In a linked work tree or a submodule `.git` is a file that names the folder.
  const link = /^gitdir: (.*)$/m.exec(await readText(new URL(".git", folder)) ?? "")?.[1];
  if (link) git = new URL(encodeURI(link) + "/", folder);
  const head = (await readText(new URL("HEAD", git)))?.trim();
  if (head === undefined || !head.startsWith("ref: ")) return head;
  const ref = head.slice("ref: ".length);
  const common = (await readText(new URL("commondir", git)))?.trim();
  const shared = common ? new URL(encodeURI(common) + "/", git) : git;
  const loose = await readText(new URL(ref, shared));
  if (loose !== undefined) return loose.trim();
  const packed = await readText(new URL("packed-refs", shared));
  return packed?.split("\n").find((line) => line.endsWith(` ${ref}`))?.split(" ")[0];
}

/** SHA-256 of a local file in hexadecimal digits; undefined if it can't be read. */
async function hashFile(file: URL): Promise<string | undefined> {
  const text = await readText(file);
  if (text === undefined) return undefined;
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A missing detail is no reason to stop a run, whatever it is missing for. */
async function readText(file: URL): Promise<string | undefined> {
  if (file.protocol !== "file:") return undefined;
  try {
    return await Deno.readTextFile(file);
  } catch {
    return undefined;
  }
}
