// The worker: owns the data socket and the onnxruntime-web sessions. One message is handled at a
// time, in order of arrival (parallel run() on one page is an error in onnxruntime-web), and each
// gets exactly one reply with its operation id, on the socket that it came by: should that have
// closed meanwhile, whoever asked has heard of it and asks again. A frame of another epoch is
// refused.

import { decode, encode } from "/page/frames.js";
import { keepOpen } from "/page/reconnect.js";

// The smallest bundle that serves a back end; the second one serves WebGPU and WebNN.
const BUNDLES = {
  wasm: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded"],
  webgpu: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"],
  webnn: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"],
};
// An ONNX model of one Identity, x -> y, float32 [1].
const NOTHING = Uint8Array.from(atob(
  "CAgSADo3ChAKAXgSAXkiCElkZW50aXR5EgFuWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQEQ=="), (c) => c.charCodeAt(0));
const WARM_LENGTHS = [16, 2, 64, 128]; // kernels differ by length
const SOFTWARE_ADAPTERS = /swiftshader|llvmpipe|lavapipe|software|basic render/i;

let config = null;
const runtimes = new Map(); // bundle file -> Promise of the onnxruntime-web module
const models = new Map(); // model name -> {session, backend, outputs}

function runtime(backend) {
  const [file, wasm] = BUNDLES[backend];
  if (!runtimes.has(file)) {
    const base = `${location.origin}/ort/${config.ortVersion}/`;
    runtimes.set(file, import(base + file).then((ort) => {
      ort.env.logLevel = "error";
      ort.env.wasm.numThreads = threads();
      ort.env.wasm.wasmPaths = { mjs: `${base}${wasm}.mjs`, wasm: `${base}${wasm}.wasm` };
      return ort;
    }));
  }
  return runtimes.get(file);
}

// The runtime with its wasm compiled and instantiated, which its import alone does not do:
// onnxruntime-web does that when it is asked for its first session, so a tiny one is made.
const instances = new Map();
function ready(backend) {
  const [file] = BUNDLES[backend];
  if (!instances.has(file)) {
    instances.set(file, runtime(backend).then(async (ort) => {
      const session = await ort.InferenceSession.create(NOTHING, { executionProviders: ["wasm"] });
      await session.release();
      return ort;
    }));
  }
  return instances.get(file);
}

