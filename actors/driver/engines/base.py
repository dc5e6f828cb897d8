"""What tabpool has to know of a browser engine and its driver, as one record.

A new engine is a module of this package with such a record, and a row of
`actors.driver.engines.ENGINES`. This module must not look for binaries or start anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from actors.driver.arguments import Gpu, LaunchSettings
from recovery.kinds import BrowserType


class Machine(NamedTuple):
    """What the launch settings depend on besides the engine.

    `root`: the processes run as root, where Chromium's sandbox can't work. `small_shm`: /dev/shm
    is too small for Chromium's shared buffers, as in containers.
    """

    headless: bool
    gpu: Gpu
    root: bool
    small_shm: bool


@dataclass(frozen=True)
class Engine:
    """One engine. Binaries are names on PATH, absolute paths, or patterns of such."""

    kind: BrowserType
    browsers: tuple[str, ...]  # the preferred one first
    drivers: tuple[str, ...]
    driver_variable: str  # of the environment; overrides `drivers`
    install: str  # how to install both, for messages
    page_mark: str  # in the command line of its page processes, and of no other
    settings: Callable[[Machine], LaunchSettings]  # of a healthy browser
    command: Callable[[str, int, Callable[[], int]], list[str]]  # of driver, on a port; a free port
    options: Callable[[str], str]  # the name of Selenium's options class, by driver
    profile_arguments: Callable[[Path], list[str]] = lambda profile: []
    packaged_driver: Callable[[], str | None] = lambda: None  # a Python package's, as last resort
    needs_display: bool = False  # it has no headless mode: on Linux it gets a virtual display
    takes_preferences: bool = False  # Selenium's options have `set_preference`
    maps_hosts: bool = False  # takes --host-resolver-rules, so that all slots share one origin
    takes_screenshots: bool = True
    covers_windows: bool = True  # a new tab hides the page; else its window is minimised


MAC = "/Applications"  # where macOS keeps programs
