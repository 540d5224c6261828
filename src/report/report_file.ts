/**
 * Writing the report's file.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { writeAtomically } from "../run/run_folder.ts";

/**
 * Writes a report, whole or not at all.
 *
 * @throws {InputError} if there is no such folder, or the place is a folder.
 */
export async function writeReport(path: string, html: string): Promise<void> {
  try {
    await writeAtomically(path, html);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) {
      throw new InputError(`--out ${path}: there is no such folder; make it first`);
    }
    if (error instanceof Deno.errors.IsADirectory || error instanceof Deno.errors.NotADirectory) {
      throw new InputError(`--out ${path}: must name a file, not a folder`);
    }
    throw error;
  }
}
