import assert from "node:assert/strict";
import { RandomStream } from "../random.ts";
import { resizeBicubic } from "./resize.ts";

/** Keys' cubic with a = -0.5, written as a piecewise polynomial. */
function kernel(x: number): number {
  const d = Math.abs(x);
  return d < 1 ? 1.5 * d ** 3 - 2.5 * d ** 2 + 1 : d < 2 ? -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2 : 0;
}

/** One line, resampled in floating point by the definition and rounded to bytes. */
function plainLine(line: number[], to: number): number[] {
  const scale = line.length / to, stretch = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    let sum = 0, value = 0;
    const first = Math.max(0, Math.floor(center - 2 * stretch + 0.5));
    const end = Math.min(line.length, Math.floor(center + 2 * stretch + 0.5));
    for (let k = first; k < end; k++) {
      const weight = kernel((k + 0.5 - center) / stretch);
      sum += weight;
      value += weight * line[k];
    }
    return Math.min(255, Math.max(0, Math.round(value / sum)));
  });
}

function plainResize(data: Uint8Array, w: number, h: number, outW: number, outH: number): number[] {
  const out = new Array<number>(outW * outH * 3);
  for (let c = 0; c < 3; c++) {
    const rows = Array.from({ length: h }, (_, y) => {
      const line = Array.from({ length: w }, (_, x) => data[(y * w + x) * 3 + c]);
      return outW === w ? line : plainLine(line, outW);
    });
    for (let x = 0; x < outW; x++) {
      const line = rows.map((row) => row[x]);
      (outH === h ? line : plainLine(line, outH)).forEach((value, y) => out[(y * outW + x) * 3 + c] = value);
    }
  }
  return out;
}

Deno.test("resizing agrees with a plain floating-point version", () => {
  const random = new RandomStream(1, "resize");
  for (const [w, h, outW, outH] of [[31, 17, 7, 5], [5, 9, 28, 28], [40, 12, 40, 6], [13, 50, 28, 50], [1, 1, 3, 2]]) {
    const data = Uint8Array.from({ length: w * h * 3 }, () => random.int(256));
    const got = resizeBicubic(data, 3, w, h, outW, outH), want = plainResize(data, w, h, outW, outH);
    // Weights are rounded to 22 bits, so a value that lies on the border of two levels may fall to either.
    const differing = want.filter((value, i) => value !== got[i]).length;
    assert.ok(want.every((value, i) => Math.abs(value - got[i]) <= 1), `${w}x${h} to ${outW}x${outH}`);
    assert.ok(differing <= want.length / 100, `${differing} of ${want.length} differ`);
  }
});

Deno.test("four channels give what three give", () => {
  const random = new RandomStream(2, "resize");
  const rgba = Uint8Array.from({ length: 20 * 10 * 4 }, () => random.int(256));
  const rgb = rgba.filter((_, i) => i % 4 !== 3);
  for (const [w, h] of [[9, 4], [20, 4], [9, 10], [20, 10], [30, 30]]) {
    assert.deepEqual(resizeBicubic(rgba, 4, 20, 10, w, h), resizeBicubic(rgb, 3, 20, 10, w, h));
  }
});

Deno.test("overshoot is clipped, and the same size is a copy", () => {
  const edge = Uint8Array.from({ length: 8 * 3 }, (_, i) => i < 12 ? 0 : 255);
  const wide = resizeBicubic(edge, 3, 8, 1, 32, 1);
  assert.equal(Math.min(...wide), 0);
  assert.equal(Math.max(...wide), 255);
  const same = resizeBicubic(edge, 3, 8, 1, 8, 1);
  assert.deepEqual(same, edge);
  assert.notEqual(same.buffer, edge.buffer);
});

Deno.test("impossible sizes are refused", () => {
  assert.throws(() => resizeBicubic(new Uint8Array(3), 3, 1, 1, 0, 1), /at least 1 pixel, got 0/);
  assert.throws(() => resizeBicubic(new Uint8Array(4), 3, 1, 1, 2, 2), RangeError);
});
