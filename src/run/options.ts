/**
 * Options: one table says what each option is, and everything else follows from it: the type of the record, the command
 * line, `--help`, the defaults, and the checks of a record that a program passes.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { InputError } from "./errors.ts";

/** Types of option values by kind; `integers` is a comma-separated list on the command line. */
interface Kinds {
  string: string;
  choice: string;
  integer: number;
  number: number;
  integers: number[];
  boolean: boolean;
}

/** What one option is. */
export interface OptionSpec {
  readonly kind: keyof Kinds;
  /** One line for `--help`; the same words as the field's doc comment. */
  readonly help: string;
  /** What holds when the option isn't given; undefined for none. */
  readonly default?: string | number | boolean | readonly number[];
  /** Shown in `--help` in place of a default that is worked out later, e.g. "2 for mgpo, otherwise 1". */
  readonly defaultText?: string;
  /** The allowed values, for `choice`. */
  readonly choices?: readonly string[];
  /** The smallest allowed number (of each element). */
  readonly min?: number;
  /** The largest allowed number (of each element). */
  readonly max?: number;
  /** Whether `min` itself is not allowed. */
  readonly above?: boolean;
  /** What `--help` writes for the value. @default {"N", "X", "NAME"… by kind} */
  readonly value?: string;
}

/** Options by camelCase name; on the command line `maxNewTokens` is `--max-new-tokens`. */
export type OptionTable = Readonly<Record<string, OptionSpec>>;

type ValueOf<S extends OptionSpec> = S["choices"] extends readonly (infer C)[] ? C : Kinds[S["kind"]];
type IsSet<S extends OptionSpec> = S extends { readonly default: unknown } ? true : false;

/** The record that a table describes: options with a default are always there. */
export type OptionValues<T extends OptionTable> =
  & { -readonly [K in keyof T as IsSet<T[K]> extends true ? K : never]: ValueOf<T[K]> }
  & { -readonly [K in keyof T as IsSet<T[K]> extends true ? never : K]?: ValueOf<T[K]> };

/** Declares a table; keeps the literal types. */
export function optionTable<const T extends OptionTable>(table: T): T {
  return table;
}

/** `maxNewTokens` → `--max-new-tokens`. */
export function flagOf(key: string): string {
  return "--" + key.replace(/[A-Z]/g, (letter) => "-" + letter.toLowerCase());
}

/**
 * Reads a command line by a table. `--flag value` and `--flag=value` are the same; booleans are `--flag` and `--no-flag`.
 * The last of several wins.
 *
 * @returns Only the options that were given.
 * @throws {InputError} naming the option: unknown, without a value, or with an impossible one; or a stray argument.
 */
export function parseCommandLine<const T extends OptionTable>(
  table: T,
  args: readonly string[],
): Partial<OptionValues<T>> {
  const specs = new Map<string, [key: string, spec: OptionSpec]>();
  const types: Record<string, { type: "string" | "boolean" }> = {};
  for (const [key, spec] of Object.entries(table)) {
    const flag = flagOf(key);
    specs.set(flag, [key, spec]);
    types[flag.slice(2)] = { type: spec.kind === "boolean" ? "boolean" : "string" };
    if (spec.kind === "boolean") specs.set("--no-" + flag.slice(2), [key, spec]);
  }
  // Not strict: node's own messages don't say what to do, and it takes "--run --resume" as the value "--resume".
  const { tokens } = parseArgs({
    args: [...args],
    options: types,
    strict: false,
    allowPositionals: true,
    tokens: true,
  });
  const given: Record<string, unknown> = {};
  for (const token of tokens) {
    if (token.kind === "positional") {
      throw new InputError(`${token.value}: stray argument; every option has a name (--help lists them)`);
    }
    if (token.kind !== "option") continue;
    const found = specs.get(token.rawName);
    if (!found) throw new InputError(`${token.rawName}: unknown option${suggestion(token.rawName, specs.keys())}`);
    const [key, spec] = found;
    given[key] = readValue(token.rawName, spec, token.value);
  }
  return given as Partial<OptionValues<T>>;
}

/** The value of one flag as given. */
function readValue(flag: string, spec: OptionSpec, text: string | undefined): Kinds[keyof Kinds] {
  if (spec.kind === "boolean") {
    if (text !== undefined) throw new InputError(`${flag}=${text}: takes no value; write ${flag} alone`);
    return flag.startsWith("--no-") ? false : true;
  }
  if (text === undefined || text === "" || text.startsWith("--")) {
    throw new InputError(`${flag}: needs a value: ${expectation(spec)}`);
  }
  const value = spec.kind === "integers"
    ? text.split(",").map(toNumber)
    : spec.kind === "integer" || spec.kind === "number"
    ? toNumber(text)
    : text;
  if (!isPossible(spec, value)) throw new InputError(`${flag} ${text}: must be ${expectation(spec)}`);
  return value;
}

