"""Serves the files that a page fetches: its own, onnxruntime-web's and those of models.

They are looked up by path in a table (`actors.assets`). This module must not do access control.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiohttp import web

from actors.assets import MODELS, Asset, model_assets, static_assets
from sharding.models.signature import ModelSpec

_SPOILT_MAX = 64
HEADERS = {
    # Cross-origin isolation: what SharedArrayBuffer, and so wasm threads, require.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Files:
    """The table of files, and faults to inject into the next ones."""

    def __init__(self) -> None:
        self._assets: dict[str, Asset] = {}
        self._spoilt: deque[str] = deque(maxlen=_SPOILT_MAX)  # faults of the next model files

    def find(self) -> None:
        """Add the page's and the runtime's files. Raises `SetupError` if they are missing."""
        self._assets.update(static_assets())

    def register(self, spec: ModelSpec) -> None:
        """Let the page fetch this model's files."""
        self._assets.update(model_assets(spec))

    def unregister(self, spec: ModelSpec) -> None:
        for path in model_assets(spec):
            self._assets.pop(path, None)

    def spoil(self, how: Sequence[str]) -> None:
        """Serve the next model files with a fault each: "500", "half", or "wrong" (one byte)."""
        self._spoilt.extend(how)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        asset = self._assets.get(request.path)
        if asset is None:
            raise web.HTTPNotFound
        headers = {
            **HEADERS,
            "Content-Type": asset.content_type,
            "Cache-Control": asset.cache_control,
        }
        if self._spoilt and request.path.startswith(MODELS):
            return await _spoilt(self._spoilt.popleft(), asset.path, headers)
        return web.FileResponse(asset.path, headers=headers)


async def _spoilt(how: str, path: Path, headers: Mapping[str, str]) -> web.StreamResponse:
    """A model file served with a fault."""
    if how == "500":
        raise web.HTTPInternalServerError(text="injected fault")
    content = bytearray(await asyncio.to_thread(path.read_bytes))
    if how == "half":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0xFF
    return web.Response(body=bytes(content), headers=headers)
