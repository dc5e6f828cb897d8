"""How many browsers there should be: one more if queues stay long, one fewer if most are idle.

One pure function of the latest readings. It adds or removes one browser at a time and waits for
the effect before the next change. The conditions for up and down can't both hold: it only scales
down if the remaining browsers' queues would not make it scale up. This module must not start or
stop anything, nor read a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The caller keeps readings in `deque(maxlen=READINGS_MAX)`. They must reach back `down_seconds`
# or the pool never shrinks, so don't read more often than every down_seconds / READINGS_MAX.
READINGS_MAX = 256


@dataclass(frozen=True)
class ScalingLimits:
    """Between `minimum` and `maximum` browsers. A `maximum` of 1 or more keeps the last one ready:
    a few operations without any browser make no queue long enough to bring one back."""

    minimum: int
    maximum: int
    up_queue: float = 2.0  # operations per browser: with so many, add one browser
    up_seconds: float = 2.0  # if it lasts that long
    down_busy: float = 0.3  # fraction of browsers busy: at or below, remove one browser
    down_seconds: float = 30.0  # on average over so long
    settle_seconds: float = 5.0  # no further change so soon after one, except to the minimum


@dataclass(frozen=True)
class Reading:
    """The pool at time `at` (seconds)."""

    at: float
    ready: int
    coming: int  # browsers being started
    queued: int  # operations admitted and not answered, and those waiting, over the pool
    busy: int  # browsers with a queue


@dataclass(frozen=True)
class Change:
    """So many browsers more, or fewer; 0 leaves the pool as it is. `why` is for people."""

    delta: int
    why: str


def scale(
    limits: ScalingLimits, readings: Sequence[Reading], changed_at: float, now: float
) -> Change:
    """Judge the pool by its `readings`, in order of time, the last being how it is now.

    `changed_at` is when the number of browsers was last changed; before any change, pass
    `-math.inf`. All times are in seconds, of one clock. No readings, no change.
    """
    if not readings:
        return Change(0, "no readings yet")
    latest = readings[-1]
    browsers = latest.ready + latest.coming
    if browsers < limits.minimum:
        return Change(limits.minimum - browsers, f"{browsers} of at least {limits.minimum}")
    if now - changed_at < limits.settle_seconds:
        return Change(0, "waiting for the last change to settle")
    if browsers > limits.maximum:
        if latest.coming:
            return Change(0, "above the maximum, but waiting for starting browsers to be ready")
        return Change(-1, f"{browsers} of at most {limits.maximum}")
    if _is_crowded(limits, readings):
        if browsers >= limits.maximum:
            return Change(0, "crowded, but already at the maximum number of browsers")
        per_browser = f"{latest.queued} operations on {latest.ready} browsers"
        return Change(1, f"{per_browser}, crowded for {limits.up_seconds:g} s")
    if latest.coming == 0 and latest.ready > limits.minimum and _is_idle(limits, readings):
        return Change(
            -1,
            f"at most {limits.down_busy:.0%} of {latest.ready} browsers busy for "
            f"{limits.down_seconds:g} s",
        )
    return Change(0, "as many as needed")


def choose_leaver(candidates: Sequence[tuple[str, int, float]]) -> str:
    """Of (browser_id, queue, since): the one with the shortest queue; among equals, the newest.

    `since` is when it joined, in seconds of any one clock. Raises `ValueError` if there are none.
    """
    browser_id, _, _ = min(candidates, key=lambda one: (one[1], -one[2], one[0]))
    return browser_id


def _window(readings: Sequence[Reading], seconds: float) -> list[Reading]:
    """The last `seconds` of the readings; none if they don't reach back that far.

    It begins with the last reading before that, which gives the state at the window's start.
    """
    start = readings[-1].at - seconds
    window = []
    for reading in reversed(readings):
        window.append(reading)
        if reading.at <= start:
            return window
    return []


def _is_crowded(limits: ScalingLimits, readings: Sequence[Reading]) -> bool:
    window = _window(readings, limits.up_seconds)
    crowded = (one.queued >= limits.up_queue * max(one.ready, 1) for one in window)
    return bool(window) and all(crowded)


def _is_idle(limits: ScalingLimits, readings: Sequence[Reading]) -> bool:
    """Whether one browser fewer would be enough. Never true of the last one."""
    window = _window(readings, limits.down_seconds)
    if not window:
        return False
    # Counted from today's browsers, not from those at the time of each reading.
    remaining = readings[-1].ready - 1
    if any(one.queued >= limits.up_queue * remaining for one in window):
        return False
    utilisation = sum(one.busy / max(one.ready, 1) for one in window) / len(window)
    return utilisation <= limits.down_busy
