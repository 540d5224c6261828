/**
 * Third-party imports that only experiments need.
 *
 * - `simple-statistics`: means, deviations, quantiles.
 * - `cephes`: the Cephes library compiled to WebAssembly, for tails of the binomial and of Student's distribution. Exact to the
 *   last digits, unlike lighter libraries (jstat rounds to 1e-10; lib-r-math.js 2.0.3 has P(X ≤ 0) = 0.2503 for two coins). Its
 *   version 3 doesn't load as a module.
 *
 * @module
 */
import cephes from "npm:cephes@2.0.0";
await cephes.compiled;
const { bdtr, stdtr, stdtri } = cephes;
export { bdtr, stdtr, stdtri };
export { mean, quantileSorted, sampleStandardDeviation } from "npm:simple-statistics@7.12.1";
