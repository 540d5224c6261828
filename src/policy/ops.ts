/**
 * The differentiable operations that a Qwen2.5-VL is made of, on packed tokens (`[N, …]`, no padding; segments say which
 * tokens belong together). Each has a plain form in tfjs operations and, where the backend has one registered, a fused
 * kernel (`Mgpo…`) with its own gradient; {@linkcode useKernels} chooses. Tests hold the two equal.
 *
 * @module
 */
import { tf } from "../deps.ts";

/** Which implementation {@linkcode useKernels} selects. */
export type Kernels = "plain" | "fused";
let kernels: Kernels = "fused";

/**
 * Chooses between plain tfjs operations and fused kernels for all later calls. `fused` uses a fused kernel where the current
 * backend has one and plain operations elsewhere.
 */
export function useKernels(choice: Kernels): void {
  if (choice !== "plain" && choice !== "fused") {
    throw new RangeError(`kernels must be "plain" or "fused", got ${JSON.stringify(choice)}`);
  }
  kernels = choice;
}

/** The current choice of {@linkcode useKernels}. */
export function currentKernels(): Kernels {
  return kernels;
}

/** Whether the fused kernel of that name is to be used now. */
export function hasFused(name: string): boolean {
  return kernels === "fused" && tf.getKernel(name, tf.getBackend()) !== undefined;
}

type Attrs = Record<string, number | boolean | number[]>;

/** Runs a registered kernel. */
export function run(name: string, inputs: Record<string, tf.Tensor>, attrs: Attrs = {}): tf.Tensor | tf.Tensor[] {
  return tf.engine().runKernel(name, inputs as unknown as tf.NamedTensorMap, attrs) as tf.Tensor | tf.Tensor[];
}
const run1 = <T extends tf.Tensor>(name: string, inputs: Record<string, tf.Tensor>, attrs: Attrs = {}): T =>
  run(name, inputs, attrs) as T;
const runMany = (name: string, inputs: Record<string, tf.Tensor>, attrs: Attrs = {}): tf.Tensor[] =>
  run(name, inputs, attrs) as tf.Tensor[];

// tf.customGrad is typed for one shape only; these two lines are the seam where the types are restated.
type Save = (tensors: tf.Tensor[]) => void;
type GradResult = { value: tf.Tensor; gradFunc: (dy: tf.Tensor, saved: tf.Tensor[]) => tf.Tensor[] };
function custom<T extends tf.Tensor>(inputs: tf.Tensor[], f: (inputs: tf.Tensor[], save: Save) => GradResult): T {
  const op = tf.customGrad(
    ((...args: unknown[]) => {
      const save = args[args.length - 1] as Save;
      return f(args.slice(0, -1) as tf.Tensor[], save);
    }) as unknown as Parameters<typeof tf.customGrad>[0],
  );
  return op(...inputs) as T;
}

/** `a·b` of rank 2 with optional transposes; the wasm backend multiplies 15 times faster after an explicit transpose. */
export function matMul(a: tf.Tensor2D, b: tf.Tensor2D, transposeA = false, transposeB = false): tf.Tensor2D {
  if (hasFused("MgpoMatMul")) return run1("MgpoMatMul", { a, b }, { transposeA, transposeB });
  if (tf.getBackend() !== "wasm") return tf.matMul(a, b, transposeA, transposeB);
  return tf.tidy(() => tf.matMul(transposeA ? tf.transpose(a) : a, transposeB ? tf.transpose(b) : b));
}

/**
 * A linear layer, `x·wᵀ + bias`.
 *
 * @param x `[N, I]`
 * @param w `[O, I]`, as checkpoints store it
 * @param bias `[O]`
 * @returns `[N, O]`
 */
