/**
 * Every third-party import of the project, pinned exactly, and nothing else. A module that is imported from a URL has no
 * import map, so these are inline `npm:` specifiers; all other files import this one relatively.
 *
 * - `@tensorflow/tfjs` and its backends: tensors, gradients, the plain kernels.
 * - `imagescript`: PNG and JPEG decoding, cropping, drawing.
 * - `@huggingface/tokenizers`, `@huggingface/jinja`: tokenizer.json and chat templates exactly as transformers reads them.
 * - `linear-sum-assignment`: one-to-one matching of points at least cost, for the counting reward.
 *
 * @module
 */
export * as tf from "npm:@tensorflow/tfjs@4.22.0";
export * as tfwasm from "npm:@tensorflow/tfjs-backend-wasm@4.22.0";
export * as tfwebgpu from "npm:@tensorflow/tfjs-backend-webgpu@4.22.0";
import "./deps_imagescript.ts";
export { Image } from "npm:imagescript@1.3.1";
export { Tokenizer as HFTokenizer } from "npm:@huggingface/tokenizers@0.2.0";
export { Template } from "npm:@huggingface/jinja@0.5.11";
export { linearSumAssignment } from "npm:linear-sum-assignment@1.0.9";
