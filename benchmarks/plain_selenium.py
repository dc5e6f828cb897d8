"""The baseline: a careful implementation with Selenium alone.

A page served from loopback, a model loaded once, inference through `execute_async_script`; on
any error what is left of driver and browser is ended, the browser launched again, the page and
model loaded again and the call repeated. It pools the model's output in the page, so that only a
small answer is sent as JSON: that favours it. Nothing of tabpool's is used but the binaries' paths
and launch arguments.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service as ChromeService
from selenium.webdriver.firefox.service import Service as FirefoxService
from urllib3.exceptions import HTTPError

from actors.driver.arguments import LaunchSettings
from actors.driver.binaries import Binaries
from recovery.kinds import BrowserType

_SCRIPT_SECONDS = 30  # the same as a pool's `hang_seconds`
_ORT = Path(__file__).parents[1] / "actors" / "page" / "ort"
_PAGE = """<!doctype html><title>plain</title><script type="module">
import * as ort from '/ort/ort.wasm.min.mjs';
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = '/ort/';
const load = ort.InferenceSession.create('/model.onnx', {executionProviders: ['wasm']});
window.infer = async (inputs) => {
  const session = await load;
  const feeds = {};
  for (const [name, {dims, data}] of Object.entries(inputs)) {
    feeds[name] = new ort.Tensor('int64', BigInt64Array.from(data.map(BigInt)), dims);
  }
  const hidden = (await session.run(feeds)).last_hidden_state;
  const [batch, tokens, width] = hidden.dims;
  const mask = inputs.attention_mask.data;
  const rows = [];
  for (let b = 0; b < batch; b++) {
    const row = new Float64Array(width);
    let count = 0;
    for (let t = 0; t < tokens; t++) {
      if (!mask[b * tokens + t]) continue;
      count++;
      for (let w = 0; w < width; w++) row[w] += hidden.data[(b * tokens + t) * width + w];
    }
    const norm = Math.hypot(...row);
    rows.push(Array.from(row, (value) => value / norm));
  }
  return rows;
};
window.ready = true;
</script>"""
_INFER = """const done = arguments[arguments.length - 1];
const go = () => window.ready
  ? window.infer(arguments[0]).then(done, (error) => done({error: String(error)}))
  : setTimeout(go, 5);
go();"""


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, model: Path, **kwargs: Any) -> None:
        self._model = model
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        if path == "/model.onnx":
            return str(self._model)
        return str(_ORT / Path(path).name)

    def do_GET(self) -> None:
        if self.path != "/":
            super().do_GET()
            return
        body = _PAGE.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


_Handler.extensions_map = {
    **SimpleHTTPRequestHandler.extensions_map,
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away in the middle of a file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class PlainSelenium:
    """One browser under a plain Selenium script that starts over when it fails."""

    def __init__(self, settings: LaunchSettings, binaries: Binaries, model: Path) -> None:
        self._settings = settings
        self._binaries = binaries
        self._model = model
        self._server: ThreadingHTTPServer | None = None
        self._driver: Any = None
        self._browser: psutil.Process | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="plain-", ignore_cleanup_errors=True)
        self.relaunches = 0

    def __enter__(self) -> Self:
        handler = functools.partial(_Handler, model=self._model)
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._launch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._quit()
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._temporary.cleanup()

    @property
    def pids(self) -> dict[str, int]:
        """The "driver" and the "browser" below it."""
        assert self._browser is not None
        return {"driver": int(self._driver.service.process.pid), "browser": self._browser.pid}

    def _launch(self) -> None:
        assert self._server is not None
        settings, driver = self._settings, self._binaries.driver
        # A driver that is killed leaves its profiles behind.
        environment = {**os.environ, "TMPDIR": self._temporary.name}
        if settings.kind is BrowserType.FIREFOX:
            firefox = webdriver.FirefoxOptions()
            firefox.binary_location = self._binaries.browser
            for argument in settings.arguments:
                firefox.add_argument(argument)
            for name, value in settings.preferences.items():
                firefox.set_preference(name, value)
            self._driver = webdriver.Firefox(firefox, FirefoxService(driver, env=environment))
        else:
            chrome = webdriver.ChromeOptions()
            chrome.binary_location = self._binaries.browser
            for argument in settings.arguments:
                chrome.add_argument(argument)
            self._driver = webdriver.Chrome(chrome, ChromeService(driver, env=environment))
        known = self._driver.capabilities
        pid = int(known.get("goog:processID") or known.get("moz:processID"))
        self._browser = psutil.Process(pid)
        self._driver.set_script_timeout(_SCRIPT_SECONDS)
        self._driver.get(f"http://127.0.0.1:{self._server.server_address[1]}/")

    def _quit(self) -> None:
        with contextlib.suppress(WebDriverException, HTTPError, OSError):
            self._driver.quit()
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._browser is not None:
                self._browser.kill()  # it outlives a driver that was killed

    def embed(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Mean-pooled, normalised embeddings, (batch, hidden) float32."""
        plain = {
            name: {"dims": list(array.shape), "data": array.ravel().tolist()}
            for name, array in inputs.items()
        }
        while True:
            with contextlib.suppress(WebDriverException, HTTPError, OSError):
                rows = self._driver.execute_async_script(_INFER, plain)
                if rows is not None:  # as Firefox's driver answers when the tab has crashed
                    if not isinstance(rows, list):
                        raise AssertionError(f"the page answered {rows!r}")
                    return np.asarray(rows, np.float32)
            self.relaunches += 1
            self._quit()
            self._launch()
