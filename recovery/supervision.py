"""Restart intensity, as in OTP: how many restarts in which period are still reasonable.

The clock is an argument; the caller keeps the history. Source: Erlang/OTP's supervisor
(`intensity` and `period`). This module must not restart anything.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RestartLimit:
    """At most `restarts_max` in `period_seconds`; a start that failed waits before the next."""

    restarts_max: int = 8
    period_seconds: float = 120.0
    delay_first_seconds: float = 0.25  # doubled for each further restart in the period
    delay_max_seconds: float = 10.0
    launches_failed_max: int = 3  # in a row: slow failures would never fill the period


@dataclass(frozen=True)
class Restart:
    """Go on; `history` is what to keep, `delay` what to wait if the start itself failed."""

    history: tuple[float, ...]
    delay: float


@dataclass(frozen=True)
class GiveUp:
    """Too many restarts: take it out and report it."""

    history: tuple[float, ...]


def record_restart(history: tuple[float, ...], at: float, limit: RestartLimit) -> Restart | GiveUp:
    """Judge one more restart at time `at` (seconds) after those at the times in `history`.

    Moments far ahead of `at` are of a wall clock that was set back since: they count no more.
    """
    recent = (*(t for t in history if abs(at - t) < limit.period_seconds), at)
    if len(recent) > limit.restarts_max:
        return GiveUp(recent)
    delay = limit.delay_first_seconds * 2 ** (len(recent) - 1)
    return Restart(recent, min(delay, limit.delay_max_seconds))
