import assert from "node:assert/strict";
import { bytesSource, fileSource, readSafetensors, Safetensors, toFloat32, writeSafetensors } from "./safetensors.ts";

/** A file with any header text. */
function fileOf(header: string, dataBytes: number): Uint8Array {
  const text = new TextEncoder().encode(header);
  const out = new Uint8Array(8 + text.length + dataBytes);
  new DataView(out.buffer).setBigUint64(0, BigInt(text.length), true);
  out.set(text, 8);
  return out;
}

Deno.test("what is written is read back, aligned to eight bytes", async () => {
  const a = { name: "a", shape: [2, 3], data: Float32Array.of(1, -2, 3.5, 0, Infinity, 1e-30) };
  const b = { name: "b.c", shape: [], data: Int32Array.of(-7) };
  const none = { name: "none", shape: [0, 4], data: new Float32Array() };
  const bytes = writeSafetensors([a, b, none]);
  assert.equal(new DataView(bytes.buffer).getUint32(0, true) % 8, 0);
  assert.deepEqual([...(await readSafetensors(bytes, "f")).values()], [a, b, none]);
  const file = await Safetensors.open(bytesSource(bytes), "f");
  assert.deepEqual(file.metadata, { format: "pt" });
  await assert.rejects(file.bytes("zzz"), RangeError);
  await assert.rejects(file.readFloat32("b.c"), /f: tensor "b\.c" is I32; expected F32/);
  assert.throws(() => writeSafetensors([a, a]), /"a" is to be written twice/);
  assert.throws(() => writeSafetensors([{ ...a, shape: [5] }]), /"a" of shape \[5\] has 6 elements/);
});

Deno.test("half precision widens exactly", () => {
  // All 65,536 half-precision numbers against their definition.
  const bits = Uint16Array.from({ length: 65536 }, (_, i) => i);
  const wide = toFloat32("F16", new Uint8Array(bits.buffer));
  for (let i = 0; i < 65536; i++) {
    const exponent = i >> 10 & 31, fraction = i & 1023;
    const size = exponent === 31
      ? (fraction ? NaN : Infinity)
      : exponent === 0
      ? fraction * 2 ** -24
      : (1 + fraction / 1024) * 2 ** (exponent - 15);
    if (!Object.is(wide[i], i & 0x8000 ? -size : size)) assert.fail(`half 0x${i.toString(16)} became ${wide[i]}`);
  }
  // 1, -2, 3.140625, the smallest subnormal.
  const brain = toFloat32("BF16", new Uint8Array(Uint16Array.of(0x3f80, 0xc000, 0x4049, 1).buffer));
  assert.deepEqual([...brain], [1, -2, 3.140625, 2 ** -133]);
});

Deno.test("other types are read, from any offset", async () => {
  const header = JSON.stringify({
    pad: { dtype: "U8", shape: [1], data_offsets: [0, 1] },
    long: { dtype: "I64", shape: [2], data_offsets: [1, 17] },
    half: { dtype: "F16", shape: [1], data_offsets: [17, 19] },
    double: { dtype: "F64", shape: [1], data_offsets: [19, 27] },
  });
  const bytes = fileOf(header, 27), view = new DataView(bytes.buffer, bytes.length - 27);
  view.setUint8(0, 200);
  view.setBigInt64(1, -5n, true);
  view.setBigInt64(9, 6n, true);
  view.setUint16(17, 0x3c00, true);
  view.setFloat64(19, 0.5, true);
  const tensors = await readSafetensors(bytes, "f");
  assert.deepEqual([...tensors.values()].map((t) => [...t.data]), [[200], [-5, 6], [1], [0.5]]);
  view.setBigInt64(9, 1n << 40n, true);
  await assert.rejects(readSafetensors(bytes, "f"), /f: tensor "long" holds 1099511627776, which does not fit/);
});

Deno.test("a file on disk is read in pieces", async () => {
  const path = await Deno.makeTempFile();
  try {
    await Deno.writeFile(path, writeSafetensors([{ name: "x", shape: [3], data: Float32Array.of(1, 2, 3) }]));
    const source = await fileSource(path);
    const file = await Safetensors.open(source!, path);
    assert.deepEqual([...await file.readFloat32("x")], [1, 2, 3]);
    await Deno.truncate(path, 10);
    await assert.rejects(file.readFloat32("x"), /the file became shorter/);
    file.close();
  } finally {
    await Deno.remove(path);
  }
  assert.equal(await fileSource(path), undefined);
});

Deno.test("each lie of a header has its own message", async () => {
  const tensor = (dtype: unknown, shape: unknown, offsets: unknown) => ({ dtype, shape, data_offsets: offsets });
  const one = (dtype: unknown, shape: unknown, offsets: unknown) =>
    JSON.stringify({ t: tensor(dtype, shape, offsets) });
  const good = one("F32", [2], [0, 8]);
  const huge = fileOf("{}", 0), past = fileOf("{}", 0), latin = fileOf("{}", 0);
  new DataView(huge.buffer).setBigUint64(0, 1n << 50n, true);
  new DataView(past.buffer).setBigUint64(0, 3n, true);
  latin[8] = 0xff;
  const cases: [Uint8Array, RegExp][] = [
    [new Uint8Array(5), /5 bytes are too few for a header/],
    [huge, /the header claims 1125899906842624 bytes, more than the limit/],
    [past, /the header claims 3 bytes, but the file has 10/],
    [latin, /the header is not UTF-8/],
    [fileOf("{", 0), /the header is not JSON;/],
    [fileOf("[]", 0), /the header is not a JSON object/],
    [fileOf(`{"__metadata__":{"a":1}}`, 0), /__metadata__ is not a map from text to text/],
    [fileOf(`{"t":${JSON.stringify(tensor("F32", [1], [0, 4]))},"\\u0074":{}}`, 4), /the header names "t" twice/],
    [fileOf(`{"t":3}`, 0), /entry for tensor "t" is not an object/],
    [fileOf(one("F31", [2], [0, 8]), 8), /tensor "t" has the unknown dtype "F31"/],
    [fileOf(one("F32", [-2], [0, 8]), 8), /tensor "t" has the impossible shape \[-2\]/],
    [fileOf(one("F32", [2], [8, 0]), 8), /tensor "t" has impossible data_offsets \[8,0\]/],
    [fileOf(one("F32", [3], [0, 8]), 8), /shape \[3\] and dtype F32 needs 12 bytes, but its range has 8/],
    [fileOf(one("F32", [2], [4, 12]), 12), /tensor "t" starts at byte 4 of the data, but the one before it ends at 0/],
    [
      fileOf(JSON.stringify({ a: tensor("F32", [2], [0, 8]), b: tensor("F32", [2], [4, 12]) }), 12),
      /tensor "b" starts at byte 4 of the data, but the one before it ends at 8/,
    ],
    [fileOf(good, 9), /the tensors take 8 bytes of data, but the file holds 9/],
    [fileOf(good, 7), /the tensors take 8 bytes of data, but the file holds 7/],
  ];
  for (const [bytes, message] of cases) {
    await assert.rejects(readSafetensors(bytes, "f"), new RegExp(`^InputError: f: .*${message.source}`));
  }
});
