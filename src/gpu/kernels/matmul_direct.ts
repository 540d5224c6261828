/**
 * The WGSL of `matmul.ts` for adapters that compute on the processor.
 *
 * There a load costs many times a multiplication, from workgroup memory as much as from storage, and barriers cost more still. So each
 * thread reads its operands straight from storage into a register tile that is as large as compiles in about a second: twice
 * as fast as tiles on llvmpipe. Both operands are addressed by strides, so that one shader serves all four orders; rows and columns beyond the last repeat it
 * and are not written.
 *
 * @module
 */
import { tiles } from "./matmul_tiles.ts";
import type { Shader } from "./runtime.ts";

const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

/** The shader; `bias`, `split` and `adds` as in the variants of `matmul_tiles.ts`. */
export function directShader(bias: boolean, split: boolean, adds: boolean): Shader {
  const { rows, columns, across, down } = tiles.direct;
  const groups = range(columns / 4), parts = "xyzw";
  const sums = range(rows).flatMap((r) => groups.map((c) => ({ name: `sum_${r}_${c}`, r, c })));
  return {
    storage: [
      { name: "a", type: "f32" },
      { name: "b", type: "f32" },
      ...(bias ? [{ name: "bias", type: "f32" } as const] : []),
      { name: "c", type: "f32", write: true },
    ],
    uniforms: {
      ...{ rows: "u32", columns: "u32", depth: "u32", depthPerPart: "u32", firstBatch: "u32" },
      ...{ rowA: "u32", stepA: "u32", columnB: "u32", stepB: "u32" },
      ...{ firstA: "u32", firstB: "u32", firstC: "u32", strideC: "u32" },
    },
    threads: across * down,
    main: `let batch = ${split ? "0u" : "u.firstBatch + wg.z"};
let row = (wg.y * ${down}u + lane / ${across}u) * ${rows}u;
let column = (wg.x * ${across}u + lane % ${across}u) * ${columns}u;
let begin = ${split ? "wg.z * u.depthPerPart" : "0u"};
let end = ${split ? "min(u.depth, begin + u.depthPerPart)" : "u.depth"};
let startA = batch * u.rows * u.depth + u.firstA + begin * u.stepA;
let startB = batch * u.columns * u.depth + u.firstB + begin * u.stepB;
${range(rows).map((r) => `var at_a${r} = startA + min(row + ${r}u, u.rows - 1u) * u.rowA;`).join("\n")}
${range(columns).map((c) => `var at_b${c} = startB + min(column + ${c}u, u.columns - 1u) * u.columnB;`).join("\n")}
${sums.map(({ name }) => `var ${name} = vec4<f32>();`).join("\n")}
for (var k = begin; k < end; k++) {
  ${groups.map((g) => `let b${g} = vec4<f32>(${range(4).map((i) => `b[at_b${4 * g + i}]`).join(", ")});`).join("\n  ")}
  ${
      range(rows).map((r) =>
        `let a${r} = a[at_a${r}]; ${groups.map((g) => `sum_${r}_${g} += a${r} * b${g};`).join(" ")}`
      ).join("\n  ")
    }
  ${range(rows).map((r) => `at_a${r} += u.stepA;`).join(" ")}
  ${range(columns).map((c) => `at_b${c} += u.stepB;`).join(" ")}
}
let start = ${split ? "wg.z" : "batch"} * u.rows * u.columns + row * u.strideC + u.firstC + column;
${
      sums.map(({ name, r, c }) =>
        `if (row + ${r}u < u.rows) {
${
          range(4).map((i) =>
            `  if (column + ${4 * c + i}u < u.columns) { c[start + ${r}u * u.strideC + ${4 * c + i}u] ${
              adds ? "+=" : "="
            } ${name}.${parts[i]}${bias ? ` + bias[u.firstC + column + ${4 * c + i}u]` : ""}; }`
          ).join("\n")
        }
}`
      ).join("\n")
    }`,
  };
}
