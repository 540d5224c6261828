/**
 * Evaluations for people: lines, and the table of base against trained.
 *
 * @module
 */
import type { Difference, Evaluation, Proportion } from "../evaluate.ts";
import { formatRatio, formatTable } from "./progress.ts";

/** `0.875 [0.853, 0.894]` */
export function formatProportion({ value, low, high }: Proportion | Difference): string {
  return Number.isFinite(value) ? `${formatRatio(value)} [${formatRatio(low)}, ${formatRatio(high)}]` : "–";
}

/** An evaluation without its items, for files that keep several. */
export type EvaluationSummary = Omit<Evaluation, "items"> & { items: number };

/** Leaves the items out but for their number. */
export function summaryOf(evaluation: Evaluation): EvaluationSummary {
  return { ...evaluation, items: evaluation.items.length };
}

/** An evaluation in one line. */
export function evaluationLine(label: string, evaluation: EvaluationSummary): string {
  const { accuracy, valid, hit, regions, items, skipped } = evaluation;
  const parts = [`${label}: accuracy ${formatProportion(accuracy)}`];
  if (valid) parts.push(`valid ${formatRatio(valid.value)}`);
  if (hit) parts.push(`hit ${formatRatio(hit.value)}`);
  for (const [name, region] of Object.entries(regions)) parts.push(`${name} ${formatRatio(region.value)}`);
  parts.push(`${items} items`);
  if (skipped.length > 0) parts.push(`${skipped.length} skipped`);
  return parts.join("  ");
}

/** A gap below this is too little for MGPO to learn from with any certainty. */
const SMALL_GAP = 0.2;

/**
 * Warns where answers after a valid box are hardly better than without one: grounding then earns no reward, and a run may
 * learn to refuse. Undefined where there is nothing to warn of.
 */
export function gapWarning({ gap }: Pick<Evaluation, "gap">): string | undefined {
  if (!gap || gap.difference.value >= SMALL_GAP) return undefined;
  return `warning: the base's gap, accuracy with a valid box minus accuracy without, is ${
    formatProportion(gap.difference)
  } over ${gap.valid.of + gap.invalid.of} items; below ${SMALL_GAP} MGPO may not learn to ground`;
}

/** Everything that an evaluation measured, a row a measure. */
export function evaluationTable(evaluation: Omit<Evaluation, "items">): string {
  const { accuracy, boxed, valid, hit, regions, gap, clipped } = evaluation;
  const rows: [name: string, share: Proportion | undefined][] = [
    ["accuracy", accuracy],
    ["answers in a box", boxed],
    ["valid boxes", valid],
    ["crops that hit", hit],
    ...Object.entries(regions).map(([name, region]) => [`crops with ${name}`, region] as [string, Proportion]),
    ["accuracy, valid box", gap?.valid],
    ["accuracy, no valid box", gap?.invalid],
    ["replies cut off", clipped],
  ];
  const cells = rows.flatMap(([name, share]) =>
    share ? [[name, formatRatio(share.value), intervalOf(share), `${share.count}/${share.of}`]] : []
  );
  if (gap) cells.push(["gap", formatRatio(gap.difference.value), intervalOf(gap.difference), ""]);
  return formatTable([["", "share", "95 % interval", "count"], ...cells]);
}

function intervalOf({ low, high }: Proportion | Difference): string {
  return `${formatRatio(low)} … ${formatRatio(high)}`;
}

/** A policy's final evaluations: with grounding and in one turn. */
export interface FinalEvaluation {
  grounded: EvaluationSummary;
  oneTurn: EvaluationSummary;
}

/** Base against trained. */
export function comparisonTable(base: FinalEvaluation, trained: FinalEvaluation): string {
  const row = (name: string, share: (e: FinalEvaluation) => Proportion | Difference | undefined): string[][] => {
    const [a, b] = [share(base), share(trained)];
    if (!a && !b) return [];
    const change = a && b ? b.value - a.value : NaN;
    const sign = change > 0 ? "+" : "";
    return [[name, ...[a, b].map((s) => s ? formatProportion(s) : "–"), sign + formatRatio(change)]];
  };
  const turns = base.grounded.turns === 2 ? "two-turn" : `${base.grounded.turns}-turn`;
  return formatTable([
    ["", "base", "trained", "change"],
    ...row(`${turns} accuracy`, (e) => e.grounded.accuracy),
    ...row("one-turn accuracy", (e) => e.oneTurn.accuracy),
    ...row("valid boxes", (e) => e.grounded.valid),
    ...row("crops that hit", (e) => e.grounded.hit),
    ...Object.keys(base.grounded.regions).flatMap((name) => row(`crops with ${name}`, (e) => e.grounded.regions[name])),
    ...row("gap", (e) => e.grounded.gap?.difference),
  ]);
}
