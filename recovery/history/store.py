"""The store of the history: the one writer of its file, and the only module that uses DuckDB.

    history.duckdb, .wal            what `recovery.history.schema` describes
    history.duckdb.lock             held by the one process that writes
    history.duckdb-0001.damaged     a damaged file, set aside when opening

`HistoryStore` blocks and belongs to one thread; only `add` may be called from time-critical code,
since it never waits for the disk. DuckDB's errors are converted here. Answers and repairs don't
depend on what is stored, and this module must not interpret it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from recovery.errors import BadInput, IllegalTransition, SetupError
from recovery.history import damage, schema
from recovery.history.buffer import SampleBuffer
from recovery.history.config import HistoryConfig
from recovery.history.samples import Sample

_NOTES_MAX = 16
# Opening reads every row, of 200,000 at most; a file of somebody else may have rows without end.
_PREPARE_SECONDS = 60.0

# With the schema named, for a file may have functions of these names.
_TABLES = "SELECT table_name FROM system.main.duckdb_tables() WHERE NOT internal"
_MACROS = "SELECT function_name FROM system.main.duckdb_functions() WHERE NOT internal LIMIT 1"

# Errors caused by the query itself.
_QUERY_ERRORS = (
    duckdb.ProgrammingError,
    duckdb.DataError,
    duckdb.NotSupportedError,
    duckdb.PermissionException,
    duckdb.TransactionException,  # it would write
    duckdb.OutOfMemoryException,
    duckdb.InterruptException,
)


class HistoryUnavailable(SetupError):
    """The history can't be read or written at present. The message says what would help."""


class HistoryTooNew(HistoryUnavailable):
    """A newer version of tabpool, or of DuckDB, made the file."""


