"""The limits of the history: of its file, its buffer and its queries."""

from __future__ import annotations

from dataclasses import dataclass, fields

from recovery import checks

_BIGGEST = 1 << 50  # of any limit


@dataclass(frozen=True)
class HistoryConfig:
    rows_max: int = 200_000  # in each base table; a tenth more before the oldest are deleted
    buffer_max: int = 10_000  # samples that wait to be written; the oldest are dropped
    answer_rows_max: int = 10_000  # a query with more rows is refused
    query_seconds_max: float = 10.0  # a query that takes longer is ended
    memory_bytes_max: int = 256 * 2**20  # DuckDB's own, for all it does at one time
    wal_bytes_max: int = 4 * 2**20  # then it is checkpointed, so that a torn one loses little
    threads: int = 1  # DuckDB's; the processors are for the browsers

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int):
                plain: float = checks.whole(field.name, value, 1, _BIGGEST)
            else:
                plain = checks.number(field.name, value, 0, _BIGGEST, above=True)
            object.__setattr__(self, field.name, plain)
