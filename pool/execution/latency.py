"""Recent durations of operations, and when one counts as late.

Bounded: a window for each kind of operation, and a limit on kinds. This module must not send
requests.
"""

from __future__ import annotations

from collections import OrderedDict, deque

_WINDOW = 128
_ENOUGH = 20  # samples needed for a quantile
_KINDS_MAX = 256
_LATE_MIN_SECONDS = 0.02  # below, hedging costs more than waiting


class Latencies:
    """Durations of one client's operations, by kind (any hashable key)."""

    def __init__(self, quantile: float, unknown_seconds: float) -> None:
        self._quantile = quantile
        self._unknown_seconds = unknown_seconds
        self._windows: OrderedDict[object, deque[float]] = OrderedDict()

    def note(self, kind: object, seconds: float) -> None:
        """An operation of this kind was answered by its first browser within `seconds`."""
        window = self._windows.setdefault(kind, deque(maxlen=_WINDOW))
        self._windows.move_to_end(kind)
        window.append(seconds)
        if len(self._windows) > _KINDS_MAX:
            self._windows.popitem(last=False)

    def late_after(self, kind: object) -> float:
        """Seconds after which such an operation is late: the quantile, or a default at first."""
        window = self._windows.get(kind, ())
        if len(window) < _ENOUGH:
            return self._unknown_seconds
        rank = min(int(len(window) * self._quantile), len(window) - 1)
        return max(sorted(window)[rank], _LATE_MIN_SECONDS)
