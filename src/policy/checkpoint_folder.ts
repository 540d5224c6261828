/**
 * A checkpoint's folder, local or behind a URL: whole small files, and weight files that are read in pieces.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import { type ByteSource, bytesSource, fileSource } from "./safetensors.ts";

/** A folder that files are read from by name. */
export class Folder {
  /** The folder as the user named it, without a slash at the end. */
  readonly where: string;
  readonly #base: URL | string;
  readonly #sha256: Readonly<Record<string, string>>;
  /** Weight files taken whole, so that checking the header and reading the tensors transfers them once. */
  readonly #whole = new Map<string, Uint8Array>();

  /**
   * @param source A local path, or a `file:`, `http:` or `https:` URL.
   * @param sha256 Sums in hexadecimal by file name; files named here are checked before use.
   */
  constructor(source: string | URL, sha256: Readonly<Record<string, string>>) {
    const isUrl = source instanceof URL || /^(https?|file):\/\//.test(source);
    this.where = String(source).replace(/(?<!^)\/+$/, "");
    this.#base = isUrl ? new URL(`${this.where}/`) : this.where;
    this.#sha256 = sha256;
  }

  get #remote(): boolean {
    return this.#base instanceof URL && this.#base.protocol !== "file:";
  }

  #path(name: string): string | URL {
    return this.#base instanceof URL ? new URL(name, this.#base) : `${this.#base}/${name}`;
  }

  /**
   * A whole file, or undefined if there is none.
   *
   * @throws {InputError} It cannot be fetched, or its sum is another.
   */
  async bytes(name: string): Promise<Uint8Array | undefined> {
    const bytes = this.#remote ? await fetchBytes(this.#path(name)) : await readBytes(this.#path(name));
    if (bytes && Object.hasOwn(this.#sha256, name)) await checkSum(bytes, this.#sha256[name], `${this.where}/${name}`);
    return bytes;
  }

  /** A whole file as text, or undefined if there is none. */
  async text(name: string): Promise<string | undefined> {
    const bytes = await this.bytes(name);
    return bytes && new TextDecoder().decode(bytes);
  }

  /** A file to be read in pieces, or undefined if there is none. Remote files and those with a sum are taken whole. */
  async open(name: string): Promise<ByteSource | undefined> {
    if (!this.#remote && !Object.hasOwn(this.#sha256, name)) return await fileSource(this.#path(name));
    const bytes = this.#whole.get(name) ?? await this.bytes(name);
    if (bytes) this.#whole.set(name, bytes);
    return bytes && bytesSource(bytes);
  }

  /** Lets go of a file that was taken whole. */
  forget(name: string): void {
    this.#whole.delete(name);
  }
}

/** Whether an error says that a path does not exist. */
export function isMissing(error: unknown): boolean {
  return error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory;
}

async function readBytes(path: string | URL): Promise<Uint8Array<ArrayBuffer> | undefined> {
  try {
    return await Deno.readFile(path);
  } catch (error) {
    if (isMissing(error)) return undefined;
    throw error;
  }
}

async function fetchBytes(url: string | URL): Promise<Uint8Array<ArrayBuffer> | undefined> {
  let response: Response;
  try {
    response = await fetch(url);
  } catch (error) {
    // A refused permission is not the network's fault: its own message says what to allow.
    if (error instanceof Deno.errors.NotCapable) throw error;
    throw new InputError(`${url}: cannot be fetched (${error instanceof Error ? error.message : error})`);
  }
  if (response.ok) return new Uint8Array(await response.arrayBuffer());
  await response.body?.cancel();
  if (response.status === 404 || response.status === 410) return undefined;
  throw new InputError(`${url}: the server answers ${response.status} ${response.statusText}`);
}

async function checkSum(bytes: Uint8Array<ArrayBuffer>, expected: string, where: string): Promise<void> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const sum = [...digest].map((b) => b.toString(16).padStart(2, "0")).join("");
  if (sum !== expected.toLowerCase()) {
    throw new InputError(
      `${where}: SHA-256 is ${sum}, expected ${expected}; the file was altered or cut, fetch it again`,
    );
  }
}
