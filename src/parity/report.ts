/**
 * What a parity run prints: a row a check with its worst error, its tolerance and whether it passed.
 *
 * @module
 */

/** The outcome of one check. */
export interface Row {
  group: string;
  name: string;
  /** The error that comes closest to (or furthest beyond) its tolerance; for exact checks the number of differences. */
  error: number;
  /** The largest error allowed; 0 means exact. */
  tolerance: number;
  pass: boolean;
  /** Numbers or values that were compared. */
  compared: number;
  /** Where the worst error is, or why the check could not be made. */
  note: string;
}

/** Collects comparisons of one row. Of several tolerances the comparison with the largest error / tolerance is shown. */
export class Check {
  #compared = 0;
  #failed = 0;
  #different = 0;
  #firstDifference = "";
  #worst = { ratio: -1, error: 0, tolerance: 0, where: "" };

  /** Compares a number; null and NaN stand for "not defined" and equal each other. */
  number(actual: number, expected: number | null, tolerance: number, where = ""): void {
    this.close([actual], [expected ?? NaN], tolerance, where);
  }

  /** Compares numbers one by one, `max |a − b| ≤ tolerance`. */
  close(actual: ArrayLike<number>, expected: ArrayLike<number | null>, tolerance: number, where = ""): void {
    if (!this.#sameLength(actual, expected, where)) return;
    let error = 0;
    for (let i = 0; i < actual.length; i++) {
      const a = actual[i], b = expected[i] ?? NaN;
      const e = a === b || (Number.isNaN(a) && Number.isNaN(b)) ? 0 : Math.abs(a - b);
      // A comparison with NaN is false: this keeps a NaN on one side from passing.
      if (!(e <= tolerance)) this.#failed++;
      if (!(e <= error)) error = Number.isNaN(e) ? Infinity : e;
    }
    this.#compared += actual.length;
    this.#remember(error, tolerance, where);
  }

  /** Records an error that was worked out elsewhere. */
  error(error: number, tolerance: number, where = ""): void {
    this.close([error], [0], tolerance, where);
  }

  /** Compares values one by one, exactly. */
  equal(actual: ArrayLike<unknown>, expected: ArrayLike<unknown>, where = ""): void {
    if (!this.#sameLength(actual, expected, where)) return;
    for (let i = 0; i < actual.length; i++) this.same(actual[i], expected[i], where && `${where} [${i}]`);
  }

  /** Compares two values (JSON-like ones by content), exactly. */
  same(actual: unknown, expected: unknown, where = ""): void {
    this.#compared++;
    if (Object.is(actual, expected)) return;
    const a = canonical(actual), b = canonical(expected);
    if (a !== b) this.#differ(`${where && `${where}: `}${short(a)} where ${short(b)} is expected`);
  }

  #sameLength(actual: ArrayLike<unknown>, expected: ArrayLike<unknown>, where: string): boolean {
    if (actual.length === expected.length) return true;
    this.#compared++;
    this.#differ(`${where && `${where}: `}${actual.length} values where ${expected.length} are expected`);
    return false;
  }

  #differ(what: string): void {
    this.#different++;
    this.#firstDifference ||= what;
  }

  #remember(error: number, tolerance: number, where: string): void {
    const ratio = tolerance > 0 ? error / tolerance : error > 0 ? Infinity : 0;
    if (ratio > this.#worst.ratio) this.#worst = { ratio, error, tolerance, where };
  }

