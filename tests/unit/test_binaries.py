import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors.driver import binaries
from actors.driver.binaries import find_binaries
from actors.driver.engines import ENGINES, Engine
from recovery.errors import BrowserMissing
from recovery.kinds import BrowserType


class Machine:
    """A machine with nothing on it but what a test installs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str) -> str:
        path = self.folder / name
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    for name in [name for name in os.environ if name.startswith("TABPOOL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DISPLAY", raising=False)
    engines = {kind: only_on_path(engine) for kind, engine in ENGINES.items()}
    engines[BrowserType.SAFARI] = replace(
        engines[BrowserType.SAFARI], browsers=(f"{tmp_path}/*/MiniBrowser", "MiniBrowser")
    )
    monkeypatch.setattr(binaries, "ENGINES", engines)
    return Machine(tmp_path)


def only_on_path(engine: Engine) -> Engine:
    """The engine without the places of this machine that are not on PATH."""
    return replace(
        engine,
        browsers=tuple(name for name in engine.browsers if "/" not in name),
        drivers=tuple(name for name in engine.drivers if "/" not in name),
        packaged_driver=lambda: None,
    )


def test_browser_and_driver_are_found_on_the_path(machine):
    browser, driver = machine.install("chromium"), machine.install("chromedriver")
    found = find_binaries(BrowserType.CHROME)
    assert (found.browser, found.driver, found.xvfb) == (browser, driver, None)


@pytest.mark.parametrize("kind", BrowserType)
def test_missing_browser_says_what_to_install_and_what_else_to_do(machine, kind):
    with pytest.raises(BrowserMissing, match=f"no {kind} browser") as caught:
        find_binaries(kind)
    assert caught.value.fields["browser"] == kind
    assert caught.value.fields["install"] in str(caught.value)
    assert "tabpool doctor" in str(caught.value)


def test_missing_driver_is_named(machine):
    browser = machine.install("firefox")
    with pytest.raises(BrowserMissing, match=f"found {browser}, but no driver"):
        find_binaries(BrowserType.FIREFOX)


def test_packaged_geckodriver_is_used_where_there_is_no_other(machine, monkeypatch):
    machine.install("firefox")
    packaged = replace(ENGINES[BrowserType.FIREFOX], packaged_driver=lambda: "/packaged")
    monkeypatch.setattr(binaries, "ENGINES", {BrowserType.FIREFOX: packaged})
    assert find_binaries(BrowserType.FIREFOX).driver == "/packaged"
    own = machine.install("geckodriver")
    assert find_binaries(BrowserType.FIREFOX).driver == own


def test_override_wins_and_must_be_executable(machine, monkeypatch):
    machine.install("chromium")
    machine.install("chromedriver")
    mine = machine.install("my-browser")
    monkeypatch.setenv("TABPOOL_CHROME", mine)
    assert find_binaries(BrowserType.CHROME).browser == mine
    (machine.folder / "my-browser").chmod(0o644)
    if os.geteuid() != 0 or not os.access(mine, os.X_OK):
        with pytest.raises(BrowserMissing):
            find_binaries(BrowserType.CHROME)
    monkeypatch.setenv("TABPOOL_CHROME", "/nowhere")
    with pytest.raises(BrowserMissing):
        find_binaries(BrowserType.CHROME)


@pytest.mark.skipif(sys.platform != "linux", reason="Safari has a display of its own")
def test_minibrowser_gets_a_display_unless_it_is_to_be_seen_on_one(machine, monkeypatch):
    (machine.folder / "lib").mkdir()
    machine.install("lib/MiniBrowser")
    machine.install("WebKitWebDriver")
    with pytest.raises(BrowserMissing, match="Xvfb was not found"):
        find_binaries(BrowserType.SAFARI)
    xvfb = machine.install("Xvfb")
    assert find_binaries(BrowserType.SAFARI).xvfb == xvfb
    assert find_binaries(BrowserType.SAFARI, headless=False).xvfb == xvfb
    monkeypatch.setenv("DISPLAY", ":0")
    assert find_binaries(BrowserType.SAFARI).xvfb == xvfb
    assert find_binaries(BrowserType.SAFARI, headless=False).xvfb is None
