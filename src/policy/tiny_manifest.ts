/**
 * SHA-256 of each file of the embedded policy: assets are not covered by the lock file. Written by `deno task pretrain`.
 *
 * @module
 */
export const tinySha256: Readonly<Record<string, string>> = {
  "chat_template.json": "28c21b1038924fc23f7ff439fcad9d6131d8add787747d3593a05fe1065a9644",
  "config.json": "87662c3e3949888b46a65b87d89d4d7ffb8ac90e8cf2cc1c52a85e4eefa3f9d1",
  "generation_config.json": "9242640ebe9c42191a9ff5efec7d2d9b8cae45a8fb2e70168aaae86be3bc19c5",
  "merges.txt": "215a6aba00d27bcd42b8ad1dccc4b4d23f40decc150bdbf0d5ce6bb2410708df",
  "model.safetensors": "2a516df7569590629c4253aad3ed300eddb81d15ac8fe00252f07b1779c35c22",
  "preprocessor_config.json": "6052d7eb803970927216d3f44e728ff428ee2cec52eb2fa13964852080512918",
  "tokenizer.json": "2f2392170f4e601959b7b6e0da67c7d844af434406c539a43eb52db33d226038",
  "tokenizer_config.json": "06583be4745dd56f00c1fe2582f9191a09064e01b1e486f7003c0e25724dbc40",
  "vocab.json": "837f65d331adfe3e15225fb6bc5c506b195aca46a7a6541dc9b3cdd18152df1a",
};