  /** The row of everything compared so far. A check that compared nothing fails. */
  row(group: string, name: string): Row {
    const compared = this.#compared;
    if (compared === 0) {
      return { group, name, error: NaN, tolerance: NaN, pass: false, compared, note: "nothing was compared" };
    }
    if (this.#different > 0) {
      return { group, name, error: this.#different, tolerance: 0, pass: false, compared, note: this.#firstDifference };
    }
    const { error, tolerance, where } = this.#worst;
    const pass = this.#failed === 0;
    const note = pass ? where : `${this.#failed} of ${compared} beyond the tolerance${where && `; worst in ${where}`}`;
    return { group, name, error, tolerance, pass, compared, note };
  }
}

/** JSON with sorted keys; undefined fields and null ones are the same. */
function canonical(value: unknown): string {
  return JSON.stringify(value, (_, v: unknown) => {
    if (typeof v === "number" && Number.isNaN(v)) return null;
    if (ArrayBuffer.isView(v)) return Array.from(v as Int32Array);
    if (typeof v !== "object" || v === null || Array.isArray(v)) return v;
    return Object.fromEntries(Object.entries(v).filter(([, f]) => f !== undefined && f !== null).sort());
  }) ?? "null";
}

function short(text: string): string {
  return text.length > 40 ? `${text.slice(0, 37)}…` : text;
}

/** Gathers rows and passes lines on as they come. */
export class Report {
  readonly rows: Row[] = [];
  #group = "";
  readonly #print: (line: string) => void;

  /** @param print Takes each line of the report. @default {nothing is printed} */
  constructor(print: (line: string) => void = () => {}) {
    this.#print = print;
  }

  /** Rows that did not pass. */
  get failed(): Row[] {
    return this.rows.filter((row) => !row.pass);
  }

  /** Runs a group of checks under its heading; an error that a check did not catch is a failing row. */
  async group(name: string, run: () => Promise<void>): Promise<void> {
    this.#group = name;
    this.#print(`\n${name}`);
    this.#print(`  ${"check".padEnd(nameWidth)} ${"worst error".padStart(11)} ${"tolerance".padStart(10)}  pass  note`);
    const start = performance.now(), before = this.rows.length;
    await this.attempt(`${name} as a whole`, run);
    const rows = this.rows.slice(before), failed = rows.filter((row) => !row.pass).length;
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    this.#print(`  ${rows.length} checks, ${failed} failed, ${seconds} s`);
  }

  /** A line that is no check, e.g. of something skipped. */
  line(text: string): void {
    this.#print(text);
  }

  /** Makes one row. If `run` throws, the row fails and says why. */
  async check(name: string, run: (check: Check) => void | Promise<void>): Promise<void> {
    const check = new Check();
    let row: Row;
    try {
      await run(check);
      row = check.row(this.#group, name);
    } catch (error) {
      row = this.#broken(name, error);
    }
    this.#add(row);
  }

  /** Runs steps that make rows of their own; only an error makes a row, a failing one. */
  async attempt(name: string, run: () => Promise<void>): Promise<void> {
    try {
      await run();
    } catch (error) {
      this.#add(this.#broken(name, error));
    }
  }

  #broken(name: string, error: unknown): Row {
    const note = (error instanceof Error ? error.message : String(error)).split("\n")[0];
    return { group: this.#group, name, error: NaN, tolerance: NaN, pass: false, compared: 0, note };
  }

  #add(row: Row): void {
    this.rows.push(row);
    this.#print(formatRow(row));
  }

  /** The last line: how many checks, how many failed. */
  summary(): string {
    return `${this.rows.length} checks, ${this.failed.length} failed`;
  }
}

const nameWidth = 70;

/** A row as a line with aligned columns. */
export function formatRow({ name, error, tolerance, pass, note }: Row): string {
  const number = (x: number) =>
    Number.isNaN(x) ? "–" : x === 0 ? "0" : x === Infinity ? "not finite" : x.toExponential(2);
  const bound = Number.isNaN(tolerance) ? "–" : tolerance === 0 ? "exact" : tolerance.toExponential(1);
  const line = `  ${name.padEnd(nameWidth)} ${number(error).padStart(11)} ${bound.padStart(10)}  ${
    pass ? "yes " : "FAIL"
  }`;
  return note ? `${line}  ${note}` : line;
}
