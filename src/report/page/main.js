/** Starts the page. */
import { RolloutBrowser } from "./browser.js";
import { Charts } from "./charts.js";
import { keepPlace, readPlace, restorePlace, watch } from "./live.js";

const page = JSON.parse(document.getElementById("data").textContent);
const saved = page.live ? readPlace() : {};
const charts = new Charts(page.charts, saved);
const browser = page.rollouts.length > 0 ? new RolloutBrowser(page, saved, (step) => charts.mark(step)) : undefined;

// Where things are now, for reloads by the reader too.
if (page.live) addEventListener("pagehide", () => keepPlace({ ...browser?.place, ...charts.place }));
restorePlace(saved);
watch(page, () => location.reload());
