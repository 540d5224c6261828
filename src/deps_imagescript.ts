/**
 * Work-around: lets ImageScript load without the permission to run native code (`--allow-ffi`).
 *
 * Evidence: imagescript 1.3.1 requires `codecs/node/bin/<arch>-<platform>.node` when it is loaded, but uses it only to encode
 * JPEG, WebP and GIF. All that this project uses (PNG and JPEG decoding, PNG encoding, drawing, cropping) is JavaScript and
 * WebAssembly. So the native file is replaced by an empty module; a call of one of those encoders would throw. Must be
 * imported before imagescript. Delete it when ImageScript loads its native codecs on demand.
 *
 * @module
 */
import Module from "node:module";

type Loader = (module: { exports: unknown }, filename: string) => void;
const extensions = (Module as unknown as { _extensions: Record<string, Loader> })._extensions;
const load = extensions[".node"];
extensions[".node"] = (module, filename) => {
  if (filename.replaceAll("\\", "/").includes("/imagescript/")) module.exports = {};
  else load(module, filename);
};