class HistoryStore:
    """The samples of one pool, or of several in turn; in memory only where `path` is None.

    Whatever may wait is serialised: a query delays the next flush by at most
    `query_seconds_max`. After an error the file is closed, and opened again by the next call.
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
        self.notes: tuple[str, ...] = ()  # remarks for readers of the figures
        self._noting = threading.Lock()  # guards `notes`
        self._buffer = SampleBuffer(self._config.buffer_max)
        self._using = threading.Lock()  # guards all below
        self._opened = False
        self._lock_fd: int | None = None
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._stored = dict.fromkeys(schema.COLUMNS, 0)
        self._last_seq = dict.fromkeys(schema.COLUMNS, 0)

    @property
    def pending(self) -> int:
        """Samples that wait to be written."""
        return len(self._buffer)

    @property
    def dropped(self) -> int:
        """Samples dropped for lack of room."""
        return self._buffer.dropped

    @property
    def refused(self) -> int:
        """Samples that no table can hold."""
        return self._buffer.refused

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
        if refused := self._buffer.add(samples):
            self._note(f"a sample can't be stored: {refused}")

    def flush(self) -> int:
        """Write waiting samples in one transaction; returns the number of rows.

        Raises `HistoryUnavailable`: then nothing was written, and all samples stay queued.
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
                self._close_or_roll_back()
                raise self._unavailable("read", error) from None

    def close(self) -> None:
        """Write waiting samples, and release the file's lock."""
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
        """Lock the file against other writers, in this process or another."""
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
                with _limited(connection, _PREPARE_SECONDS):
                    self._prepare(connection)
            except duckdb.InterruptException:
                _close(connection)
                raise HistoryUnavailable(
                    f"{self._name} took longer to open than {_PREPARE_SECONDS:g} s, so it is not "
                    "one that tabpool made: choose another file",
                    path=str(self._path),
                ) from None
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
        raise HistoryUnavailable(f"{self._name} is damaged when newly created: check its disk")

    def _settings(self) -> dict[str, str | bool | int | float | list[str]]:
        return {
            "threads": self._config.threads,
            "memory_limit": f"{self._config.memory_bytes_max}B",
            "checkpoint_threshold": f"{self._config.wal_bytes_max}B",
            "max_temp_directory_size": "0B",  # queries that don't fit in memory are refused
            # A query reads tables, not the caller's files, network or variables.
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
            "lock_configuration": True,
        }

    def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
        tables = {name for (name,) in connection.execute(_TABLES).fetchall()}
        # Tables, not views of those names, and no functions, which DuckDB takes for its own of the
        # same name: whatever reads them runs what the file's maker wrote.
        foreign = not tables >= {"meta", *schema.COLUMNS} or connection.execute(_MACROS).fetchall()
        if tables and foreign:
            raise HistoryUnavailable(
                f"{self._path} is a DuckDB file, but not a history: choose another name",
                path=str(self._path),
            )
        connection.begin()
        if not tables:
            _run(connection, schema.creation(self.wall()))
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        if not schema.is_readable(meta):
            found_schema = schema.schema_of(meta)
            raise HistoryTooNew(
                f"{self._name} has schema {found_schema}, and this version of tabpool knows "
                f"{schema.SCHEMA} at most: use the version that made it, or choose another file",
                path=str(self._path),
                schema=found_schema,
            )
        _run(connection, schema.migration(meta))
        connection.commit()
        for table in schema.COLUMNS:
            counted = connection.execute(
                f"SELECT count(*), coalesce(max(seq), 0), bit_xor(hash({table})) FROM {table}"
            ).fetchall()
            self._stored[table], self._last_seq[table], _ = counted[0]

    def _set_aside(self, error: duckdb.Error) -> bool:
        """Set damaged files aside; False if `error` is not one of damage."""
        if self._path is None:
            return False
        words = damage.cause(str(error), self._path)
        if not damage.is_damage(words):
            return False
        try:
            aside = damage.set_aside(self._path, words)
        except OSError as error:
            raise self._unavailable("set aside", error) from None
        if aside.moved:
            log_only = "the samples since its last checkpoint are"
            lost = log_only if aside.wal_only else "all samples are"
            self._note(
                f"{self._name} was damaged ({words.splitlines()[0]}); {lost} now in "
                f"{', '.join(path.name for path in aside.moved)}"
            )
        return bool(aside.moved)

    # -- writing ----------------------------------------------------------------------------------

    def _flush(self) -> int:
        connection = self._require_connection()
        batch = self._buffer.take()
        if not batch:
            return 0
        try:
            self._write(connection, batch)
        except BaseException as error:
            self._buffer.put_back(batch)
            self._close_or_roll_back()
            if isinstance(error, duckdb.Error):
                raise self._unavailable("written", error) from None
            raise
        return len(batch)

    def _write(self, connection: duckdb.DuckDBPyConnection, batch: Sequence[schema.Row]) -> None:
        stored, last_seq = dict(self._stored), dict(self._last_seq)
        connection.begin()
        for table in schema.COLUMNS:
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

    # -- reading ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(
        self, connection: duckdb.DuckDBPyConnection
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that can't write, and is interrupted when its time is over."""
        cursor = connection.cursor()
        try:
            with _limited(cursor, self._config.query_seconds_max):
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                yield cursor
        finally:
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
            raise BadInput(f"expected one SELECT statement, got: {kinds}", sql=sql)
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

    def _close_or_roll_back(self) -> None:
        """Reset the connection: after an error DuckDB may refuse further work."""
        if self._path is not None:
            _close(self._connection)
            self._connection = None
        elif self._connection is not None:  # in memory: there is no file to reopen
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
        with self._noting:
            self.notes = (*self.notes, text)[-_NOTES_MAX:]

    def _unavailable(self, what: str, error: Exception) -> HistoryUnavailable:
        words = str(error).removeprefix("IO Error: ")
        kind, remedy = HistoryUnavailable, ""
        if damage.is_locked(words):
            remedy = ". Close the program that has it open, or choose another file"
        elif damage.is_newer(words):
            kind = HistoryTooNew
            remedy = ". Update duckdb, or choose another file"
        return kind(f"{self._name} can't be {what}: {words}{remedy}", path=str(self._path))


def _run(connection: duckdb.DuckDBPyConnection, statements: Sequence[schema.Statement]) -> None:
    for statement in statements:
        connection.execute(statement.sql, statement.params)


def _close(connection: duckdb.DuckDBPyConnection | None) -> None:
    if connection is not None:
        with contextlib.suppress(duckdb.Error):
            connection.close()


@contextlib.contextmanager
def _limited(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt what a connection does when its time is over."""
    timer = threading.Timer(seconds, _interrupt, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _interrupt(cursor: duckdb.DuckDBPyConnection) -> None:
    with contextlib.suppress(duckdb.Error):  # it may just have been closed
        cursor.interrupt()
