import math
import pickle
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import pytest

from recovery.errors import BadInput, IllegalTransition
from recovery.failures import Category
from recovery.history.config import HistoryConfig
from recovery.history.samples import OperationSample, RecoverySample
from recovery.history.store import HistoryStore, HistoryUnavailable
from recovery.history.tracker import PerformanceHistoryTracker
from recovery.kinds import Level
from tests.histories import (
    CHROME,
    FAILED,
    OPERATION,
    RECOVERED,
    SIMULATED,
    SIMULATION,
    STEP,
    damaged,
    ids,
    op,
    opened,
    refilled,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def only_store():
    with closing(opened()) as store:
        yield store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "corrupt.duckdb"  # no name may look like an error to it


# -- storing --------------------------------------------------------------------------------------


def test_every_field_comes_back_as_it_was(path):
    samples = [
        OPERATION,
        replace(RECOVERED, strategy="my own", op_id="ä\u2028\0'\"", at=0.1 + 0.2),
        replace(SIMULATED, level=Level.CRITICAL, duration_ms=5e-324, bytes_in=2**63 - 1),
        STEP,
        replace(STEP, rung=SIMULATION, success=False, memory_bytes=0, note=""),
    ]
    opened(path, *samples).close()
    with closing(opened(path)) as store:
        found = [
            (kind, row)
            for kind, table in ((OperationSample, "operations"), (RecoverySample, "recoveries"))
            for row in store.query(f"SELECT * FROM {table} ORDER BY seq")
        ]
    assert [row.pop("seq") for _, row in found] == [1, 2, 3, 1, 2]
    for (kind, row), sample in zip(found, samples, strict=True):
        row["at"] = row.pop("at_s")
        assert {*row} == {field.name for field in fields(sample)}
        assert kind(**row) == sample
        assert pickle.loads(pickle.dumps(sample)) == sample


def test_samples_are_added_before_during_and_after(path):
    store = HistoryStore(path)
    assert not path.parent.joinpath("corrupt.duckdb").exists()
    store.add([op(1)])
    with pytest.raises(HistoryUnavailable, match="not open"):
        store.flush()
    with pytest.raises(HistoryUnavailable, match="not open"):
        store.query("SELECT 1")
    store.open()
    with pytest.raises(IllegalTransition, match="opened before"):
        store.open()
    assert store.flush() == 1
    assert store.flush() == 0
    store.add([op(2), STEP])
    assert (store.pending, store.stored) == (2, {"operations": 1, "recoveries": 0})
    store.close()  # writes what waits
    store.close()
    store.add([op(3)])
    store.open()
    assert (store.flush(), store.dropped, store.refused, store.notes) == (1, 0, 0, ())
    assert ids(store) == ["1", "2", "3"]
    assert store.stored == {"operations": 3, "recoveries": 1}
    store.close()


def test_the_buffer_is_bounded_and_drops_the_oldest():
    store = HistoryStore(None, HistoryConfig(buffer_max=3))
    store.add([op(1), op(2)])
    store.add([op(3), op(4), op(5)])
    assert (store.pending, store.dropped) == (3, 2)
    store.open()
    store.flush()
    assert ids(store) == ["3", "4", "5"]
    assert PerformanceHistoryTracker(store).statistics()["samples_dropped"] == 2


def test_samples_that_no_table_can_hold_are_refused_alone():
    store = opened()
    store.add(
        [
            op(1),
            replace(OPERATION, duration_ms=math.nan),
            replace(OPERATION, at=math.inf),
            replace(OPERATION, bytes_in=2**63),
            replace(OPERATION, attempts=None),
            replace(OPERATION, op_id="\ud800" + 5000 * "x"),  # is made to fit
        ]
    )
    assert (store.flush(), store.refused) == (2, 4)
    assert len(store.notes) == 1
    assert ids(store) == ["1", "?" + 1999 * "x"]


def test_the_oldest_rows_are_deleted(path):
    store = opened(path, rows_max=100)
    for start in range(0, 430, 43):
        store.add([op(number) for number in range(start, start + 43)])
        store.add([STEP])
        store.flush()
        (count,) = store.query("SELECT count(*) AS n, max(seq) AS last FROM operations")
        assert count["n"] == store.stored["operations"] <= 110
        assert count["last"] == start + 43
    assert ids(store)[-100:] == [str(number) for number in range(330, 430)]
    assert store.stored["recoveries"] == 10
    store.add([op(number) for number in range(500)])  # more than there may ever be
    store.flush()
    assert ids(store) == [str(number) for number in range(400, 500)]
    store.close()
    with closing(opened(path, op(500), rows_max=100)) as store:  # goes on counting
        assert store.query("SELECT max(seq) AS last, count(*) AS n FROM operations") == [
            {"last": 430 + 500 + 1, "n": 101}
        ]


def test_adding_while_flushing_loses_nothing(path):
    store = opened(path)

    def add(start):
        for number in range(start, start + 500, 5):
            store.add([op(number + k) for k in range(5)])

    threads = [threading.Thread(target=add, args=[start]) for start in (0, 500, 1000)]
    for thread in threads:
        thread.start()
    written = 0
    while any(thread.is_alive() for thread in threads):
        written += store.flush()
        assert store.query("SELECT count(*) AS n FROM operations") == [{"n": written}]
    written += store.flush()
    assert written == 1500
    assert sorted(map(int, ids(store))) == list(range(1500))
    store.close()


# -- files that can't be used ---------------------------------------------------------------------


def test_a_path_that_can_be_no_file_is_refused(tmp_path):
    with pytest.raises(HistoryUnavailable, match="directory"):
        HistoryStore(tmp_path).open()
    (tmp_path / "file").touch()
    with pytest.raises(HistoryUnavailable, match="file"):
        HistoryStore(tmp_path / "file" / "h.duckdb").open()
    with closing(opened(tmp_path / "made" / "on the way" / "h.duckdb", OPERATION)) as store:
        assert ids(store) == ["op-1"]


HOLDER = """
import sys, pathlib, duckdb
from recovery.history.store import HistoryStore
store = HistoryStore(pathlib.Path(sys.argv[1]))
store.open()
print("held by the store", flush=True)
sys.stdin.readline()
store.close()
connection = duckdb.connect(sys.argv[1])
print("held by DuckDB", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_is_locked_out(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as holder:
        assert holder.stdout.readline() == "held by the store\n"
        store = HistoryStore(path)
        with pytest.raises(HistoryUnavailable, match=f"process {holder.pid}: close what is open"):
            store.open()
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "held by DuckDB\n"
        with pytest.raises(HistoryUnavailable, match=f"{holder.pid}.*Close the program"):
            store.open()
        holder.communicate("\n")
    assert damaged(path) == []
    store.open()
    with pytest.raises(HistoryUnavailable, match="in use by process"):
        HistoryStore(path).open()  # nor is there a second one in this process
    store.close()


FULL_DISK = """
import pathlib, resource, sys
from recovery.history.store import HistoryStore, HistoryUnavailable
from tests.histories import ids, op

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

store = HistoryStore(pathlib.Path(sys.argv[1]))
store.open()
limit(60_000)
written = 0
for turn in range(4):
    store.add([op(number) for number in range(turn * 100, turn * 100 + 100)])
    try:
        written += store.flush()
    except HistoryUnavailable as error:
        print(error)
        assert len(ids(store)) == written  # it still answers
assert written < 400 and store.pending == 400 - written, written
limit(resource.RLIM_INFINITY)
written += store.flush()
assert ids(store) == [str(number) for number in range(400)], written
store.close()
"""


def test_a_full_disk_loses_nothing_that_still_fits_in_the_buffer(path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "can't be written: " in done.stdout
    assert "File too large" in done.stdout


# -- asking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO meta VALUES ('a', 'b')",
        "WITH a AS (SELECT 1) INSERT INTO meta SELECT 'a', 'b' FROM a",
        "DELETE FROM operations",
        "UPDATE meta SET value = '2'",
        "DROP VIEW strategy_scores",
        "CREATE TABLE a (b INT)",
        "SELECT 1; DROP TABLE operations",
        "SELECT 1; SELECT 2",
        "COPY operations TO 'stolen.csv'",
        "ATTACH 'other.duckdb'",
        "SET threads = 8",
        "PRAGMA database_list",
        "EXPLAIN ANALYZE DELETE FROM operations",
        "BEGIN",
        "",
        "-- nothing",
        "SELEC 1",
        "SELECT nothing FROM nowhere",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM local_variable",
        "SELECT ?",
        "SELECT 1 AS a, 2 AS a",
        "SELECT 'x'::INTEGER",
    ],
)
def test_only_a_select_is_answered(sql, only_store):
    local_variable = [1]  # which DuckDB would find
    store = refilled(only_store, OPERATION)
    with pytest.raises(BadInput):
        store.query(sql)
    assert ids(store) == ["op-1"]
    assert local_variable == [1]


def test_a_query_takes_parameters_and_gives_plain_rows(only_store):
    store = refilled(only_store, OPERATION, FAILED)
    assert store.query("SELECT ? AS a, ?::VARCHAR AS b", [1, CHROME]) == [{"a": 1, "b": "chrome"}]
    asked = "FROM operations SELECT success WHERE category = $c"
    assert store.query(asked, {"c": Category.CRASH}) == [{"success": False}]
    with pytest.raises(BadInput):
        store.query("SELECT 1 AS a", [object()])


def test_long_answers_and_long_work_are_refused():
    store = opened(None, answer_rows_max=3, query_seconds_max=0.2)
    assert len(store.query("FROM range(3)")) == 3
    with pytest.raises(BadInput, match="more than 3 rows"):
        store.query("FROM range(4)")
    with pytest.raises(BadInput, match=r"ended after 0\.2 s"):
        store.query("SELECT count(*) AS n FROM range(10000000) a, range(1000000) b")
    assert store.query("SELECT 1 AS a") == [{"a": 1}]
    store = opened(None, memory_bytes_max=16 * 2**20)
    with pytest.raises(BadInput, match="Out of Memory"):
        store.query("SELECT list(range) AS n FROM range(10000000)")
    assert store.query("SELECT 1 AS a") == [{"a": 1}]