export function linear(x: tf.Tensor2D, w: tf.Tensor2D, bias?: tf.Tensor1D): tf.Tensor2D {
  const inputs: tf.Tensor[] = bias ? [x, w, bias] : [x, w];
  return custom<tf.Tensor2D>(inputs, ([x, w, bias], save) => {
    save([x, w]);
    let value: tf.Tensor;
    if (bias && hasFused("MgpoMatMul")) {
      value = run1("MgpoMatMul", { a: x, b: w, bias }, { transposeA: false, transposeB: true });
    } else {
      value = matMul(x as tf.Tensor2D, w as tf.Tensor2D, false, true);
      if (bias) value = tf.add(value, bias);
    }
    const gradFunc = (dy: tf.Tensor, [x, w]: tf.Tensor[]) => {
      const grads = [
        matMul(dy as tf.Tensor2D, w as tf.Tensor2D) as tf.Tensor,
        matMul(dy as tf.Tensor2D, x as tf.Tensor2D, true, false),
      ];
      if (bias) grads.push(hasFused("MgpoColSum") ? run1("MgpoColSum", { x: dy }) : tf.sum(dy, 0));
      return grads;
    };
    return { value, gradFunc };
  });
}

/**
 * Root-mean-square norm, `x / sqrt(mean(x²) + eps) · w` over the last axis.
 *
 * @param x `[N, D]`
 * @param w `[D]`
 */
export function rmsNorm(x: tf.Tensor2D, w: tf.Tensor1D, eps: number): tf.Tensor2D {
  if (!hasFused("MgpoRmsNorm")) {
    return tf.tidy(() => tf.mul(tf.mul(x, tf.rsqrt(tf.add(tf.mean(tf.square(x), -1, true), eps))), w) as tf.Tensor2D);
  }
  return custom<tf.Tensor2D>([x, w], ([x, w], save) => {
    const [value, rstd] = runMany("MgpoRmsNorm", { x, w }, { eps });
    save([x, w, rstd]);
    return { value, gradFunc: (dy, [x, w, rstd]) => runMany("MgpoRmsNormGrad", { x, w, rstd, dy }) };
  });
}

/** `silu(gate)·up`, both `[N, M]`. */
export function swiglu(gate: tf.Tensor2D, up: tf.Tensor2D): tf.Tensor2D {
  if (!hasFused("MgpoSwiGLU")) return tf.tidy(() => tf.mul(tf.mul(gate, tf.sigmoid(gate)), up) as tf.Tensor2D);
  return custom<tf.Tensor2D>([gate, up], ([gate, up], save) => {
    save([gate, up]);
    return {
      value: run1("MgpoSwiGLU", { gate, up }),
      gradFunc: (dy, [gate, up]) => runMany("MgpoSwiGLUGrad", { gate, up, dy }),
    };
  });
}

/** The exact (erf) GELU. */
export function gelu(x: tf.Tensor2D): tf.Tensor2D {
  if (!hasFused("MgpoGelu")) {
    return tf.tidy(() => tf.mul(tf.mul(x, 0.5), tf.add(tf.erf(tf.mul(x, Math.SQRT1_2)), 1)) as tf.Tensor2D);
  }
  return custom<tf.Tensor2D>([x], ([x], save) => {
    save([x]);
    return { value: run1("MgpoGelu", { x }), gradFunc: (dy, [x]) => [run1("MgpoGeluGrad", { x, dy })] };
  });
}

/** The `[d, d]` matrix R with `x·R = concat(−x[d/2:], x[:d/2])`. */
function rotateHalfMatrix(d: number): tf.Tensor2D {
  const m = new Float32Array(d * d), half = d / 2;
  for (let i = 0; i < half; i++) {
    m[(i + half) * d + i] = -1;
    m[i * d + i + half] = 1;
  }
  return tf.tensor2d(m, [d, d]);
}

/**
 * Rotary position embedding, `x·cos + rotateHalf(x)·sin`.
 *
 * @param x `[N, H, d]`
 * @param cos `[N, d]`, no gradient
 * @param sin `[N, d]`, no gradient
 */
