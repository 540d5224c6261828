/**
 * The report of a run that goes on: kept fresh and served by a thread of its own.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";

/** What the thread is told. */
export type ToWorker =
  | { kind: "serve"; port: number }
  | { kind: "watch"; run: string }
  | { kind: "refresh" }
  | { kind: "end" };

/** What it says. */
export type FromWorker =
  | { kind: "serving"; address: string }
  | { kind: "refused"; message: string }
  | { kind: "problem"; message: string }
  | { kind: "ended" };

/** A page about a run, on 127.0.0.1 and as `report.html` in the run folder. Nothing that goes wrong here stops a training. */
export class LiveReport {
  /** Where it is served. */
  readonly address: string;
  readonly #worker: Worker;
  readonly #ended: Promise<void>;

  private constructor(address: string, worker: Worker, ended: Promise<void>) {
    this.address = address;
    this.#worker = worker;
    this.#ended = ended;
  }

  /**
   * Starts to serve; there is no page until {@linkcode watch}.
   *
   * @param port 0 for a free one.
   * @param log Takes what goes wrong later.
   * @throws {InputError} if the port can't be had.
   */
  static async serve(port: number, log: (line: string) => void): Promise<LiveReport> {
    const worker = new Worker(new URL("./live_worker.ts", import.meta.url).href, { type: "module" });
    const started = Promise.withResolvers<string>(), ended = Promise.withResolvers<void>();
    const told = new Set<string>();
    worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
      if (data.kind === "serving") started.resolve(data.address);
      else if (data.kind === "refused") started.reject(new InputError(data.message));
      else if (data.kind === "ended") ended.resolve();
      else if (!told.has(data.message)) log(`note: ${told.add(data.message) && data.message}`);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      started.reject(new InputError(`--report: the page cannot be served (${event.message})`));
      log(`note: the report is no longer kept: ${event.message}`);
      ended.resolve();
    };
    worker.postMessage({ kind: "serve", port } satisfies ToWorker);
    try {
      return new LiveReport(await started.promise, worker, ended.promise);
    } catch (error) {
      worker.terminate();
      throw error;
    }
  }

  /** The run folder that the page is about. */
  watch(run: string): void {
    this.#worker.postMessage({ kind: "watch", run } satisfies ToWorker);
  }

  /** Says that there is something new; a page follows when it isn't too soon after the one before. */
  refresh(): void {
    this.#worker.postMessage({ kind: "refresh" } satisfies ToWorker);
  }

  /** Writes the last page and stops serving, after a moment in which an open browser may fetch it. */
  async end(): Promise<void> {
    this.#worker.postMessage({ kind: "end" } satisfies ToWorker);
    await this.#ended;
    this.#worker.terminate();
  }
}
