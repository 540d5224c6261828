import assert from "node:assert/strict";
import { parseConfig, parseGenerationConfig } from "./config.ts";

const tiny = new URL("../../fixtures/goldens/models/tiny/", import.meta.url);
const readJson = async (name: string) => JSON.parse(await Deno.readTextFile(new URL(name, tiny)));
type Json = Record<string, unknown>;

Deno.test("the nested and the published layout give the same configuration", async () => {
  const nested = parseConfig(await readJson("config.json"), "config.json");
  const { rope_scaling: _, ...flat } = await readJson("config.published.json");
  assert.deepEqual(parseConfig(await readJson("config.published.json"), "flat"), nested);
  assert.throws(() => parseConfig(flat, "flat"), /flat: rope_parameters or rope_scaling is missing/);
  assert.deepEqual(nested.text, {
    vocabSize: 512,
    hiddenSize: 64,
    intermediateSize: 160,
    layers: 3,
    heads: 4,
    kvHeads: 2,
    headDim: 16,
    rmsNormEps: 1e-6,
    ropeTheta: 1e6,
    mropeSection: [2, 3, 3],
    tied: true,
    maxPositions: 4096,
  });
  assert.deepEqual(nested.vision, {
    depth: 4,
    hiddenSize: 32,
    intermediateSize: 72,
    heads: 2,
    headDim: 16,
    inChannels: 3,
    patchSize: 14,
    spatialMergeSize: 2,
    temporalPatchSize: 2,
    windowSize: 112,
    fullAttentionBlocks: [1, 3],
    outHiddenSize: 64,
    normEps: 1e-6,
    ropeTheta: 10000,
  });
  assert.deepEqual(nested.tokens, {
    image: 496,
    video: 497,
    visionStart: 493,
    visionEnd: 494,
    eos: [492],
    pad: undefined,
    bos: 490,
  });
});

Deno.test("generation_config.json goes before config.json", async () => {
  const base = parseConfig(await readJson("config.json"), "config.json");
  const merged = parseGenerationConfig(await readJson("generation_config.json"), "g", base);
  assert.deepEqual(merged.tokens.eos, [492, 490]);
  assert.equal(merged.tokens.pad, 490);
  const more = { eos_token_id: 7, suppress_tokens: [1, 1, 2], temperature: 0.5, top_p: 0.9, max_new_tokens: 14 };
  const { tokens, generation } = parseGenerationConfig(more, "g", base);
  assert.deepEqual(tokens.eos, [7]);
  assert.deepEqual(generation, { suppressTokens: [1, 2], temperature: 0.5, topP: 0.9, maxNewTokens: 14 });
  assert.deepEqual(parseGenerationConfig({}, "g", base), base);
  assert.throws(() => parseGenerationConfig({ eos_token_id: [512] }, "g", base), /g: eos_token_id names 512, outside/);
  assert.throws(() => parseGenerationConfig({ top_p: "x" }, "g", base), /g: top_p must be a positive number, got "x"/);
});

Deno.test("each way to be wrong has its own message", async () => {
  const good = await readJson("config.json");
  const text = (fields: Json) => ({ ...good, text_config: { ...good.text_config, ...fields } });
  const vision = (fields: Json) => ({ ...good, vision_config: { ...good.vision_config, ...fields } });
  const cases: [unknown, RegExp][] = [
    [[], /c: the file must be a JSON object, got \[\]/],
    [{ ...good, model_type: "llama" }, /c: model_type must be "qwen2_5_vl", got "llama"/],
    [{ ...good, vision_config: undefined }, /c: vision_config is missing/],
    [{ ...good, vision_config: 3 }, /c: "vision_config" must be a JSON object, got 3/],
    [{ ...good, image_token_id: undefined }, /c: image_token_id is missing/],
    [{ ...good, image_token_id: 512 }, /c: image_token_id = 512 is outside the vocabulary of 512/],
    [text({ hidden_size: undefined }), /c: text_config\.hidden_size is missing/],
    [text({ hidden_size: 64.5 }), /c: text_config\.hidden_size must be an integer of at least 1, got 64\.5/],
    [text({ hidden_size: 66 }), /num_attention_heads = 4 does not divide hidden_size = 66/],
    [text({ num_key_value_heads: 3 }), /num_key_value_heads = 3 does not divide num_attention_heads = 4/],
    [text({ head_dim: 32 }), /head_dim is 32, but hidden_size \/ num_attention_heads is 16/],
    [text({ hidden_act: "gelu" }), /text_config\.hidden_act is "gelu", but only "silu" is supported/],
    [text({ use_sliding_window: true }), /use_sliding_window is true, but only false is supported/],
    [text({ layer_types: ["sliding_attention"] }), /layer_types must all be "full_attention"/],
    [text({ rms_norm_eps: -1 }), /rms_norm_eps must be a positive number, got -1/],
    [
      text({ rope_parameters: { mrope_section: [2, 3, 4] } }),
      /mrope_section must be three .* head_dim \/ 2 = 8, got \[2,3,4\]/,
    ],
    [text({ rope_parameters: {} }), /rope_parameters\.mrope_section is missing/],
    [text({ rope_parameters: { rope_type: "yarn" } }), /rope_parameters\.rope_type is "yarn", but only "mrope" or/],
    [vision({ num_heads: 3 }), /vision_config\.num_heads = 3 must divide hidden_size = 32/],
    [vision({ out_hidden_size: 32 }), /out_hidden_size is 32, but hidden_size of the text is 64/],
    [vision({ fullatt_block_indexes: [4] }), /fullatt_block_indexes must be below depth = 4, got \[4\]/],
    [vision({ window_size: 100 }), /window_size = 100 must be a multiple/],
    [{ ...good, tie_word_embeddings: "yes" }, /tie_word_embeddings must be true or false, got "yes"/],
  ];
  for (const [json, message] of cases) {
    assert.throws(() => parseConfig(json, "c"), (error: Error) => {
      assert.match(`${error.name}: ${error.message}`, new RegExp(`^InputError: .*${message.source}`));
      return true;
    });
  }
});
