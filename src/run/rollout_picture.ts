/**
 * Conversations as a picture: an SVG that shows, a row a policy, what the model saw, what it said, and what it was shown next.
 *
 * @module
 */
import type { Sample } from "../data/dataset.ts";
import { Picture } from "../policy/picture.ts";
import type { QwenPolicy } from "../policy/qwen.ts";
import { isCorrect } from "../reward.ts";
import type { Trajectory } from "../rollout.ts";

/** One row of the picture. */
export interface PictureRow {
  /** e.g. `base` or `after 50 steps`. */
  title: string;
  trajectory: Trajectory;
}

const SIDE = 224, GAP = 16, TEXT = 260, ROW = SIDE + 56, WIDTH = 2 * SIDE + 2 * TEXT + 5 * GAP;

const escape = (text: string) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

async function dataUrl(picture: Picture): Promise<string> {
  const bytes = await picture.encodePng();
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return `data:image/png;base64,${btoa(binary)}`;
}

/** Breaks text into lines of at most so many characters. */
function wrap(text: string, width: number): string[] {
  const lines: string[] = [];
  for (const line of text.split("\n")) {
    let rest = line;
    while (rest.length > width) {
      const space = rest.lastIndexOf(" ", width), at = space > width / 2 ? space : width;
      lines.push(rest.slice(0, at));
      rest = rest.slice(at).trimStart();
    }
    lines.push(rest);
  }
  return lines;
}

function bubble(x: number, y: number, who: string, text: string, colour: string): string {
  const lines = wrap(text, 32);
  const spans = lines.map((line, i) => `<tspan x="${x + 10}" dy="${i === 0 ? 0 : 16}">${escape(line)}</tspan>`).join(
    "",
  );
  return `<text x="${x + 10}" y="${y + 14}" font-size="11" fill="#777">${escape(who)}</text>` +
    `<rect x="${x}" y="${y + 20}" width="${TEXT}" height="${lines.length * 16 + 16}" rx="8" fill="${colour}"/>` +
    `<text x="${x + 10}" y="${
      y + 40
    }" font-size="12.5" font-family="ui-monospace, monospace" fill="#222" xml:space="preserve">${spans}</text>`;
}

function resized(policy: QwenPolicy, picture: Picture): Picture {
  const { data, width, height } = policy.processor.resize(picture);
  return Picture.fromRgb(data, width, height);
}

/**
 * Draws two-turn conversations about one sample.
 *
 * @param policy Resizes pictures as the model saw them.
 * @returns SVG text, pictures embedded.
 */
export async function rolloutPicture(policy: QwenPolicy, sample: Sample, rows: readonly PictureRow[]): Promise<string> {
  const original = await sample.picture(), input = await dataUrl(resized(policy, original));
  const parts: string[] = [];
  const image = (href: string, x: number, y: number) =>
    `<image href="${href}" x="${x}" y="${y}" width="${SIDE}" height="${SIDE}" style="image-rendering:pixelated"/>`;
  for (const [i, { title, trajectory }] of rows.entries()) {
    const top = GAP + i * ROW, y = top + 28, [first, last] = [trajectory.turns[0], trajectory.turns.at(-1)!];
    parts.push(
      `<text x="${GAP}" y="${top + 16}" font-size="15" font-weight="600" fill="#222">${escape(title)}</text>`,
      image(input, GAP, y),
    );
    if (first.box) {
      const scale = SIDE / trajectory.inputSize[0], [x1, y1, x2, y2] = first.box.map((v) => v * scale);
      parts.push(
        `<rect x="${GAP + x1}" y="${y + y1}" width="${x2 - x1}" height="${
          y2 - y1
        }" fill="none" stroke="#fff" stroke-width="4"/>`,
        `<rect x="${GAP + x1}" y="${y + y1}" width="${x2 - x1}" height="${
          y2 - y1
        }" fill="none" stroke="#e0007a" stroke-width="2"/>`,
      );
    }
    const asked = `${sample.question} Where must one look?`;
    parts.push(
      bubble(2 * GAP + SIDE, y, "asked", asked, "#eef1f6"),
      bubble(2 * GAP + SIDE, y + 84, "the model", first.text, "#e4f3e4"),
    );
    const second = first.crop ? await dataUrl(resized(policy, original.crop(first.crop))) : input;
    const right = isCorrect(sample, last.text);
    parts.push(
      image(second, 3 * GAP + SIDE + TEXT, y),
      bubble(
        4 * GAP + 2 * SIDE + TEXT,
        y,
        first.crop ? "shown the crop of the original" : `no box (${first.invalid}): the same picture again`,
        `${sample.choices?.join(" ") ?? ""} – answer?`,
        "#eef1f6",
      ),
      bubble(4 * GAP + 2 * SIDE + TEXT, y + 84, "the model", last.text, right ? "#cdeecd" : "#f6d9d9"),
      `<text x="${4 * GAP + 2 * SIDE + TEXT}" y="${y + 170}" font-size="13" fill="#222">right answer ${
        escape(sample.answer)
      } → reward ${right ? 1 : 0}</text>`,
    );
  }
  const height = rows.length * ROW + GAP;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" font-family="system-ui, sans-serif">\n` +
    `<rect width="100%" height="100%" fill="#fff"/>\n${parts.join("\n")}\n</svg>\n`;
}
