/**
 * What the page knows: its data, what the reader chose, and questions about both. Nothing here touches the document.
 */

/** Words for why there is no valid box, and for what else can be said of one. */
export const GROUNDING = {
  hit: "valid box, crop hits",
  miss: "valid box, crop misses",
  valid: "valid box",
  no_json: "no JSON in the reply",
  wrong_shape: "JSON of another shape",
  not_numbers: "coordinates that aren’t numbers",
  out_of_range: "box outside the picture",
  degenerate: "box without area",
  too_small: "box too small",
  aspect: "box too thin",
  "no box": "no box",
  answered: "answered at once",
  "one turn": "no grounding turn",
};

/** Groupings with a valid box. */
export const VALID = ["hit", "miss", "valid"];

/** Nothing filtered. */
export const ALL = { run: "", split: "", step: "", outcome: "", grounding: "", text: "" };

/** Whether a rollout passes the filters; an empty filter passes everything. */
export function passes(rollout, filters) {
  const { run, split, step, outcome, grounding, text } = filters;
  if (run !== "" && rollout.run !== Number(run)) return false;
  if (split !== "" && rollout.split !== split) return false;
  if (step !== "" && rollout.step !== Number(step)) return false;
  if (outcome !== "" && rollout.correct !== (outcome === "right")) return false;
  if (grounding !== "" && !passesBox(rollout.grounding, grounding)) return false;
  if (text === "") return true;
  const wanted = text.toLowerCase();
  return [rollout.question, rollout.answer, rollout.item, ...rollout.turns.map((turn) => turn.text)]
    .some((part) => part.toLowerCase().includes(wanted));
}

function passesBox(grounding, wanted) {
  if (wanted === "any") return VALID.includes(grounding);
  if (wanted === "none") return !VALID.includes(grounding) && grounding !== "one turn";
  return grounding === wanted;
}

/**
 * The rollouts that belong on one slider: the same held-out question over the steps of its run, or the group of a training question.
 */
export function trackOf(rollouts, index) {
  const one = rollouts[index];
  const isSame = one.split === "heldout"
    ? (other) => other.rollout === one.rollout
    : (other) => other.step === one.step;
  const track = [];
  for (const [i, other] of rollouts.entries()) {
    if (other.run === one.run && other.split === one.split && other.item === one.item && isSame(other)) track.push(i);
  }
  const place = (i) => one.split === "heldout" ? rollouts[i].step : rollouts[i].rollout;
  return track.sort((a, b) => place(a) - place(b));
}

/** The rollout of another run about the same question, at the same step or the nearest before it. */
export function counterpart(rollouts, index, run) {
  const one = rollouts[index];
  let best = -1;
  for (const [i, other] of rollouts.entries()) {
    if (other.run !== run || other.split !== one.split || other.item !== one.item || other.rollout !== one.rollout) {
      continue;
    }
    if (other.step <= one.step && (best < 0 || other.step > rollouts[best].step)) best = i;
  }
  return best;
}

/** What names a rollout in any version of the page. */
export function nameOf(rollout, runs) {
  return JSON.stringify([runs[rollout.run].name, rollout.split, rollout.step, rollout.item, rollout.rollout]);
}

/** The point of a chart's line at a step, or the nearest one. */
export function pointAt(points, step) {
  let best = points[0];
  for (const point of points) if (Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
  return best;
}
