/**
 * The thread that writes and serves the report of a run that goes on: training keeps its own thread busy within a step, and needs
 * none of what a report loads.
 *
 * @module
 */
import type { FromWorker, ToWorker } from "./live.ts";
import { answer, type ServedPage } from "./live_page.ts";
import { renderReport, reportTitle } from "./page.ts";
import { writeReport } from "./report_file.ts";

/** The least milliseconds between two pages, and how many times as long as a page takes to write one waits at least. */
const PERIOD = 4000, SHARE = 10;
/** Milliseconds since its last look for which a browser counts as open, and for which it is given time to fetch the last page. */
const OPEN = 10_000, FAREWELL = 5000;

// Deno's types for workers can't be had beside those of windows.
const port = self as unknown as {
  postMessage(message: FromWorker): void;
  onmessage: (event: MessageEvent<ToWorker>) => void;
};

let run: string | undefined, page: ServedPage | undefined;
let isWanted = false, isAtWork = false, isEnding = false, notBefore = 0;
/** The last look of a browser, and whether it has the newest page. */
let seen = -Infinity, isFetched = false;

port.onmessage = ({ data }) => {
  if (data.kind === "serve") serve(data.port);
  else {
    if (data.kind === "watch") run = data.run;
    if (data.kind === "end") isEnding = true;
    isWanted = true;
    work();
  }
};

function serve(number: number): void {
  try {
    const server = Deno.serve({
      hostname: "127.0.0.1",
      port: number,
      onListen: ({ port: taken }) => port.postMessage({ kind: "serving", address: `http://127.0.0.1:${taken}/` }),
    }, (request) => {
      const response = answer(request, page);
      seen = performance.now();
      if (response.status === 200 && page) isFetched = true;
      return response;
    });
    server.unref();
  } catch (error) {
    const isTaken = error instanceof Deno.errors.AddrInUse;
    const why = isTaken ? "is in use; choose another, or 0 for a free one" : `cannot be opened (${messageOf(error)})`;
    port.postMessage({ kind: "refused", message: `--report-port ${number}: ${why}` });
  }
}

/** Writes pages as long as they are wanted, but rests in between. */
async function work(): Promise<void> {
  if (isAtWork) return;
  isAtWork = true;
  while (isWanted && run !== undefined) {
    await until(notBefore);
    isWanted = false;
    const started = performance.now(), isLast = isEnding;
    try {
      const { html, written } = await renderReport({ runs: [run], live: !isLast, title: reportTitle([run]) });
      await writeReport(`${run}/report.html`, html);
      page = { html, written };
      isFetched = false;
    } catch (error) {
      port.postMessage({ kind: "problem", message: `the report was not written: ${messageOf(error)}` });
    }
    const ended = performance.now();
    notBefore = ended + Math.max(PERIOD, SHARE * (ended - started));
    if (isLast) break;
  }
  isAtWork = false;
  if (isEnding) {
    await farewell();
    port.postMessage({ kind: "ended" });
  }
}

/** A browser that looks for newer pages is given the time to find the last one. */
async function farewell(): Promise<void> {
  const end = performance.now() + FAREWELL;
  while (performance.now() < end && performance.now() - seen < OPEN && !isFetched) await pause(100);
}

/** Rests, unless it is time to end. */
async function until(time: number): Promise<void> {
  while (performance.now() < time && !isEnding) await pause(100);
}

function pause(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
