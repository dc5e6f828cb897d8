"""Finds each browser and its driver on this machine, and says what to install if missing.

Uses the file system only; it starts nothing. `TABPOOL_CHROME`, `TABPOOL_CHROMEDRIVER`,
`TABPOOL_FIREFOX`, `TABPOOL_GECKODRIVER`, `TABPOOL_EDGE`, `TABPOOL_EDGEDRIVER`,
`TABPOOL_SAFARI` and `TABPOOL_SAFARIDRIVER` override the search.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from dataclasses import dataclass

from actors.driver.engines import ENGINES
from recovery.errors import BrowserMissing
from recovery.kinds import BrowserType


@dataclass(frozen=True)
class Binaries:
    """A browser, its driver and, where it can't run without a display, Xvfb."""

    kind: BrowserType
    browser: str
    driver: str
    xvfb: str | None = None


def find_binaries(kind: BrowserType, *, headless: bool = True) -> Binaries:
    """Find `kind`. Raises `BrowserMissing`, naming the missing part and what to install."""
    engine = ENGINES[kind]
    browser = _find(f"TABPOOL_{kind.upper()}", engine.browsers)
    if browser is None:
        raise _missing(kind, f"no {kind} browser")
    driver = _find(engine.driver_variable, engine.drivers) or engine.packaged_driver()
    if driver is None:
        raise _missing(kind, f"found {browser}, but no driver for it")
    xvfb = None
    if engine.needs_display and sys.platform == "linux":
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


def _missing(kind: BrowserType, what: str) -> BrowserMissing:
    return BrowserMissing(
        f"{what} on this machine. Install it ({ENGINES[kind].install}), or leave {kind!s} out of "
        "`browsers=`. `tabpool doctor` shows what is installed.",
        browser=str(kind),
        install=ENGINES[kind].install,
    )
