"""The HTTP server of one browser's page, and its routes.

It listens on loopback: the machine's, or that of the browser's private network.

`actors.bridge.admission` does access control; the handlers of `sockets` handle messages. This
module must not do either.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type

from actors.assets import index_html, ort_version
from actors.bridge.admission import Admission
from actors.bridge.files import HEADERS, Files
from actors.bridge.records import PROTOCOL, PageConfig
from recovery.policies import PORT_FREES

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves the page, its files and, by the handlers of `sockets` (path to handler), sockets."""

    def __init__(
        self,
        config: PageConfig,
        admission: Admission,
        files: Files,
        sockets: Mapping[str, Handler],
    ) -> None:
        self._config = config
        self._admission = admission
        self._files = files
        self._sockets = sockets
        self._runner: web.AppRunner | None = None
        self._site: web.BaseSite | None = None
        self.port = 0  # on the machine's loopback

    async def start(self, port: int = 0) -> None:
        """Listen on `port` of loopback (0: any; also when `port` stays taken)."""
        runner = await self._ready()
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(OSError), **PORT_FREES
            ):
                with attempt:
                    await self._begin(web.TCPSite(runner, "127.0.0.1", port))
        except (OSError, RetryError):
            await self._begin(web.TCPSite(runner, "127.0.0.1", 0))
        self.port = runner.addresses[0][1]

    async def listen(self, listener: socket.socket) -> None:
        """Listen on a socket of a private network; the previous one is closed."""
        try:
            runner = await self._ready()
            site, self._site = self._site, None
            if site is not None:
                await site.stop()
            self.port = 0
            await self._begin(web.SockSite(runner, listener))
        except BaseException:
            listener.close()
            raise

    async def _ready(self) -> web.AppRunner:
        if self._runner is None:
            self._files.find()
            app = web.Application(middlewares=[self._guard])
            app.router.add_get("/enter/{ticket}", self._enter)
            app.router.add_get("/", self._index)
            for path, handler in self._sockets.items():
                app.router.add_get(path, handler)
            app.router.add_get("/{path:.*}", self._files.serve)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            self._runner = runner
        return self._runner

    async def _begin(self, site: web.BaseSite) -> None:
        await site.start()
        self._site = site

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = self._site = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._admission.check(request)
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        self._admission.take_ticket(request.match_info["ticket"])
        response = web.Response(status=303, headers={"Location": "/", "Cache-Control": "no-store"})
        self._admission.give_cookie(response)
        return response

    async def _index(self, request: web.Request) -> web.StreamResponse:
        self._admission.take_page()
        config = {
            "protocol": PROTOCOL,
            "token": self._admission.token,
            "epoch": self._admission.epoch,
            "ortVersion": ort_version(),
            "threads": self._config.threads,
            "probe": self._config.probe,
            "faults": self._config.faults,
            "messageBytesMax": self._config.message_bytes_max,
        }
        text = index_html().replace("{{config}}", json.dumps(config))
        headers = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; "
            "script-src 'self' 'wasm-unsafe-eval'; "
            f"connect-src 'self' ws://{self._admission.host}",
        }
        return web.Response(text=text, content_type="text/html", headers=headers)
