"""The files that a page fetches."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.assets import index_html, static_assets
from sharding.models.signature import ModelFile
from tests import fakes
from tests.served import ORT, serving


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/page/../assets.py",
        "/page/../../pyproject.toml",
        "/page/..%2fassets.py",
        "/page/%2e%2e/assets.py",
        "/page/%2e%2e%2fassets.py",
        "/page/..%5cassets.py",
        "/page/%252e%252e/assets.py",
        "//etc/passwd",
        "/%2fetc%2fpasswd",
        "/page//main.js",
        "/page/main.js%00",
        "/page/",
        "/page",
        "/page/index.html",
        "/ort/VERSION",
        f"{ORT}/../VERSION",
        "/models/d/0",
        "/" + "a" * 2000,
    ],
)
async def test_no_path_escapes_the_table_of_files(path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        assert await served.status(path, cookie) in (400, 403, 404)
        assert await served.status("/page/main.js", cookie) == 200


async def test_runtime_can_be_cached_for_ever_and_the_page_not():
    async with serving() as served:
        cookie = await served.enter(served.begin())
        wasm = f"{ORT}/ort-wasm-simd-threaded.wasm"
        async with served.get(wasm, cookie) as response:
            assert response.content_type == "application/wasm"
            assert "immutable" in response.headers["Cache-Control"]
        async with served.get("/page/main.js", cookie) as response:
            assert response.content_type == "text/javascript"
            assert response.headers["Cache-Control"] == "no-cache"
            etag = response.headers["ETag"]
        header = {"If-None-Match": etag}
        assert await served.status("/page/main.js", cookie, **header) == 304


async def test_files_are_served_in_ranges(tmp_path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        model = _model(tmp_path, bytes(range(100)))
        served.bridge.register(model)
        async with served.get("/models/digest/0", cookie, Range="bytes=10-19") as response:
            assert response.status == 206
            assert await response.read() == bytes(range(10, 20))
            assert response.headers["Cache-Control"] == "no-store"
        assert await served.status("/models/digest/0", cookie, Range="bytes=500-") == 416
        served.bridge.unregister(model)
        assert await served.status("/models/digest/0", cookie) == 404


async def test_model_file_that_vanished_is_not_found(tmp_path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        served.bridge.register(_model(tmp_path, b"x"))
        (tmp_path / "model.onnx").unlink()
        assert await served.status("/models/digest/0", cookie) == 404


def _model(folder: Path, content: bytes) -> Any:
    path = folder / "model.onnx"
    path.write_bytes(content)
    file = ModelFile(str(path), path.name, len(content), "digest")
    return replace(fakes.spec(digest="digest"), files=(file,))


def test_page_names_no_file_that_is_not_served():
    """Every file that the page names is in the table."""
    named = re.findall(r'(?:src|href)="(/[^"]+)"', index_html())
    assert named
    assert all(path in static_assets() for path in named)


@pytest.mark.parametrize(("how", "served"), [("half", b"ab"), ("wrong", b"ab\x9cd"), ("500", None)])
async def test_next_file_of_a_model_is_spoilt_once(tmp_path, how, served):
    async with serving() as ours:
        cookie = await ours.enter(ours.begin())
        ours.bridge.register(_model(tmp_path, b"abcd"))
        ours.bridge.spoil([how])
        assert await ours.status("/page/main.js", cookie) == 200  # no file of a model
        async with ours.get("/models/digest/0", cookie) as response:
            assert response.status == (500 if served is None else 200)
            if served is not None:
                assert await response.read() == served
        async with ours.get("/models/digest/0", cookie) as response:
            assert await response.read() == b"abcd"
