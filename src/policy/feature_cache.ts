/**
 * Features of pictures, kept by content while the vision tower rests.
 *
 * @module
 */
import type { tf } from "../deps.ts";

/** Owns the features that it is given; the least recently used go first. */
export class FeatureCache {
  #byKey = new Map<string, tf.Tensor2D>();
  #rows = 0;

  /** @param maxRows The most rows of features, over all pictures, that {@linkcode trim} leaves. */
  constructor(readonly maxRows: number) {}

  /** The features of a picture, `[M, D]`, still owned by the cache. */
  get(key: string): tf.Tensor2D | undefined {
    const found = this.#byKey.get(key);
    if (found) {
      this.#byKey.delete(key);
      this.#byKey.set(key, found);
    }
    return found;
  }

  /** Takes over the features of a picture that it does not have. */
  set(key: string, features: tf.Tensor2D): void {
    this.#byKey.set(key, features);
    this.#rows += features.shape[0];
  }

  /** Drops the oldest entries beyond the bound; never called while entries are in use. */
  trim(): void {
    for (const [key, features] of this.#byKey) {
      if (this.#rows <= this.maxRows) return;
      this.#byKey.delete(key);
      this.#rows -= features.shape[0];
      features.dispose();
    }
  }

  /** Releases everything. */
  clear(): void {
    for (const features of this.#byKey.values()) features.dispose();
    this.#byKey.clear();
    this.#rows = 0;
  }
}
