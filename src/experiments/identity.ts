/**
 * Names of results by their content: a hash of everything that decides them. A finished run with the same name need not be
 * repeated, whatever experiment asks for it.
 *
 * @module
 */
import { createHash } from "node:crypto";
import { tinySha256 } from "../policy/tiny_manifest.ts";
import { InputError } from "../run/errors.ts";
import type { OptionTable } from "../run/options.ts";

/** A hash of a JSON value, whatever the order of its keys: 12 hexadecimal digits. */
export function contentHash(value: unknown): string {
  return createHash("sha256").update(canonicalJson(value)).digest("hex").slice(0, 12);
}

/** JSON with sorted keys; what is undefined is left out. */
export function canonicalJson(value: unknown): string {
  return JSON.stringify(
    value,
    (_, item) =>
      typeof item === "object" && item !== null && !Array.isArray(item)
        ? Object.fromEntries(Object.entries(item).sort(([a], [b]) => a < b ? -1 : 1))
        : item,
  );
}

/**
 * Settings without those that have their table's default: an option that the program learns later, and whose default changes
 * nothing, then leaves the names of older results as they are.
 */
export function withoutDefaults(
  table: OptionTable,
  settings: Readonly<Record<string, unknown>>,
): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(settings).filter(([key, value]) =>
      value !== undefined && canonicalJson(value) !== canonicalJson(table[key]?.default ?? null)
    ),
  );
}

/**
 * A hash of a policy's weights, words and configuration.
 *
 * @param source `tiny`, or the path of a folder.
 * @throws {InputError} if there is no such folder, or it is empty.
 */
export async function policyHash(source: string): Promise<string> {
  if (source === "tiny") return contentHash(tinySha256);
  const hashes: Record<string, string> = {};
  try {
    for await (const { name, isFile } of Deno.readDir(source)) {
      // The optimizer's state decides nothing for who starts from the weights.
      if (isFile && !["optimizer.safetensors", "state.json"].includes(name)) {
        hashes[name] = await fileHash(`${source}/${name}`);
      }
    }
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) {
      throw new InputError(`no policy folder "${source}"`);
    }
    throw error;
  }
  if (Object.keys(hashes).length === 0) throw new InputError(`policy folder "${source}" is empty`);
  return contentHash(hashes);
}

/** SHA-256 of a file of any size. */
async function fileHash(path: string): Promise<string> {
  const hash = createHash("sha256"), file = await Deno.open(path);
  for await (const chunk of file.readable) hash.update(chunk);
  return hash.digest("hex");
}