// `integrity`: what the file's bytes must hash to, should the server or what lies between change them.
async function fetchBytes(url, integrity = "") {
  const response = await fetch(url, { integrity });
  if (!response.ok) throw new Error(`${url} answered ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

const threads = () => (self.crossOriginIsolated ? config.threads : 1);

// Feature tests: the smallest modules that use SIMD and shared memory (as in wasm-feature-detect).
const valid = (...bytes) => WebAssembly.validate(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, ...bytes]));
const hasSimd = () => valid(1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);
const hasThreads = () => self.crossOriginIsolated && typeof SharedArrayBuffer !== "undefined"
  && valid(1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 5, 4, 1, 3, 1, 1, 10, 11, 1, 9, 0, 65, 0, 254, 16, 2, 0, 26, 11);

async function probeWebGpu() {
  if (!navigator.gpu) return { webgpu: false, webgpuNote: "navigator.gpu is absent" };
  try {
    const adapter = await navigator.gpu.requestAdapter();
    if (!adapter) return { webgpu: false, webgpuNote: "no adapter" };
    const { vendor, architecture, device, description } = adapter.info ?? {};
    const name = [vendor, architecture, device, description].filter(Boolean).join(" ");
    return {
      webgpu: true, webgpuAdapter: name || "unnamed adapter",
      webgpuSoftware: Boolean(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter)
        || SOFTWARE_ADAPTERS.test(name),
      webgpuFeatures: [...adapter.features].sort(),
    };
  } catch (error) {
    return { webgpu: false, webgpuNote: String(error) };
  }
}

async function probeWebNn() {
  if (!navigator.ml) return { webnn: false, webnnNote: "navigator.ml is absent" };
  try {
    await navigator.ml.createContext();
    return { webnn: true, webnnNote: "" };
  } catch (error) {
    return { webnn: false, webnnNote: String(error) };
  }
}

async function info() {
  return {
    userAgent: navigator.userAgent, cores: navigator.hardwareConcurrency,
    isolated: self.crossOriginIsolated, wasmSimd: hasSimd(), wasmThreads: hasThreads(),
    threads: threads(), ortVersion: config.ortVersion,
    ...(config.probe ? { ...await probeWebGpu(), ...await probeWebNn() } : {}),
  };
}

async function run(ort, session, tensors) {
  const feeds = {};
  for (const [name, { type, data, dims }] of Object.entries(tensors)) {
    feeds[name] = new ort.Tensor(type, data, dims);
  }
  const begun = performance.now();
  const results = await session.run(feeds);
  const outputs = {};
  for (const [name, tensor] of Object.entries(results)) {
    outputs[name] = { type: tensor.type, data: await tensor.getData(true), dims: tensor.dims };
  }
  return { outputs, inPageMs: performance.now() - begun };
}

// -- stages: caches that stay here between the steps of a sequence ---------------------------------

// The same rules as `SequenceCaches` in sharding/sequences/caches.py: a step of an older fence, or one for
// which the caches hold another number of positions, is refused; the last step again is answered
// again, and not computed.
const SEQUENCES_MAX = 64; // of one model
const IDLE_MS = 60_000; // a sequence that nobody has asked for so long makes room for another

class Refusal extends Error {
  constructor(what, message, facts = {}) {
    super(message);
    this.body = { what, message, ...facts };
  }
}

const outOfStep = ({ sequence, position }, expected) => new Refusal("out_of_step",
  `${sequence}: the caches hold ${expected} positions, not ${position}`, { expected });

function fenced(entry, order) {
  const kept = entry.sequences.get(order.sequence);
  if (kept && order.fence < kept.fence) {
    throw new Refusal("stale_step", `${order.sequence}: fence ${order.fence} is older than ${kept.fence}`);
  }
  if (!kept && entry.sequences.size >= SEQUENCES_MAX) {
    const [oldest, idle] = entry.sequences.entries().next().value;
    if (performance.now() - idle.at > IDLE_MS) { // its caller is gone, or can build it again
      drop(entry, oldest);
      return kept;
    }
    throw new Refusal("too_many_sequences", `${SEQUENCES_MAX} sequences are kept here already`);
  }
  return kept;
}

const ARRAYS = { float32: Float32Array, float64: Float64Array, float16: Uint16Array, uint8: Uint8Array, int8: Int8Array };
const count = (dims) => dims.reduce((a, b) => a * b, 1);

function emptyCache(ort, { dtype, shape }) {
  const Kind = dtype === "float16" && typeof Float16Array !== "undefined" ? Float16Array : ARRAYS[dtype];
  return new ort.Tensor(dtype, new Kind(count(shape)), shape);
}

function dispose(caches) {
  for (const tensor of Object.values(caches)) tensor.dispose();
}

function keep(entry, sequence, kept) {
  drop(entry, sequence); // and to the end of the map: its first is the one that is idle longest
  entry.sequences.set(sequence, { ...kept, at: performance.now() });
}

function drop(entry, sequence) {
  const kept = entry.sequences.get(sequence);
  entry.sequences.delete(sequence);
  if (kept) dispose(kept.caches);
}

const restoredDims = ({ shape, axis }, position) => shape.map((dim, at) => (at === axis ? position : dim));

function restore(ort, entry, order, tensors) {
  const kept = fenced(entry, order);
  if (kept && kept.fence === order.fence) {
    if (kept.position === order.position && !kept.last) return; // these very ones: the answer was lost
    throw outOfStep(order, kept.position);
  }
  const caches = {};
  for (const cache of entry.caches) {
    const { type, data, dims } = tensors[cache.past] ?? {};
    if (!dims || String(dims) !== String(restoredDims(cache, order.position))) {
      throw new Refusal("out_of_step", `${cache.past} is not whole`, { expected: 0 });
    }
    caches[cache.past] = new ort.Tensor(type, data.slice(), dims);
  }
  keep(entry, order.sequence, { fence: order.fence, position: order.position, caches, last: null });
}

// The positions that a step added to a cache, which held `position` of them.
function added({ axis }, { data, dims }, position) {
  const inner = count(dims.slice(axis + 1)), length = dims[axis];
  const outer = count(dims.slice(0, axis)), more = length - position;
  const out = new data.constructor(outer * more * inner);
  for (let row = 0; row < outer; row++) {
    const begin = (row * length + position) * inner;
    out.set(data.subarray(begin, begin + more * inner), row * more * inner);
  }
  return { data: out, dims: dims.map((dim, at) => (at === axis ? more : dim)) };
}

// The ids of the `most` highest numbers, highest first, of equals the lowest id first; NaN is last.
function highest(row, most) {
  const key = (id) => (row[id] === row[id] ? row[id] : -Infinity);
  const ids = new Int32Array(most);
  let kept = 0;
  for (let id = 0; id < row.length; id++) {
    const value = key(id);
    if (kept === most && !(value > key(ids[most - 1]))) continue;
    let place = kept < most ? kept : most - 1;
    while (place > 0 && key(ids[place - 1]) < value) {
      ids[place] = ids[place - 1];
      place -= 1;
    }
    ids[place] = id;
    if (kept < most) kept += 1;
  }
  return ids;
}

// The `most` highest scores of the last position and their ids (0: all of them), highest first, of
// equals the lowest id first.
function choice({ type, data, dims }, most) {
  const width = dims[dims.length - 1];
  const row = data.subarray(data.length - width);
  const ids = type === "float32" && most && most < width ? highest(row, most) : Int32Array.from(row.keys());
  const scores = ids.length === width ? row.slice() : row.constructor.from(ids, (id) => row[id]);
  return {
    "choice/ids": { type: "int32", data: ids, dims: [ids.length] },
    "choice/scores": { type, data: scores, dims: [ids.length] },
  };
}

async function step(ort, entry, order, tensors) {
  const kept = fenced(entry, order);
  const fresh = !kept || order.fence > kept.fence;
  if (fresh && order.position) throw outOfStep(order, 0);
  if (!fresh) {
    if (kept.last && kept.last.position === order.position && order.position + order.tokens === kept.position) {
      return kept.last.answer;
    }
    if (order.position !== kept.position) throw outOfStep(order, kept.position);
  }
  const past = fresh
    ? Object.fromEntries(entry.caches.map((cache) => [cache.past, emptyCache(ort, cache)])) : kept.caches;
  const feeds = { ...past };
  for (const [name, { type, data, dims }] of Object.entries(tensors)) feeds[name] = new ort.Tensor(type, data, dims);
  const begun = performance.now();
  const results = await entry.session.run(feeds);
  const caches = {}, outputs = {};
  const presents = new Map(entry.caches.map((cache) => [cache.present, cache]));
  for (const [name, tensor] of Object.entries(results)) {
    const cache = presents.get(name);
    if (cache) caches[cache.past] = tensor;
    else if (name !== "logits" || order.choice !== null) {
      outputs[name] = { type: tensor.type, data: await tensor.getData(true), dims: tensor.dims };
    }
  }
  if (order.choice !== null && outputs.logits) {
    const { logits } = outputs;
    delete outputs.logits;
    Object.assign(outputs, choice(logits, order.choice));
  }
  if (order.deltas) {
    for (const cache of entry.caches) {
      const { type, dims } = caches[cache.past];
      const data = await caches[cache.past].getData(true); // it leaves the device with that
      outputs[`delta/${cache.past}`] = { type, ...added(cache, { data, dims }, order.position) };
    }
  }
  const answer = { outputs, inPageMs: performance.now() - begun };
  const position = order.position + order.tokens;
  keep(entry, order.sequence, { fence: order.fence, position, caches, last: { position: order.position, answer } });
  return answer;
}

async function take(ort, entry, { what, ...order }, tensors) {
  if (what === "forget") {
    const kept = entry.sequences.get(order.sequence);
    if (kept && order.fence >= kept.fence) drop(entry, order.sequence); // else rebuilt here since
    return { outputs: {}, inPageMs: 0 };
  }
  if (what === "restore") {
    restore(ort, entry, order, tensors);
    return { outputs: {}, inPageMs: 0 };
  }
  return step(ort, entry, order, tensors);
}

// A lost device never comes back by itself, and every session on it is lost, too. To run one all the
// same may never return, and then nobody hears of the loss.
const LOSS_MS = 20; // that the event of a loss may come after the error that it causes
const lost = new Map(); // runtime -> why
const watched = new WeakSet();
async function watchDevice(ort) {
  const device = await ort.env.webgpu?.device;
  if (!device || watched.has(device)) return;
  watched.add(device);
  const { reason, message } = await device.lost;
  lost.set(ort, { reason, message });
  self.postMessage({ kind: "device_lost", reason, message });
}

async function onDevice(backend, work) {
  const ort = await runtime(backend);
  const refuseIfLost = () => {
    const why = lost.get(ort);
    if (why) throw new Refusal("device_lost", `the device is lost: ${why.message}`, { device_lost: why });
  };
  refuseIfLost();
  try {
    return await work(ort);
  } catch (error) {
    if (backend === "webgpu") await new Promise((next) => { setTimeout(next, LOSS_MS); });
    refuseIfLost();
    throw error;
  }
}

// Create a session and run it on the warm-up inputs until its time settles or the budget is spent.
async function create({ files, caches }, backend, { warmRuns, warmMs }, tensors) {
  const asked = performance.now();
  const [ort, [bytes, ...others]] = await Promise.all([
    ready(backend), Promise.all(files.map(({ url, integrity }) => fetchBytes(url, integrity))),
  ]);
  // Under every name that the graph has for a file: the runtime compares them as they are written.
  const externalData = others.flatMap((data, at) => files[at + 1].paths.map((path) => ({ path, data })));
  const begun = performance.now();
  const session = await ort.InferenceSession.create(bytes, {
    executionProviders: [backend], graphOptimizationLevel: "all", externalData,
    // Caches stay on the device, where there is one.
    ...(backend === "webgpu" && caches.length
      ? { preferredOutputLocation: Object.fromEntries(caches.map((c) => [c.present, "gpu-buffer"])) } : {}),
  });
  const createMs = performance.now() - begun;
  if (backend === "webgpu") watchDevice(ort);
  const fetchMs = begun - asked;
  const times = [];
  let warmError = "", answer = {};
  try {
    const end = performance.now() + warmMs;
    while (times.length < warmRuns && performance.now() < end) {
      const { outputs, inPageMs } = await run(ort, session, tensors);
      times.push(inPageMs);
      answer = outputs;
    }
  } catch (error) {
    // Made-up inputs may not suit a model (an index out of range, say). Real ones may.
    warmError = String(error);
  }
  return { session, backend, fetchMs, createMs, times, warmError, answer };
}

const speed = ({ times }) => (times.length ? Math.min(...times) : Infinity);

async function load({ model, digest, backends, ...source }, tensors) {
  if (models.has(model)) await unload({ model });
  let best = null;
  const tried = {};
  for (const backend of backends) {
    try {
      const made = await create(source, backend, source.warm, tensors);
      const { fetchMs, createMs, times, warmError } = made;
      tried[backend] = { fetchMs, createMs, times, warmError };
      const [kept, dropped] = !best || speed(made) < speed(best) ? [made, best] : [best, made];
      best = kept;
      await dropped?.session.release();
    } catch (error) {
      tried[backend] = { error: describe(error) };
    }
  }
  if (!best) throw new Error(backends.map((b) => `${b}: ${tried[b].error}`).join("; "));
  const { answer, warmError, ...kept } = best;
  models.set(model, { ...kept, digest, caches: source.caches, sequences: new Map() });
  const build = `${config.ortVersion}/${BUNDLES[best.backend][0]}`;
  return { body: { backend: best.backend, build, tried, warmError }, tensors: lied(model, answer) };
}

async function unload({ model }) {
  const entry = models.get(model);
  models.delete(model);
  for (const { caches } of entry?.sequences.values() ?? []) dispose(caches);
  await entry?.session.release();
  return {};
}

// -- faults on purpose, of a pool that allows them -------------------------------------------------

let lie = null; // some bits of the next answers are flipped
const armed = { exhaust: 0, destroy: 0, tooLarge: 0 }; // how many of the next operations have it

function lied(model, outputs) {
  if (!lie || lie.left <= 0 || (lie.model && lie.model !== model) || !Object.keys(outputs).length) return outputs;
  lie.left -= 1;
  for (const tensor of Object.values(outputs)) {
    const { buffer, byteOffset, byteLength } = tensor.data;
    const bytes = new Uint8Array(buffer, byteOffset, byteLength);
    const width = tensor.data.BYTES_PER_ELEMENT;
    const at = (lie.element % tensor.data.length) * width + Math.floor(lie.bit / 8);
    if (lie.bit < 8 * width && at < bytes.length) bytes[at] ^= 1 << (lie.bit % 8);
  }
  return outputs;
}

const CHUNK_BYTES = 32 << 20;
function hold(bytes) {
  const held = [];
  for (let left = bytes; left > 0; left -= CHUNK_BYTES) held.push(new Uint8Array(CHUNK_BYTES).fill(1));
  return held;
}

// Takes address space (nothing is written to it) until the engine has no more, and throws its error.
const EXHAUST_CHUNKS_MAX = 512;
function exhaust() {
  const held = [];
  while (held.length < EXHAUST_CHUNKS_MAX) held.push(new Uint8Array(1 << 30));
  throw new Error(`${held.length} GiB and no end`);
}

async function destroyDevice() {
  for (const ort of await Promise.all(runtimes.values())) (await ort.env.webgpu?.device)?.destroy();
}

// What befalls an operation that begins now.
function befall() {
  if (armed.exhaust > 0) {
    armed.exhaust -= 1;
    exhaust();
  }
  if (armed.destroy > 0) {
    armed.destroy -= 1;
    setTimeout(destroyDevice);
  }
}

const ANSWERED_MS = 200; // within which the answer has left, on a slow machine, too
async function fail({ what, ...how }, socket) {
  switch (what) {
    case "lie": lie = { left: how.times, ...how }; break;
    case "loop": setTimeout(() => { for (;;); }, ANSWERED_MS); break;
    case "hold": {
      let held = hold(how.bytes);
      setTimeout(() => { held = null; }, how.seconds * 1000, held);
      break;
    }
    case "destroy": how.times ? armed.destroy = how.times : await destroyDevice(); break;
    case "exhaust": armed.exhaust = how.times; break;
    case "tooLarge": armed.tooLarge = how.times; break;
    case "flood": setTimeout(() => socket.send(new Uint8Array(how.bytes)), ANSWERED_MS); break;
    default: return { kind: "error", body: { what: "unknown_kind", message: what } };
  }
  return { kind: "faulted" };
}

async function handle(frame, socket) {
  const { kind, body, tensors } = frame;
  if (frame.epoch !== config.epoch) {
    return { kind: "error", body: { what: "stale_frame", message: `epoch ${frame.epoch}` } };
  }
  switch (kind) {
    case "ping": return { kind: "pong" };
    case "info": return { kind: "info", body: await info() };
    case "warm": await runtime(body.backend).then((ort) => warm(ort, body)); return { kind: "warm" };
    case "load": return { kind: "loaded", ...await load(body, tensors) };
    case "unload": return { kind: "unloaded", body: await unload(body) };
    case "run": {
      const entry = models.get(body.model);
      if (!entry) return { kind: "error", body: { what: "not_loaded", message: body.model } };
      befall();
      const { outputs, inPageMs } = await onDevice(entry.backend, (ort) => (
        body.stage ? take(ort, entry, body.stage, tensors) : run(ort, entry.session, tensors)));
      return { kind: "result", tensors: lied(body.model, outputs), body: { inPageMs } };
    }
    case "fault":
      if (!config.faults) return { kind: "error", body: { what: "unknown_kind", message: kind } };
      return fail(body, socket);
    default: return { kind: "error", body: { what: "unknown_kind", message: kind } };
  }
}

// Build a session of the warm-up model and run it, again and again for as long as is asked for
// (0: once). Both matter: building a session is code of its own.
async function warm(ort, { backend, seconds = 0 }) {
  const bytes = await fetchBytes("/page/warmup.onnx");
  const end = performance.now() + seconds * 1000;
  do {
    const session = await ort.InferenceSession.create(bytes, { executionProviders: [backend] });
    const rounds = seconds ? WARM_LENGTHS : WARM_LENGTHS.slice(0, 1);
    for (const length of rounds) {
      await session.run({ ids: new ort.Tensor("int64", new BigInt64Array(length), [1, length]) });
    }
    await session.release();
  } while (performance.now() < end);
}

// After a trap or an abort the runtime's heap is in no known state: the page is of no more use.
const ABORTED = /\bAborted\(|memory access out of bounds|unreachable executed|table index is out of bounds/;
const isAborted = (error) => error instanceof WebAssembly.RuntimeError || ABORTED.test(String(error));

const WORDS_MAX = 8000; // characters of an error's text: what quotes a model's names may be of any length
const describe = (error) => (error?.message ? `${error.name}: ${error.message}` : String(error)).slice(0, WORDS_MAX);

let queue = Promise.resolve();
function receive(buffer, socket) {
  queue = queue.then(async () => {
    if (socket.readyState !== WebSocket.OPEN) return; // nobody waits for this any more
    let frame, reply;
    try {
      frame = decode(buffer);
    } catch (error) { // in its turn, by which it is known whose reply this is
      send(socket, { kind: "error", body: { what: "bad_frame", message: describe(error) } });
      return;
    }
    try {
      reply = await handle(frame, socket);
    } catch (error) {
      if (error instanceof Refusal) {
        send(socket, { kind: "error", body: error.body, op: frame.op, step: frame.step, position: frame.position });
        return;
      }
      const what = isAborted(error) ? "runtime_aborted" : `${frame.kind}_failed`;
      reply = { kind: "error", body: { what, message: describe(error) } };
    }
    send(socket, { ...reply, op: frame.op, step: frame.step, position: frame.position });
  });
}

function send(socket, frame) {
  if (socket.readyState !== WebSocket.OPEN) return;
  let bytes = null;
  try {
    bytes = encode({ ...frame, epoch: config.epoch });
    const spoilt = frame.kind === "result" && armed.tooLarge > 0;
    if (spoilt) armed.tooLarge -= 1;
    if (spoilt || bytes.byteLength > config.messageBytesMax) {
      bytes = encode({ kind: "error", op: frame.op, epoch: config.epoch,
        body: { what: "too_large", size: bytes.byteLength, limit: config.messageBytesMax,
          message: `the answer has ${bytes.byteLength} bytes` } });
    }
  } catch (error) {
    bytes = encode({ kind: "error", op: frame.op, epoch: config.epoch,
      body: { what: "encode_failed", message: describe(error) } });
  }
  socket.send(bytes);
}

self.onmessage = ({ data }) => {
  config = data;
  ready("wasm").catch(() => {}); // begun while the socket opens; a failure shows when it is used
  keepOpen(config.url, [config.protocol, config.token], {
    received: (event, socket) => receive(event.data, socket),
    ended() {
      self.postMessage({ text: "the data socket could not be opened again" });
      self.close();
    },
  });
};
