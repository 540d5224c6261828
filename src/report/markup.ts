/**
 * HTML from templates in which every value is escaped unless it is markup itself.
 *
 * @module
 */

/** Text that is HTML already. */
export class Markup {
  /** @param text Trusted: written as it is. */
  constructor(readonly text: string) {}
}

/** What may stand in a template; nothing is written for undefined, null and false. */
export type Content = string | number | Markup | undefined | null | false | readonly Content[];

/**
 * A template whose values are escaped: `` html`<b>${text}</b>` ``. Lists are written one after another.
 */
export function html(parts: TemplateStringsArray, ...values: Content[]): Markup {
  return new Markup(parts.map((part, i) => part + (i < values.length ? markupOf(values[i]) : "")).join(""));
}

function markupOf(value: Content): string {
  if (value === undefined || value === null || value === false) return "";
  if (value instanceof Markup) return value.text;
  return typeof value === "object" ? value.map(markupOf).join("") : escapeText(String(value));
}

const entities: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

/** Text as it may stand in an element or a quoted attribute; a half of a surrogate pair becomes U+FFFD. */
export function escapeText(text: string): string {
  return text.toWellFormed().replace(/[&<>"']/g, (character) => entities[character]);
}

/**
 * A value as JSON that may stand in a `<script>`: whatever it holds, it can't end the element or open a comment. Halves of surrogate
 * pairs survive as escapes.
 */
export function scriptJson(value: unknown): Markup {
  return new Markup(JSON.stringify(value).replaceAll("<", "\\u003c"));
}