export function rope(x: tf.Tensor3D, cos: tf.Tensor2D, sin: tf.Tensor2D): tf.Tensor3D {
  if (!hasFused("MgpoRope")) {
    return tf.tidy(() => {
      const [n, h, d] = x.shape;
      const rotated = tf.reshape(tf.matMul(tf.reshape(x, [n * h, d]) as tf.Tensor2D, rotateHalfMatrix(d)), [n, h, d]);
      const c = tf.reshape(cos, [n, 1, d]), s = tf.reshape(sin, [n, 1, d]);
      return tf.add(tf.mul(x, c), tf.mul(rotated, s)) as tf.Tensor3D;
    });
  }
  return custom<tf.Tensor3D>([x], ([x], save) => {
    save([cos, sin]);
    return {
      value: run1("MgpoRope", { x, cos, sin }, { inverse: false }),
      gradFunc: (dy, [cos, sin]) => [run1("MgpoRope", { x: dy, cos, sin }, { inverse: true })],
    };
  });
}

const toIndex = (index: ArrayLike<number>): tf.Tensor1D =>
  tf.tensor1d(index instanceof Int32Array ? index : Int32Array.from(index), "int32");

function gatherPlain(x: tf.Tensor2D, index: ArrayLike<number>): tf.Tensor2D {
  let missing = false;
  const at = new Int32Array(index.length);
  for (let i = 0; i < at.length; i++) {
    at[i] = index[i] < 0 ? x.shape[0] : index[i];
    if (index[i] < 0) missing = true;
  }
  const source = missing ? tf.concat([x, tf.zeros([1, x.shape[1]])], 0) as tf.Tensor2D : x;
  return tf.gather(source, toIndex(at)) as tf.Tensor2D;
}

/** Sums rows with equal index, in row order, without atomics: a 0/1 matrix times `x`. */
function scatterAddPlain(x: tf.Tensor2D, index: ArrayLike<number>, rows: number): tf.Tensor2D {
  const slot = new Int32Array(rows).fill(-1);
  const first: number[] = [];
  let repeated = false;
  for (let i = 0; i < index.length; i++) {
    const r = index[i];
    if (r < 0) continue;
    if (slot[r] < 0) slot[r] = first.push(i) - 1;
    else repeated = true;
  }
  if (first.length === 0) return tf.zeros([rows, x.shape[1]]);
  if (!repeated) return gatherPlain(x, slot.map((s) => s < 0 ? -1 : first[s]));
  const used = first.length, one = new Float32Array(used * index.length);
  for (let i = 0; i < index.length; i++) if (index[i] >= 0) one[slot[index[i]] * index.length + i] = 1;
  return gatherPlain(tf.matMul(tf.tensor2d(one, [used, index.length]), x) as tf.Tensor2D, slot);
}

/**
 * Rows of a matrix by index; −1 gives a row of zeros. The gradient sums rows with equal index in a fixed order.
 *
 * @param x `[N, D]`
 * @param index M integers in [−1, N)
 * @returns `[M, D]`
 */
export function gatherRows(x: tf.Tensor2D, index: ArrayLike<number>): tf.Tensor2D {
  return custom<tf.Tensor2D>([x], ([x], save) => {
    save([]);
    const rows = x.shape[0];
    const value = hasFused("MgpoGatherRows")
      ? run1("MgpoGatherRows", { x, index: toIndex(index) })
      : gatherPlain(x as tf.Tensor2D, index);
    const gradFunc = (dy: tf.Tensor) => [
      hasFused("MgpoScatterAddRows")
        ? run1("MgpoScatterAddRows", { x: dy, index: toIndex(index) }, { rows })
        : tf.tidy(() => scatterAddPlain(dy as tf.Tensor2D, index, rows)),
    ];
    return { value, gradFunc };
  });
}

/** Where packed tokens are cut into sequences that attend within themselves. */
export interface Segments {
  /** Starts of the segments and the total at the end: `S + 1` increasing integers from 0 to N. */
  readonly cu: Int32Array;
}

/** Segments from their lengths. */
export function segmentsOf(lengths: readonly number[]): Segments {
  const cu = new Int32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) cu[i + 1] = cu[i] + lengths[i];
  return { cu };
}

/** The largest score tensor that plain attention makes at once, in elements (128 MiB). */
const MAX_SCORES = 1 << 25;

