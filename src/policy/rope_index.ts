/**
 * Positions: M-RoPE (time, height, width) of text and image tokens over a whole conversation, the window order and axial
 * positions of the vision tower, and the cosine and sine tables of both. Integers and tables only; no tensors.
 *
 * @module
 */

/** Grid of an image in patches: time (1), height, width. */
export type Grid = readonly [number, number, number];

/** Positions of a sequence's tokens. */
export interface RopeIndex {
  /** Time, height and width position of each token, three arrays of length L. */
  readonly positions: readonly [Int32Array, Int32Array, Int32Array];
  /** The position, on all three axes, of the token that would come next. */
  readonly next: number;
}

/**
 * M-RoPE positions of a whole sequence (Qwen2-VL, section 2.1): text advances all three axes together; an image's tokens take
 * the start on the time axis and their row and column on the others; what follows starts after the largest position.
 *
 * @param ids Token ids, images expanded to one image token per merged patch.
 * @param grids The grids of the sequence's images in order, in patches.
 * @throws {RangeError} If the image tokens do not fit the grids.
 */
export function ropeIndex(
  ids: readonly number[],
  grids: readonly Grid[],
  imageToken: number,
  merge: number,
): RopeIndex {
  const n = ids.length, t = new Int32Array(n), h = new Int32Array(n), w = new Int32Array(n);
  let at = 0, image = 0, i = 0;
  while (i < n) {
    if (ids[i] !== imageToken) {
      t[i] = h[i] = w[i] = at++;
      i++;
      continue;
    }
    const grid = grids[image];
    if (!grid) throw new RangeError(`the sequence has image tokens at ${i} but only ${grids.length} image(s)`);
    const [frames, gh, gw] = [grid[0], grid[1] / merge, grid[2] / merge], count = frames * gh * gw;
    for (let j = 0; j < count; j++, i++) {
      if (ids[i] !== imageToken) {
        throw new RangeError(`image ${image} has ${count} features but only ${j} image tokens (token ${i})`);
      }
      t[i] = at + Math.floor(j / (gh * gw));
      h[i] = at + Math.floor(j / gw) % gh;
      w[i] = at + j % gw;
    }
    at += Math.max(frames, gh, gw);
    image++;
  }
  if (image !== grids.length) {
    throw new RangeError(`the sequence shows ${image} image(s) but ${grids.length} were given`);
  }
  return { positions: [t, h, w], next: at };
}

/** Cosine and sine tables, `[N, d]` row-major each. */
export interface RopeTable {
  readonly cos: Float32Array;
  readonly sin: Float32Array;
}

function fillTable(n: number, d: number, angle: (row: number, i: number) => number): RopeTable {
  const cos = new Float32Array(n * d), sin = new Float32Array(n * d), half = d / 2;
  for (let r = 0; r < n; r++) {
    for (let i = 0; i < half; i++) {
      const a = angle(r, i);
      cos[r * d + i] = cos[r * d + half + i] = Math.cos(a);
      sin[r * d + i] = sin[r * d + half + i] = Math.sin(a);
    }
  }
  return { cos, sin };
}

/**
 * The text model's table. Frequency i of d/2 belongs to the axis whose section it falls in (`mrope_section`, not interleaved).
 * Angles are rounded to float32 as the reference does.
 */
export function textRopeTable(
  positions: readonly [ArrayLike<number>, ArrayLike<number>, ArrayLike<number>],
  headDim: number,
  theta: number,
  section: readonly number[],
): RopeTable {
  const half = headDim / 2, axis = new Uint8Array(half);
  for (let i = 0; i < half; i++) axis[i] = i < section[0] ? 0 : i < section[0] + section[1] ? 1 : 2;
  const inverse = Float32Array.from({ length: half }, (_, i) => 1 / Math.pow(theta, (2 * i) / headDim));
  return fillTable(positions[0].length, headDim, (r, i) => Math.fround(positions[axis[i]][r] * inverse[i]));
}

/** Row and column of each patch in processor order (2×2 merge blocks), for all images one after the other. */
export function patchPositions(grids: readonly Grid[], merge: number): { h: Int32Array; w: Int32Array } {
  const total = grids.reduce((s, [t, gh, gw]) => s + t * gh * gw, 0);
  const h = new Int32Array(total), w = new Int32Array(total);
  let i = 0;
  for (const [t, gh, gw] of grids) {
    for (let f = 0; f < t; f++) {
      for (let by = 0; by < gh; by += merge) {
        for (let bx = 0; bx < gw; bx += merge) {
          for (let y = 0; y < merge; y++) {
            for (let x = 0; x < merge; x++, i++) {
              h[i] = by + y;
              w[i] = bx + x;
            }
          }
        }
      }
    }
  }
  return { h, w };
}

/** The vision tower's table in processor order: a quarter of each head turns by row, a quarter by column (base 10,000). */
export function visionRopeTable(grids: readonly Grid[], headDim: number, merge: number): RopeTable {
  const { h, w } = patchPositions(grids, merge), quarter = headDim / 4;
  const inverse = Float32Array.from({ length: quarter }, (_, i) => 1 / Math.pow(10000, (2 * i) / (headDim / 2)));
  return fillTable(
    h.length,
    headDim,
    (r, i) => Math.fround(i < quarter ? h[r] * inverse[i] : w[r] * inverse[i - quarter]),
  );
}

/** The order in which window attention sees merged patches. */
export interface WindowIndex {
  /** M merged-patch indices: position in window order → index in image order. */
  readonly order: Int32Array;
  /** Starts of the windows in patches, and the total (`cu_window_seqlens`, empty windows left out). */
  readonly windows: Int32Array;
  /** Starts of the images (frames) in patches, and the total (`cu_seqlens`). */
  readonly frames: Int32Array;
}

/**
 * Groups merged patches into square windows of `windowSize` pixels, row by row; windows at the rim are smaller.
 *
 * @param windowSize In pixels; a window has windowSize / (patch·merge) merged patches a side.
 */
export function windowIndex(grids: readonly Grid[], windowSize: number, patch: number, merge: number): WindowIndex {
  const side = Math.floor(windowSize / merge / patch), unit = merge * merge;
  const order: number[] = [], windows = [0], frames = [0];
  let base = 0;
  for (const [t, gh, gw] of grids) {
    const h = gh / merge, w = gw / merge;
    for (let f = 0; f < t; f++) {
      for (let wy = 0; wy < h; wy += side) {
        for (let wx = 0; wx < w; wx += side) {
          const yEnd = Math.min(wy + side, h), xEnd = Math.min(wx + side, w);
          for (let y = wy; y < yEnd; y++) for (let x = wx; x < xEnd; x++) order.push(base + y * w + x);
          windows.push(order.length * unit);
        }
      }
      base += h * w;
      frames.push(base * unit);
    }
  }
  return { order: Int32Array.from(order), windows: Int32Array.from(windows), frames: Int32Array.from(frames) };
}
