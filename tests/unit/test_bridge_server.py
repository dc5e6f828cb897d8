"""The HTTP server: where it listens, and what every answer carries."""

import pytest

from actors.bridge import Bridge, PageConfig
from tests.served import LIMIT, ORT, serving


@pytest.mark.parametrize("path", ["/", "/page/main.js", f"{ORT}/ort.wasm.min.mjs"])
async def test_every_answer_isolates_the_page(path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        async with served.get(path, cookie) as response:
            assert response.status == 200
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_port_survives_for_the_next_bridge_and_a_taken_one_is_not_fatal():
    async with serving() as served:
        port = served.bridge.port
    again = Bridge(PageConfig(1, LIMIT, probe=False), lambda _: None)
    await again.start(port)
    assert again.port == port
    await again.stop()