/** Plain attention on `[U, R, d]` queries and `[U, L, d]` keys, chunked so that no score tensor exceeds {@linkcode MAX_SCORES}. */
function attendUnits(
  q: tf.Tensor3D,
  k: tf.Tensor3D,
  v: tf.Tensor3D,
  mask: (units: number, from: number) => tf.Tensor | null,
  scale: number,
): tf.Tensor3D {
  const [units, rows] = q.shape, length = k.shape[1];
  const step = Math.max(1, Math.floor(MAX_SCORES / (rows * length)));
  const parts: tf.Tensor3D[] = [];
  for (let u = 0; u < units; u += step) {
    const n = Math.min(step, units - u);
    const cut = (x: tf.Tensor3D) => n === units ? x : tf.slice(x, [u, 0, 0], [n, -1, -1]);
    let scores: tf.Tensor = tf.mul(tf.matMul(cut(q), cut(k), false, true), scale);
    const bias = mask(n, u);
    if (bias) scores = tf.add(scores, bias);
    parts.push(tf.matMul(tf.softmax(scores), cut(v)) as tf.Tensor3D);
  }
  return parts.length === 1 ? parts[0] : tf.concat(parts, 0);
}

const MASKED = -1e9;

/** Packed tokens laid out as S sequences of equal length, and back. */
interface Padding {
  /** Tokens of each padded sequence. */
  readonly length: number;
  /** The token at each padded place, −1 for none; null where packed tokens already lie so. */
  readonly pad: number[] | null;
  /** The padded place of each token. */
  readonly back: Int32Array;
}

/** Padding of segments to the longest of them, at their starts or at their ends. */
function paddingOf({ cu }: Segments, atStart: boolean): Padding {
  const count = cu.length - 1, lengths = Array.from({ length: count }, (_, s) => cu[s + 1] - cu[s]);
  const length = lengths.reduce((most, n) => Math.max(most, n), 0), back = new Int32Array(cu[count]);
  if (lengths.every((n) => n === length)) return { length, pad: null, back };
  const pad: number[] = new Array(count * length).fill(-1);
  for (let s = 0; s < count; s++) {
    const from = s * length + (atStart ? length - lengths[s] : 0);
    for (let i = 0; i < lengths[s]; i++) pad[back[cu[s] + i] = from + i] = cu[s] + i;
  }
  return { length, pad, back };
}

/** The causal mask of padded scores, `[1, group·rows, columns]`: row i sees columns up to i + columns − rows. */
function triangleOf(group: number, rows: number, columns: number): tf.Tensor3D {
  const m = new Float32Array(group * rows * columns), more = columns - rows;
  for (let r = 0; r < group * rows; r++) {
    m.fill(MASKED, r * columns + Math.min((r % rows) + more + 1, columns), (r + 1) * columns);
  }
  return tf.tensor3d(m, [1, group * rows, columns]);
}

/** `[units, 1, columns]`: masks the padding of the keys of `units` units from `from` on. */
function paddingMask({ length, pad }: Padding, kvHeads: number, units: number, from: number): tf.Tensor3D {
  const mask = new Float32Array(units * length);
  for (let u = 0; u < units; u++) {
    const s = Math.floor((from + u) / kvHeads);
    for (let j = 0; j < length; j++) if (pad![s * length + j] < 0) mask[u * length + j] = MASKED;
  }
  return tf.tensor3d(mask, [units, 1, length]);
}

