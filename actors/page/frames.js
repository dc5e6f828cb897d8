// Frames in the safetensors layout, the page's side of sharding/models/frames.py: 8 bytes of header
// length, a JSON header padded to a multiple of 8, then raw little-endian tensor data. Tensors
// lie in descending item size, so that each can be viewed in place. No number becomes text.

const KINDS = {
  F64: ["float64", Float64Array], F32: ["float32", Float32Array],
  F16: ["float16", globalThis.Float16Array ?? Uint16Array],
  I64: ["int64", BigInt64Array], I32: ["int32", Int32Array],
  I16: ["int16", Int16Array], I8: ["int8", Int8Array],
  U64: ["uint64", BigUint64Array], U32: ["uint32", Uint32Array],
  U16: ["uint16", Uint16Array], U8: ["uint8", Uint8Array], BOOL: ["bool", Uint8Array],
};
// The limits of sharding/models/frames.py, which refuses what is above them: an answer that can't be
// carried is an error here, so that its request hears why.
const TENSORS_MAX = 1024;
const HEADER_BYTES_MAX = 1 << 20;
const METADATA = "__metadata__";
const CODES = Object.fromEntries(Object.entries(KINDS).map(([code, [type]]) => [type, code]));

// Returns {kind, op, epoch, step, position, body, tensors: {name: {type, data, dims}}}.
export function decode(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const { [METADATA]: meta, ...entries } = header;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
    const [type, View] = KINDS[dtype];
    const offset = 8 + length + begin;
    const data = new View(buffer, offset, (end - begin) / View.BYTES_PER_ELEMENT);
    tensors[name] = { type, data, dims: shape };
  }
  return {
    kind: meta.kind, op: meta.op, epoch: Number(meta.epoch), step: Number(meta.step),
    position: Number(meta.position), body: JSON.parse(meta.body || "{}"), tensors,
  };
}

export function encode({ kind, op = "", epoch = 0, step = 0, position = 0, body = {}, tensors = {} }) {
  const meta = {
    kind, op, epoch: String(epoch), step: String(step), position: String(position),
    body: JSON.stringify(body),
  };
  const names = Object.keys(tensors);
  if (names.length > TENSORS_MAX) throw new Error(`${names.length} outputs, and a message carries at most ${TENSORS_MAX}`);
  const parts = Object.entries(tensors).map(([name, { type, data, dims }]) => {
    if (name === METADATA) throw new Error(`an output can't be called ${METADATA}`);
    if (!CODES[type]) throw new Error(`output ${name} is of type ${type}, which frames can't carry`);
    return { name, code: CODES[type], data, dims };
  });
  parts.sort((a, b) => b.data.BYTES_PER_ELEMENT - a.data.BYTES_PER_ELEMENT);
  const header = { [METADATA]: meta };
  let end = 0;
  for (const { name, code, data, dims } of parts) {
    header[name] = { dtype: code, shape: [...dims], data_offsets: [end, end + data.byteLength] };
    end += data.byteLength;
  }
  let text = new TextEncoder().encode(JSON.stringify(header));
  const length = Math.ceil(text.length / 8) * 8;
  if (length > HEADER_BYTES_MAX) throw new Error(`a header of ${length} bytes, and a message has at most ${HEADER_BYTES_MAX}`);
  const bytes = new Uint8Array(8 + length + end);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(length), true);
  bytes.set(text, 8);
  bytes.fill(0x20, 8 + text.length, 8 + length);
  let offset = 8 + length;
  for (const { data } of parts) {
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), offset);
    offset += data.byteLength;
  }
  return bytes;
}
