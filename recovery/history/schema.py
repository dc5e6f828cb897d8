"""The schema of the history's file: tables and views as data, and its migrations.

    operations, recoveries          a row for each sample, numbered by `seq` without a gap
    meta                            the schema's number, and the digest of the views

A file of a higher schema is refused, views that differ are replaced. This module writes SQL and
reads samples; it must not open a file or run what it writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

from recovery.history.samples import OperationSample, Sample
from recovery.history.significance import SAMPLES_MIN, WILSON_Z

SCHEMA = 1  # of the file; one that this version can't read has a higher number
TIMEOUT_FACTOR = 2  # an adaptive timeout over the 95th percentile of what succeeded
_TEXT_CHARS_MAX = 2000
_INCIDENT_GAP_S = 60  # the steps of one plan follow each other at once

# -- tables ---------------------------------------------------------------------------------------

# A column has the name of its field; but AT is a word of SQL.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "operations": {
        "at_s": "DOUBLE",
        "pool": "VARCHAR",
        "op_id": "VARCHAR",
        "model": "VARCHAR",
        "model_type": "VARCHAR",
        "op": "VARCHAR",
        "browser_id": "VARCHAR",
        "browser_type": "VARCHAR",
        "epoch": "BIGINT",
        "backend": "VARCHAR",
        "level": "VARCHAR",
        "strategy": "VARCHAR",
        "success": "BOOLEAN",
        "recovered": "BOOLEAN",
        "simulated": "BOOLEAN",
        "attempts": "BIGINT",
        "duration_ms": "DOUBLE",
        "in_page_ms": "DOUBLE",
        "queue_ms": "DOUBLE",
        "bytes_in": "BIGINT",
        "bytes_out": "BIGINT",
        "category": "VARCHAR",
        "fingerprint": "VARCHAR",
    },
    "recoveries": {
        "at_s": "DOUBLE",
        "pool": "VARCHAR",
        "browser_id": "VARCHAR",
        "browser_type": "VARCHAR",
        "epoch": "BIGINT",
        "model_type": "VARCHAR",
        "strategy": "VARCHAR",
        "rung": "BIGINT",
        "category": "VARCHAR",
        "severity": "VARCHAR",
        "scope": "VARCHAR",
        "fingerprint": "VARCHAR",
        "duration_ms": "DOUBLE",
        "success": "BOOLEAN",
        "memory_bytes": "BIGINT",
        "note": "VARCHAR",
    },
}


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):  # it would spoil every mean that includes it
        raise ValueError(f"expected a finite number, got {number}")
    return number


def _whole(value: Any) -> int:
    whole = int(value)
    if not -(2**63) <= whole < 2**63:
        raise ValueError(f"{whole} does not fit into 64 bits")
    return whole


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value)[:_TEXT_CHARS_MAX]
    return text if text.isascii() else text.encode(errors="replace").decode()  # lone surrogates


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "DOUBLE": _number,
    "BIGINT": _whole,
    "BOOLEAN": bool,
    "VARCHAR": _text,
}
_FIELDS: Mapping[str, Sequence[tuple[str, Callable[[Any], Any]]]] = {
    table: [
        ("at" if column == "at_s" else column, _READERS[kind]) for column, kind in columns.items()
    ]
    for table, columns in COLUMNS.items()
}


class Row(NamedTuple):
    table: str
    values: tuple[Any, ...]


def row_of(sample: Sample) -> Row:
    """Raises `ValueError`, `TypeError` or `OverflowError` for what no column can hold."""
    table = "operations" if isinstance(sample, OperationSample) else "recoveries"
    return Row(table, tuple(read(getattr(sample, name)) for name, read in _FIELDS[table]))


# -- views ----------------------------------------------------------------------------------------


def _wilson_low(successes: str, samples: str) -> str:
    """SQL for the lower end of the 95 % Wilson interval of a rate; NULL without samples."""
    z2 = WILSON_Z * WILSON_Z
    rate = f"({successes} / {samples})"
    return (
        f"CASE WHEN {samples} > 0 THEN ({rate} + {z2} / (2 * {samples}) - {WILSON_Z} * sqrt("
        f"({rate} * (1 - {rate}) + {z2} / (4 * {samples})) / {samples})) / (1 + {z2} / {samples}) "
        "END"
    )


VIEWS: Mapping[str, str] = {
    # Every step. `impact_operations`: operations of the pool that met a failure and were under way
    # during the step. `stability_s`: how long the browser then was in no need of another one.
    "recovery_performance": """
        WITH steps AS (SELECT *, at_s - duration_ms / 1000 AS began_s FROM recoveries),
        hit AS (
            SELECT pool, at_s AS ended_s, at_s - duration_ms / 1000 AS began_s
            FROM operations WHERE category IS NOT NULL
        ),
        begun AS (
            SELECT pool, began_s, count(*) OVER (PARTITION BY pool ORDER BY began_s) AS n FROM hit
        ),
        ended AS (
            SELECT pool, ended_s, count(*) OVER (PARTITION BY pool ORDER BY ended_s) AS n FROM hit
        )
        SELECT s.seq, s.at_s, s.pool, s.browser_id, s.browser_type, s.epoch, s.model_type,
            s.category AS error_type, s.severity, s.scope, s.fingerprint,
            s.strategy, s.rung AS recovery_level, s.success, s.rung = 5 AS simulated,
            s.duration_ms AS recovery_time_ms,
            nullif(s.memory_bytes, 0) AS resource_usage_bytes,
            coalesce(begun.n, 0) - coalesce(ended.n, 0) AS impact_operations,
            CASE WHEN s.success THEN next.began_s - s.at_s END AS stability_s,
            s.note
        FROM steps s
        ASOF LEFT JOIN begun ON begun.pool = s.pool AND begun.began_s <= s.at_s
        ASOF LEFT JOIN ended ON ended.pool = s.pool AND ended.ended_s < s.began_s
        ASOF LEFT JOIN steps next ON next.pool = s.pool AND next.browser_id = s.browser_id
            AND next.began_s > s.at_s
    """,
    # `score`: the lower end of the 95 % Wilson interval of the success rate, so that few samples
    # score low. Times, memory and stability are medians, `impact_score` is the mean of
    # `impact_operations`. A task is an operation that met such a failure.
    "strategy_scores": f"""
        WITH steps AS (
            SELECT error_type, strategy,
                count(*) FILTER (NOT simulated) AS samples,
                count(*) FILTER (success AND NOT simulated) AS successes,
                count(*) FILTER (simulated) AS simulated,
                median(recovery_time_ms) FILTER (success AND NOT simulated) AS recovery_time_ms,
                median(resource_usage_bytes) FILTER (NOT simulated) AS resource_usage_bytes,
                median(stability_s) FILTER (NOT simulated) AS stability_s,
                avg(impact_operations) FILTER (NOT simulated) AS impact_score
            FROM recovery_performance GROUP BY ALL
        ),
        tasks AS (
            SELECT category AS error_type, strategy, count(*) AS tasks,
                count(*) FILTER (success AND NOT simulated) AS tasks_recovered
            FROM operations WHERE category IS NOT NULL GROUP BY ALL
        ),
        counted AS (
            SELECT error_type, strategy, coalesce(samples, 0) AS samples,
                coalesce(successes, 0) AS successes, coalesce(simulated, 0) AS simulated,
                recovery_time_ms, resource_usage_bytes, stability_s, impact_score,
                coalesce(tasks, 0) AS tasks, coalesce(tasks_recovered, 0) AS tasks_recovered
            FROM steps FULL JOIN tasks USING (error_type, strategy)
        )
        SELECT error_type, strategy, samples, successes, simulated,
            successes / nullif(samples, 0) AS success_rate,
            {_wilson_low("successes", "samples")} AS score,
            recovery_time_ms, resource_usage_bytes, stability_s, impact_score,
            tasks, tasks_recovered, tasks_recovered / nullif(tasks, 0) AS task_recovery
        FROM counted
    """,
    # Of the steps that succeeded; `samples` counts them.
    "adaptive_timeouts": f"""
        SELECT error_type, strategy, recovery_level, browser_type, count(*) AS samples,
            median(recovery_time_ms) AS median_ms,
            quantile_cont(recovery_time_ms, 0.95) AS p95_ms,
            max(recovery_time_ms) AS max_ms,
            CASE WHEN count(*) >= {SAMPLES_MIN}
                THEN {TIMEOUT_FACTOR} * quantile_cont(recovery_time_ms, 0.95) END AS timeout_ms
        FROM recovery_performance WHERE success AND NOT simulated GROUP BY ALL
    """,
    # Every incident: the steps of one browser that answer one failure, until one succeeds. Another
    # failure begins a new one; so does a step that began after a success, or on a lower rung, when
    # the step before had ended (those of a race overlap), or long after it.
    "progressive_recovery": f"""
        WITH steps AS (SELECT *, at_s - duration_ms / 1000 AS began_s FROM recoveries),
        followed AS (
            SELECT *, lag(at_s) OVER browser AS at_before, lag(rung) OVER browser AS rung_before,
                lag(success) OVER browser AS success_before,
                lag((category, fingerprint)) OVER browser AS failure_before
            FROM steps WINDOW browser AS (PARTITION BY pool, browser_id ORDER BY at_s, seq)
        ),
        numbered AS (
            SELECT *, row_number() OVER browser AS place, count(*) FILTER (
                at_before IS NULL OR (category, fingerprint) IS DISTINCT FROM failure_before
                OR ((success_before OR rung < rung_before) AND began_s >= at_before - 0.001)
                OR began_s > at_before + {_INCIDENT_GAP_S}
            ) OVER browser AS incident
            FROM followed WINDOW browser AS (PARTITION BY pool, browser_id ORDER BY at_s, seq)
        )
        SELECT pool, browser_id, incident, any_value(browser_type) AS browser_type,
            arg_min(model_type, place) AS model_type, any_value(category) AS error_type,
            any_value(fingerprint) AS fingerprint, arg_min(strategy, place) AS strategy,
            min(began_s) AS began_s, max(at_s) AS ended_s,
            arg_min(rung, place) AS first_level, max(rung) AS recovery_level,
            count(*) AS attempts, count(DISTINCT rung) - 1 AS escalations,
            bool_or(success AND rung < 5) AS success,
            bool_or(success AND rung = 5) AND NOT bool_or(success AND rung < 5) AS simulated,
            (max(at_s) - min(began_s)) * 1000 AS recovery_time_ms
        FROM numbered GROUP BY pool, browser_id, incident
    """,
}
VIEWS_DIGEST = f"{crc32(repr(VIEWS).encode()):08x}"

# -- migrations -----------------------------------------------------------------------------------


class Statement(NamedTuple):
    sql: str
    params: tuple[Any, ...] = ()


def creation(at: float) -> list[Statement]:
    """The statements that create the tables of an empty file; `at` is wall time."""
    made = []
    for table, columns in COLUMNS.items():
        typed = ", ".join(f"{column} {kind}" for column, kind in columns.items())
        made.append(Statement(f"CREATE TABLE {table} (seq BIGINT, {typed})"))
    made.append(Statement("CREATE TABLE meta (key VARCHAR, value VARCHAR)"))
    for key, value in (("schema", str(SCHEMA)), ("made_at_s", str(at))):
        made.append(Statement("INSERT INTO meta VALUES (?, ?)", (key, value)))
    return made


def schema_of(meta: Mapping[str, str]) -> str:
    """The schema number stored in a file."""
    return str(meta.get("schema", "(none)"))


def is_readable(meta: Mapping[str, str]) -> bool:
    """Whether this version can read a file that says so of itself."""
    schema = schema_of(meta)
    return schema.isdigit() and int(schema) <= SCHEMA


def migration(meta: Mapping[str, str]) -> list[Statement]:
    """What brings a readable file up to date. Nothing, if it is: a full disk can still be read."""
    if meta.get("views") == VIEWS_DIGEST:
        return []
    return [
        *(Statement(f"CREATE OR REPLACE VIEW {view} AS {body}") for view, body in VIEWS.items()),
        Statement("DELETE FROM meta WHERE key = 'views'"),
        Statement("INSERT INTO meta VALUES ('views', ?)", (VIEWS_DIGEST,)),
    ]
