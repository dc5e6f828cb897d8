import pytest

from recovery.breaker import CircuitBreaker
from recovery.errors import BadInput
from tests.circuits import DEFAULT


def test_defaults_are_those_of_the_source():
    assert (
        DEFAULT.failure_threshold,
        DEFAULT.recovery_timeout,
        DEFAULT.half_open_max_calls,
        DEFAULT.success_threshold,
        DEFAULT.metrics_window_size,
        DEFAULT.min_samples_for_stats,
    ) == (3, 10.0, 1, 2, 100, 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"failure_threshold": 0},
        {"failure_threshold": 2.5},
        {"recovery_timeout": -1.0},
        {"recovery_timeout": float("nan")},
        {"probe_timeout": float("inf")},
        {"recovery_timeout_jitter": 1.5},
        {"half_open_max_calls": "one"},
        {"window_calls": 100, "window_seconds": 10.0},
        {"failure_rate_threshold": 0.5},
        {"window_calls": 100, "slow_call_rate_threshold": 0.5},
        {"window_calls": 5, "failure_rate_threshold": 0.5},
        {"failure_treshold": 3},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(BadInput):
        CircuitBreaker("b", **settings)
