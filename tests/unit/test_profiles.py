import asyncio
import os
from pathlib import Path

import pytest
from tenacity import stop_after_attempt

from actors.driver import profiles
from actors.driver.binaries import Binaries
from actors.driver.profiles import (
    new_profile_path,
    save_template,
    template_lock,
    template_path,
    templates_root,
)
from recovery.errors import LaunchFailed
from recovery.kinds import BrowserType
from tests.fakes import eventually


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TABPOOL_CACHE", str(tmp_path / "cache"))


def profile_with(folder: Path, **files: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(folder)


def test_templates_lie_where_the_user_says(tmp_path, monkeypatch):
    assert templates_root() == tmp_path / "cache" / "profiles"
    monkeypatch.delenv("TABPOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert templates_root() == Path("/xdg/tabpool/profiles")


def test_every_launch_has_a_profile_of_its_own_that_is_not_there_yet():
    paths = {new_profile_path() for _ in range(100)}
    assert len(paths) == 100
    assert not any(os.path.exists(path) for path in paths)


def test_template_does_not_look_as_if_it_were_in_use(tmp_path):
    profile = profile_with(tmp_path / "profile", cache="warm", lock="x")
    (tmp_path / "profile" / "SingletonLock").symlink_to("host-123")  # dangles, as Chromium's
    template = templates_root() / "chrome"
    save_template(profile, template)
    assert os.listdir(template) == ["cache"]
    assert (template / "cache").read_text() == "warm"


def test_saved_template_replaces_the_one_before(tmp_path):
    template = templates_root() / "chrome"
    save_template(profile_with(tmp_path / "a", old="1"), template)
    save_template(profile_with(tmp_path / "b", new="2"), template)
    assert os.listdir(template) == ["new"]
    assert os.listdir(templates_root()) == ["chrome"]


def test_oldest_templates_are_dropped(tmp_path):
    profile = profile_with(tmp_path / "profile", cache="x")
    for number in range(profiles._TEMPLATES_MAX + 3):
        template = templates_root() / f"t{number}"
        save_template(profile, template)
        os.utime(template, (number, number))
    kept = set(os.listdir(templates_root()))
    assert len(kept) == profiles._TEMPLATES_MAX
    assert f"t{profiles._TEMPLATES_MAX + 2}" in kept
    assert "t0" not in kept


def test_template_is_another_for_another_browser_or_gpu(tmp_path):
    browser = tmp_path / "browser"
    browser.write_text("v1")
    found = Binaries(BrowserType.CHROME, str(browser), "driver")
    before = template_path(found, "off")
    assert template_path(found, "off") == before
    assert template_path(found, "auto") != before
    browser.write_text("version 2")
    assert template_path(found, "off") != before


async def test_lock_lets_one_at_a_time_in():
    template = templates_root() / "chrome"
    order: list[str] = []

    async def second() -> None:
        order.append("asked")
        async with template_lock(template):
            order.append("second in")

    async with template_lock(template):
        task = asyncio.create_task(second())
        await eventually(lambda: order == ["asked"])
        order.append("first out")
    await task
    assert order == ["asked", "first out", "second in"]


async def test_lock_that_is_never_free_is_a_failed_launch(monkeypatch):
    monkeypatch.setitem(profiles.TEMPLATE_FREES, "stop", stop_after_attempt(1))
    template = templates_root() / "chrome"
    async with template_lock(template):
        with pytest.raises(LaunchFailed, match="keeps the profile template"):
            async with template_lock(template):
                raise AssertionError("two are in")
    async with template_lock(template):
        pass  # it was let go
