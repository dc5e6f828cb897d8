"""Restart intensity, as in OTP: how many restarts are allowed in which period.

The clock is an argument; the caller keeps the history. Source: Erlang/OTP's supervisor
(`intensity` and `period`). This module must not restart anything.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RestartLimit:
    """At most `restarts_max` in `period_seconds`; after a failed start it waits before the next."""

    restarts_max: int = 8
    period_seconds: float = 120.0
    delay_first_seconds: float = 0.25  # doubled for each further restart in the period
    delay_max_seconds: float = 10.0
    launches_failed_max: int = 3  # in a row: slow failures would never fill the period


@dataclass(frozen=True)
class Restart:
    """Restart; `history` is to be kept, `delay` is to be waited if the start failed."""

    history: tuple[float, ...]
    delay: float


@dataclass(frozen=True)
class GiveUp:
    """Too many restarts: remove the browser and report it."""

    history: tuple[float, ...]


def record_restart(history: tuple[float, ...], at: float, limit: RestartLimit) -> Restart | GiveUp:
    """Judge one more restart at time `at` (seconds) after those at the times in `history`.

    Times far ahead of `at` come from before the wall clock was set back, and are ignored.
    """
    recent = (*(t for t in history if abs(at - t) < limit.period_seconds), at)
    if len(recent) > limit.restarts_max:
        return GiveUp(recent)
    delay = limit.delay_first_seconds * 2 ** (len(recent) - 1)
    return Restart(recent, min(delay, limit.delay_max_seconds))
