"""What a driver and its browser get of the worker's environment."""

from pathlib import Path

import pytest

from actors.driver.environment import browser_environment

PROFILE = Path("/profiles/p")


def made(worker: dict[str, str], *, headless: bool = True, **changes: str) -> dict[str, str]:
    return browser_environment(worker, PROFILE, changes, headless=headless)


@pytest.mark.parametrize(
    "name",
    [
        *("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY", "no_proxy"),
        *("RAY_AUTH_TOKEN", "RAY_ADDRESS", "TABPOOL_STATE", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH"),
        *("DBUS_SESSION_BUS_ADDRESS", "LD_PRELOAD", "SSLKEYLOGFILE"),
    ],
)
def test_proxies_secrets_and_whatever_is_unknown_stay_with_the_worker(name):
    assert name not in made({name: "x"})


@pytest.mark.parametrize("name", ["PATH", "LANG", "LC_ALL", "TZ", "DISPLAY", "LIBGL_DRIVERS_PATH"])
def test_what_programs_need_is_handed_on(name):
    assert made({name: "x"})[name] == "x"


@pytest.mark.parametrize("worker", [{}, {"HOME": "/root", "XDG_CACHE_HOME": "/c", "TMPDIR": "/t"}])
def test_home_and_its_folders_are_below_the_profile(worker):
    found = made(worker)
    for name in ("HOME", "TMPDIR", "TMP", "TEMP", "XDG_RUNTIME_DIR"):
        assert found[name] == "/profiles/p/t"
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        assert Path(found[name]).parent == PROFILE


def test_browser_with_a_window_keeps_the_folder_of_its_display_s_socket():
    worker = {"XDG_RUNTIME_DIR": "/run/user/1000", "WAYLAND_DISPLAY": "wayland-0"}
    assert made(worker, headless=False)["XDG_RUNTIME_DIR"] == "/run/user/1000"


def test_the_launch_has_the_last_word():
    assert made({"LIBGL_ALWAYS_SOFTWARE": "0"}, LIBGL_ALWAYS_SOFTWARE="1") == {
        **made({}),
        "LIBGL_ALWAYS_SOFTWARE": "1",
    }