function attentionPlain(
  q: tf.Tensor3D,
  k: tf.Tensor3D,
  v: tf.Tensor3D,
  segments: Segments,
  causal: boolean,
  scale: number,
  keys: Segments,
): tf.Tensor3D {
  const [total, heads, d] = q.shape, kvHeads = k.shape[1], group = heads / kvHeads, count = segments.cu.length - 1;
  // Padding at the starts lets one triangle serve segments whose keys are ahead of their queries by different lengths.
  const ahead = keys.cu.map((start, s) => start - segments.cu[s]);
  const atStart = causal && ahead.some((a, s) => a !== s * ahead[1]);
  const [rows, columns] = [paddingOf(segments, atStart), paddingOf(keys, atStart)];
  const toUnits = (x: tf.Tensor3D, h: number, { length, pad }: Padding): tf.Tensor3D => {
    const flat = tf.reshape(x, [x.shape[0], h * d]) as tf.Tensor2D;
    const padded = pad === null ? flat : gatherRows(flat, pad);
    const g = h / kvHeads; // query heads of one key head become further rows of the same unit
    const split = tf.transpose(tf.reshape(padded, [count, length, kvHeads, g * d]), [0, 2, 1, 3]);
    if (g === 1) return tf.reshape(split, [count * kvHeads, length, d]);
    const rows = tf.transpose(tf.reshape(split, [count * kvHeads, length, g, d]), [0, 2, 1, 3]);
    return tf.reshape(rows, [count * kvHeads, g * length, d]);
  };
  const triangle = causal ? triangleOf(group, rows.length, columns.length) : null;
  const mask = (units: number, from: number): tf.Tensor | null => {
    if (columns.pad === null) return triangle;
    const bias = paddingMask(columns, kvHeads, units, from);
    return triangle ? tf.add(bias, triangle) : bias;
  };
  const [qs, ks, vs] = [toUnits(q, heads, rows), toUnits(k, kvHeads, columns), toUnits(v, kvHeads, columns)];
  let out = attendUnits(qs, ks, vs, mask, scale) as tf.Tensor;
  if (group > 1) {
    out = tf.transpose(tf.reshape(out, [count * kvHeads, group, rows.length, d]), [0, 2, 1, 3]);
  }
  out = tf.transpose(tf.reshape(out, [count, kvHeads, rows.length, group * d]), [0, 2, 1, 3]);
  const packed = tf.reshape(out, [count * rows.length, heads * d]) as tf.Tensor2D;
  return tf.reshape(rows.pad === null ? packed : gatherRows(packed, rows.back), [total, heads, d]);
}

/** Refuses keys that don't fit their queries. */
function checkKeys({ cu }: Segments, keys: Segments, causal: boolean): void {
  if (keys.cu.length !== cu.length) {
    throw new RangeError(
      `attention: ${cu.length - 1} segments of queries but ${keys.cu.length - 1} segments of keys; each needs its own`,
    );
  }
  for (let s = 0; s + 1 < cu.length; s++) {
    const [queries, count] = [cu[s + 1] - cu[s], keys.cu[s + 1] - keys.cu[s]];
    if (count >= (causal ? queries : Math.min(queries, 1))) continue;
    const need = causal ? "causal attention needs at least as many keys as queries" : "queries need at least one key";
    throw new RangeError(`attention: segment ${s} has ${queries} queries and ${count} keys; ${need}`);
  }
}

/**
 * Softmax attention within segments of packed tokens, with grouped key-value heads. A segment's queries can be the last ones of
 * a longer sequence of keys: the tokens after a shared prefix, or those that extend a cache.
 *
 * @param q `[N, H, d]`
 * @param k `[M, Hkv, d]`, Hkv divides H
 * @param v `[M, Hkv, d]`
 * @param segments How the N queries are cut. Queries meet the keys of their segment only; a segment may have no queries.
 * @param causal Whether a query sees only keys up to its own place, both counted from the end of the segment: query i of Lq sees
 * keys j ≤ i + Lk − Lq.
 * @param scale Scores are multiplied by it.
 * @param keys How the M keys are cut, into as many segments. @default {segments}
 * @returns `[N, H, d]`
 * @throws {RangeError} if the counts of segments differ, or a segment has fewer keys than queries (if causal) or no key for its
 * queries.
 */
