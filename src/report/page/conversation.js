/** One rollout: pictures with boxes, facts, and the conversation with its tokens. What a model wrote is only ever set as text. */
import { GROUNDING, VALID } from "./state.js";

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; texts become text nodes. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== false && child !== ""));
  return element;
}

const addresses = new Map();

/** The address of a picture, decoded when it is first shown; undefined if it isn't in the page. */
function pictureAddress(name) {
  if (addresses.has(name)) return addresses.get(name);
  const holder = document.querySelector(`script[data-picture="${CSS.escape(name)}"]`);
  if (!holder) return undefined;
  const binary = atob(holder.textContent), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const address = URL.createObjectURL(new Blob([bytes], { type: holder.dataset.type }));
  addresses.set(name, address);
  return address;
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function rectangle([x1, y1, x2, y2], [width, height], kind) {
  const place = {
    x: x1 * width,
    y: y1 * height,
    width: Math.max(0, x2 - x1) * width,
    height: Math.max(0, y2 - y1) * height,
  };
  return [shape("rect", { ...place, class: "halo" }), shape("rect", { ...place, class: kind })];
}

function cross([x, y], [width, height], kind) {
  const r = Math.max(width, height) / 60, [cx, cy] = [x * width, y * height];
  const d = `M${cx - r},${cy - r}L${cx + r},${cy + r}M${cx - r},${cy + r}L${cx + r},${cy - r}`;
  return [shape("path", { d, class: "halo" }), shape("path", { d, class: kind })];
}

/** Boxes and points over the original picture. */
function overlay(rollout) {
  const { size, targets, points, found, turns } = rollout;
  const svg = shape("svg", {
    viewBox: `0 0 ${size[0]} ${size[1]}`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  for (const turn of turns) if (turn.crop) svg.append(...rectangle(turn.crop, size, "cut"));
  for (const box of targets) svg.append(...rectangle(box, size, "target"));
  for (const turn of turns) if (turn.box) svg.append(...rectangle(turn.box, size, "asked"));
  for (const point of points) svg.append(...cross(point, size, "target"));
  for (const point of found) svg.append(...cross(point, size, "asked"));
  return svg;
}

/** A picture in its frame; where it is missing, the frame says so and keeps its shape. */
function frame(name, size, alt, over) {
  const address = name === undefined || name.startsWith("!") ? undefined : pictureAddress(name);
  const inner = address ? make("img", { src: address, alt }) : make(
    "span",
    { class: "missing" },
    name === undefined ? "no picture was kept" : `picture missing: ${name.replace(/^!/, "")}`,
  );
  const box = make("span", { class: "frame" }, inner, ...over ? [over] : []);
  if (size) box.style.aspectRatio = `${size[0]} / ${size[1]}`;
  return box;
}

/** A small picture with its boxes, for strips. */
export function thumbnail(rollout) {
  return frame(rollout.pictures[0], rollout.size, "", overlay(rollout));
}

/** Right or wrong, and what became of the box, in words. */
export function verdict(rollout) {
  return `${rollout.correct ? "right" : "wrong"}, ${GROUNDING[rollout.grounding] ?? rollout.grounding}`;
}

/** The pictures of a rollout in order: the input with all boxes, then the crops. */
function gallery(rollout) {
  const about = rollout.turns.map((turn, i) => turn.box ? `turn ${i + 1} asked for a box` : "").filter(Boolean).join(
    ", ",
  );
  const figures = [make(
    "figure",
    { class: "input" },
    frame(rollout.pictures[0], rollout.size, `The picture asked about${about && `; ${about}`}`, overlay(rollout)),
    make("figcaption", {}, "the picture ", ...legendOf(rollout)),
  )];
  const cut = rollout.turns.filter((turn) => turn.crop);
  for (const [i, turn] of cut.entries()) {
    const hit = turn.hit === undefined ? "" : turn.hit ? ", shows the target" : ", misses the target";
    figures.push(make(
      "figure",
      { class: "crop" },
      frame(rollout.pictures[i + 1], undefined, `What was cut out${hit}`),
      make("figcaption", {}, `crop ${cut.length > 1 ? i + 1 : ""} shown next${hit}`),
    ));
  }
  return make("div", { class: "gallery" }, ...figures);
}

function legendOf({ targets, points, found, turns }) {
  const keys = [];
  if (turns.some((turn) => turn.box) || found.length > 0) {
    keys.push(["asked", found.length > 0 ? "named" : "asked for"]);
  }
  if (turns.some((turn) => turn.crop)) keys.push(["cut", "cut out"]);
  if (targets.length > 0 || points.length > 0) keys.push(["target", "target"]);
  return keys.map(([kind, text]) => make("span", { class: `key ${kind}` }, text));
}

function facts(rollout, run) {
  const list = make("dl", { class: "facts" });
  const add = (name, ...value) => list.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...value)));
  add("answer", rollout.said === undefined ? "none in a box" : rollout.said, ` (right: ${rollout.answer})`);
  if (rollout.reward !== undefined) {
    const parts = Object.entries(rollout.parts ?? {}).map(([name, value]) => `${name} ${value}`).join(", ");
    add("reward", String(round(rollout.reward)), parts && ` (${parts})`);
  }
  if (rollout.advantage !== undefined) {
    add("against its group", (rollout.advantage > 0 ? "+" : "") + round(rollout.advantage));
  }
  if (rollout.grounding !== "one turn") add("box", GROUNDING[rollout.grounding] ?? rollout.grounding);
  add(
    "from",
    `${run.name}, step ${rollout.step}, ${rollout.split === "heldout" ? "held-out" : "training"} ${rollout.item}`,
  );
  return list;
}

