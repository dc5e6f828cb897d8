// The page's main thread: owns the control socket and starts the worker. It never computes, so
// that it can answer a ping while the worker is busy: busy must not be taken for dead.

const config = JSON.parse(document.getElementById("config").textContent);
const socketUrl = (path) => `ws://${location.host}${path}`;
const control = new WebSocket(socketUrl("/control"), [config.protocol, config.token]);
const say = (message) => {
  if (control.readyState === WebSocket.OPEN) control.send(JSON.stringify(message));
};
const CONSOLE_LENGTH_MAX = 2000; // characters of one reported message

let worker = null;

function report(level, text) {
  say({ kind: "console", level, text: String(text).slice(0, CONSOLE_LENGTH_MAX) });
}

function startWorker() {
  worker = new Worker("/page/worker.js", { type: "module", name: "tabpool" });
  worker.onmessage = ({ data }) => say(data);
  worker.onerror = (event) => say({ kind: "worker_failed", text: event.message || "worker error" });
  worker.postMessage({ ...config, url: socketUrl("/data") });
}

control.onopen = () => {
  say({ kind: "hello", epoch: config.epoch, isolated: self.crossOriginIsolated });
  startWorker();
  document.getElementById("state").textContent = "connected";
};
control.onmessage = ({ data }) => {
  const message = JSON.parse(data);
  if (message.kind === "ping") say({ kind: "pong", id: message.id });
};
control.onclose = () => {
  // The actor is gone or has replaced this page: stop computing for nobody.
  if (worker) worker.terminate();
  document.getElementById("state").textContent = "disconnected";
};
addEventListener("error", (event) => report("error", event.message));
addEventListener("unhandledrejection", (event) => report("error", event.reason));
document.addEventListener("visibilitychange", () =>
  say({ kind: "visibility", state: document.visibilityState }));
