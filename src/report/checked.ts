/**
 * Looking into JSON that may be anything: a value of the expected kind, or nothing.
 *
 * @module
 */

/** An object with unknown contents. */
export type Json = Readonly<Record<string, unknown>>;

/** An object that isn't a list; undefined for anything else. */
export function asObject(value: unknown): Json | undefined {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? value as Json : undefined;
}

/** A list; empty for anything else. */
export function asList(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}

/** A text; undefined for anything else. */
export function asText(value: unknown): string | undefined {
  return typeof value === "string" ? value : undefined;
}

/** A finite number; undefined for anything else. */
export function asNumber(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}

/** A whole number that is not negative; undefined for anything else. */
export function asCount(value: unknown): number | undefined {
  return Number.isSafeInteger(value) && (value as number) >= 0 ? value as number : undefined;
}

/** A list of exactly so many finite numbers; undefined for anything else. */
export function asNumbers(value: unknown, count: number): number[] | undefined {
  const numbers = asList(value).map(asNumber);
  return numbers.length === count && numbers.every((x) => x !== undefined) ? numbers as number[] : undefined;
}
