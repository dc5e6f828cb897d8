import math

import pytest

from actors.driver.arguments import Gpu
from pool.config import PoolConfig, backend_order
from recovery.errors import BadInput, LevelUnavailable
from recovery.kinds import Backend, BrowserType, Level


def test_defaults_work():
    config = PoolConfig()
    assert config.checked() is config
    assert config.kinds() == {BrowserType.CHROME: 1}
    assert config.level_effective is Level.MEDIUM


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("browsers", {}),
        ("browsers", {"chrome": 0}),
        ("browsers", {"chrome": -1}),
        ("browsers", {"chrome": 1.0}),
        ("browsers", {"chrome": True}),
        ("browsers", {"chrome": "2"}),
        ("browsers", {"netscape": 1}),
        ("browsers", {"": 1}),
        ("browsers", {"chrome": 33}),
        ("name", "-starts-with-a-dash"),
        ("name", "has space"),
        ("name", "has/slash"),
        ("name", "a" * 49),
        ("name", "line\n"),
        ("level", "highest"),
        ("level", "MEDIUM"),
        ("level", None),
        ("strategy", "hope"),
        ("backend", "native"),
        ("backend", "cuda"),
        ("backend", None),
        ("when_full", "drop"),
        ("max_recovery_attempts", 0),
        ("max_recovery_attempts", 101),
        ("max_recovery_attempts", 2.0),
        ("threads", 0),
        ("threads", True),
        ("threads", "2"),
        ("queue_max", 0),
        ("queue_max", math.inf),
        ("waiting_max", -1),
        ("message_bytes_max", 100),
        ("message_bytes_max", 2**40),
        ("deadline", 0),
        ("deadline", -1.0),
        ("deadline", math.nan),
        ("deadline", math.inf),
        ("launch_seconds", 0),
        ("load_seconds", 10**6),
        ("lease", 0.5),
        ("lease", 10**6),
        ("lease", math.nan),
    ],
    ids=repr,
)
def test_bad_option_is_named_with_what_was_expected_and_what_came(option, value):
    with pytest.raises(BadInput, match=f"^({option}|.*netscape|'')") as caught:
        PoolConfig(**{option: value}).checked()
    assert caught.value.fields.keys() >= {"expected", "got"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("browsers", ["chrome"]),
        ("browsers", None),
        ("name", 5),
        ("deadline", "60"),
        ("deadline", None),
        ("lease", "15"),
        ("max_connections", "32"),
        ("max_connections", None),
        ("launch_seconds", [1]),
    ],
    ids=repr,
)
def test_option_of_a_wrong_type_is_bad_input_too(option, value):
    with pytest.raises(BadInput):
        PoolConfig(**{option: value}).checked()


@pytest.mark.parametrize(
    ("level", "browsers", "lower"),
    [("high", 1, Level.MEDIUM), ("critical", 1, Level.MEDIUM), ("critical", 2, Level.HIGH)],
)
def test_level_that_cannot_be_held_is_refused_or_lowered_and_said_so(level, browsers, lower):
    with pytest.raises(LevelUnavailable, match="strict=False"):
        PoolConfig(browsers={"chrome": browsers}, level=level).checked()
    lowered = PoolConfig(browsers={"chrome": browsers}, level=level, strict=False).checked()
    assert lowered.level_effective is lower


@pytest.mark.parametrize(("level", "browsers"), [("high", 2), ("critical", 3)])
def test_redundant_level_takes_so_many_browsers(level, browsers):
    config = PoolConfig(browsers={"chrome": browsers}, level=level).checked()
    assert config.level_effective is Level(level)


@pytest.mark.parametrize("level", ["none", "low", "medium"])
def test_level_that_can_be_held_is(level):
    assert PoolConfig(level=level).checked().level_effective is Level(level)


def test_browsers_may_be_named_by_their_binaries_and_add_up():
    config = PoolConfig(browsers={"chromium": 2, "google-chrome": 1, "firefox-esr": 1})
    assert config.kinds() == {BrowserType.CHROME: 3, BrowserType.FIREFOX: 1}


def test_max_connections_bounds_the_sum():
    PoolConfig(browsers={"chrome": 2, "firefox": 2}, max_connections=4).checked()
    with pytest.raises(BadInput, match="max_connections"):
        PoolConfig(browsers={"chrome": 3, "firefox": 2}, max_connections=4).checked()


def test_hosts_are_told_what_concerns_them():
    hosts = PoolConfig(backend="wasm", threads=4, queue_max=3, lease=20, headless=False).hosts()
    assert hosts.gpu is Gpu.OFF
    assert (hosts.threads, hosts.queue_max, hosts.lease_seconds) == (4, 3, 20)
    assert not hosts.headless
    assert PoolConfig(backend="auto").hosts().gpu is Gpu.AUTO
    assert PoolConfig(backend="webgpu").hosts().gpu is not Gpu.OFF


def test_forced_back_end_is_the_only_one_tried():
    assert backend_order("wasm") == (Backend.WASM,)
    assert set(backend_order("auto")) == {Backend.WASM, Backend.WEBGPU, Backend.WEBNN}


@pytest.mark.parametrize(
    ("level", "browsers", "scaling"),
    [
        ("critical", {"chrome": 3}, {"chrome": (1, 4)}),  # might shrink below its level
        ("medium", {"chrome": 1}, {"firefox": (1, 64)}),  # might outgrow the pool
        ("medium", {"chrome": 1}, {"chrome": (3, 2)}),
        ("medium", {"chrome": 1}, {"chrome": 3}),
    ],
)
def test_scaling_that_can_not_be_is_bad_input(level, browsers, scaling):
    with pytest.raises(BadInput, match="adaptive_scaling"):
        PoolConfig(browsers=browsers, level=level, adaptive_scaling=scaling).checked()


def test_scaling_within_level_and_size_is_taken():
    scaling = {"chrome": (3, 5)}
    config = PoolConfig(browsers={"chrome": 3}, level="critical", adaptive_scaling=scaling)
    assert config.checked().scaling()[BrowserType.CHROME].maximum == 5
