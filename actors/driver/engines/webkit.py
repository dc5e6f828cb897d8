"""WebKit: safaridriver with Safari on macOS, WebKitGTK's MiniBrowser on Linux. Data only."""

from __future__ import annotations

from collections.abc import Callable

from actors.driver.arguments import Gpu, LaunchSettings
from actors.driver.engines.base import MAC, Engine, Machine
from recovery.kinds import BrowserType


def _settings(machine: Machine) -> LaunchSettings:
    # WebKitGTK has no WebGPU, and under Xvfb only software GL: don't composite.
    environment = {"WEBKIT_DISABLE_COMPOSITING_MODE": "1", "LIBGL_ALWAYS_SOFTWARE": "1"}
    arguments = ("--automation",)
    return LaunchSettings(BrowserType.SAFARI, machine.headless, Gpu.OFF, arguments, {}, environment)


def is_safaridriver(driver: str) -> bool:
    """Whether this is Apple's, which takes neither a binary nor arguments."""
    return driver.endswith("safaridriver")


def _command(driver: str, port: int, free_port: Callable[[], int]) -> list[str]:
    if is_safaridriver(driver):
        return [driver, "--port", str(port)]
    return [driver, f"--port={port}", "--host=127.0.0.1"]


SAFARI = Engine(
    BrowserType.SAFARI,
    browsers=(
        "/usr/lib/*/webkit2gtk-4.1/MiniBrowser",
        "/usr/lib/*/webkit2gtk-4.0/MiniBrowser",
        "/usr/lib*/webkit2gtk-4.*/MiniBrowser",
        f"{MAC}/Safari.app/Contents/MacOS/Safari",
    ),
    drivers=("WebKitWebDriver", "safaridriver"),
    driver_variable="TABPOOL_SAFARIDRIVER",
    install="Debian: apt-get install webkit2gtk-driver xvfb; macOS: safaridriver --enable",
    page_mark="WebKitWebProcess",
    settings=_settings,
    command=_command,
    options=lambda driver: "SafariOptions" if is_safaridriver(driver) else "WebKitGTKOptions",
    needs_display=True,
    takes_screenshots=False,  # its driver never answers to that, and is deaf to all else meanwhile
    covers_windows=False,  # a new tab stays behind the page
)
