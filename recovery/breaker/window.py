"""Reported calls: the totals, and the sliding window of a breaker's rates.

A window is by count (a bit is a call) or by time (in buckets, a tenth of it each). The records are
named tuples for the reason that `recovery.breaker.state` gives. This module only counts: it must
not know a breaker's states, nor what follows from a rate.
"""

from __future__ import annotations

from typing import NamedTuple

from recovery.breaker.config import BreakerConfig

_new = tuple.__new__  # what a named tuple's constructor does, in half the time


class Bucket(NamedTuple):
    """The calls reported in one stretch of a window by time, from `start` on."""

    start: float
    calls: int
    failed: int
    slow: int


class Window(NamedTuple):
    """The three sums behind the rates, and what is needed to slide the window.

    By count, a bit is a call, the lowest the latest. By time, `buckets` are the stretches before
    the one that began at `start`; what is in that one is the sums less what is in those.
    """

    calls: int = 0
    failed: int = 0
    slow: int = 0
    failed_bits: int = 0
    slow_bits: int = 0
    start: float = 0.0
    buckets: tuple[Bucket, ...] = ()


class Calls(NamedTuple):
    """Reported calls since the breaker was made. `recent`: a bit a call, set where it failed.

    The last seven fields are the window's, here because one tuple is made faster than two.
    """

    successes: int = 0
    failures: int = 0
    recorded: int = 0  # failures that counted towards opening
    slow: int = 0
    recent: int = 0
    shown: int = 0
    shown_failed: int = 0
    shown_slow: int = 0
    failed_bits: int = 0
    slow_bits: int = 0
    start: float = 0.0
    buckets: tuple[Bucket, ...] = ()

    @property
    def window(self) -> Window:
        return Window(*self[5:])

    def with_window(self, window: Window) -> Calls:
        return _new(Calls, (*self[:5], *window))


def counted(
    calls: Calls, at: float, failed: int, recorded: int, slow: int, config: BreakerConfig
) -> Calls:
    """The calls with one more, and the window without those that it no longer shows.

    A failure that is not recorded stays out of the window. One long function, because every call
    takes it and calls are what Python is slow at.
    """
    (
        successes,
        failures,
        recorded_before,
        slow_before,
        recent,
        shown,
        shown_failed,
        shown_slow,
        failed_bits,
        slow_bits,
        start,
        buckets,
    ) = calls
    if config.windowed and recorded >= failed:
        if not config.window_calls:
            if at - start >= config.bucket_seconds:
                buckets = _buckets_shown(calls.window, at - config.window_seconds)
                shown = sum(bucket.calls for bucket in buckets)
                shown_failed = sum(bucket.failed for bucket in buckets)
                shown_slow = sum(bucket.slow for bucket in buckets)
                start = at
            shown += 1
            shown_failed += failed
            shown_slow += slow
        else:
            if shown < config.window_calls:
                shown += 1
            if failed or failed_bits:
                failed_bits = (failed_bits << 1 | failed) & config.window_mask
                shown_failed = failed_bits.bit_count()
            if slow or slow_bits:
                slow_bits = (slow_bits << 1 | slow) & config.window_mask
                shown_slow = slow_bits.bit_count()
    if failed or recent:
        recent = (recent << 1 | failed) & config.metrics_mask
    return _new(
        Calls,
        (
            successes + 1 - failed,
            failures + failed,
            recorded_before + recorded,
            slow_before + slow,
            recent,
            shown,
            shown_failed,
            shown_slow,
            failed_bits,
            slow_bits,
            start,
            buckets,
        ),
    )


def _buckets_shown(window: Window, oldest: float) -> tuple[Bucket, ...]:
    """The finished buckets and the current one, less those that began before `oldest`."""
    latest = Bucket(
        window.start,
        window.calls - sum(bucket.calls for bucket in window.buckets),
        window.failed - sum(bucket.failed for bucket in window.buckets),
        window.slow - sum(bucket.slow for bucket in window.buckets),
    )
    return tuple(bucket for bucket in (*window.buckets, latest) if bucket.start > oldest)


def over_rate(calls: Calls, config: BreakerConfig) -> bool:
    """Whether the window has enough calls, and a share of failed or slow ones that opens."""
    shown = calls.shown
    if not shown or shown < config.minimum_calls:
        return False
    failure_rate, slow_rate = config.failure_rate_threshold, config.slow_call_rate_threshold
    return (failure_rate > 0.0 and calls.shown_failed >= failure_rate * shown) or (
        slow_rate > 0.0 and calls.shown_slow >= slow_rate * shown
    )
