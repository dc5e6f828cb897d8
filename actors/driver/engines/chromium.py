"""Chrome or Chromium, and Edge: one engine, two products. Data only."""

from __future__ import annotations

from pathlib import Path

from actors.driver.arguments import Gpu, LaunchSettings
from actors.driver.engines.base import MAC, Engine, Machine
from recovery.kinds import BrowserType

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


def _settings(kind: BrowserType, machine: Machine) -> LaunchSettings:
    arguments = (
        *_CHROMIUM,
        *(("--headless=new",) if machine.headless else ()),
        *(("--no-sandbox",) if machine.root else ()),  # only then: it can't work as root
        *(("--disable-dev-shm-usage",) if machine.small_shm else ()),
        *_CHROMIUM_GPU[machine.gpu],
    )
    return LaunchSettings(kind, machine.headless, machine.gpu, arguments)


def _profile(profile: Path) -> list[str]:
    return [f"--user-data-dir={profile}"]


CHROME = Engine(
    BrowserType.CHROME,
    browsers=(
        # The binary itself before Debian's wrapper: the wrapper only adds flags for desktops.
        "/usr/lib/chromium/chromium",
        "chromium",
        "google-chrome",
        "google-chrome-stable",
        "chromium-browser",
        f"{MAC}/Google Chrome.app/Contents/MacOS/Google Chrome",
        f"{MAC}/Chromium.app/Contents/MacOS/Chromium",
    ),
    drivers=("chromedriver", "/usr/lib/chromium-browser/chromedriver"),
    driver_variable="TABPOOL_CHROMEDRIVER",
    install="Debian: apt-get install chromium chromium-driver; "
    "macOS: brew install --cask google-chrome chromedriver",
    page_mark="--type=renderer",
    settings=lambda machine: _settings(BrowserType.CHROME, machine),
    command=lambda driver, port, free_port: [driver, f"--port={port}"],
    options=lambda driver: "ChromeOptions",
    profile_arguments=_profile,
    maps_hosts=True,
)
EDGE = Engine(
    BrowserType.EDGE,
    browsers=(
        "microsoft-edge",
        "microsoft-edge-stable",
        f"{MAC}/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    ),
    drivers=("msedgedriver",),
    driver_variable="TABPOOL_EDGEDRIVER",
    install="Microsoft Edge and a msedgedriver of the same version, from Microsoft",
    page_mark="--type=renderer",
    settings=lambda machine: _settings(BrowserType.EDGE, machine),
    command=lambda driver, port, free_port: [driver, f"--port={port}"],
    options=lambda driver: "EdgeOptions",
    profile_arguments=_profile,
    maps_hosts=True,
)
