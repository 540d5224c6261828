/**
 * Serving one page on this machine, read only.
 *
 * @module
 */

/** A page, and what changes with it. */
export interface ServedPage {
  html: string;
  /** When it was written, as the page says of itself. */
  written: string;
}

const waiting = `<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2">` +
  `<meta name="color-scheme" content="light dark"><title>MGPO report</title>` +
  `<p style="font-family:system-ui">The report appears when the first figures are there.</p>`;

const headers = {
  "content-type": "text/html; charset=utf-8",
  "cache-control": "no-store",
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cross-origin-resource-policy": "same-origin",
  "x-frame-options": "DENY",
};

/**
 * Answers a request: only `GET /`, and only where the browser itself says that it means this machine, so that a page from elsewhere
 * whose name was pointed here reads nothing.
 *
 * @param page Undefined while there is none.
 */
export function answer(request: Request, page: ServedPage | undefined): Response {
  const plain = { ...headers, "content-type": "text/plain; charset=utf-8" };
  const host = (request.headers.get("host") ?? "").replace(/:\d+$/, "");
  if (host !== "127.0.0.1" && host !== "localhost") {
    return new Response("This report is only for this machine.\n", { status: 403, headers: plain });
  }
  if (request.method !== "GET") {
    return new Response("This report can only be read.\n", { status: 405, headers: { ...plain, allow: "GET" } });
  }
  if (new URL(request.url).pathname !== "/") {
    return new Response("There is only one page: /\n", { status: 404, headers: plain });
  }
  if (!page) return new Response(waiting, { headers });
  const etag = JSON.stringify(page.written);
  if (request.headers.get("if-none-match") === etag) {
    return new Response(null, { status: 304, headers: { ...headers, etag } });
  }
  return new Response(page.html, { headers: { ...headers, etag } });
}
