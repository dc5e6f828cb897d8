"""The settings of breakers, and their validation.

A configuration is made once and shared by many breakers, so values derived from it are computed
once, when it is made. This module must not know what a breaker does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from recovery import checks
from recovery.errors import BadInput

_BUCKETS = 10  # a window by time slides in steps of a tenth
_BIGGEST = 1_000_000  # of any count in the configuration
_LONGEST = 1_000_000_000.0  # seconds of any duration: longer than any process runs


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When a breaker opens, for how long, and what closes it again. 0 switches a window off."""

    failure_threshold: int = 3  # recorded failures in a row that open it
    recovery_timeout: float = 10.0  # seconds until the first probe; jitter only shortens it
    half_open_max_calls: int = 1  # probes under way at once
    success_threshold: int = 2  # probes in a row that must succeed to close it
    metrics_window_size: int = 100  # latest calls that the metrics' rates cover
    min_samples_for_stats: int = 5  # calls below which those rates are not significant

    window_calls: int = 0  # window of this many latest calls ...
    window_seconds: float = 0.0  # ... or of the calls of the latest seconds
    minimum_calls: int = 10  # in the window, before a rate counts
    failure_rate_threshold: float = 0.0  # share of failed calls in the window that opens it
    slow_call_rate_threshold: float = 0.0  # share of slow calls in the window that opens it
    slow_call_seconds: float = 0.0  # a call that took this long or longer is slow

    recovery_timeout_growth: float = 2.0  # each opening in a row is longer by this factor
    recovery_timeout_max: float = 120.0  # seconds; or recovery_timeout, where that is longer
    recovery_timeout_jitter: float = 0.1  # up to this share is subtracted at random
    probe_timeout: float = 30.0  # seconds; a probe that hasn't reported by then has failed
    recovery_history_max: int = 32  # recoveries kept for the metrics

    windowed: bool = field(init=False, repr=False, compare=False)
    metrics_mask: int = field(init=False, repr=False, compare=False)
    window_mask: int = field(init=False, repr=False, compare=False)
    bucket_seconds: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("failure_threshold", 1, _BIGGEST),
            ("recovery_timeout", 0.0, _LONGEST),
            ("half_open_max_calls", 1, _BIGGEST),
            ("success_threshold", 1, _BIGGEST),
            ("metrics_window_size", 1, _BIGGEST),
            ("min_samples_for_stats", 1, _BIGGEST),
            ("window_calls", 0, _BIGGEST),
            ("window_seconds", 0.0, _LONGEST),
            ("minimum_calls", 1, _BIGGEST),
            ("failure_rate_threshold", 0.0, 1.0),
            ("slow_call_rate_threshold", 0.0, 1.0),
            ("slow_call_seconds", 0.0, _LONGEST),
            ("recovery_timeout_growth", 1.0, 100.0),
            ("recovery_timeout_max", 0.0, _LONGEST),
            ("recovery_timeout_jitter", 0.0, 1.0),
            ("probe_timeout", 0.0, _LONGEST),
            ("recovery_history_max", 0, _BIGGEST),
        ):
            check: Any = checks.whole if isinstance(low, int) else checks.number
            object.__setattr__(self, name, check(name, getattr(self, name), low, high))
        by_rate = self.failure_rate_threshold or self.slow_call_rate_threshold
        if self.window_calls and self.window_seconds:
            raise BadInput("Both window_calls and window_seconds are set: set only one of them.")
        if by_rate and not (self.window_calls or self.window_seconds):
            raise BadInput("A rate threshold needs a window: set window_calls or window_seconds.")
        if bool(self.slow_call_rate_threshold) is not bool(self.slow_call_seconds):
            raise BadInput("Set both slow_call_rate_threshold and slow_call_seconds, or neither.")
        if 0 < self.window_calls < self.minimum_calls:
            raise BadInput("Lower minimum_calls: above window_calls, no rate would count.")
        windowed = bool(self.window_calls or self.window_seconds)
        object.__setattr__(self, "windowed", windowed)
        object.__setattr__(self, "metrics_mask", (1 << self.metrics_window_size) - 1)
        object.__setattr__(self, "window_mask", (1 << self.window_calls) - 1)
        object.__setattr__(self, "bucket_seconds", self.window_seconds / _BUCKETS)


def configured(config: BreakerConfig, settings: dict[str, Any]) -> BreakerConfig:
    known = {each.name for each in fields(BreakerConfig) if each.init}
    for name in settings:
        if name not in known:
            raise BadInput(
                f"No circuit breaker setting {name!r}: expected one of {', '.join(sorted(known))}.",
                expected=sorted(known),
                got=name,
            )
    return replace(config, **settings) if settings else config


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """The limits of a registry."""

    open_share_max: float = 0.5  # of a breaker and its peers that may be open at once
    breakers_max: int = 1024  # beyond it, the least recently used closed breaker is dropped

    def __post_init__(self) -> None:
        share = checks.number("open_share_max", self.open_share_max, 0, 1)
        most = checks.whole("breakers_max", self.breakers_max, 1, _BIGGEST)
        object.__setattr__(self, "open_share_max", share)
        object.__setattr__(self, "breakers_max", most)
