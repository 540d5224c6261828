/**
 * A peer in another language: a program that runs beside the benchmark and answers each line on its standard input with one line of
 * JSON, so that both can be timed in turns.
 *
 * @module
 */
import { InputError } from "../../src/run/errors.ts";

/** The peer cannot run on this machine; the message says what is absent and what to do. */
export class PeerAbsent extends InputError {}

/** A running peer. */
export class Peer {
  readonly #name: string;
  readonly #child: Deno.ChildProcess;
  readonly #input: WritableStreamDefaultWriter<Uint8Array>;
  readonly #output: ReadableStreamDefaultReader<string>;
  readonly #errors: Promise<string>;
  #buffer = "";

  private constructor(name: string, child: Deno.ChildProcess) {
    this.#name = name;
    this.#child = child;
    this.#input = child.stdin.getWriter();
    this.#output = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
    this.#errors = new Response(child.stderr).text();
  }

  /**
   * Starts a program.
   *
   * @param program A name on PATH, or a path.
   * @throws {PeerAbsent} There is no such program, or Deno may not run it.
   */
  static start(program: string, args: readonly string[]): Peer {
    try {
      const command = new Deno.Command(program, { args: [...args], stdin: "piped", stdout: "piped", stderr: "piped" });
      return new Peer(program, command.spawn());
    } catch (error) {
      if (error instanceof Deno.errors.NotCapable) {
        throw new PeerAbsent(`no permission to run ${program}; give Deno --allow-run=${program}`);
      }
      if (error instanceof Deno.errors.NotFound) throw new PeerAbsent(`${program} is not on this machine`);
      throw error;
    }
  }

  /** Sends a line and waits for the answer. */
  async ask<T>(line: string): Promise<T> {
    // A peer that has ended takes no more input; why it ended stands in its errors, which `answer` reports.
    await this.#input.write(new TextEncoder().encode(line + "\n")).catch(() => {});
    return await this.answer<T>();
  }

  /**
   * The next line, read as JSON.
   *
   * @throws {Error} The peer has ended; the message has the last line of what it wrote to standard error.
   */
  async answer<T>(): Promise<T> {
    for (;;) {
      const end = this.#buffer.indexOf("\n");
      if (end >= 0) {
        const line = this.#buffer.slice(0, end);
        this.#buffer = this.#buffer.slice(end + 1);
        return JSON.parse(line) as T;
      }
      const { value, done } = await this.#output.read();
      if (done) {
        const last = (await this.#errors).trim().split("\n").at(-1);
        throw new Error(`${this.#name} ended without an answer: ${last || "it said nothing"}`);
      }
      this.#buffer += value;
    }
  }

  /** Ends the peer and waits until it is gone. */
  async close(): Promise<void> {
    await this.#input.close().catch(() => {});
    await this.#output.cancel();
    await this.#child.status;
    await this.#errors;
  }
}
