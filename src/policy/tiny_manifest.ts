/**
 * SHA-256 of each file of the embedded policy: assets are not covered by the lock file. Written by `deno task pretrain`.
 *
 * @module
 */
export const tinySha256: Readonly<Record<string, string>> = {};
