import assert from "node:assert/strict";
import { InputError } from "./errors.ts";
import { flagOf, helpText, optionTable, type OptionValues, parseCommandLine, resolveOptions } from "./options.ts";

const table = optionTable({
  method: { kind: "choice", choices: ["mgpo", "grpo", "sft"], default: "mgpo", help: "The algorithm" },
  steps: { kind: "integer", min: 1, default: 50, help: "Optimizer steps" },
  learningRate: { kind: "number", min: 0, above: true, help: "Step size", defaultText: "by method" },
  maxNewTokens: { kind: "integers", min: 1, default: [14, 8], help: "Tokens by turn" },
  topP: { kind: "number", min: 0, above: true, max: 1, default: 1, help: "Nucleus mass" },
  resume: { kind: "boolean", default: false, help: "Go on" },
  evalStart: { kind: "boolean", default: true, help: "Evaluate first" },
  run: { kind: "string", value: "DIR", help: "Run folder" },
});

function message(f: () => unknown): string {
  try {
    f();
  } catch (error) {
    assert.ok(error instanceof InputError, `not an InputError: ${error}`);
    assert.ok(!error.message.includes("\n"));
    return error.message;
  }
  throw new Error("did not throw");
}

Deno.test("parseCommandLine reads every kind", () => {
  const args = "--method grpo --steps=7 --learning-rate 1e-4 --max-new-tokens 20,9 --resume --no-eval-start --run a/b";
  assert.deepEqual(parseCommandLine(table, args.split(" ")), {
    method: "grpo",
    steps: 7,
    learningRate: 1e-4,
    maxNewTokens: [20, 9],
    resume: true,
    evalStart: false,
    run: "a/b",
  });
  assert.deepEqual(parseCommandLine(table, []), {});
  assert.equal(parseCommandLine(table, ["--steps", "3", "--steps", "4"]).steps, 4);
});

Deno.test("parseCommandLine names the option in every error", () => {
  const cases: [args: string[], pattern: RegExp][] = [
    [["--stepps", "3"], /^--stepps: unknown option; did you mean --steps\?$/],
    [["--quantize"], /^--quantize: unknown option; --help lists them all$/],
    [["-x"], /^-x: unknown option/],
    [["--steps"], /^--steps: needs a value: a whole number of at least 1$/],
    [["--run", "--resume"], /^--run: needs a value/],
    [["--run="], /^--run: needs a value/],
    [["--steps", "0"], /^--steps 0: must be a whole number of at least 1$/],
    [["--steps", "2.5"], /^--steps 2.5: must be a whole number/],
    [["--steps", "many"], /^--steps many: must be a whole number/],
    [["--steps", " "], /must be a whole number/],
    [["--top-p", "1.5"], /^--top-p 1.5: must be a number above 0 and up to 1$/],
    [["--learning-rate", "-1"], /^--learning-rate -1: must be a number above 0$/],
    [["--max-new-tokens", "3,,4"], /^--max-new-tokens 3,,4: must be whole numbers of at least 1, with commas between$/],
    [["--method", "ppo"], /^--method ppo: must be mgpo, grpo or sft$/],
    [["--resume=yes"], /^--resume=yes: takes no value/],
    [["train"], /^train: stray argument/],
  ];
  for (const [args, pattern] of cases) assert.match(message(() => parseCommandLine(table, args)), pattern);
});

Deno.test("resolveOptions fills in defaults and rejects what it doesn't know", () => {
  const values: OptionValues<typeof table> = resolveOptions(table, { steps: 3, run: undefined });
  assert.equal(values.steps, 3);
  assert.deepEqual(values.maxNewTokens, [14, 8]);
  assert.equal(values.learningRate, undefined);
  assert.ok(!("run" in values));
  assert.match(message(() => resolveOptions(table, { step: 3 })), /^step: unknown option; did you mean steps\?$/);
  assert.match(message(() => resolveOptions(table, { toString: 1 })), /^toString: unknown option/);
  assert.match(message(() => resolveOptions(table, { topP: 0 })), /^topP = 0: must be a number above 0 and up to 1$/);
  assert.match(message(() => resolveOptions(table, { steps: "3" })), /^steps = "3": must be/);
});

Deno.test("helpText shows every option with its default", () => {
  const text = helpText("deno task train [OPTIONS]", ["Options", table]);
  for (const key of Object.keys(table)) assert.ok(text.includes(flagOf(key)), key);
  assert.match(text, /--steps N +Optimizer steps \[default: 50\]/);
  assert.match(text, /--method mgpo\|grpo\|sft +The algorithm \[default: mgpo\]/);
  assert.match(text, /--learning-rate X +Step size \[default: by method\]/);
  assert.match(text, /--run DIR +Run folder \[no default\]/);
});