export function attention(
  q: tf.Tensor3D,
  k: tf.Tensor3D,
  v: tf.Tensor3D,
  segments: Segments,
  causal: boolean,
  scale: number,
  keys: Segments = segments,
): tf.Tensor3D {
  if (keys !== segments) checkKeys(segments, keys, causal);
  if (!hasFused("MgpoAttention")) {
    return tf.tidy(() => attentionPlain(q, k, v, segments, causal, scale, keys));
  }
  return custom<tf.Tensor3D>([q, k, v], ([q, k, v], save) => {
    const cuSeqlens = toIndex(segments.cu), own = keys === segments ? [] : [toIndex(keys.cu)];
    const given = ([cuSeqlensK]: tf.Tensor[]) => cuSeqlensK ? { cuSeqlensK } : undefined;
    const [out, lse] = runMany("MgpoAttention", { q, k, v, cuSeqlens, ...given(own) }, { causal, scale });
    save([q, k, v, out, lse, cuSeqlens, ...own]);
    return {
      value: out,
      gradFunc: (dout, [q, k, v, out, lse, cuSeqlens, ...own]) =>
        runMany("MgpoAttentionGrad", { q, k, v, out, lse, dout, cuSeqlens, ...given(own) }, { causal, scale }),
    };
  });
}

/** Forward of {@linkcode logProbEntropy} on tensors: log-probs, entropies, and what the gradient needs again. */
function chosen(
  logits: tf.Tensor2D,
  target: tf.Tensor1D,
  suppress: tf.Tensor1D | null,
  temperature: number,
): { logprob: tf.Tensor; entropy: tf.Tensor; lse: tf.Tensor } {
  if (hasFused("MgpoLogSoftmaxGather")) {
    const given: Record<string, tf.Tensor> = suppress ? { suppress } : {};
    const [logprob, entropy, lse] = runMany("MgpoLogSoftmaxGather", { logits, target, ...given }, { temperature });
    return { logprob, entropy, lse };
  }
  const z = scaledLogits(logits, suppress, temperature), lse = tf.logSumExp(z, -1);
  const logp = tf.sub(z, tf.expandDims(lse, -1)), one = tf.oneHot(target, logits.shape[1]);
  return {
    logprob: tf.sum(tf.mul(logp, one), -1),
    entropy: tf.neg(tf.sum(tf.mul(tf.exp(logp), logp), -1)),
    lse,
  };
}

function scaledLogits(logits: tf.Tensor2D, suppress: tf.Tensor1D | null, temperature: number): tf.Tensor2D {
  const scaled = temperature === 1 ? logits : tf.div(logits, temperature);
  return (suppress ? tf.add(scaled, suppress) : scaled) as tf.Tensor2D;
}

/** Gradient of {@linkcode chosen} with respect to the logits: (dlogp·(1ᵗ − p) − dH·p·(ln p + H)) / temperature. */
function chosenGrad(
  logits: tf.Tensor2D,
  target: tf.Tensor1D,
  suppress: tf.Tensor1D | null,
  temperature: number,
  { lse, entropy }: { lse: tf.Tensor; entropy: tf.Tensor },
  dy: tf.Tensor,
): tf.Tensor2D {
  const [dlogprob, dentropy] = tf.unstack(dy, 0);
  if (hasFused("MgpoLogSoftmaxGather")) {
    const extra: Record<string, tf.Tensor> = suppress ? { suppress } : {};
    const inputs = { logits, target, lse, entropy, dlogprob, dentropy, ...extra };
    return run1("MgpoLogSoftmaxGatherGrad", inputs, { temperature });
  }
  const column = (x: tf.Tensor) => tf.expandDims(x, -1);
  const logp = tf.sub(scaledLogits(logits, suppress, temperature), column(lse)), p = tf.exp(logp);
  const fromLogProb = tf.mul(tf.sub(tf.oneHot(target, logits.shape[1]), p), column(dlogprob));
  const fromEntropy = tf.mul(tf.mul(p, tf.add(logp, column(entropy))), column(dentropy));
  return tf.div(tf.sub(fromLogProb, fromEntropy), temperature) as tf.Tensor2D;
}

/**
 * Log-probs of given tokens and entropies under `softmax(logits / temperature + suppress)`.
 *
 * @param logits `[N, V]`
 * @param target N token ids
 * @param suppress `[V]`, 0 or a large negative number; null for none
 * @returns `[2, N]`: row 0 the log-probs (natural log), row 1 the entropies in nats
 */
