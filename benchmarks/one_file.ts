/**
 * Work-around: lets ImageScript load from a bundle, beside which its native codecs do not lie. Like `src/deps_imagescript.ts`, whose
 * evidence it shares: nothing here uses those codecs, so what cannot be found is replaced by an empty module. Must be imported before
 * everything else. Delete it together with that file.
 *
 * @module
 */
import Module from "node:module";

type Load = (this: unknown, request: string, ...rest: unknown[]) => unknown;
const internals = Module as unknown as { _load: Load };
const load = internals._load;
internals._load = function (request, ...rest) {
  try {
    return load.call(this, request, ...rest);
  } catch (error) {
    if (/^\.\/bin\/[\w-]+\.node$/.test(request)) return {};
    throw error;
  }
};
