"""Every argument of every public call: what it takes, and the one sentence about what it does not.

No pool is opened: a value is judged before anything is asked of a pool. A parameter or option that
is new must be put into the table, or a test here fails.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pool import (
    BreakerConfig,
    BrowserPool,
    HistoryConfig,
    PoolConfig,
    RegistryConfig,
    ResourceLimits,
    RestartLimit,
    Result,
    recover_browser,
)
from pool.operations.graph import GraphOperation
from pool.operations.registry import OperationRegistry
from recovery.errors import BadInput, PoolClosed, PoolError, UnknownModel
from recovery.faults import Fault, FaultKind, Intensity
from recovery.kinds import Level
from recovery.plan import STRATEGIES
from tests.fakes import failure

NOT_TEXT = [None, 5, b"text", ["text"], np.array(["text"])]
NO_TEXT = [*NOT_TEXT, "", "x" * 100_000, "\ud800"]
NO_NUMBER = ["5", None, [5], 1j, True, np.True_, math.nan, np.array([5]), np.float32("nan")]
NO_SECONDS = [*NO_NUMBER, math.inf, -math.inf, -1, -0.001, np.float32("inf"), 10**400]
NO_WHOLE = [*NO_NUMBER, 5.0, np.float32(5), -1, 10**30]
NO_FLAG = [None, 0, 1, "yes", "no", "True", [], np.int64(1), 1.0]
NO_MAPPING = [5, "chrome", ["chrome"], [("chrome", 2)], {"chrome"}]
NO_PATH = [None, 5, b"/model", ["/model"], "", "a\0b"]


def optional(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not None]


# -- options of a pool -----------------------------------------------------------------------------

# By option: values that are refused, and values that are taken.
OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "browsers": (
        [
            *NO_MAPPING,
            {},
            *({"chrome": count} for count in [*NO_WHOLE, 33]),
            {"netscape": 1},
            {5: 1},
        ],
        [{"chrome": np.int64(2)}, {"chromium": 1, "firefox": np.uint8(0)}],
    ),
    "name": (
        [*(value for value in NO_TEXT if value != ""), "has space", "a" * 49],
        ["p-1", np.str_("p")],  # "" is taken, and becomes a name of its own
    ),
    "level": ([*NO_TEXT, "highest"], ["none", Level.LOW]),
    "strategy": ([*NO_TEXT, "hope"], ["restart"]),
    "strict": (NO_FLAG, [np.False_, False]),
    "max_connections": ([*NO_WHOLE, 0, 10_001], [np.int32(40)]),
    "max_recovery_attempts": ([*NO_WHOLE, 0, 101], [np.int8(5)]),
    "headless": (NO_FLAG, [False, np.bool_(0)]),
    "backend": ([*NO_TEXT, "cuda"], ["wasm", "auto"]),
    "threads": ([*NO_WHOLE, 0, 65], [np.int64(4)]),
    "deadline": ([*NO_SECONDS, 0, 86_401], [np.float32(5), np.int64(5), 5, 0.001]),
    "queue_max": ([*NO_WHOLE, 0], [np.uint16(7)]),
    "when_full": ([*NO_TEXT, "drop"], ["error"]),
    "private_network": ([*NO_TEXT, "on"], ["required"]),
    "waiting_max": ([*NO_WHOLE, 0], [np.int64(5)]),
    "message_bytes_max": ([*NO_WHOLE, 1023, 2**40], [np.int64(1 << 20)]),
    "launch_seconds": ([*NO_SECONDS, 0], [np.float64(5)]),
    "load_seconds": ([*NO_SECONDS, 0], [np.float16(5)]),
    "hang_seconds": ([*NO_SECONDS, 0], [np.float32(5)]),
    "hedge_quantile": ([*NO_NUMBER, 0.4, 1, 1.0], [np.float32(0.5), 0.99]),
    "hedge_seconds": ([*NO_SECONDS, 0], [np.float32(0.5)]),
    "simulation": (NO_FLAG, [np.True_]),
    "probe_seconds": (NO_SECONDS, [0, np.float32(0)]),
    "faults": (NO_FLAG, [np.True_]),
    "reconnect_seconds": ([*NO_SECONDS, 0, 601], [np.float32(1)]),
    "breaker": ([None, 5, {}, RegistryConfig()], [BreakerConfig(failure_threshold=5)]),
    "model_breaker": ([5, {}, RegistryConfig()], [None, BreakerConfig()]),
    "circuits": ([None, 5, {}, BreakerConfig()], [RegistryConfig()]),
    "adaptive_scaling": (
        [*NO_MAPPING, *({"chrome": b} for b in [5, (1,), (2, 1), (0, 1), (1.0, 2), (1, True)])],
        [{}, {"chrome": (np.int64(1), np.int64(3))}, {"chrome": [1, 2]}],
    ),
    "resources": (
        [
            None,
            {},
            *(ResourceLimits(memory_low=value) for value in [*NO_NUMBER, 1.1, -0.1]),
            *(ResourceLimits(memory_min=value) for value in [*NO_NUMBER, 1.1]),
            *(ResourceLimits(idle_seconds=value) for value in NO_SECONDS),
            *(ResourceLimits(recycle_seconds=value) for value in NO_SECONDS),
            *(ResourceLimits(recycle_operations=value) for value in NO_WHOLE),
            *(ResourceLimits(recycle_bytes=value) for value in NO_WHOLE),
        ],
        [ResourceLimits(recycle_operations=np.int64(5), memory_low=np.float32(0.5))],
    ),
    "checkpoint_interval": ([*NO_SECONDS, 0], [np.float32(5)]),
    "history": (NO_FLAG, [np.False_]),
    "history_limits": ([None, {}, RestartLimit()], [HistoryConfig(rows_max=np.int64(5))]),
    "state_dir": ([value for value in NO_PATH if value != ""], ["", "/tmp/x", Path("/tmp/x")]),
    "lease": ([*NO_SECONDS, 0.5, 3601], [np.float32(5)]),
    "persistent": ([*NO_FLAG, True], [np.False_]),  # True needs an address
    "address": (optional(NO_TEXT), [None, "auto"]),
    "dashboard": (NO_FLAG, [np.False_]),
    "restart_limit": (
        [
            None,
            {},
            *(RestartLimit(restarts_max=value) for value in NO_WHOLE),
            *(RestartLimit(period_seconds=value) for value in NO_SECONDS),
            *(RestartLimit(delay_first_seconds=value) for value in NO_SECONDS),
            *(RestartLimit(delay_max_seconds=value) for value in NO_SECONDS),
            *(RestartLimit(launches_failed_max=value) for value in [*NO_WHOLE, 0]),
        ],
        [RestartLimit(restarts_max=np.int64(5), period_seconds=np.float32(5))],
    ),
}


def refused(call: Any, name: str) -> BadInput:
    """The one error of one sentence."""
    with pytest.raises(BadInput) as caught:
        made_of(call)
    error = caught.value
    assert type(error) is BadInput
    assert name in error.message
    assert "expected" in error.message
    assert error.message.endswith((".", ")")), error.message
    assert len(error.message) < 700, "what was given is shown in part"
    assert {"got"} <= error.fields.keys()
    return error


def made_of(call: Any) -> None:
    result = call()
    if inspect.isawaitable(result):
        asyncio.run(wait_for(result))
    elif inspect.isasyncgen(result):
        asyncio.run(wait_for(anext(result)))


async def wait_for(work: Any) -> Any:
    return await work


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_refused_by_its_name(option):
    for value in OPTIONS[option][0]:
        error = refused(lambda value=value: BrowserPool(**{option: value}), "")
        assert re.match(rf"{option}\b|'|.* is not a supported browser", error.message), error


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_taken_and_becomes_what_python_has(option):
    for value in OPTIONS[option][1]:
        config = BrowserPool(**{option: value}).config
        plain = getattr(config, option)
        assert plain == value or plain == str(value)
        assert "numpy" not in type(plain).__module__
        for part in vars(plain).values() if hasattr(plain, "__dict__") else ():
            assert "numpy" not in type(part).__module__
        assert all(type(count) is int for count in config.kinds().values())
        assert config.checked() is config


def test_every_option_is_in_the_table():
    assert OPTIONS.keys() == {field.name for field in fields(PoolConfig)}


@pytest.mark.parametrize("browsers", [5, "chrome", ["chrome"], [("chrome", 2)], {"chrome"}, ()])
def test_browsers_are_a_mapping(browsers):
    error = refused(lambda: BrowserPool(browsers), "browsers")
    assert error.message.startswith('browsers: expected a mapping such as {"chrome": 2')


def test_strategy_is_refused_with_those_that_there_are():
    error = refused(lambda: BrowserPool(strategy=["restart"]), "strategy")
    assert all(name in error.message for name in STRATEGIES)


@pytest.mark.parametrize(
    ("made", "name", "values"),
    [
        (BreakerConfig, "failure_threshold", [*NO_WHOLE, 0]),
        (BreakerConfig, "recovery_timeout", NO_SECONDS),
        (BreakerConfig, "recovery_timeout_jitter", [*NO_NUMBER, 1.1, -1]),
        (RegistryConfig, "open_share_max", [*NO_NUMBER, 1.1, -1]),
        (RegistryConfig, "breakers_max", [*NO_WHOLE, 0]),
        (HistoryConfig, "rows_max", [*NO_WHOLE, 0]),
        (HistoryConfig, "query_seconds_max", [*NO_SECONDS, 0]),
    ],
)
def test_record_of_settings_refuses_what_is_none_when_it_is_made(made, name, values):
    for value in values:
        refused(lambda value=value: made(**{name: value}), name)
    numbers = {f.name: np.float32(f.default) for f in fields(made) if type(f.default) is float}
    numbers |= {f.name: np.int64(f.default) for f in fields(made) if type(f.default) is int}
    for value in vars(made(**numbers)).values() if hasattr(made(), "__dict__") else ():
        assert "numpy" not in type(value).__module__
    for name in numbers:
        assert "numpy" not in type(getattr(made(**numbers), name)).__module__


# -- calls -----------------------------------------------------------------------------------------

MODEL = Path(__file__)  # never read: the pool is not open
RESULT = Result("op", "m", "inference", success=True, level_effective=Level.LOW)
FAULT = Fault(next(iter(FaultKind)), next(iter(Intensity)), "chrome-0")
ID = [*NO_TEXT, "x" * 129]
GOOD: dict[str, dict[str, Any]] = {
    "load": {"name": "m", "path": MODEL},
    "order_again": {"name": "m"},
    "unload": {"name": "m"},
    "run_with_recovery": {"model": "m", "op": "inference", "inputs": {}},
    "stream": {"model": "m", "inputs": {"text": "a"}},
    "changed": {"seconds": 1},
    "drain": {"browser_id": "chrome-0"},
    "scale": {"browsers": {"chrome": 1}},
    "repair": {"browser_id": "chrome-0", "failure": failure()},
    "switch_breaker": {"browser_id": "chrome-0", "to": "reset"},
    "get_recovery_statistics": {},
    "history": {"question": "statistics"},
    "bundle": {"result": RESULT, "inputs": {}, "path": "/tmp/x.zip"},
    "diagnose": {"browser_id": "chrome-0"},
    "inject": {"browser_id": "chrome-0", "fault": {"what": "lie"}},
    "inject_fault": {"fault": FAULT},
    "attach": {"name": "p"},
}
# By call and parameter: values that are refused. `None`: judged elsewhere, and said where.
BAD: dict[str, dict[str, list[Any] | None]] = {
    "load": {
        "name": [*NO_TEXT, "../name", "a b", "-a", "x" * 65],
        "path": NO_PATH,
        "type": [5, "prose", ["text"], b"text"],
        "backend": [5, "cuda", ["wasm"], np.array(["wasm", "auto"])],
        "example": NO_MAPPING,
        "shards": [*optional(NO_WHOLE), 0, 10_001],
        "strategy": [*optional(NO_TEXT), "hope"],
    },
    "order_again": {"name": None},  # `UnknownModel`, below
    "unload": {"name": None},
    "run_with_recovery": {
        "model": None,
        "op": None,  # `UnknownOperation`: tests/unit/test_running.py
        "inputs": None,  # by the operation: tests/unit/test_operations.py
        "deadline": [*optional(NO_SECONDS), 0, 86_401],
        "op_id": [*optional(NO_TEXT), "x" * 129],
        "level": [*optional(NO_TEXT), "critical", "some"],
        "simulation": [*optional(NO_FLAG), True],  # True: the pool does not allow it
    },
    "stream": {
        "model": None,
        "inputs": None,
        "op": None,
        "op_id": [*optional(NO_TEXT), "x" * 129],
        "level": [*optional(NO_TEXT), "critical"],
        "on_result": [5, "print", []],
        "on_begin": [5, "print", []],
    },
    "changed": {"seconds": [*NO_SECONDS, 10**9]},
    "drain": {"browser_id": ID},
    "scale": {
        "browsers": [
            None,
            *NO_MAPPING,
            *({"chrome": count} for count in NO_WHOLE),
            {"netscape": 1},
        ]
    },
    "repair": {
        "browser_id": ID,
        "failure": [None, "it broke", ValueError("it broke"), {}],
        "start": [*optional(NO_WHOLE), 0, 6],
    },
    "switch_breaker": {
        "browser_id": ID,
        "to": [*NO_TEXT, "open"],
        "model": [None, 5, ["m"], b"m"],
    },
    "get_recovery_statistics": {"since": optional(NO_SECONDS)},
    "history": {
        "question": [*NO_TEXT, "nothing", "view"],
        "options": None,  # below
    },
    "bundle": {
        "result": [None, {}, "op"],
        "inputs": [None, *NO_MAPPING],
        "path": NO_PATH,
        "with_data": NO_FLAG,
        "why": NO_TEXT,
        "chaos": NO_MAPPING,
    },
    "diagnose": {"browser_id": ID, "screenshot": NO_FLAG},
    "inject": {"browser_id": ID, "fault": [None, *NO_MAPPING]},
    "inject_fault": {"fault": [None, {}, "lie", FaultKind], "gated": NO_FLAG},
    "attach": {"name": [*NO_TEXT, "a b"], "address": NO_TEXT, "options": None},
}
NO_ARGUMENTS = {
    "blocking",
    "breakers",
    "close",
    "control",
    "control_pids",
    "export_telemetry",
    "hosts",
    "models",
    "open",
    "shutdown",
    "state",
}
CASES = [(call, name) for call, bad in BAD.items() for name, values in bad.items() if values]


@pytest.mark.parametrize(("call", "name"), CASES, ids=lambda value: value)
def test_argument_is_refused_by_its_name_before_the_pool_is_looked_at(call, name):
    values = BAD[call][name]
    assert values
    pool = BrowserPool(name="p")
    for value in values:
        given = {**GOOD[call], name: value}
        error = refused(lambda given=given: getattr(pool, call)(**given), "")
        first = error.message.split(":")[0]
        named = name in first or "cannot name a model" in first or "is no model type" in first
        assert named or call in ("scale", "attach", "history"), error.message


def test_arguments_that_are_right_find_a_pool_that_is_not_open():
    pool = BrowserPool(name="p")
    for call in GOOD.keys() - {"attach", "changed", "bundle", "order_again", "unload"}:
        work = getattr(pool, call)(**GOOD[call])

        async def run(work: Any = work) -> None:
            if inspect.isasyncgen(work):
                await anext(work)
            else:
                await work

        with pytest.raises(PoolClosed, match="not open"):
            asyncio.run(run())


def test_numbers_of_numpy_are_numbers_of_calls():
    pool = BrowserPool(name="p")
    for call, more in (
        ("run_with_recovery", {"deadline": np.float32(5), "op_id": np.str_("op")}),
        ("load", {"shards": np.int64(2), "strategy": np.str_("optimal")}),
        ("repair", {"start": np.int64(2)}),
        ("scale", {"browsers": {"chrome": np.int64(1)}}),
        ("diagnose", {"screenshot": np.False_}),
        ("get_recovery_statistics", {"since": np.float64(0)}),
    ):
        with pytest.raises(PoolClosed):
            asyncio.run(wait_for(getattr(pool, call)(**{**GOOD[call], **more})))


@pytest.mark.parametrize("name", [5, None, ["m"], b"m", "nobody"])
@pytest.mark.parametrize("call", ["order_again", "unload"])
def test_name_of_no_model_is_one_error_too(call, name):
    with pytest.raises((UnknownModel, PoolClosed)) as caught:
        asyncio.run(wait_for(getattr(BrowserPool(name="p"), call)(name)))
    assert isinstance(caught.value, PoolError)


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("statistics", {"sincee": 5}),
        ("statistics", {"since": "yesterday"}),
        ("failure_patterns", {"limit": 0}),
        ("failure_patterns", {"limit": "10"}),
        ("recommend_browser", {}),
        ("recommend_browser", {"model_type": "prose"}),
        ("rung_outcomes", {"category": "sad"}),
        ("rung_outcomes", {"fingerprint": 5}),
        ("analyze_performance_trends", {"time_window_seconds": math.inf}),
        ("analyze_performance_trends", {"browser_type": "netscape"}),
        ("success_rates", {"by": "strategy"}),
        ("success_rates", {"by": ["weather"]}),
        ("strategy_scores", {"limit": -1}),
        ("strategy_scores", {"error_type": ["crash"]}),
    ],
)
def test_question_to_the_history_takes_its_own_options_only(question, options):
    refused(lambda: BrowserPool(name="p").history(question, **options), next(iter(options), ""))


def test_options_of_a_question_come_as_python_has_them():
    from recovery.history.questions import checked_options

    options = {"since": np.float32(5), "by": ["rung"]}
    assert checked_options("success_rates", options) == {"since": 5.0, "by": ("rung",)}
    found = checked_options("strategy_scores", {"limit": np.int64(5), "success": np.True_, "n": 2})
    assert found == {"limit": 5, "success": True, "n": 2}
    assert [type(value) for value in found.values()] == [int, bool, int]


def test_every_parameter_of_every_call_is_in_the_table():
    calls = {
        name: [each for each in inspect.signature(call).parameters if each not in ("self", "cls")]
        for name, call in inspect.getmembers(BrowserPool, callable)
        if not name.startswith("_")
    }
    assert {name: parameters for name, parameters in calls.items() if name in NO_ARGUMENTS} == {
        name: [] for name in NO_ARGUMENTS
    }
    assert {name: set(parameters) for name, parameters in calls.items() if name in BAD} == {
        name: set(bad) for name, bad in BAD.items()
    }
    assert calls.keys() == BAD.keys() | NO_ARGUMENTS


# -- the other faces -------------------------------------------------------------------------------


def test_blocking_pool_refuses_the_same():
    pool = BrowserPool(name="p").blocking()
    try:
        for call, name, value in (
            ("load", "path", None),
            ("run_with_recovery", "deadline", math.inf),
            ("scale", "browsers", ["chrome"]),
            ("drain", "browser_id", 5),
            ("get_recovery_statistics", "since", "now"),
        ):
            refused(lambda c=call, g={**GOOD[call], name: value}: getattr(pool, c)(**g), name)
        future = pool.submit("m", "inference", {}, deadline="5")
        refused(future.result, "deadline")
    finally:
        pool.close()


class NoPool:
    def hosts(self) -> tuple[Any, ...]:
        raise AssertionError("a pool was asked")


@pytest.mark.parametrize(
    ("browser_id", "error", "context", "name"),
    [
        (5, "it broke", None, "browser_id"),
        ("chrome-0", 5, None, "error"),
        ("chrome-0", None, None, "error"),
        ("chrome-0", "it broke", "more", "context"),
    ],
)
def test_recovery_by_hand_refuses_what_it_can_not_mean(browser_id, error, context, name):
    refused(lambda: recover_browser(NoPool(), browser_id, error, context), name)


def test_what_is_no_operation_is_not_registered():
    registry = OperationRegistry()
    for value in (None, 5, "classify", GraphOperation):
        refused(lambda value=value: registry.register(value), "operation")
    for name in (None, 5, ["a"], ""):
        with pytest.raises(BadInput, match="cannot be called"):
            registry.register(GraphOperation(name))
    refused(lambda: registry.operation("mine")(5), "finish")
    refused(lambda: registry.operation("mine", prepare="none")(lambda *_: {}), "prepare")
    assert "mine" not in registry.names()
