import assert from "node:assert/strict";
import { type OptionSpec, type OptionTable, type OptionValues, resolveOptions } from "./run/options.ts";
import {
  type EvaluateOptions,
  evaluateTable,
  maxNewTokensFor,
  type TrainOptions,
  trainTable,
  withHints,
} from "./settings.ts";

// The record types and the tables agree in names and value types: each assigns to the other.
const _train: TrainOptions = resolveOptions(trainTable, {}) satisfies OptionValues<typeof trainTable>;
const _evaluate: EvaluateOptions = resolveOptions(evaluateTable, {}) satisfies OptionValues<typeof evaluateTable>;
const _trainKeys: Record<keyof TrainOptions, OptionSpec> = trainTable;
const _evaluateKeys: Record<keyof EvaluateOptions, OptionSpec> = evaluateTable;

/** Name → [doc line, default] of the fields of an interface in the source text. */
function documented(source: string, name: string): Map<string, [doc: string, byDefault: string]> {
  const start = source.indexOf(`export interface ${name} `);
  const body = source.slice(start, source.indexOf("\n}", start));
  return new Map(
    [...body.matchAll(/\/\*\* (.*?) @default \{(.*)\} \*\/\n\s*(\w+)\?:/g)].map((
      [, doc, value, key],
    ) => [key, [doc, value]]),
  );
}

function tabulated(table: OptionTable): Map<string, [string, string]> {
  return new Map(
    Object.entries(table).map(([key, spec]) => {
      const value = spec.defaultText ?? (spec.kind === "choice" ? `"${spec.default}"` : String(spec.default));
      return [key, [spec.help, value]];
    }),
  );
}

Deno.test("doc comments and tables say the same", async () => {
  const source = await Deno.readTextFile(new URL("./settings.ts", import.meta.url));
  const common = documented(source, "ConversationOptions");
  for (const [name, table] of [["TrainOptions", trainTable], ["EvaluateOptions", evaluateTable]] as const) {
    const docs = new Map([...common, ...documented(source, name)]), rows = tabulated(table);
    assert.deepEqual([...docs.keys()].sort(), [...rows.keys()].sort());
    for (const [key, [doc, value]] of docs) {
      const [help, byDefault] = rows.get(key)!;
      assert.equal(help, doc, key);
      const numeric = Number(value);
      assert.equal(Number.isNaN(numeric) ? byDefault : Number(byDefault), Number.isNaN(numeric) ? value : numeric, key);
    }
  }
});

Deno.test("what the user says goes before the data's wishes and the policy's", () => {
  const hints = { minBoxSide: 7, squareCrop: true };
  const settings = withHints(resolveOptions(evaluateTable, { minBoxSide: 9, squareCrop: false }), hints);
  assert.equal(settings.minBoxSide, 9);
  assert.equal(settings.squareCrop, false);
  assert.equal(withHints(resolveOptions(evaluateTable, {}), hints).minBoxSide, 7);
  assert.equal(withHints(resolveOptions(evaluateTable, {})).squareCrop, undefined);
  type P = Parameters<typeof maxNewTokensFor>[0];
  assert.deepEqual(maxNewTokensFor({ maxNewTokens: 14 } as P), [14]);
  assert.deepEqual(maxNewTokensFor({} as P), [256, 512]);
  assert.deepEqual(maxNewTokensFor({ maxNewTokens: 14 } as P, [3, 4]), [3, 4]);
});
