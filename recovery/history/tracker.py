"""The history: samples in one DuckDB file, and what can be read out of them.

    history.duckdb, .wal            the tables `operations`, `recoveries` and `meta`, and views
    history.duckdb.lock             held by the one process that writes
    history.duckdb-0001.damaged     what an opening set aside

`HistoryStore` is blocking and belongs to whoever writes; only `add` may be called from where time
matters, for it never waits for the disk. `PerformanceHistoryTracker` reads: every figure comes
from stored rows and stands beside their number. A simulated answer or step is counted apart,
never as a success. DuckDB's errors stop here. This module must not decide anything from what it
finds, and nothing that it stores is needed to answer or to repair.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict
from zlib import crc32

import duckdb

from recovery.errors import BadInput, IllegalTransition, SetupError
from recovery.failures import Category
from recovery.history.samples import OperationSample, Sample
from recovery.kinds import BrowserType, ModelType, RecoveryLevel

SCHEMA = 1  # of the file; one that this version can't read has a higher number
DAMAGED_MAX = 4  # files set aside that are kept
SAMPLES_MIN = 5  # of fewer no timeout is derived, and no browser or step judged
TREND_SAMPLES_MIN = 10
TREND_T_MIN = 3.36  # two-sided p < 0.01 already with 10 samples (8 degrees of freedom)
TREND_CHANGE_MIN = 0.05  # of the mean, from the first to the last sample
FASTER_MIN = 0.1  # by which a browser's median must be shorter before another is recommended
TIMEOUT_FACTOR = 2  # an adaptive timeout over the 95th percentile of what succeeded
_Z = 1.96  # of a normal distribution: Wilson intervals of 95 %
_TEXT_CHARS_MAX = 2000
_NOTES_MAX = 16
_INCIDENT_GAP_S = 60  # the steps of one plan follow each other at once
_TRENDS_MAX = 100  # combinations that recommendations look at


class HistoryUnavailable(SetupError):
    """The history can't be read or written at present. The message says what would help."""


class HistoryTooNew(HistoryUnavailable):
    """A newer version of tabpool, or of DuckDB, made the file."""


@dataclass(frozen=True)
class HistoryConfig:
    rows_max: int = 200_000  # in each base table; a tenth more before the oldest are deleted
    buffer_max: int = 10_000  # samples that wait to be written; the oldest give way
    answer_rows_max: int = 10_000  # a query with a longer answer is refused
    query_seconds_max: float = 10.0  # a query that takes longer is ended
    memory_bytes_max: int = 256 * 2**20  # DuckDB's own, for all it does at one time
    wal_bytes_max: int = 4 * 2**20  # then it goes into the file, so that a torn one costs little
    threads: int = 1  # DuckDB's; the processors are for the browsers


# -- what is stored -------------------------------------------------------------------------------

# A column has the name of its field; but AT is a word of SQL.
_COLUMNS: Mapping[str, Mapping[str, str]] = {
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
    if not math.isfinite(number):  # it would spoil every mean that it gets into
        raise ValueError(f"{number} is no measurement")
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
    for table, columns in _COLUMNS.items()
}


class _Row(NamedTuple):
    table: str
    values: tuple[Any, ...]


def _row(sample: Sample) -> _Row:
    """Raises `ValueError`, `TypeError` or `OverflowError` for what no column can hold."""
    table = "operations" if isinstance(sample, OperationSample) else "recoveries"
    return _Row(table, tuple(read(getattr(sample, name)) for name, read in _FIELDS[table]))


# -- views ----------------------------------------------------------------------------------------


def _wilson_low(successes: str, samples: str) -> str:
    """SQL for the lower end of the 95 % Wilson interval of a rate; NULL without samples."""
    z2 = _Z * _Z
    rate = f"({successes} / {samples})"
    return (
        f"CASE WHEN {samples} > 0 THEN ({rate} + {z2} / (2 * {samples}) - {_Z} * sqrt("
        f"({rate} * (1 - {rate}) + {z2} / (4 * {samples})) / {samples})) / (1 + {z2} / {samples}) "
        "END"
    )


