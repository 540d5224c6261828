/** The rollout browser: filters, a list that only draws what is in sight, a slider over the steps of one question. */
import { detailOf, make, thumbnail, verdict } from "./conversation.js";
import { ALL, counterpart, GROUNDING, nameOf, passes, trackOf, VALID } from "./state.js";

/** Height of a row in pixels, as in the style sheet. */
const ROW = 52;
/** Rows that are drawn beyond those in sight. */
const SPARE = 4;
/** Milliseconds after which a strip is drawn. */
const LATER = 40;
/** Milliseconds of one step while playing. */
const BEAT = 900;

const byId = (id) => document.getElementById(id);

/** Starts the browser; `onStep` hears of the step that is looked at. */
export class RolloutBrowser {
  constructor(page, saved, onStep) {
    this.page = page;
    this.onStep = onStep;
    this.filters = { ...ALL, ...saved.filters };
    this.selected = -1;
    this.list = byId("list");
    this.rows = byId("rows");
    byId("browser").hidden = false;
    this.fillFilters();
    this.listen();
    this.applyFilters(saved.selected ?? "", true);
    this.list.scrollTop = saved.listTop ?? this.list.scrollTop;
    this.drawRows();
  }

  /** What brings the reader back to this place. */
  get place() {
    const selected = this.selected < 0 ? "" : nameOf(this.page.rollouts[this.selected], this.page.runs);
    return { filters: this.filters, selected, listTop: this.list.scrollTop };
  }

  fillFilters() {
    const { rollouts, runs } = this.page;
    const steps = [...new Set(rollouts.map((rollout) => rollout.step))].sort((a, b) => a - b);
    const reasons = [...new Set(rollouts.map((rollout) => rollout.grounding))];
    const known = Object.keys(GROUNDING).filter((name) => reasons.includes(name));
    const kinds = [...known, ...reasons.filter((name) => !(name in GROUNDING)).sort()];
    const has = reasons.some((name) => VALID.includes(name));
    this.options("run", [["", "all runs"], ...runs.map((run, i) => [String(i), run.name])]);
    this.options("split", [["", "all"], ["heldout", "held-out"], ["train", "training"]]);
    this.options("step", [["", "all"], ...steps.map((step) => [String(step), step === 0 ? "0 (base)" : String(step)])]);
    this.options("outcome", [["", "all"], ["right", "right"], ["wrong", "wrong"]]);
    this.options("grounding", [
      ["", "all"],
      ...has ? [["any", "any valid box"], ["none", "no valid box"]] : [],
      ...kinds.map((name) => [name, GROUNDING[name] ?? name]),
    ]);
    byId("filter-text").value = this.filters.text;
  }

  options(name, choices) {
    const select = byId(`filter-${name}`);
    select.append(...choices.map(([value, text]) => make("option", { value }, text)));
    if (!choices.some(([value]) => value === this.filters[name])) this.filters[name] = "";
    select.value = this.filters[name];
  }

