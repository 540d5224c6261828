/**
 * The supervised losses of pretraining beside next-token cross-entropy: what each patch shows, what each image token says in
 * words, where signs are, and where attention should look. The probes are thrown away afterwards.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { linear } from "../policy/ops.ts";
import { RandomStream } from "../random.ts";
import { gridEnd, inputSide, taughtBox, type View } from "./pool.ts";

/** Patches a side, merged tokens a side. */
const PATCHES = 8, CELLS = 4, PATCH = 14, CELL = 28;
const NONE_WEIGHT = 0.15;

/** Index of a patch (row, column) in processor order. */
const patchAt = (y: number, x: number) => ((y >> 1) * CELLS + (x >> 1)) * 4 + (y & 1) * 2 + (x & 1);
/** Image token that holds a point, in input pixels. */
export const cellOf = ([x, y]: readonly [number, number]): number =>
  Math.floor(y / CELL) * CELLS + Math.floor(x / CELL);

/** Linear probes, by name; owned by whoever makes them. */
export function makeProbes(hidden: number, out: number, seed: number): Map<string, tf.Variable> {
  const probes = new Map<string, tf.Variable>();
  let index = 0;
  for (
    const [name, rows, columns] of [
      ["patch", 9 + 8 + 4, hidden],
      ["visionBox", 4 * out, out],
      ["textBox", 4 * out, out],
      ["place", 2 * CELLS, out],
    ] as const
  ) {
    const random = new RandomStream(seed, "probe", index++), bound = 1 / Math.sqrt(columns);
    for (const [part, shape] of [["weight", [rows, columns]], ["bias", [rows]]] as const) {
      const size = shape.reduce((a, b) => a * b, 1);
      const data = Float32Array.from({ length: size }, () => part === "bias" ? 0 : random.uniform(-bound, bound));
      const key = `probe.${name}.${part}`;
      probes.set(key, tf.tidy(() => tf.variable(tf.tensor(data, [...shape]), true, key)));
    }
  }
  return probes;
}

/** −Σ weight · log softmax over given rows: `[n, C]` logits, targets with weights that sum to 1. */
function crossEntropy(
  logits: tf.Tensor2D,
  targets: readonly { row: number; class: number; weight: number }[],
): tf.Scalar {
  const [n, classes] = logits.shape, w = new Float32Array(n * classes);
  const total = targets.reduce((s, t) => s + t.weight, 0) || 1;
  for (const t of targets) w[t.row * classes + t.class] -= t.weight / total;
  return tf.sum(tf.mul(tf.logSoftmax(logits), tf.tensor2d(w, [n, classes]))) as tf.Scalar;
}

/** Losses per patch: colour at a sign's centre, letter where its plate is, offset and size at its centre. */
export function patchLosses(
  probes: ReadonlyMap<string, tf.Variable>,
  patches: tf.Tensor2D,
  views: readonly View[],
  from: number,
): { colour: tf.Scalar; letter: tf.Scalar; place: tf.Scalar } {
  const hits = patchTargets(views), per = PATCHES * PATCHES;
  const hidden = patches.shape[1] / 4;
  const all = tf.reshape(patches, [patches.shape[0] * 4, hidden]) as tf.Tensor2D;
  const rows = tf.slice(all, [from * per, 0], [views.length * per, hidden]);
  const logits = linear(
    rows,
    probes.get("probe.patch.weight") as tf.Tensor2D,
    probes.get("probe.patch.bias") as tf.Tensor1D,
  );
  const n = views.length * per;
  const cut = (at: number, width: number) => tf.slice(logits, [0, at], [n, width]) as tf.Tensor2D;
  const wanted = tf.tensor2d(hits.place, [n, 4]), mask = tf.tensor2d(hits.placeMask, [n, 1]);
  const distance = tf.abs(tf.mul(tf.sub(cut(17, 4), wanted), mask));
  const near = tf.minimum(distance, 1);
  const smooth = tf.add(tf.mul(0.5, tf.square(near)), tf.sub(distance, near));
  return {
    colour: crossEntropy(cut(0, 9), hits.colour),
    letter: crossEntropy(cut(9, 8), hits.letter),
    place: tf.div(tf.sum(smooth), Math.max(1, hits.centres * 4)),
  };
}