export function logProbEntropy(
  logits: tf.Tensor2D,
  target: ArrayLike<number>,
  suppress: tf.Tensor1D | null,
  temperature: number,
): tf.Tensor2D {
  return custom<tf.Tensor2D>([logits], ([logits], save) => {
    const t = toIndex(target);
    const { logprob, entropy, lse } = chosen(logits as tf.Tensor2D, t, suppress, temperature);
    save([logits, t, lse, entropy, ...(suppress ? [suppress] : [])]);
    const gradFunc = (dy: tf.Tensor, [logits, t, lse, entropy, saved]: tf.Tensor[]) => [
      tf.tidy(() =>
        chosenGrad(
          logits as tf.Tensor2D,
          t as tf.Tensor1D,
          saved as tf.Tensor1D ?? null,
          temperature,
          { lse, entropy },
          dy,
        )
      ),
    ];
    return { value: tf.stack([logprob, entropy], 0), gradFunc };
  });
}

/**
 * {@linkcode logProbEntropy} of `x·wᵀ` without keeping the logits: the gradient makes them again. Rows are taken piece by piece, so
 * that no `[tokens, vocabulary]` tensor ever exists, forward or backward, and one gradient of `w` at a time is added up.
 *
 * @param x `[N, D]`
 * @param w `[V, D]`
 * @param piece The most rows whose logits exist at a time. @default {N}
 */
export function headLogProbEntropy(
  x: tf.Tensor2D,
  w: tf.Tensor2D,
  target: ArrayLike<number>,
  suppress: tf.Tensor1D | null,
  temperature: number,
  piece: number = target.length,
): tf.Tensor2D {
  const ids = Array.from(target), starts: number[] = [];
  for (let from = 0; from < ids.length; from += piece) starts.push(from);
  const rowsOf = <T extends tf.Tensor>(x: T, from: number): T =>
    starts.length === 1 ? x : tf.slice(x, from, Math.min(piece, ids.length - from));
  const indexOf = (from: number) => toIndex(ids.slice(from, from + piece));
  return custom<tf.Tensor2D>([x, w], ([x, w], save) => {
    const parts = starts.map((from) =>
      tf.tidy(() => {
        const logits = matMul(rowsOf(x as tf.Tensor2D, from), w as tf.Tensor2D, false, true);
        const { logprob, entropy, lse } = chosen(logits, indexOf(from), suppress, temperature);
        return [logprob, entropy, lse];
      })
    );
    const joined = (i: number) => parts.length === 1 ? parts[0][i] : tf.concat(parts.map((part) => part[i]), 0);
    const [logprob, entropy, lse] = [0, 1, 2].map(joined);
    save([x, w, lse, entropy, ...(suppress ? [suppress] : [])]);
    const gradFunc = (dy: tf.Tensor, saved: tf.Tensor[]) => {
      const [x, w, lse, entropy, bias = null] = saved as [tf.Tensor2D, tf.Tensor2D, ...tf.Tensor[]];
      const dx: tf.Tensor[] = [];
      let dw: tf.Tensor | undefined;
      for (const from of starts) {
        const [dxPart, dwPart] = tf.tidy(() => {
          const part = rowsOf(x, from), logits = matMul(part, w, false, true);
          const known = { lse: rowsOf(lse, from), entropy: rowsOf(entropy, from) };
          const slope = starts.length === 1 ? dy : tf.slice(dy, [0, from], [2, part.shape[0]]);
          const d = chosenGrad(logits, indexOf(from), bias as tf.Tensor1D | null, temperature, known, slope);
          return [matMul(d, w), matMul(d, part, true, false)];
        });
        dx.push(dxPart);
        const sum = dw ? tf.add(dw, dwPart) : dwPart;
        if (dw) tf.dispose([dw, dwPart]);
        dw = sum;
      }
      return [dx.length === 1 ? dx[0] : tf.concat(dx, 0), dw!];
    };
    return { value: tf.stack([logprob, entropy], 0), gradFunc };
  });
}
