/**
 * How a task runs: its errors as one line, its exit status, its reaction to Ctrl-C.
 *
 * @module
 */
import { InputError } from "./errors.ts";

/** Exit status after Ctrl-C, as shells have it: 128 + SIGINT. */
export const INTERRUPTED = 130;

/** Thrown where Ctrl-C stops a task between its results. */
export class Interrupted extends Error {
  override name = "Interrupted";
}

/**
 * Runs a task's main function and ends the program with its status. What a user's input caused is printed as one line
 * without a stack, status 1; anything else is a defect and keeps its stack.
 *
 * @param main Takes the command line; returns the exit status, nothing meaning 0.
 */
export async function runTask(main: (args: readonly string[]) => Promise<number | void>): Promise<never> {
  try {
    Deno.exit(await main(Deno.args) ?? 0);
  } catch (error) {
    console.error(errorText(error));
    Deno.exit(1);
  }
}

/** What is printed for an error: one line if the user can do something about it, otherwise the stack. */
export function errorText(error: unknown): string {
  const line = userMessage(error);
  if (line !== undefined) return `error: ${line.replaceAll(/\s*\n\s*/g, " ")}`;
  return error instanceof Error ? `unexpected error: ${error.stack ?? error.message}` : `unexpected error: ${error}`;
}

function userMessage(error: unknown): string | undefined {
  if (error instanceof InputError) return error.message;
  if (error instanceof Deno.errors.NotCapable) {
    const [, access, target] = /Requires (\w+) access to (.*?)(?:, run again|$)/.exec(error.message) ?? [];
    if (!access) return `Deno has not been given a permission: ${error.message}`;
    return `no permission for ${access} access to ${target}; run Deno with --allow-${access}`;
  }
  if (error instanceof Deno.errors.PermissionDenied) {
    return `the system refuses access: ${error.message}; check the owner and the rights of the file or folder`;
  }
  if (error instanceof Deno.errors.NotFound) return `not found: ${error.message}; check the path`;
  if (error instanceof Error && "code" in error && error.code === "ENOSPC") {
    return `the disk is full: ${error.message}; make room, then go on with --resume`;
  }
  return undefined;
}

/**
 * Listens to Ctrl-C (and to the signal that ends services). The first one asks the task to stop at its next safe point; a
 * second one ends the program at once, which a run folder survives too.
 *
 * @param onFirst Called at the first signal.
 * @returns Whether to stop, and a function that stops listening.
 */
export function listenForInterrupt(onFirst: () => void): { readonly requested: boolean; stop(): void } {
  const signals: Deno.Signal[] = Deno.build.os === "windows" ? ["SIGINT"] : ["SIGINT", "SIGTERM"];
  let requested = false;
  const listener = () => {
    if (requested) Deno.exit(INTERRUPTED);
    requested = true;
    onFirst();
  };
  for (const signal of signals) Deno.addSignalListener(signal, listener);
  return {
    get requested() {
      return requested;
    },
    stop() {
      for (const signal of signals) Deno.removeSignalListener(signal, listener);
    },
  };
}
