// The page's main thread: owns the control socket and starts the worker. It never computes, so
// that it can answer a ping while the worker is busy: busy must not be taken for dead.

import { keepOpen } from "/page/reconnect.js";

const config = JSON.parse(document.getElementById("config").textContent);
const socketUrl = (path) => `ws://${location.host}${path}`;
const CONSOLE_LENGTH_MAX = 2000; // characters of one reported message

let control = null;
let worker = null;
let failed = null; // that the worker did: said again on a new socket, should it have been lost

function say(message) {
  if (control?.readyState === WebSocket.OPEN) control.send(JSON.stringify(message));
}

function report(level, text) {
  say({ kind: "console", level, text: String(text).slice(0, CONSOLE_LENGTH_MAX) });
}

function show(state) {
  document.getElementById("state").textContent = state;
}

function workerFailed(text) {
  failed = { kind: "worker_failed", text };
  say(failed);
}

function startWorker() {
  worker = new Worker("/page/worker.js", { type: "module", name: "tabpool" });
  // It says that its device was lost, or that it gave up.
  worker.onmessage = ({ data }) => (data.kind ? say(data) : workerFailed(data.text));
  worker.onerror = (event) => workerFailed(event.message || "worker error");
  worker.postMessage({ ...config, url: socketUrl("/data") });
}

// A fault on purpose, of a pool that allows them.
function fail({ what, bytes }) {
  if (what === "reload") location.reload();
  if (what === "flood") control.send("x".repeat(bytes));
}

keepOpen(socketUrl("/control"), [config.protocol, config.token], {
  opened(socket) {
    control = socket;
    say({ kind: "hello", epoch: config.epoch, isolated: self.crossOriginIsolated });
    say({ kind: "visibility", state: document.visibilityState });
    if (failed) say(failed);
    if (!worker) startWorker();
    show("connected");
  },
  received({ data }) {
    const message = JSON.parse(data);
    if (message.kind === "ping") say({ kind: "pong", id: message.id });
    if (message.kind === "fault" && config.faults) fail(message);
  },
  closed: () => show("reconnecting"),
  ended() {
    // The actor is gone or has replaced this page: stop computing for nobody.
    worker?.terminate();
    show("disconnected");
  },
});

addEventListener("error", (event) => report("error", event.message));
addEventListener("unhandledrejection", (event) => report("error", event.reason));
document.addEventListener("visibilitychange", () =>
  say({ kind: "visibility", state: document.visibilityState }));