interface PatchTargets {
  colour: { row: number; class: number; weight: number }[];
  letter: { row: number; class: number; weight: number }[];
  place: Float32Array;
  placeMask: Float32Array;
  centres: number;
}

function patchTargets(views: readonly View[]): PatchTargets {
  const per = PATCHES * PATCHES, n = views.length * per;
  const out: PatchTargets = {
    colour: [],
    letter: [],
    place: new Float32Array(n * 4),
    placeMask: new Float32Array(n),
    centres: 0,
  };
  views.forEach(({ signs }, v) => {
    const colour = new Int8Array(per).fill(-1);
    for (const sign of signs) {
      const [cx, cy] = sign.centre,
        y = Math.floor(cy / PATCH),
        x = Math.floor(cx / PATCH),
        row = v * per + patchAt(y, x);
      colour[patchAt(y, x)] = sign.colour;
      out.place.set([
        cx / PATCH - x - 0.5,
        cy / PATCH - y - 0.5,
        Math.log(sign.side / PATCH),
        Math.log(sign.side / PATCH),
      ], row * 4);
      out.placeMask[row] = 1;
      out.centres++;
      if (!sign.large) continue;
      const [x0, y0, x1, y1] = sign.plate;
      for (let py = 0; py < PATCHES; py++) {
        for (let px = 0; px < PATCHES; px++) {
          // The plate covers the patch where it holds the patch's middle, or where the plate's own middle lies in it.
          const mx = (px + 0.5) * PATCH, my = (py + 0.5) * PATCH;
          const covers = mx >= x0 && mx < x1 && my >= y0 && my < y1;
          const holds = Math.floor((x0 + x1) / 2 / PATCH) === px && Math.floor((y0 + y1) / 2 / PATCH) === py;
          if (covers || holds) out.letter.push({ row: v * per + patchAt(py, px), class: sign.letter, weight: 1 });
        }
      }
    }
    colour.forEach((c, p) =>
      out.colour.push({ row: v * per + p, class: c < 0 ? 8 : c, weight: c < 0 ? NONE_WEIGHT : 1 })
    );
  });
  return out;
}

/** `1 − cosine` between image tokens and the words of what they show: colours at centres, letters on plates. */
export function alignmentLoss(
  embeds: tf.Tensor2D,
  words: tf.Tensor2D,
  views: readonly View[],
  from: number,
  ids: { colours: readonly number[]; letters: readonly number[] },
): tf.Scalar {
  const per = CELLS * CELLS, rows: number[] = [], targets: number[] = [];
  views.forEach(({ signs }, v) => {
    for (const sign of signs) {
      rows.push(v * per + cellOf(sign.centre));
      targets.push(ids.colours[sign.colour]);
      if (!sign.large) continue;
      const [x0, y0, x1, y1] = sign.plate;
      for (let cell = 0; cell < per; cell++) {
        const mx = (cell % CELLS + 0.5) * CELL, my = (Math.floor(cell / CELLS) + 0.5) * CELL;
        const covers = mx >= x0 && mx < x1 && my >= y0 && my < y1;
        if (covers || cellOf([(x0 + x1) / 2, (y0 + y1) / 2]) === cell) {
          rows.push(v * per + cell);
          targets.push(ids.letters[sign.letter]);
        }
      }
    }
  });
  if (rows.length === 0) return tf.scalar(0);
  const n = views.length * per, width = embeds.shape[1], vocab = words.shape[0];
  const own = tf.slice(embeds, [from * per, 0], [n, width]) as tf.Tensor2D;
  const unit = (x: tf.Tensor2D) => tf.mul(x, tf.rsqrt(tf.add(tf.sum(tf.square(x), -1, true), 1e-6))) as tf.Tensor2D;
  const cosine = linear(unit(own), unit(words));
  const w = new Float32Array(n * vocab);
  rows.forEach((row, i) => w[row * vocab + targets[i]] -= 1 / rows.length);
  return tf.add(1, tf.sum(tf.mul(cosine, tf.tensor2d(w, [n, vocab]))));
}

