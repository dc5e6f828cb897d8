"""A browser's product, version and features, from its driver and its page. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.driver.binaries import Binaries
from recovery.kinds import BrowserType
from recovery.records import BrowserFacts


def read_facts(
    kind: BrowserType,
    binaries: Binaries | None,
    capabilities: Mapping[str, Any],
    page: Mapping[str, Any],
) -> BrowserFacts:
    """`capabilities` are the WebDriver session's, `page` what the page answers to "info"."""
    driver = capabilities.get("chrome", {}).get("chromedriverVersion", "") or capabilities.get(
        "moz:geckodriverVersion", ""
    )
    return BrowserFacts(
        product=product(kind, binaries, capabilities),
        version=str(capabilities.get("browserVersion", "")),
        driver=str(driver).split(" ")[0],
        isolated=bool(page.get("isolated")),
        wasm_simd=bool(page.get("wasmSimd")),
        wasm_threads=bool(page.get("wasmThreads")),
        threads=int(page.get("threads", 1)),
        webgpu=bool(page.get("webgpu")),
        webgpu_adapter=str(page.get("webgpuAdapter", page.get("webgpuNote", ""))),
        webgpu_software=bool(page.get("webgpuSoftware")),
        webgpu_features=tuple(page.get("webgpuFeatures", ())),
        webnn=bool(page.get("webnn")),
        webnn_note=str(page.get("webnnNote", "")),
        user_agent=str(page.get("userAgent", "")),
    )


def product(kind: BrowserType, binaries: Binaries | None, capabilities: Mapping[str, Any]) -> str:
    """The actual product: Chromium and WebKitGTK are not reported as Chrome and Safari."""
    name = str(capabilities.get("browserName", kind))
    path = binaries.browser.lower() if binaries else ""
    if "chromium" in path:
        return "Chromium"
    return "WebKitGTK MiniBrowser" if "minibrowser" in path else name.capitalize()
