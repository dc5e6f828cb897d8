"""`tabpool doctor`: checks the browsers of this machine by launching them.

Every browser is launched as by a pool (without Ray), and its own page reports its
features. This module must not install or change anything.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from actors.browser.host import BrowserHost
from actors.driver.arguments import Gpu
from actors.messages import HostConfig, LaunchOrder
from pool.config import has_gpu
from recovery.errors import PoolError, SetupError
from recovery.kinds import BrowserType
from recovery.records import BrowserFacts, HostRef

_PACKAGES = ("tabpool", "ray", "selenium", "onnx", "onnxruntime", "aiohttp", "numpy")


@dataclass(frozen=True)
class Finding:
    """One browser: its facts, or why it can't be used and the remedy."""

    browser: BrowserType
    usable: bool
    facts: BrowserFacts | None = None
    seconds: float = 0.0
    problem: str = ""
    remedy: str = ""
    hints: tuple[str, ...] = ()


async def launch_each(
    kinds: Iterable[BrowserType] = tuple(BrowserType), *, headless: bool = True
) -> AsyncIterator[Finding]:
    """Launch each browser in turn and yield its finding."""
    config = HostConfig(
        headless=headless,
        gpu=Gpu.AUTO if has_gpu() else Gpu.SOFTWARE,
        lease_seconds=3600.0,  # not renewed here; a first launch also creates a template
    )
    for kind in kinds:
        host = BrowserHost(f"doctor-{kind}", kind, config, lambda: None)
        try:
            report = await host.launch(LaunchOrder(HostRef(f"doctor-{kind}", 0), term=1))
        except PoolError as error:
            yield Finding(
                kind,
                usable=False,
                problem=str(error),
                remedy=str(error.fields.get("install", "")),
                hints=() if isinstance(error, SetupError) else error.fields.get("console", ()),
            )
        else:
            yield Finding(
                kind,
                usable=report.facts.isolated and report.facts.wasm_simd,
                facts=report.facts,
                seconds=sum(report.seconds.values()) - report.seconds.get("template", 0.0),
                hints=tuple(_hints(kind, report.facts)),
            )
        finally:
            await host.stop()


def _hints(kind: BrowserType, facts: BrowserFacts) -> Iterable[str]:
    if not facts.wasm_threads:
        yield "no wasm threads: the page is not cross-origin isolated in this browser"
    if not facts.webgpu:
        if kind is BrowserType.SAFARI and "WebKitGTK" in facts.product:
            yield "WebKitGTK has no WebGPU: models run on WASM"
        else:
            yield (
                "no WebGPU adapter: install a GPU driver, or mesa-vulkan-drivers (Debian) for a "
                "software one"
            )
    elif facts.webgpu_software:
        yield "WebGPU is a software adapter: correct but slow, so only used with backend='webgpu'"
    if not facts.private_network:
        yield (
            f"no private network ({facts.network_note}): every user of this machine can reach the "
            "driver's port; see docs/security.md"
        )
    if not facts.webnn:
        yield f"no WebNN ({facts.webnn_note.split(chr(10))[0][:100]})"


def machine() -> dict[str, str]:
    """Versions of tabpool, its dependencies and the platform."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    from actors.assets import ort_version

    try:
        found["onnxruntime-web"] = ort_version()
    except SetupError as error:
        found["onnxruntime-web"] = str(error)
    found["gpu"] = "yes" if has_gpu() else "none found"
    found["executable"] = sys.executable
    return found


def verdict(findings: Iterable[Finding]) -> bool:
    """Whether a pool can run here: at least one browser is usable."""
    return any(finding.usable for finding in findings)


def as_row(finding: Finding) -> tuple[str, ...]:
    """One finding as the cells of a table."""
    facts = finding.facts
    if facts is None:
        return (str(finding.browser), "-", "-", "-", "-", "-", "no")
    wasm = "SIMD" if facts.wasm_simd else "plain"
    if facts.wasm_threads:
        wasm += " + threads"
    adapter = facts.webgpu_adapter if facts.webgpu else "none"
    return (
        str(finding.browser),
        f"{facts.product} {facts.version}",
        wasm,
        adapter,
        "yes" if facts.webnn else "no",
        f"{finding.seconds:.1f} s",
        "yes" if finding.usable else "no",
    )


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """All findings as plain data."""
    from dataclasses import asdict

    listed = list(findings)
    return {
        "can_run": verdict(listed),
        "machine": machine(),
        "browsers": [asdict(finding) for finding in listed],
    }
