/** Reading values off the charts, and hiding methods. */
import { make } from "./conversation.js";
import { pointAt } from "./state.js";

const SVG_NAME = "http://www.w3.org/2000/svg";

/** Makes the charts readable by pointer and keyboard. */
export class Charts {
  constructor(charts, saved) {
    this.charts = charts.map((data) => ({ data, figure: document.getElementById(data.id) }));
    this.hidden = new Set(saved.hidden ?? []);
    for (const { data, figure } of this.charts) this.listen(data, figure);
    for (const button of document.querySelectorAll("[data-series]")) {
      button.addEventListener("click", () => this.toggle(Number(button.dataset.series)));
    }
    this.showHidden();
  }

  /** What brings the reader back to this place. */
  get place() {
    return { hidden: [...this.hidden] };
  }

  toggle(series) {
    if (!this.hidden.delete(series)) this.hidden.add(series);
    this.showHidden();
  }

  showHidden() {
    for (const button of document.querySelectorAll("[data-series]")) {
      button.setAttribute("aria-pressed", String(!this.hidden.has(Number(button.dataset.series))));
    }
    for (const element of document.querySelectorAll("#curves .series")) {
      const number = [...element.classList].map((name) => /^series-(\d+)$/.exec(name)?.[1]).find(Boolean);
      element.classList.toggle("hidden", this.hidden.has(Number(number)));
    }
  }

  listen(data, figure) {
    const svg = figure.querySelector(":scope > svg"), readout = figure.querySelector(".readout");
    const cursor = document.createElementNS(SVG_NAME, "line"), marker = document.createElementNS(SVG_NAME, "line");
    const [from, to, left, right] = data.x, height = svg.viewBox.baseVal.height;
    for (const [line, name] of [[marker, "marker"], [cursor, "cursor"]]) {
      line.setAttribute("class", name);
      line.setAttribute("y1", 14);
      line.setAttribute("y2", height - 34);
      line.style.display = "none";
      svg.append(line);
    }
    const steps = [...new Set(data.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) =>
      a - b
    );
    const place = (line, step) => {
      const x = left + (step - from) / (to - from || 1) * (right - left);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.style.display = step < from || step > to ? "none" : "";
    };
    let current;
    const show = (step) => {
      current = step;
      place(cursor, step);
      readout.hidden = false;
      // On the side where the cursor isn't.
      readout.style.marginLeft = step - from > (to - from) / 2 ? "0" : "auto";
      const lines = data.lines.filter((line) => !this.hidden.has(line.series));
      readout.replaceChildren(make("b", {}, `step ${step}`), ...lines.map((line) => valueOf(line, step)));
    };
    const hide = () => {
      cursor.style.display = "none";
      readout.hidden = true;
    };
    const nearest = (step) => steps.reduce((best, one) => Math.abs(one - step) < Math.abs(best - step) ? one : best);
    svg.addEventListener("pointermove", (event) => {
      const bounds = svg.getBoundingClientRect(),
        x = (event.clientX - bounds.left) / bounds.width * svg.viewBox.baseVal.width;
      show(nearest(from + (x - left) / (right - left || 1) * (to - from)));
    });
    svg.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("focus", () => figure.matches(":focus-visible") && show(current ?? steps.at(-1)));
    figure.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      show(steps[Math.min(steps.length - 1, Math.max(0, steps.indexOf(current ?? steps.at(-1)) + by))]);
    });
    figure.mark = (step) => place(marker, step);
  }

  /** Marks a step in every chart. */
  mark(step) {
    for (const { figure } of this.charts) figure.mark(step);
  }
}

function valueOf({ series, name, points }, step) {
  const [at, mean, low, high, n] = pointAt(points, step);
  const spread = n > 1 ? ` (${low} to ${high}, n = ${n})` : "";
  const value = at === step ? `${mean}${spread}` : `– (step ${at}: ${mean})`;
  return make("span", {}, make("i", { class: `swatch series-colour-${series % 8}` }), `${name}: ${value}`);
}
