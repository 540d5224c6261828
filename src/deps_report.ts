/**
 * Third-party imports that only the report needs.
 *
 * - `@observablehq/plot`: the charts.
 * - `linkedom`: the document that the charts are drawn into, as SVG text, when the report is written; no browser takes part.
 *
 * @module
 */
export { plot } from "npm:@observablehq/plot@0.6.17";
export { areaY, dot, lineY, ruleX, ruleY } from "npm:@observablehq/plot@0.6.17";
export { parseHTML } from "npm:linkedom@0.18.12";
