/**
 * The internal functions that several kernels of the module call.
 *
 * @module
 */
import type { Callable } from "./asm.ts";
import { emitLaneParts, type LaneParts } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import { emitPackColumns, emitPackRows, type Pack } from "./pack.ts";
import { type Block, emitBlock } from "./tiles.ts";

/** What `emitParts` adds. */
export interface Parts extends LaneParts {
  /** Natural logarithm, from the host: one call a row, so its speed does not matter. */
  readonly log: Callable<readonly ["f64"], "f64">;
  readonly blockRows: Block;
  readonly blockColumns: Block;
  readonly packRows: Pack;
  readonly packColumns: Pack;
}

/** Adds the shared functions; call it first, because it declares the import. Also exports `zero(address, bytes)`. */
export function emitParts(m: ModuleBuilder): Parts {
  const log = m.import("log", ["f64"], "f64");
  m.function("zero", ["i32", "i32"], (f, address, bytes) => f.zero(address, bytes), { exported: true });
  return {
    log,
    ...emitLaneParts(m),
    blockRows: emitBlock(m, "rows"),
    blockColumns: emitBlock(m, "columns"),
    packRows: emitPackRows(m),
    packColumns: emitPackColumns(m),
  };
}
