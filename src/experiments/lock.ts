/**
 * One process at a time: a lock on a file, held by the operating system, which gives it back when its process ends in whatever
 * way. So there are no stale locks, and two experiments may share a folder of runs.
 *
 * @module
 */

/** A lock that is held. */
export interface Lock {
  /** Gives it back. The file stays: to remove it would let two processes hold "the same" lock. */
  release(): void;
}

/** Takes a lock as soon as nobody has it; for what is done in a moment. */
export async function waitForLock(path: string): Promise<Lock> {
  for (;;) {
    const lock = await tryLock(path);
    if ("release" in lock) return lock;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/**
 * Takes a lock if nobody has it.
 *
 * @param path A file that is there for the lock only; made, with its folder, where it is missing.
 * @returns The lock, or who has it, as that process said.
 */
export async function tryLock(path: string): Promise<Lock | { heldBy: string }> {
  await Deno.mkdir(path.slice(0, path.lastIndexOf("/")), { recursive: true });
  const file = await Deno.open(path, { read: true, write: true, create: true });
  if (!await file.tryLock(true)) {
    const text = await new Response(file.readable).text();
    return { heldBy: text.trim() || "another process" };
  }
  await file.truncate();
  await file.write(new TextEncoder().encode(`process ${Deno.pid}\n`));
  return { release: () => file.close() };
}
