import pickle

import pytest

from actors.driver.arguments import Gpu, LaunchSettings
from actors.driver.binaries import Binaries
from actors.driver.engines import default_settings
from actors.driver.session import driver_command
from recovery.kinds import BrowserType


def settings(kind=BrowserType.CHROME, **options) -> LaunchSettings:
    return default_settings(kind, **{"root": False, "small_shm": False, **options})


@pytest.mark.parametrize("kind", [BrowserType.CHROME, BrowserType.EDGE])
def test_sandbox_is_given_up_only_where_it_cannot_work(kind):
    assert "--no-sandbox" in settings(kind, root=True).arguments
    assert "--no-sandbox" not in settings(kind, root=False).arguments


def test_small_shared_memory_is_avoided():
    assert "--disable-dev-shm-usage" in settings(small_shm=True).arguments
    assert "--disable-dev-shm-usage" not in settings(small_shm=False).arguments


@pytest.mark.parametrize(
    ("kind", "argument"),
    [(BrowserType.CHROME, "--headless=new"), (BrowserType.FIREFOX, "-headless")],
)
def test_window_is_shown_only_if_asked_for(kind, argument):
    assert argument in settings(kind, headless=True).arguments
    assert argument not in settings(kind, headless=False).arguments


def test_gpu_that_is_off_is_off():
    assert "--disable-gpu" in settings(gpu=Gpu.OFF).arguments
    assert "--enable-unsafe-webgpu" not in settings(gpu=Gpu.OFF).arguments
    assert "--enable-unsafe-webgpu" in settings(gpu=Gpu.AUTO).arguments
    assert "--use-webgpu-adapter=swiftshader" in settings(gpu=Gpu.SOFTWARE).arguments
    firefox = BrowserType.FIREFOX
    assert settings(firefox, gpu=Gpu.OFF).preferences["dom.webgpu.enabled"] is False
    assert settings(firefox, gpu=Gpu.AUTO).preferences["dom.webgpu.enabled"] is True


@pytest.mark.parametrize("kind", BrowserType)
def test_every_browser_has_settings_without_a_repeated_argument(kind):
    made = settings(kind, root=True, small_shm=True)
    assert made.kind is kind
    assert len(made.arguments) == len(set(made.arguments))
    assert pickle.loads(pickle.dumps(made)) == made


def test_adjusting_adds_and_later_preferences_win():
    base = LaunchSettings(BrowserType.FIREFOX, arguments=("-a",), preferences={"p": 1, "q": 1})
    adjusted = base.adjusted(("-a", "-b"), {"q": 2})
    assert adjusted.arguments == ("-a", "-b")
    assert adjusted.preferences == {"p": 1, "q": 2}
    assert base.arguments == ("-a",)
    assert base.adjusted() == base


def test_every_firefox_has_a_websocket_port_of_its_own():
    """Two that ask for the same one can't live side by side: the second quits."""
    binaries = Binaries(BrowserType.FIREFOX, "firefox", "geckodriver")
    command = driver_command(binaries, 4444)
    port = command[command.index("--websocket-port") + 1]
    assert port.isdigit()
    assert port not in ("9222", "4444")
