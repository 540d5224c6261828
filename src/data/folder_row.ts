/**
 * One line of a folder's JSONL file: its fields checked one by one, each complaint with file, row and what to do.
 *
 * @module
 */
import { InputError } from "../run/errors.ts";
import type { Box } from "./dataset.ts";

/** A row as a person wrote it, checked. */
export interface FolderRow {
  /** The picture's path from the folder, as written. */
  readonly image: string;
  readonly question: string;
  readonly choices?: readonly string[];
  /** The right choice's text, or a free answer. */
  readonly answer: string;
  /** Pixels of the original. */
  readonly boxes?: readonly Box[];
  readonly id?: string;
}

/**
 * Parses a line. Fields that it does not know are left alone.
 *
 * @param line A JSON object.
 * @param where File and row, which every error starts with.
 * @throws {InputError} The line is not a JSON object, or a field is missing or wrong.
 */
export function parseRow(line: string, where: string): FolderRow {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    throw new InputError(`${where}: not JSON: ${show(line.trim())}; write one whole JSON object a line`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new InputError(`${where}: must be a JSON object with image, question and answer, got ${show(value)}`);
  }
  const row = value as Readonly<Record<string, unknown>>;
  const choices = parseChoices(row.choices, where);
  return {
    image: requiredText(row, "image", "the path of a picture in the folder", where),
    question: requiredText(row, "question", "a text", where),
    choices,
    answer: parseAnswer(row.answer, choices, where),
    boxes: parseBoxes(row.boxes, where),
    id: parseId(row.id, where),
  };
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

function requiredText(row: Readonly<Record<string, unknown>>, field: string, what: string, where: string): string {
  const value = row[field];
  if (value === undefined || value === null) throw new InputError(`${where}: "${field}" is missing; add ${what}`);
  if (typeof value !== "string" || value.trim() === "" || value.includes("\0")) {
    throw new InputError(`${where}: "${field}" must be ${what}, got ${show(value)}`);
  }
  return value;
}

/** A text or number as trimmed text; undefined for anything else and for nothing but spaces. */
function shortText(value: unknown): string | undefined {
  const usable = typeof value === "string" || typeof value === "number" && Number.isFinite(value);
  return usable ? String(value).trim() || undefined : undefined;
}

function parseChoices(value: unknown, where: string): string[] | undefined {
  if (value === undefined || value === null) return undefined;
  const texts = Array.isArray(value) ? value.map(shortText) : [];
  const choices = texts.filter((text) => text !== undefined);
  if (choices.length !== texts.length || choices.length < 2 || choices.length > 26) {
    throw new InputError(`${where}: "choices" must be a list of 2 to 26 texts, got ${show(value)}`);
  }
  const twice = choices.find((choice, i) => choices.indexOf(choice) !== i);
  if (twice !== undefined) {
    throw new InputError(`${where}: "choices" holds ${show(twice)} twice; each choice must differ`);
  }
  return choices;
}

/** The choice's text goes before its letter, so that choices which are letters themselves are taken at their word. */
function parseAnswer(value: unknown, choices: readonly string[] | undefined, where: string): string {
  if (value === undefined || value === null) {
    throw new InputError(`${where}: "answer" is missing; add the right ${choices ? "choice or its letter" : "answer"}`);
  }
  const answer = shortText(value);
  if (answer === undefined) throw new InputError(`${where}: "answer" must be a text or a number, got ${show(value)}`);
  if (!choices || choices.includes(answer)) return answer;
  const alike = choices.filter((choice) => choice.toLowerCase() === answer.toLowerCase());
  if (alike.length === 1) return alike[0];
  const letter = /^(?:\(([A-Za-z])\)|([A-Za-z])[.):]?)$/.exec(answer);
  const index = letter ? (letter[1] ?? letter[2]).toUpperCase().charCodeAt(0) - 65 : -1;
  if (index >= 0 && index < choices.length) return choices[index];
  const last = String.fromCharCode(64 + choices.length);
  throw new InputError(
    `${where}: "answer" ${show(value)} is not among the choices ${
      show(choices)
    }; give a choice's text or a letter A to ${last}`,
  );
}

function parseBoxes(value: unknown, where: string): Box[] | undefined {
  if (value === undefined || value === null) return undefined;
  if (!Array.isArray(value)) {
    throw new InputError(`${where}: "boxes" must be a list of [x1, y1, x2, y2], got ${show(value)}`);
  }
  if (value.length === 0) return undefined;
  return value.map((box: unknown): Box => {
    if (Array.isArray(box) && box.length === 4 && box.every((v): v is number => Number.isFinite(v))) {
      const [x1, y1, x2, y2] = box;
      if (x1 >= 0 && y1 >= 0 && x1 < x2 && y1 < y2) return [x1, y1, x2, y2];
    }
    throw new InputError(
      `${where}: "boxes" holds ${
        show(box)
      }; a box is [x1, y1, x2, y2] in pixels of the original, 0 <= x1 < x2, 0 <= y1 < y2`,
    );
  });
}

function parseId(value: unknown, where: string): string | undefined {
  if (value === undefined || value === null) return undefined;
  const id = shortText(value);
  if (id === undefined) throw new InputError(`${where}: "id" must be a text or a number, got ${show(value)}`);
  return id;
}