_VIEWS: Mapping[str, str] = {
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
_VIEWS_DIGEST = f"{crc32(repr(_VIEWS).encode()):08x}"


# -- the store ------------------------------------------------------------------------------------

# DuckDB tells one cause from another in words only. What is not among them is not damage: such a
# file stays where it is.
_DAMAGE = re.compile(
    r"corrupt|not a valid DuckDB database|replaying WAL|could not read enough bytes", re.IGNORECASE
)
_WAL_DAMAGE = re.compile(r"replaying WAL|corrupt \w*\s?WAL", re.IGNORECASE)
_NEWER = re.compile(r"version number", re.IGNORECASE)
_LOCKED = re.compile(r"set lock on file", re.IGNORECASE)
_NOT_THE_FILE = re.compile(
    r"no space left|too many open files|cannot allocate|input/output error|permission denied"
    rf"|{_LOCKED.pattern}|{_NEWER.pattern}",
    re.IGNORECASE,
)
# What is wrong with a query is its caller's fault.
_QUERY_ERRORS = (
    duckdb.ProgrammingError,
    duckdb.DataError,
    duckdb.NotSupportedError,
    duckdb.PermissionException,
    duckdb.TransactionException,  # it would write
    duckdb.OutOfMemoryException,
    duckdb.InterruptException,
)


class HistoryStore:
    """The samples of one pool, or of several in turn; in memory only where `path` is None.

    Whatever may wait is serialised: a query delays the next flush by at most
    `query_seconds_max`. After an error the file is let go, and opened again by the next call.
    """

    def __init__(
        self,
        path: Path | None,
        config: HistoryConfig | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path.absolute() if path is not None else None
        self._config = config or HistoryConfig()
        self.wall = wall
        self.dropped = 0  # samples that found no room
        self.refused = 0  # samples that no table can hold
        self.notes: tuple[str, ...] = ()  # what whoever reads the figures should know
        self._adding = threading.Lock()  # guards the buffer, the counts and `notes`
        self._buffer: deque[_Row] = deque()
        self._using = threading.Lock()  # guards all below
        self._opened = False
        self._lock_fd: int | None = None
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._stored = dict.fromkeys(_COLUMNS, 0)
        self._last_seq = dict.fromkeys(_COLUMNS, 0)

    @property
    def pending(self) -> int:
        """Samples that wait to be written."""
        return len(self._buffer)

    @property
    def stored(self) -> Mapping[str, int]:
        """Rows in each base table, as of the last opening or flush."""
        return dict(self._stored)

    def open(self) -> None:
        """Raises `HistoryUnavailable`, or `HistoryTooNew`; the file is then as it was.

        A damaged file is set aside, and `notes` say so. Every row is read once, so that damage
        shows here and not in a query.
        """
        with self._using:
            if self._opened:
                raise IllegalTransition(f"{self._name} was opened before")
            try:
                self._take_lock()
                self._connect()
            except BaseException:
                self._release()
                raise
            self._opened = True

    def add(self, samples: Sequence[Sample]) -> None:
        """Keep `samples` for the next flush. Never waits for the disk, and never fails."""
        rows = []
        refused = ""
        for sample in samples:
            try:
                rows.append(_row(sample))
            except (ValueError, TypeError, OverflowError) as error:
                refused = str(error)
        with self._adding:
            if refused and not self.refused:
                self._note(f"a sample can't be stored: {refused}")
            self.refused += len(samples) - len(rows)
            self._buffer.extend(rows)
            self._drop_oldest()

    def flush(self) -> int:
        """Write what waits, in one transaction; returns the number of rows.

        Raises `HistoryUnavailable`: then nothing was written, and all goes on waiting.
        """
        with self._using:
            return self._flush()

    def query(
        self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()
    ) -> list[dict[str, Any]]:
        """The rows that one SELECT gives, of what has been flushed.

        Raises `BadInput` for anything but a SELECT and for one that fails, takes too long or gives
        too many rows; `HistoryUnavailable`.
        """
        with self._using:
            connection = self._require_connection()
            try:
                with self._reading(connection) as cursor:
                    return self._select(cursor, sql, params)
            except _QUERY_ERRORS as error:
                limit = self._config.query_seconds_max
                why = (
                    f"it was ended after {limit:g} s"
                    if isinstance(error, duckdb.InterruptException)
                    else str(error)
                )
                raise BadInput(f"the query was refused: {why}", sql=sql) from None
            except duckdb.Error as error:
                self._let_go()
                raise self._unavailable("read", error) from None

    def close(self) -> None:
        """Write what waits, and let another process have the file."""
        with self._using:
            if not self._opened:
                return
            try:
                self._flush()
            finally:
                self._release()

    # -- opening ----------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"the history in {self._path or 'memory'}"

    def _take_lock(self) -> None:
        """Make sure that nobody else sets files aside, in this process or in another."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_name(f"{self._path.name}.lock")
            fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unavailable("opened", error) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode(errors="replace")
            os.close(fd)
            raise HistoryUnavailable(
                f"{self._name} is in use by process {holder or '(unknown)'}: close what is open "
                "there, or choose another file",
                path=str(self._path),
            ) from None
        except OSError as error:
            os.close(fd)
            raise self._unavailable("opened", error) from None
        self._lock_fd = fd

    def _connect(self) -> None:
        for _ in range(3):  # as it is; without its WAL; a new one
            connection = None
            try:
                connection = duckdb.connect(str(self._path or ":memory:"), config=self._settings())
                self._prepare(connection)
            except duckdb.Error as error:
                _close(connection)
                if not self._set_aside(error):
                    raise self._unavailable("opened", error) from None
            except BaseException:
                _close(connection)
                raise
            else:
                self._connection = connection
                return
        raise HistoryUnavailable(f"{self._name} is damaged as soon as it is made: is its disk ill?")

    def _settings(self) -> dict[str, str | bool | int | float | list[str]]:
        return {
            "threads": self._config.threads,
            "memory_limit": f"{self._config.memory_bytes_max}B",
            "checkpoint_threshold": f"{self._config.wal_bytes_max}B",
            "max_temp_directory_size": "0B",  # what does not fit in memory is refused
            # A query reads tables, not the caller's files, network or variables.
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
            "lock_configuration": True,
        }

    def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
        found = connection.execute("SELECT table_name FROM duckdb_tables() WHERE NOT internal")
        tables = {name for (name,) in found.fetchall()}
        if tables and "meta" not in tables:
            raise HistoryUnavailable(
                f"{self._path} is a DuckDB file, but not a history: choose another name",
                path=str(self._path),
            )
        connection.begin()
        if not tables:
            for table, columns in _COLUMNS.items():
                typed = ", ".join(f"{column} {kind}" for column, kind in columns.items())
                connection.execute(f"CREATE TABLE {table} (seq BIGINT, {typed})")
            connection.execute("CREATE TABLE meta (key VARCHAR, value VARCHAR)")
            made = [("schema", str(SCHEMA)), ("made_at_s", str(self.wall()))]
            connection.executemany("INSERT INTO meta VALUES (?, ?)", made)
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        schema = str(meta.get("schema", "(none)"))
        if not schema.isdigit() or int(schema) > SCHEMA:
            raise HistoryTooNew(
                f"{self._name} has schema {schema}, and this version of tabpool knows {SCHEMA} at "
                "most: use the version that made it, or choose another file",
                path=str(self._path),
                schema=schema,
            )
        if meta.get("views") != _VIEWS_DIGEST:  # else nothing is written, as on a full disk
            for view, body in _VIEWS.items():
                connection.execute(f"CREATE OR REPLACE VIEW {view} AS {body}")
            connection.execute("DELETE FROM meta WHERE key = 'views'")
            connection.execute("INSERT INTO meta VALUES ('views', ?)", [_VIEWS_DIGEST])
        connection.commit()
        for table in _COLUMNS:
            counted = connection.execute(
                f"SELECT count(*), coalesce(max(seq), 0), bit_xor(hash({table})) FROM {table}"
            ).fetchall()
            self._stored[table], self._last_seq[table], _ = counted[0]

    def _set_aside(self, error: duckdb.Error) -> bool:
        """Move what is damaged out of the way; False if nothing is, as far as `error` tells."""
        if self._path is None:
            return False
        name, folder = self._path.name, self._path.parent
        words = str(error)
        for may_contain_any_word in (self._path, folder):
            words = words.replace(str(may_contain_any_word), "")
        if not _DAMAGE.search(words) or _NOT_THE_FILE.search(words):
            return False
        logs = (f"{name}.wal", f"{name}.wal.checkpoint", f"{name}.wal.recovery")
        wal_only = _WAL_DAMAGE.search(words) is not None and (folder / logs[0]).exists()
        form = re.compile(rf"{re.escape(name)}-(\d{{4,}})(\.wal.*)?\.damaged")
        try:
            found = [(form.fullmatch(path.name), path) for path in folder.iterdir()]
            aside = sorted((int(match[1]), path) for match, path in found if match)
            number = aside[-1][0] + 1 if aside else 1
            moved = []
            for old in logs if wal_only else (name, *logs):
                if (folder / old).exists():
                    new = folder / f"{name}-{number:04d}{old.removeprefix(name)}.damaged"
                    os.replace(folder / old, new)
                    moved.append(new)
            for _, path in aside[: max(0, len(aside) + len(moved) - DAMAGED_MAX)]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unavailable("set aside", error) from None
        if moved:
            lost = "the samples since its last checkpoint are" if wal_only else "all samples are"
            with self._adding:
                self._note(
                    f"{self._name} was damaged ({words.splitlines()[0]}); {lost} now in "
                    f"{', '.join(path.name for path in moved)}"
                )
        return bool(moved)

    # -- writing ----------------------------------------------------------------------------------

    def _flush(self) -> int:
        connection = self._require_connection()
        with self._adding:
            batch = list(self._buffer)
            self._buffer.clear()
        if not batch:
            return 0
        try:
            self._write(connection, batch)
        except BaseException as error:
            with self._adding:
                self._buffer.extendleft(reversed(batch))
                self._drop_oldest()
            self._let_go()
            if isinstance(error, duckdb.Error):
                raise self._unavailable("written", error) from None
            raise
        return len(batch)

    def _write(self, connection: duckdb.DuckDBPyConnection, batch: Sequence[_Row]) -> None:
        stored, last_seq = dict(self._stored), dict(self._last_seq)
        connection.begin()
        for table in _COLUMNS:
            rows = []
            for row in batch:
                if row.table == table:
                    last_seq[table] += 1
                    rows.append((last_seq[table], *row.values))
            if not rows:
                continue
            appender = connection.appender(table)
            appender.append_rows(rows)
            appender.flush()
            stored[table] += len(rows)
            if stored[table] > self._config.rows_max * 1.1:
                # Numbers leave no gap, so this keeps exactly the newest.
                oldest = last_seq[table] - self._config.rows_max
                connection.execute(f"DELETE FROM {table} WHERE seq <= ?", [oldest])
                stored[table] = self._config.rows_max
        connection.commit()
        self._stored, self._last_seq = stored, last_seq

    def _drop_oldest(self) -> None:
        while len(self._buffer) > self._config.buffer_max:
            self._buffer.popleft()
            self.dropped += 1

    # -- reading ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(
        self, connection: duckdb.DuckDBPyConnection
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that can't write, and is interrupted when its time is over."""
        cursor = connection.cursor()
        timer = threading.Timer(self._config.query_seconds_max, _interrupt, [cursor])
        timer.daemon = True
        try:
            timer.start()
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            yield cursor
        finally:
            timer.cancel()
            _close(cursor)

    def _select(
        self,
        cursor: duckdb.DuckDBPyConnection,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        statements = cursor.extract_statements(sql)
        if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
            kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
            raise BadInput(
                f"the history answers one SELECT at a time, and this is: {kinds}", sql=sql
            )
        cursor.execute(statements[0], params)
        names = [column[0] for column in cursor.description]
        if len(set(names)) < len(names):
            raise BadInput(f"two columns have one name: {', '.join(names)}", sql=sql)
        limit = self._config.answer_rows_max
        rows = cursor.fetchmany(limit + 1)
        if len(rows) > limit:
            raise BadInput(
                f"the answer has more than {limit} rows: add a LIMIT, or let it count", sql=sql
            )
        return [dict(zip(names, row, strict=True)) for row in rows]

    # -- the connection ---------------------------------------------------------------------------

    def _require_connection(self) -> duckdb.DuckDBPyConnection:
        if not self._opened:
            raise HistoryUnavailable(f"{self._name} is not open: open it first")
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        return self._connection

    def _let_go(self) -> None:
        """After an error DuckDB may refuse all further work; what it has on disk is still good."""
        if self._path is not None:
            _close(self._connection)
            self._connection = None
        elif self._connection is not None:  # all that there is
            with contextlib.suppress(duckdb.Error):
                self._connection.rollback()

    def _release(self) -> None:
        _close(self._connection)
        self._connection = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)  # and with it the lock
            self._lock_fd = None
        self._opened = False

    def _note(self, text: str) -> None:
        self.notes = (*self.notes, text)[-_NOTES_MAX:]

    def _unavailable(self, what: str, error: Exception) -> HistoryUnavailable:
        words = str(error).removeprefix("IO Error: ")
        kind, remedy = HistoryUnavailable, ""
        if _LOCKED.search(words):
            remedy = ". Close the program that has it open, or choose another file"
        elif _NEWER.search(words):
            kind = HistoryTooNew
            remedy = ". Update duckdb, or choose another file"
        return kind(f"{self._name} can't be {what}: {words}{remedy}", path=str(self._path))


def _close(connection: duckdb.DuckDBPyConnection | None) -> None:
    if connection is not None:
        with contextlib.suppress(duckdb.Error):
            connection.close()


def _interrupt(cursor: duckdb.DuckDBPyConnection) -> None:
    with contextlib.suppress(duckdb.Error):  # it may just have been closed
        cursor.interrupt()


# -- reading it -----------------------------------------------------------------------------------


class RungOutcome(NamedTuple):
    """What a rung achieved; `median_ms` is of its successes."""

    successes: int
    attempts: int
    median_ms: float | None


class Trend(TypedDict):
    """How durations change from operation to operation.

    `samples` are all operations in the window. The durations are those of the `measured`: of right
    answers that met no failure. Recent and oldest are means of ten each, where there are twenty.
    """

    samples: int
    measured: int
    time_window_seconds: float
    success_rate: float | None
    simulated: int
    recovered: int
    avg_duration_ms: float | None
    min_duration_ms: float | None
    median_duration_ms: float | None
    max_duration_ms: float | None
    avg_oldest_duration_ms: float | None
    avg_recent_duration_ms: float | None
    slope_ms_per_operation: float | None
    direction: str  # "improving", "degrading" or "stable"
    reason: str


class PerformanceHistoryTracker:
    """What the history says. Reads only what has been flushed.

    A success rate is of real answers: a simulated operation is a sample, but no success; a
    simulated recovery step is neither, since the steps that failed before it have been counted.
    `since` is wall time in seconds.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store

    def record(self, *samples: Sample) -> None:
        """The same as the store's `add`."""
        self._store.add(samples)

    def success_rates(
        self, by: Sequence[str] = ("strategy", "rung"), since: float | None = None
    ) -> list[dict[str, Any]]:
        """Recovery steps, counted by some of strategy, rung, category, browser and model type.

        The most frequent come first.
        """
        known = ("strategy", "rung", "category", "browser_type", "model_type")
        if not set(by) <= set(known):
            raise BadInput(
                f"recovery steps are counted by {', '.join(known)}, not by {', '.join(by)}",
                expected=list(known),
                got=list(by),
            )
        keys = "".join(f"{key}, " for key in by)
        return self._store.query(
            f"""
            SELECT {keys} count(*) FILTER (rung < 5) AS samples,
                count(*) FILTER (success AND rung < 5) AS successes,
                count(*) FILTER (success AND rung < 5) / nullif(count(*) FILTER (rung < 5), 0)
                    AS success_rate,
                median(duration_ms) FILTER (success AND rung < 5) AS median_ms,
                count(*) FILTER (rung = 5) AS simulated
            FROM recoveries WHERE at_s >= ? {f"GROUP BY {', '.join(by)}" if by else ""}
            ORDER BY {keys and "samples DESC, "} {keys} simulated
            """,
            [_start(since)],
        )

    def rung_outcomes(
        self,
        fingerprint: str = "",
        *,
        category: Category | None = None,
        browser_type: BrowserType | None = None,
        model_type: ModelType | None = None,
        since: float | None = None,
    ) -> dict[RecoveryLevel, RungOutcome]:
        """What each rung that was tried achieved against such failures; simulation is no repair."""
        given = {
            "fingerprint": fingerprint or None,
            "category": category,
            "browser_type": browser_type,
            "model_type": model_type,
        }
        wanted = {name: str(value) for name, value in given.items() if value is not None}
        rows = self._store.query(
            f"""
            SELECT rung, count(*) FILTER (success) AS successes, count(*) AS attempts,
                median(duration_ms) FILTER (success) AS median_ms
            FROM recoveries
            WHERE rung < 5 AND at_s >= ? {"".join(f" AND {name} = ?" for name in wanted)}
            GROUP BY rung ORDER BY rung
            """,
            [_start(since), *wanted.values()],
        )
        return {
            RecoveryLevel(row["rung"]): RungOutcome(
                row["successes"], row["attempts"], row["median_ms"]
            )
            for row in rows
        }

    def analyze_performance_trends(
        self,
        model: str | None = None,
        browser_type: BrowserType | None = None,
        op: str | None = None,
        time_window_seconds: float = 3600,
    ) -> Trend:
        """A straight line through the durations of the last while, in the order of their ends.

        It is called stable unless there are at least 10 durations, the slope's t value is 3.36 or
        more (p < 0.01), and the line changes by 5 % of the mean or more. Ask for one model and
        operation: where the mix changes, so do the durations.
        """
        given = {"model": model, "browser_type": browser_type, "op": op}
        wanted = {name: str(value) for name, value in given.items() if value is not None}
        (row,) = self._store.query(
            f"""
            WITH chosen AS (
                SELECT *, success AND NOT simulated AND NOT recovered AS measured FROM operations
                WHERE at_s >= ? {"".join(f" AND {name} = ?" for name in wanted)}
            ),
            line AS (
                SELECT duration_ms AS ms, row_number() OVER (ORDER BY at_s, seq) AS i,
                    count(*) OVER () AS n
                FROM chosen WHERE measured
            )
            SELECT any_value(samples) AS samples, any_value(successes) AS successes,
                any_value(simulated) AS simulated, any_value(recovered) AS recovered,
                count(ms) AS measured, avg(ms) AS mean, min(ms) AS least, median(ms) AS median,
                max(ms) AS most, avg(ms) FILTER (n >= 20 AND i <= 10) AS oldest,
                avg(ms) FILTER (n >= 20 AND i > n - 10) AS recent,
                regr_sxx(ms, i) AS sxx, regr_sxy(ms, i) AS sxy, regr_syy(ms, i) AS syy
            FROM (
                SELECT count(*) AS samples,
                    count(*) FILTER (success AND NOT simulated) AS successes,
                    count(*) FILTER (simulated) AS simulated,
                    count(*) FILTER (success AND recovered AND NOT simulated) AS recovered
                FROM chosen
            ) LEFT JOIN line ON true
            """,
            [self._store.wall() - time_window_seconds, *wanted.values()],
        )
        samples, measured = row["samples"], row["measured"]
        slope = row["sxy"] / row["sxx"] if measured >= 2 else None
        direction, reason = _direction(measured, row["mean"], row["sxx"], row["sxy"], row["syy"])
        return Trend(
            samples=samples,
            measured=measured,
            time_window_seconds=time_window_seconds,
            success_rate=row["successes"] / samples if samples else None,
            simulated=row["simulated"],
            recovered=row["recovered"],
            avg_duration_ms=row["mean"],
            min_duration_ms=row["least"],
            median_duration_ms=row["median"],
            max_duration_ms=row["most"],
            avg_oldest_duration_ms=row["oldest"],
            avg_recent_duration_ms=row["recent"],
            slope_ms_per_operation=slope,
            direction=direction,
            reason=reason,
        )

    def recommend_browser(
        self, model_type: ModelType, since: float | None = None
    ) -> list[dict[str, Any]]:
        """Browser types for a model type, the best first.

        Their `reliability` is right answers over operations and incidents (an operation that a
        broken browser lost, but another one answered, counts for the other one only). Those that
        can't be told from the most reliable one (95 % Wilson intervals) are ordered by the median
        duration, the others by reliability; those with too few samples come last, unranked.
        """
        rows = self._store.query(
            """
            WITH answers AS (
                SELECT browser_type, count(*) AS samples,
                    count(*) FILTER (success AND NOT simulated) AS successes,
                    median(duration_ms) FILTER (success AND NOT simulated AND NOT recovered)
                        AS median_ms
                FROM operations
                WHERE browser_type IS NOT NULL AND model_type = $type AND at_s >= $since
                GROUP BY browser_type
            ),
            repairs AS (
                SELECT browser_type, count(*) AS incidents FROM progressive_recovery
                WHERE model_type = $type AND ended_s >= $since GROUP BY browser_type
            )
            SELECT browser_type, coalesce(samples, 0) AS samples,
                coalesce(successes, 0) AS successes, successes / nullif(samples, 0) AS success_rate,
                coalesce(incidents, 0) AS incidents, median_ms
            FROM answers FULL JOIN repairs USING (browser_type) ORDER BY browser_type
            """,
            {"type": str(model_type), "since": _start(since)},
        )
        for row in rows:
            trials = row["samples"] + row["incidents"]
            row["reliability"] = row["successes"] / trials
            row["score"], row["_high"] = _wilson(row["successes"], trials)
            row["ranked"] = row["samples"] >= SAMPLES_MIN
        bar = max((row["score"] for row in rows if row["ranked"]), default=0.0)

        def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
            if row["ranked"] and row["_high"] >= bar and row["median_ms"] is not None:
                return 0, row["median_ms"]
            return (1 if row["ranked"] else 2), -row["score"]

        ordered = sorted(rows, key=place)
        return [{name: value for name, value in row.items() if name != "_high"} for row in ordered]

    def failure_patterns(self, limit: int = 10) -> list[dict[str, Any]]:
        """The failures that are met most, by fingerprint and category.

        `operations` met one first (as their callers saw it), `incidents` are browsers that were
        repaired because of one; an incident may have cost several operations, or none.
        """
        return self._store.query(
            """
            WITH seen AS (
                SELECT fingerprint, category, browser_type, model_type, at_s, 1 AS operations,
                    (success AND NOT simulated)::INTEGER AS operations_recovered,
                    0 AS incidents, 0 AS incidents_recovered
                FROM operations WHERE category IS NOT NULL
                UNION ALL
                SELECT fingerprint, error_type, browser_type, model_type, ended_s, 0, 0, 1,
                    success::INTEGER
                FROM progressive_recovery
            )
            SELECT fingerprint, category,
                sum(operations)::BIGINT AS operations,
                sum(operations_recovered)::BIGINT AS operations_recovered,
                sum(incidents)::BIGINT AS incidents,
                sum(incidents_recovered)::BIGINT AS incidents_recovered,
                coalesce(list_sort(list(DISTINCT browser_type) FILTER (incidents > 0)), [])
                    AS browser_types,
                list_sort(list(DISTINCT model_type)) AS model_types,
                min(at_s) AS first_at_s, max(at_s) AS last_at_s
            FROM seen GROUP BY fingerprint, category
            ORDER BY count(*) DESC, last_at_s DESC, fingerprint, category LIMIT ?
            """,
            [limit],
        )

    def statistics(self, since: float | None = None) -> dict[str, Any]:
        """Totals, and recovery steps by strategy, rung, category and browser type."""
        (operations,) = self._store.query(
            """
            SELECT count(*) AS samples, count(*) FILTER (success AND NOT simulated) AS successes,
                count(*) FILTER (NOT success) AS failures,
                count(*) FILTER (success AND simulated) AS simulated,
                count(*) FILTER (success AND recovered AND NOT simulated) AS recovered,
                count(*) FILTER (success AND NOT simulated) / nullif(count(*), 0) AS success_rate
            FROM operations WHERE at_s >= ?
            """,
            [_start(since)],
        )
        (incidents,) = self._store.query(
            """
            SELECT count(*) AS samples, count(*) FILTER (success) AS successes,
                count(*) FILTER (simulated) AS simulated,
                median(recovery_time_ms) FILTER (success) AS median_ms
            FROM progressive_recovery WHERE ended_s >= ?
            """,
            [_start(since)],
        )
        (steps,) = self.success_rates((), since)
        counted = {
            name: {
                row.pop(key): row
                for row in self.success_rates((key,), since)  # a row without its key
            }
            for name, key in (
                ("by_strategy", "strategy"),
                ("by_rung", "rung"),
                ("by_category", "category"),
                ("by_browser", "browser_type"),
            )
        }
        return {
            "recovery_attempts": steps["samples"],
            "recovery_successes": steps["successes"],
            "recovery_failures": steps["samples"] - steps["successes"],
            "recovery_simulated": steps["simulated"],
            "success_rate": steps["success_rate"],
            "median_recovery_ms": steps["median_ms"],
            "incidents": incidents,
            "operations": operations,
            **counted,
            "samples_dropped": self._store.dropped,
            "notes": list(self._store.notes),
        }

    def get_performance_recommendations(
        self, time_window_seconds: float = 3600
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """What should be looked at: slower operations, better browsers, steps that never help."""
        since = self._store.wall() - time_window_seconds
        found: dict[str, dict[str, Any]] = {}

        def recommend(key: str, samples: int, description: str, recommendation: str) -> None:
            found[key] = {
                "description": description,
                "recommendation": recommendation,
                "samples": samples,
            }

        used = self._store.query(
            """
            SELECT model, op, browser_type, count(*) AS samples FROM operations
            WHERE at_s >= ? AND browser_type IS NOT NULL GROUP BY ALL
            ORDER BY ALL LIMIT ?
            """,
            [since, _TRENDS_MAX],
        )
        for group in used:
            model, op, browser = group["model"], group["op"], BrowserType(group["browser_type"])
            trend = self.analyze_performance_trends(model, browser, op, time_window_seconds)
            if trend["direction"] == "degrading":
                recommend(
                    f"degrading:{model}:{op}:{browser}",
                    trend["measured"],
                    f"{op} of {model} on {browser} gets slower: {trend['reason']}",
                    f"restart the {browser} browsers when they are idle, and see whether it helps",
                )
        for kind in ModelType:
            ranked = [row for row in self.recommend_browser(kind, since) if row["ranked"]]
            if len(ranked) < 2:
                continue
            most = max(ranked, key=lambda row: int(row["samples"]))
            best = ranked[0]
            if _better(best, most):
                recommend(
                    f"browser:{kind}",
                    best["samples"] + most["samples"],
                    f"most {kind} operations run on {most['browser_type']} (reliability "
                    f"{most['reliability']:.3f}, {_ms(most['median_ms'])}), but "
                    f"{best['browser_type']} does better ({best['reliability']:.3f}, "
                    f"{_ms(best['median_ms'])})",
                    f"prefer {best['browser_type']} for {kind} models",
                )
        for row in self.success_rates(("category", "rung"), since):
            if row["samples"] >= SAMPLES_MIN and not row["successes"]:
                rung = RecoveryLevel(row["rung"])
                recommend(
                    f"useless:{row['category']}:{rung.name.lower()}",
                    row["samples"],
                    f"{rung.name} failed all {row['samples']} times against {row['category']}",
                    "start at a higher rung for this failure",
                )
        return {"recommendations": found}


def _start(since: float | None) -> float:
    return -math.inf if since is None else since


def _ms(value: float | None) -> str:
    return "no undisturbed answer" if value is None else f"{value:.1f} ms"


def _wilson(successes: int, samples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate."""
    rate, z2 = successes / samples, _Z * _Z
    centre = rate + z2 / (2 * samples)
    reach = _Z * math.sqrt((rate * (1 - rate) + z2 / (4 * samples)) / samples)
    return (centre - reach) / (1 + z2 / samples), (centre + reach) / (1 + z2 / samples)


def _better(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a browser is better than another by more than noise: more reliable, or faster."""
    if one is other or one["score"] > other["reliability"]:
        return one is not other
    faster, slower = one["median_ms"], other["median_ms"]
    return faster is not None and slower is not None and faster < (1 - FASTER_MIN) * slower


def _direction(
    samples: int, mean: float | None, sxx: float | None, sxy: float | None, syy: float | None
) -> tuple[str, str]:
    """Whether the line through `samples` points goes up or down for certain, and why (not)."""
    if samples < TREND_SAMPLES_MIN or not mean or not sxx or sxy is None or syy is None:
        return "stable", f"{samples} durations, and {TREND_SAMPLES_MIN} are needed to tell"
    slope = sxy / sxx
    change = slope * (samples - 1)
    noise = math.sqrt(max(0.0, syy - slope * sxy) / (samples - 2) / sxx)
    t = abs(slope) / noise if noise else math.inf
    words = f"{change:+.1f} ms over {samples} operations of {mean:.1f} ms, t = {t:.1f}"
    if abs(change) < TREND_CHANGE_MIN * mean:
        return "stable", f"{words}: less than {TREND_CHANGE_MIN:.0%}"
    if t < TREND_T_MIN:
        return "stable", f"{words}: less than {TREND_T_MIN}, which noise explains"
    return ("degrading" if slope > 0 else "improving"), words