  listen() {
    for (const name of Object.keys(ALL)) {
      byId(`filter-${name}`).addEventListener("input", (event) => {
        this.filters[name] = event.target.value;
        // The same question in another run, if it has it.
        const other = name === "run" && event.target.value !== "" && this.selected >= 0
          ? counterpart(this.page.rollouts, this.selected, Number(event.target.value))
          : -1;
        const kept = other >= 0 ? other : this.selected;
        this.applyFilters(kept < 0 ? "" : nameOf(this.page.rollouts[kept], this.page.runs));
      });
    }
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("clear").addEventListener("click", () => {
      this.filters = { ...ALL };
      for (const name of Object.keys(ALL)) byId(`filter-${name}`).value = "";
      this.applyFilters(this.place.selected);
    });
    this.list.addEventListener("scroll", () => this.drawRows());
    this.list.addEventListener("keydown", (event) => this.key(event));
    byId("detail").addEventListener("keydown", (event) => {
      // The slider, fields and links have arrows of their own.
      if (!event.target.closest("input, summary, a")) this.key(event);
    });
    this.rows.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (row) this.select(Number(row.dataset.index));
    });
    new ResizeObserver(() => this.drawRows()).observe(this.list);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.shown.indexOf(this.selected), page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      const to = Math.min(this.shown.length - 1, Math.max(0, at + moves[event.key]));
      if (this.shown.length > 0) this.select(this.shown[to]);
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") this.walk(event.key === "ArrowLeft" ? -1 : 1);
    else return;
    event.preventDefault();
  }

  /** Shows what passes; keeps to the rollout of this name, else takes the first. */
  applyFilters(name, isFirst = false) {
    const { rollouts, runs } = this.page;
    this.shown = [];
    for (const [i, rollout] of rollouts.entries()) if (passes(rollout, this.filters)) this.shown.push(i);
    const count = this.shown.length, isAll = count === rollouts.length;
    byId("count").value = isAll ? `${count} rollouts` : `${count} of ${rollouts.length} rollouts`;
    this.rows.style.height = `${count * ROW}px`;
    const kept = name === "" ? undefined : this.shown.find((i) => nameOf(rollouts[i], runs) === name);
    const place = (i) => runs[rollouts[i].run].series;
    const watched = isFirst ? this.shown.filter((i) => rollouts[i].split === "heldout") : [];
    const first = watched.sort((a, b) => place(a) - place(b))[0];
    const isGood = (i) => rollouts[i].correct && rollouts[i].grounding === "hit";
    // To begin with, something that has been learned.
    const track = first === undefined ? [] : trackOf(rollouts, first);
    this.select(kept ?? track.findLast(isGood) ?? first ?? this.shown[0] ?? -1);
  }

  select(index) {
    this.selected = index;
    const at = this.shown.indexOf(index);
    if (at >= 0) {
      const top = at * ROW, { scrollTop, clientHeight } = this.list;
      if (top < scrollTop) this.list.scrollTop = top;
      else if (top + ROW > scrollTop + clientHeight) this.list.scrollTop = top + ROW - clientHeight;
    }
    this.drawRows();
    this.drawDetail();
  }

  /** Along the slider. */
  walk(by) {
    if (this.selected < 0) return;
    const track = trackOf(this.page.rollouts, this.selected), at = track.indexOf(this.selected) + by;
    if (at >= 0 && at < track.length) this.select(track[at]);
  }

  drawRows() {
    const { scrollTop, clientHeight } = this.list, height = clientHeight || 10 * ROW;
    const from = Math.max(0, Math.floor(scrollTop / ROW) - SPARE);
    const to = Math.min(this.shown.length, Math.ceil((scrollTop + height) / ROW) + SPARE);
    const rows = [];
    for (let at = from; at < to; at++) rows.push(this.row(this.shown[at], at));
    this.rows.replaceChildren(...rows);
    const isDrawn = rows.some((row) => row.getAttribute("aria-selected") === "true");
    if (isDrawn) this.list.setAttribute("aria-activedescendant", `row-${this.selected}`);
    else this.list.removeAttribute("aria-activedescendant");
    if (this.shown.length === 0) this.rows.append(make("p", { class: "muted none" }, "No rollout passes the filters."));
  }

  row(index, at) {
    const rollout = this.page.rollouts[index], run = this.page.runs[rollout.run];
    const row = make(
      "div",
      {
        ...{ class: "row", role: "option", id: `row-${index}`, "data-index": index },
        ...{
          "aria-selected": String(index === this.selected),
          "aria-posinset": at + 1,
          "aria-setsize": this.shown.length,
        },
        "aria-label": `${verdict(rollout)}: ${rollout.question}, step ${rollout.step}, ${run.name}`,
      },
      make(
        "span",
        { class: `dot ${rollout.correct ? "right" : "wrong"}`, "aria-hidden": "true" },
        rollout.correct ? "✓" : "✗",
      ),
      make(
        "span",
        { class: "what" },
        make("span", { class: "line" }, rollout.question || rollout.item),
        make("span", { class: "line muted" }, `${run.name} · step ${rollout.step} · ${boxWord(rollout.grounding)}`),
      ),
      make("span", { class: "said" }, rollout.said ?? "–"),
    );
    row.style.top = `${at * ROW}px`;
    return row;
  }

  drawDetail() {
    const detail = byId("detail"), { rollouts, runs, texts } = this.page;
    if (this.selected < 0) {
      this.stop();
      detail.replaceChildren(make("p", { class: "muted none" }, "Nothing is selected."));
      return;
    }
    const rollout = rollouts[this.selected], track = trackOf(rollouts, this.selected);
    // The slider keeps the focus while it moves, so it stays as long as the question does.
    const key = JSON.stringify(track);
    if (this.track !== key || !detail.querySelector(".track")) {
      this.stop();
      this.track = key;
      detail.replaceChildren(this.trackBar(track, rollout), make("div", { class: "rest" }));
    }
    this.drawTrack(detail, track, rollout);
    detail.querySelector(".rest").replaceChildren(...detailOf(rollout, runs[rollout.run], texts).filter(Boolean));
    this.onStep(rollout.step);
  }

  trackBar(track, { split }) {
    const isSteps = split === "heldout";
    const name = isSteps ? "This question over the steps of the run" : "The group: rollouts of this training question";
    const slider = make("input", {
      ...{ type: "range", id: "slider", min: 0, max: Math.max(0, track.length - 1), step: 1, "aria-label": name },
      disabled: track.length < 2,
    });
    slider.addEventListener("input", () => this.select(track[slider.valueAsNumber]));
    const play = make("button", { type: "button", id: "play", disabled: track.length < 2 }, "▶ play");
    play.addEventListener("click", () => this.timer ? this.stop() : this.play());
    const strip = make("div", { class: "strip" });
    // Dozens of pictures: they come after what was asked for.
    clearTimeout(this.later);
    this.later = setTimeout(() => {
      strip.append(...track.map((index) => this.cell(index, isSteps)));
      this.markCell(strip);
    }, LATER);
    return make(
      "div",
      { class: "track" },
      make("div", { class: "controls" }, play, slider, make("output", { id: "slider-value" })),
      make("p", { class: "muted small" }, name),
      strip,
    );
  }

  drawTrack(detail, track, rollout) {
    const at = track.indexOf(this.selected), slider = detail.querySelector("#slider");
    slider.value = at;
    const text = rollout.split === "heldout" ? `step ${rollout.step}` : `rollout ${rollout.rollout + 1}`;
    slider.setAttribute("aria-valuetext", `${text}: ${verdict(rollout)}`);
    detail.querySelector("#slider-value").value = `${text} (${at + 1} of ${track.length})`;
    this.markCell(detail.querySelector(".strip"));
  }

  /** A picture of the strip. */
  cell(index, isSteps) {
    const one = this.page.rollouts[index];
    const label = !isSteps ? `no. ${one.rollout + 1}` : one.step === 0 ? "base" : `step ${one.step}`;
    const cell = make(
      "button",
      {
        ...{ type: "button", class: `cell ${one.correct ? "right" : "wrong"}`, tabindex: -1, "data-index": index },
        "aria-label": `${label}: ${verdict(one)}`,
      },
      thumbnail(one),
      make("span", {}, `${one.correct ? "✓" : "✗"} ${label}`),
    );
    cell.addEventListener("click", () => this.select(index));
    return cell;
  }

  /** Frames the picture of the strip that is looked at, and brings it into sight. */
  markCell(strip) {
    for (const cell of strip.children) cell.toggleAttribute("data-here", Number(cell.dataset.index) === this.selected);
    const here = strip.querySelector("[data-here]");
    if (here) strip.scrollLeft = here.offsetLeft - strip.clientWidth / 2 + here.clientWidth / 2;
  }

  play() {
    const track = trackOf(this.page.rollouts, this.selected);
    if (track.at(-1) === this.selected) this.select(track[0]);
    byId("play").textContent = "■ stop";
    this.timer = setInterval(() => {
      this.walk(1);
      if (track.at(-1) === this.selected) this.stop();
    }, BEAT);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = undefined;
    const button = byId("play");
    if (button) button.textContent = "▶ play";
  }
}

/** The box in a word or two, for rows. */
function boxWord(grounding) {
  if (grounding === "hit") return "hit";
  if (grounding === "miss") return "miss";
  return GROUNDING[grounding] ?? grounding;
}
