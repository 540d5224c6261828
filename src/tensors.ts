/**
 * The tensor types that the public API speaks of: those of the TensorFlow.js that the project pins, by names of its own, so that
 * a user who annotates with them needs no import of TensorFlow.js (and cannot get another version of it).
 *
 * @module
 */
import type { tf } from "./deps.ts";

/** A tensor of any rank on the current backend; whoever owns it releases it with `dispose()`. */
export type Tensor = tf.Tensor;

/** A tensor of shape `[]`. */
export type Scalar = tf.Scalar;

/** A tensor of shape `[n]`. */
export type Tensor1D = tf.Tensor1D;

/** A tensor of shape `[n, m]`. */
export type Tensor2D = tf.Tensor2D;

/** A tensor that training changes in place with `assign`. */
export type Variable = tf.Variable;
