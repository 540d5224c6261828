/**
 * Errors that a user's input caused.
 *
 * @module
 */

/**
 * Something outside the program was wrong: a file, an option, a dataset row, the machine. The message says in one line what
 * was wrong, where, and what to do; tasks print it alone, without a stack, and exit with status 1.
 */
export class InputError extends Error {
  /** What stands before the message where an error is printed with its stack. */
  override name = "InputError";
}
