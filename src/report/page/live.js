/** A page that is served while a run goes on looks for a newer one, and comes back at the same place. */

const KEY = "mgpo-report";
/** Milliseconds between two looks, and how long the reader must have been at rest before the page is exchanged. */
const PERIOD = 3000, REST = 1200;

/** Where the reader was, if the page has been exchanged. */
export function readPlace() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

/** Remembers where the reader is, until the window is closed. */
export function keepPlace(place) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ ...place, top: scrollY, focus: document.activeElement?.id ?? "" }));
  } catch {
    // A browser without storage begins at the top.
  }
}

/** Puts window and focus where they were. */
export function restorePlace({ top, focus }) {
  if (typeof focus === "string" && focus !== "") document.getElementById(focus)?.focus({ preventScroll: true });
  if (typeof top === "number") scrollTo({ top, behavior: "instant" });
}

/** Looks for a newer page where this one was served from; files are never looked after. */
export function watch(page, exchange) {
  const label = document.getElementById("live"), written = new Date(page.written).toLocaleTimeString();
  if (!page.live || location.protocol !== "http:") {
    label.textContent = `written ${new Date(page.written).toLocaleString()}`;
    return;
  }
  label.textContent = `live, written ${written}`;
  let moved = 0;
  for (const name of ["pointerdown", "keydown", "wheel", "input"]) {
    addEventListener(name, () => moved = performance.now(), { passive: true, capture: true });
  }
  const tag = JSON.stringify(page.written);
  const look = async () => {
    try {
      const response = await fetch(location.pathname, { cache: "no-store", headers: { "if-none-match": tag } });
      const now = response.headers.get("etag");
      await response.body?.cancel();
      label.textContent = `live, written ${written}`;
      if (response.ok && now !== tag) return exchangeSoon();
    } catch {
      label.textContent = `training has ended or is away; written ${written}`;
    }
    setTimeout(look, PERIOD);
  };
  const exchangeSoon = () => {
    if (performance.now() - moved < REST || document.hidden) setTimeout(exchangeSoon, 300);
    else exchange();
  };
  setTimeout(look, PERIOD);
}
