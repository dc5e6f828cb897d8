"""Launch arguments and preferences of each browser, as data.

A `LaunchSettings` holds all options of a launch; recovery derives changed ones. This module must
not look for binaries or start anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from recovery.kinds import BrowserType

PreferenceValue = bool | int | str


class Gpu(StrEnum):
    """Which GPU adapter the page may use: none, the machine's, or a software one."""

    OFF = "off"
    AUTO = "auto"
    SOFTWARE = "software"


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch one browser.

    `arguments` are command-line arguments, `preferences` Firefox preferences, `environment`
    extra variables of the browser's processes.
    """

    kind: BrowserType
    headless: bool = True
    gpu: Gpu = Gpu.AUTO
    arguments: tuple[str, ...] = ()
    preferences: Mapping[str, PreferenceValue] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def adjusted(
        self,
        arguments: tuple[str, ...] = (),
        preferences: Mapping[str, PreferenceValue] | None = None,
    ) -> LaunchSettings:
        """The same launch with more arguments and preferences; later ones win."""
        return replace(
            self,
            arguments=(*self.arguments, *(a for a in arguments if a not in self.arguments)),
            preferences={**self.preferences, **(preferences or {})},
        )


_CHROMIUM = (
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-extensions",
    "--mute-audio",
    "--password-store=basic",
    # No requests to the vendor's hosts, no updates.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    # Hidden pages must compute at full speed.
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
)
_CHROMIUM_GPU = {
    Gpu.OFF: ("--disable-gpu",),
    Gpu.AUTO: ("--enable-unsafe-webgpu", "--enable-features=WebMachineLearningNeuralNetwork"),
    Gpu.SOFTWARE: (
        "--enable-unsafe-webgpu",
        "--use-webgpu-adapter=swiftshader",
        "--enable-features=Vulkan,WebMachineLearningNeuralNetwork",
    ),
}
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


def default_settings(
    kind: BrowserType, *, headless: bool = True, gpu: Gpu = Gpu.OFF, root: bool, small_shm: bool
) -> LaunchSettings:
    """The default settings of a browser type.

    `root`: the processes run as root, where Chromium's sandbox can't work (`--no-sandbox` is
    passed only then). `small_shm`: /dev/shm is too small for Chromium's shared buffers, as in
    containers.
    """
    match kind:
        case BrowserType.CHROME | BrowserType.EDGE:
            arguments = (
                *_CHROMIUM,
                *(("--headless=new",) if headless else ()),
                *(("--no-sandbox",) if root else ()),
                *(("--disable-dev-shm-usage",) if small_shm else ()),
                *_CHROMIUM_GPU[gpu],
            )
            return LaunchSettings(kind, headless, gpu, arguments)
        case BrowserType.FIREFOX:
            arguments = ("-headless",) if headless else ()
            return LaunchSettings(kind, headless, gpu, arguments, {**_FIREFOX, **_FIREFOX_GPU[gpu]})
        case BrowserType.SAFARI:
            # WebKitGTK has no WebGPU, and under Xvfb only software GL: don't composite.
            environment = {"WEBKIT_DISABLE_COMPOSITING_MODE": "1", "LIBGL_ALWAYS_SOFTWARE": "1"}
            return LaunchSettings(kind, headless, Gpu.OFF, ("--automation",), {}, environment)