/**
 * Cross-entropy of the taught box's four coordinates, read at the image token that holds a sign's centre and scored against
 * the coordinate words.
 *
 * @param tokens `[views·16, D]` image tokens (or hidden states at them)
 * @param words `[36, D]` coordinate words
 * @param sides Width of the original picture
 */
export function boxLoss(
  probe: { weight: tf.Tensor2D; bias: tf.Tensor1D },
  tokens: tf.Tensor2D,
  words: tf.Tensor2D,
  views: readonly View[],
): tf.Scalar {
  const per = CELLS * CELLS, n = views.length * per, width = tokens.shape[1], classes = words.shape[0];
  const targets: { row: number; class: number; weight: number }[] = [];
  views.forEach(({ signs }, v) => {
    for (const sign of signs) {
      const row = v * per + cellOf(sign.centre);
      const centre = sign.centre as [number, number];
      const box = taughtBox({ centre, side: sign.side }, inputSide);
      box.forEach((c, i) => targets.push({ row: row * 4 + i, class: Math.min(gridEnd, c), weight: 1 }));
    }
  });
  const four = tf.reshape(linear(tokens, probe.weight, probe.bias), [n * 4, width]) as tf.Tensor2D;
  const logits = linear(four, words);
  if (logits.shape[1] !== classes) throw new RangeError("coordinate words do not fit");
  return tf.mul(4, crossEntropy(logits, targets)) as tf.Scalar;
}

/** Cross-entropy of each image token's row and column. @param tokens `[views·16, D]` */
export function placeLoss(
  probe: { weight: tf.Tensor2D; bias: tf.Tensor1D },
  tokens: tf.Tensor2D,
): tf.Scalar {
  const n = tokens.shape[0], per = CELLS * CELLS;
  const logits = tf.reshape(linear(tokens, probe.weight, probe.bias), [n * 2, CELLS]) as tf.Tensor2D;
  const targets = Array.from({ length: n * 2 }, (_, i) => {
    const cell = (i >> 1) % per;
    return { row: i, class: (i & 1) ? cell % CELLS : Math.floor(cell / CELLS), weight: 1 };
  });
  return tf.mul(2, crossEntropy(logits, targets)) as tf.Scalar;
}

/**
 * −log attention mass of one head on the image token that should be looked at, for neighbouring sequences of equal length and
 * structure.
 *
 * @param q `[N, H, d]` rotated queries of the packed sequences
 * @param k `[N, Hkv, d]`
 * @param start First packed token of the first of them
 * @param rows Position of each look within its sequence, R of them, the same for all sequences
 * @param targets `[S][R]` position that should be attended to
 */
export function guideLoss(
  q: tf.Tensor3D,
  k: tf.Tensor3D,
  start: number,
  sequences: number,
  length: number,
  rows: readonly number[],
  targets: readonly (readonly number[])[],
): tf.Scalar {
  const d = q.shape[2], count = rows.length;
  const headOf = (x: tf.Tensor3D) =>
    tf.reshape(tf.slice(x, [start, 0, 0], [sequences * length, 1, d]), [sequences, length, d]);
  const keys = headOf(k), pick = new Float32Array(count * length), late = new Float32Array(count * length);
  rows.forEach((row, r) => {
    pick[r * length + row] = 1;
    late.fill(-1e9, r * length + row + 1, (r + 1) * length);
  });
  // Looks are picked by a 0/1 matrix on the left, the same for every sequence.
  const looks = tf.matMul(
    tf.tensor2d(pick, [count, length]).reshape([1, count, length]).tile([sequences, 1, 1]),
    headOf(q),
  );
  const scores = tf.add(
    tf.mul(tf.matMul(looks, keys, false, true), 1 / Math.sqrt(d)),
    tf.tensor3d(late, [1, count, length]),
  );
  const w = new Float32Array(sequences * count * length);
  targets.forEach((own, s) => own.forEach((at, r) => w[(s * count + r) * length + at] = -1 / (sequences * count)));
  return tf.sum(tf.mul(tf.logSoftmax(scores), tf.tensor3d(w, [sequences, count, length])));
}
