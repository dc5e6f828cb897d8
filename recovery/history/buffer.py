"""The samples that wait to be written: a bounded queue of rows, filled from any thread.

Adding never waits for the disk. This module must not write.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from recovery.history.samples import Sample
from recovery.history.schema import Row, row_of


class SampleBuffer:
    """Rows in the order of their samples; beyond `rows_max`, the oldest are dropped."""

    def __init__(self, rows_max: int) -> None:
        self._rows_max = rows_max
        self._lock = threading.Lock()  # guards all below
        self._rows: deque[Row] = deque()
        self.dropped = 0  # samples dropped for lack of room
        self.refused = 0  # samples that no table can hold

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, samples: Sequence[Sample]) -> str:
        """Never fails. Returns why a sample was refused, for the first one only; else empty."""
        rows = []
        why = ""
        for sample in samples:
            try:
                rows.append(row_of(sample))
            except (ValueError, TypeError, OverflowError) as error:
                why = str(error)
        with self._lock:
            first = not self.refused
            self.refused += len(samples) - len(rows)
            self._rows.extend(rows)
            self._drop_oldest()
        return why if first else ""

    def take(self) -> list[Row]:
        """Remove and return all waiting rows."""
        with self._lock:
            rows = list(self._rows)
            self._rows.clear()
        return rows

    def put_back(self, rows: Sequence[Row]) -> None:
        """Return rows that could not be written to the front of the queue."""
        with self._lock:
            self._rows.extendleft(reversed(rows))
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._rows) > self._rows_max:
            self._rows.popleft()
            self.dropped += 1
