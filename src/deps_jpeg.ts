/**
 * Third-party import for writing JPEG pictures, which only runs that keep rollouts need (ImageScript's own encoder is native code).
 *
 * - `@jsquash/jpeg`: Squoosh's MozJPEG as WebAssembly.
 *
 * @module
 */
export { encode as encodeJpeg } from "npm:@jsquash/jpeg@1.6.0";
