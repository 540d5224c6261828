/**
 * How long does resizing a picture take, beside the same in plain code? It computes on WebAssembly memory of its own
 * whatever the backend, so it is measured once.
 *
 * @module
 */
import { resizeBicubic, resizePlain } from "../src/policy/resize.ts";
import { alternate, type Benchmark, median, type Row } from "./benchmark.ts";

const ROUNDS = 15;

/**
 * What is resized: a scene to the embedded policy's input, a crop of one enlarged to it, a photograph to the published
 * pixel budget.
 */
const sizes = [
  { name: "scene", from: [672, 672], to: [112, 112], repeats: 20 },
  { name: "crop", from: [84, 84], to: [112, 112], repeats: 200 },
  { name: "photograph", from: [6000, 4000], to: [1204, 812], repeats: 1 },
] as const;

export const resize: Benchmark = {
  names: ["resize/wasm/scene", "resize/wasm/crop", "resize/wasm/photograph"],
  async run() {
    const rows: Row[] = [];
    for (const { name, from: [width, height], to: [outWidth, outHeight], repeats } of sizes) {
      const source = new Uint8Array(width * height * 4);
      for (let i = 0; i < source.length; i++) source[i] = Math.imul(i, 0x9e3779b1) >>> 24;
      const repeat = (way: typeof resizeBicubic) => () => {
        for (let i = 0; i < repeats; i++) way(source, 4, width, height, outWidth, outHeight);
        return Promise.resolve();
      };
      // The first rounds run unoptimised code while the engine compiles.
      await alternate(3, repeat(resizeBicubic), repeat(resizePlain));
      const { first, second } = await alternate(ROUNDS, repeat(resizeBicubic), repeat(resizePlain));
      const fast = median(first), plain = median(second);
      rows.push({
        name: `resize/wasm/${name}`,
        value: fast / repeats * 1000,
        unit: "ms",
        ratio: plain / fast,
        peer: "the same in plain code",
        n: ROUNDS,
      });
    }
    return rows;
  },
};
