/**
 * What a running task shows: on a terminal one line that is drawn over, elsewhere plain lines.
 *
 * @module
 */
import type { StepRecord } from "./metrics.ts";

/** Writes lines to standard output and, on a terminal, keeps one line below them up to date. */
export class Progress {
  readonly isTerminal: boolean;
  readonly #write: (text: string) => void;
  readonly #columns: () => number;
  #status = "";

  /**
   * @param options.isTerminal @default {whether standard output is a terminal}
   * @param options.write Takes the text. @default {standard output}
   * @param options.columns Width of the terminal. @default {its width}
   */
  constructor(options: { isTerminal?: boolean; write?: (text: string) => void; columns?: () => number } = {}) {
    this.isTerminal = options.isTerminal ?? Deno.stdout.isTerminal();
    this.#write = options.write ?? writeToStdout;
    this.#columns = options.columns ?? (() => Deno.consoleSize().columns || 80);
  }

  /** A line that stays. */
  log(line: string): void {
    this.#write((this.#status ? "\r\x1b[2K" : "") + line + "\n" + this.#status);
  }

  /** Replaces the line below; nothing where there is no terminal. */
  status(line: string): void {
    if (!this.isTerminal) return;
    // A line that wraps could not be drawn over.
    this.#status = line.slice(0, Math.max(20, this.#columns() - 1));
    this.#write("\r\x1b[2K" + this.#status);
  }

  /** Removes the line below. */
  clear(): void {
    if (this.#status) this.#write("\r\x1b[2K");
    this.#status = "";
  }
}

const encoder = new TextEncoder();

function writeToStdout(text: string): void {
  const bytes = encoder.encode(text);
  for (let at = 0; at < bytes.length;) at += Deno.stdout.writeSync(bytes.subarray(at));
}

/** A step in one line: what a person wants to see rise, and what tells that something is wrong. */
export function formatStep(record: StepRecord, steps: number): string {
  const parts = [`step ${String(record.step).padStart(String(steps).length)}/${steps}`];
  const add = (label: string, name: string, format: (x: number) => string = formatRatio) => {
    if (name in record) parts.push(`${label} ${format(record[name])}`);
  };
  add("reward", "reward/mean");
  add("valid", "grounding/valid_ratio");
  add("hit", "grounding/hit_ratio");
  add("loss", "policy_loss", (x) => x.toFixed(4));
  add("grad", "grad_norm", (x) => x.toFixed(3));
  if (record.samples_skipped > 0) parts.push(`skipped ${record.samples_skipped}`);
  add("", "timing_s/total", (x) => `${x.toFixed(1)} s`);
  return parts.join("  ").replace(/ {3,}/g, "  ");
}

/** A bar like `[####----]`. */
export function formatBar(done: number, total: number, width = 20): string {
  const filled = Math.round(width * Math.min(1, total > 0 ? done / total : 1));
  return `[${"#".repeat(filled)}${"-".repeat(width - filled)}]`;
}

/** Seconds as `m:ss` or `h:mm:ss`. */
export function formatDuration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const two = (n: number) => String(n).padStart(2, "0");
  const h = Math.floor(whole / 3600), m = Math.floor(whole / 60) % 60, s = whole % 60;
  return h > 0 ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

/** A ratio with three digits. */
export function formatRatio(x: number): string {
  return Number.isFinite(x) ? x.toFixed(3) : "–";
}

/** Remaining time from the last steps' mean; undefined before the first. */
export function remainingSeconds(stepSeconds: readonly number[], stepsLeft: number): number | undefined {
  const last = stepSeconds.slice(-10);
  if (last.length === 0) return undefined;
  return last.reduce((a, b) => a + b, 0) / last.length * stepsLeft;
}

/** Aligns rows of cells; the first column to the left, the others to the right. The first row is the heading. */
export function formatTable(rows: readonly (readonly string[])[]): string {
  const widths = rows[0].map((_, i) => Math.max(...rows.map((row) => (row[i] ?? "").length)));
  const lines = rows.map((row) =>
    row.map((cell, i) => i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i])).join("  ").trimEnd()
  );
  const rule = widths.map((width) => "-".repeat(width)).join("  ");
  return [lines[0], rule, ...lines.slice(1)].join("\n");
}