/** `Number`, but nothing for blanks, which it reads as 0. */
function toNumber(text: string): number {
  return text.trim() === "" ? NaN : Number(text);
}

/** Whether a value is one that the option may have. */
function isPossible(spec: OptionSpec, value: unknown): boolean {
  const inRange = (x: unknown) =>
    typeof x === "number" && Number.isFinite(x) && (spec.kind === "number" || Number.isSafeInteger(x)) &&
    (spec.min === undefined || (spec.above ? x > spec.min : x >= spec.min)) &&
    (spec.max === undefined || x <= spec.max);
  switch (spec.kind) {
    case "string":
      return typeof value === "string" && value !== "";
    case "choice":
      return typeof value === "string" && (spec.choices ?? []).includes(value);
    case "boolean":
      return typeof value === "boolean";
    case "integer":
    case "number":
      return inRange(value);
    case "integers":
      return Array.isArray(value) && value.length > 0 && value.every(inRange);
  }
}

/** What an option takes, in words. */
function expectation(spec: OptionSpec): string {
  const { kind, min, max, above } = spec;
  const range = min !== undefined && max !== undefined
    ? ` ${above ? "above" : "from"} ${min} ${above ? "and up to" : "to"} ${max}`
    : min !== undefined
    ? above ? ` above ${min}` : ` of at least ${min}`
    : max !== undefined
    ? ` of at most ${max}`
    : "";
  switch (kind) {
    case "string":
      return "a text";
    case "choice":
      return (spec.choices ?? []).join(" or ").replace(/ or (?=.* or )/g, ", ");
    case "boolean":
      return "true or false";
    case "integer":
      return `a whole number${range}`;
    case "number":
      return `a number${range}`;
    case "integers":
      return `whole numbers${range}, with commas between`;
  }
}

/**
 * Checks a record that a program passed and fills in the defaults.
 *
 * @throws {InputError} naming the option that is unknown or has an impossible value.
 */
export function resolveOptions<const T extends OptionTable>(
  table: T,
  given: Readonly<Record<string, unknown>>,
): OptionValues<T> {
  const out: Record<string, unknown> = {};
  for (const [key, spec] of Object.entries(table)) if (spec.default !== undefined) out[key] = spec.default;
  for (const [key, value] of Object.entries(given)) {
    const spec = Object.hasOwn(table, key) ? table[key] : undefined;
    if (!spec) throw new InputError(`${key}: unknown option${suggestion(key, Object.keys(table))}`);
    if (value === undefined) continue;
    if (!isPossible(spec, value)) {
      throw new InputError(`${key} = ${JSON.stringify(value)}: must be ${expectation(spec)}`);
    }
    out[key] = value;
  }
  return out as OptionValues<T>;
}

/** `--help`: a usage line and a line or two for each option, with its default. */
export function helpText(usage: string, ...sections: [title: string, table: OptionTable][]): string {
  const lines = [usage];
  for (const [title, table] of sections) {
    lines.push("", `${title}:`);
    for (const [key, spec] of Object.entries(table)) {
      const head = spec.kind === "boolean" ? flagOf(key) : `${flagOf(key)} ${spec.value ?? placeholder(spec)}`;
      const about = `${spec.help} [${defaultOf(spec)}]`;
      if (head.length <= 28) lines.push(`  ${head.padEnd(30)}${about}`);
      else lines.push(`  ${head}`, " ".repeat(32) + about);
    }
  }
  return lines.join("\n");
}

function defaultOf(spec: OptionSpec): string {
  if (spec.defaultText !== undefined) return `default: ${spec.defaultText}`;
  if (spec.kind === "boolean") return spec.default ? "default: on; --no-… turns it off" : "default: off";
  return spec.default === undefined ? "no default" : `default: ${spec.default}`;
}

function placeholder(spec: OptionSpec): string {
  return {
    string: "TEXT",
    choice: (spec.choices ?? []).join("|"),
    integer: "N",
    number: "X",
    integers: "N,N",
    boolean: "",
  }[spec.kind];
}

/** "; did you mean X?" for a near miss, otherwise a pointer to `--help`. */
function suggestion(name: string, known: Iterable<string>): string {
  let best = "", bestDistance = 3;
  for (const candidate of known) {
    const distance = editDistance(name, candidate);
    if (distance < bestDistance) [best, bestDistance] = [candidate, distance];
  }
  return best ? `; did you mean ${best}?` : name.startsWith("-") ? "; --help lists them all" : "";
}

/** Levenshtein distance. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length];
}