function round(value) {
  return Math.round(value * 1000) / 1000;
}

const OPENING = "<|im_start|>", ROLE = /^(system|user|assistant)\b/;

/** The whole conversation, a block a message; without tokens of a chat's form, a block for each time that the writer changes. */
function conversation(rollout, texts) {
  const box = make("div", { class: "conversation" }), { tokens, marks, turns } = rollout;
  if (tokens.length === 0) {
    for (const turn of turns) box.append(block("user", [turn.prompt]), written(block("the model", [turn.text])));
    return box;
  }
  const textOf = (token) => texts[Array.isArray(token) ? token[0] : token];
  const isChat = tokens.some((token) => textOf(token) === OPENING);
  let current, count = 0, wasWritten = false, picture = 0;
  for (const [i, token] of tokens.entries()) {
    const text = textOf(token), mark = marks[i], isWritten = mark === "1" || mark === "2";
    if (!current || (isChat ? text === OPENING : isWritten !== wasWritten)) box.append(current = block("", []));
    const role = ROLE.exec(text)?.[1];
    if (isChat && role && current.body.childElementCount === 1) current.who.textContent = role;
    if (isWritten) written(current);
    if (Array.isArray(token) && token[1] > 1) current.body.append(imageChip(rollout, picture++, text, token[1]));
    else if (text !== "") current.body.append(tokenSpan(text, mark, isWritten ? rollout.logprobs[count] : undefined));
    if (isWritten) count++;
    wasWritten = isWritten;
  }
  for (const one of box.children) if (one.who.textContent === "") one.who.textContent = "given";
  return box;
}

function written(element) {
  element.classList.add("written");
  element.who.textContent = "the model";
  return element;
}

function block(who, children) {
  const element = make("div", { class: "message" });
  element.who = make("span", { class: "who" }, who);
  element.body = make("div", { class: "body", dir: "auto" }, ...children);
  element.append(element.who, element.body);
  return element;
}

function tokenSpan(text, mark, logprob) {
  const isSpecial = /^<\|.*\|>$/.test(text), classes = ["t", ...isSpecial ? ["special"] : []];
  if (mark === "1" || mark === "2") classes.push("own");
  if (mark === "2" || mark === "3") classes.push("loss");
  const span = make("span", { class: classes.join(" ") }, isSpecial ? text.slice(2, -2) : text);
  if (logprob !== undefined) {
    const p = Math.exp(logprob);
    span.title = `p = ${p < 0.001 ? p.toExponential(1) : p.toFixed(3)}${mark === "2" ? ", carries loss" : ""}`;
    span.style.setProperty("--doubt", String(Math.round((1 - p) * 100) / 100));
  }
  return span;
}

function imageChip(rollout, number, text, count) {
  const label = /image|video/.test(text) ? `picture, ${count} tokens` : `${text} × ${count}`;
  const shown = rollout.turns[number - 1];
  const index = number === 0 || !shown?.crop ? 0 : rollout.turns.slice(0, number).filter((turn) => turn.crop).length;
  const name = rollout.pictures[index];
  const address = name && !name.startsWith("!") ? pictureAddress(name) : undefined;
  return make("span", { class: "chip" }, ...address ? [make("img", { src: address, alt: "" })] : [], label);
}

/** Everything about one rollout. */
export function detailOf(rollout, run, texts) {
  const outcome = rollout.correct ? "right" : "wrong";
  const box = rollout.grounding === "one turn" ? "" : GROUNDING[rollout.grounding] ?? rollout.grounding;
  const isValid = VALID.includes(rollout.grounding) && rollout.grounding !== "miss";
  return [
    make(
      "div",
      { class: "question" },
      make("h3", {}, rollout.question || "(no question was kept)"),
      rollout.choices.length > 0 && make("p", { class: "muted" }, rollout.choices.join(" · ")),
      make(
        "p",
        { class: "badges" },
        make("span", { class: `badge ${outcome}` }, `${rollout.correct ? "✓" : "✗"} ${outcome}`),
        box && make("span", { class: `badge ${isValid ? "right" : "wrong"}` }, box),
      ),
    ),
    make("div", { class: "look" }, gallery(rollout), facts(rollout, run)),
    make(
      "p",
      { class: "small muted" },
      make("span", { class: "t own loss" }, "trained tokens"),
      rollout.split === "heldout"
        ? " carry loss when a conversation is trained on (this one is held out); "
        : " carry loss; ",
      "the stronger the tint, the less likely the token was. The rest is given.",
    ),
    conversation(rollout, texts),
  ];
}
