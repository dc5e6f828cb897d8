import math
import pickle
import random
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.errors import BadInput, IllegalTransition, SetupError
from recovery.failures import Category, Scope, Severity
from recovery.history import tracker as history
from recovery.history.samples import OperationSample, RecoverySample
from recovery.history.tracker import (
    DAMAGED_MAX,
    HistoryConfig,
    HistoryStore,
    HistoryTooNew,
    HistoryUnavailable,
    PerformanceHistoryTracker,
    RungOutcome,
)
from recovery.kinds import Backend, BrowserType, Level, ModelType, RecoveryLevel, Strategy

ROOT = Path(__file__).parents[2]
NOW = 1_800_000_000.0
CHROME, FIREFOX, SAFARI = BrowserType.CHROME, BrowserType.FIREFOX, BrowserType.SAFARI
MINIMAL, MODERATE = RecoveryLevel.MINIMAL, RecoveryLevel.MODERATE
FALLBACK, SIMULATION = RecoveryLevel.FALLBACK, RecoveryLevel.SIMULATION

OPERATION = OperationSample(
    at=NOW - 10.123456789,
    pool="p",
    op_id="op-1",
    model="minilm",
    model_type=ModelType.TEXT,
    op="embed",
    browser_id="chrome-0",
    browser_type=CHROME,
    epoch=3,
    backend=Backend.WASM,
    level=Level.MEDIUM,
    strategy=Strategy.PROGRESSIVE,
    success=True,
    recovered=False,
    simulated=False,
    attempts=1,
    duration_ms=12.25,
    in_page_ms=9.5,
    queue_ms=0.125,
    bytes_in=2**40,
    bytes_out=1536,
)
FAILED = replace(OPERATION, success=False, category=Category.CRASH, fingerprint="f")
RECOVERED = replace(FAILED, success=True, recovered=True, attempts=2)
SIMULATED = replace(
    RECOVERED, simulated=True, recovered=False, browser_type=None, backend=Backend.NATIVE
)
STEP = RecoverySample(
    at=NOW - 10,
    pool="p",
    browser_id="chrome-0",
    browser_type=CHROME,
    epoch=3,
    model_type=ModelType.TEXT,
    strategy=Strategy.PROGRESSIVE,
    rung=MODERATE,
    category=Category.CRASH,
    severity=Severity.SEVERE,
    scope=Scope.BROWSER,
    fingerprint="f",
    duration_ms=1000.0,
    success=True,
    memory_bytes=5 * 10**9,
    note="n",
)


def opened(path=None, *samples, **config):
    store = HistoryStore(path, HistoryConfig(**config), wall=lambda: NOW)
    store.open()
    store.add(samples)
    store.flush()
    return store


@pytest.fixture(scope="module")
def only_store():
    with closing(opened()) as store:
        yield store


@pytest.fixture
def tracker(only_store):
    """Makes a tracker of the given samples alone. Opening takes longer than most tests."""
    return lambda *samples: PerformanceHistoryTracker(refilled(only_store, *samples))


def refilled(store, *samples):
    for table in store.stored:
        store._connection.execute(f"DELETE FROM {table}")
    store.add(samples)
    store.flush()
    return store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "corrupt.duckdb"  # no name may look like an error to it


def ids(store):
    return [row["op_id"] for row in store.query("SELECT op_id FROM operations ORDER BY seq")]


def op(number):
    return replace(OPERATION, op_id=str(number))


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


def test_views_of_an_older_version_are_replaced(path):
    opened(path, STEP).close()
    with duckdb.connect(path) as connection:
        connection.execute("DROP VIEW recovery_performance")
        connection.execute("CREATE OR REPLACE VIEW strategy_scores AS SELECT 1 AS old")
        connection.execute("UPDATE meta SET value = 'old' WHERE key = 'views'")
    with closing(opened(path)) as store:
        assert store.query("SELECT samples FROM strategy_scores") == [{"samples": 1}]


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


def damaged(path):
    return sorted(found.name for found in path.parent.glob("*.damaged"))


def test_garbage_is_set_aside_and_at_most_four_are_kept(path):
    for number in range(1, 6):
        path.write_bytes(b"garbage %d" % number * 1000)
        with closing(opened(path, OPERATION)) as store:
            assert ids(store) == ["op-1"]
            (note,) = store.notes
            assert "not a valid DuckDB database file" in note
            assert f"corrupt.duckdb-{number:04d}.damaged" in note
            assert PerformanceHistoryTracker(store).statistics()["notes"] == [note]
        path.unlink()
    assert damaged(path) == [f"corrupt.duckdb-{number:04d}.damaged" for number in range(2, 6)]
    assert len(damaged(path)) == DAMAGED_MAX
    assert (path.parent / "corrupt.duckdb-0005.damaged").read_bytes().startswith(b"garbage 5")


def copy_in_use(path, tmp_path):
    """A history as a killed process leaves it: 100 rows in the file, 10 more in its WAL."""
    source = tmp_path / "source.duckdb"
    opened(source, *map(op, range(100))).close()
    with closing(opened(source, *map(op, range(100, 110)))):
        # Of names that DuckDB has open only copies are read: closing one would drop its lock.
        subprocess.run(["cp", source, path], check=True)
        subprocess.run(["cp", f"{source}.wal", f"{path}.wal"], check=True)


def test_what_a_killed_process_left_is_read(path, tmp_path):
    copy_in_use(path, tmp_path)
    with closing(opened(path)) as store:
        assert ids(store) == [str(number) for number in range(110)]
        assert store.notes == ()


def test_a_damaged_wal_costs_only_what_is_in_it(path, tmp_path):
    copy_in_use(path, tmp_path)
    wal = path.with_name("corrupt.duckdb.wal")
    data = bytearray(wal.read_bytes())
    data[len(data) // 2] ^= 1
    wal.write_bytes(data)
    with closing(opened(path, op("new"))) as store:
        assert ids(store) == [*map(str, range(100)), "new"]
        (note,) = store.notes
        assert "since its last checkpoint" in note
    assert damaged(path) == ["corrupt.duckdb-0001.wal.damaged"]


def test_any_flipped_bit_and_any_cut_is_found_at_opening(path, tmp_path):
    copy_in_use(path, tmp_path)
    wal = path.with_name("corrupt.duckdb.wal")
    whole, log = path.read_bytes(), wal.read_bytes()
    rng = random.Random(0)
    for turn in range(8):
        data, tail = bytearray(whole), bytearray(log)
        hit = tail if turn % 3 == 0 else data
        place = rng.randrange(len(hit) if turn % 2 else 3 * 4096) % len(hit)
        if turn % 4 == 3 and hit is data:
            del data[place:]
        else:
            hit[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        wal.write_bytes(tail)
        with closing(opened(path)) as store:
            rows = len(ids(store))
            store.query("SELECT * FROM strategy_scores")
            assert rows == 110 if not store.notes else rows in (0, 100)
    assert len(damaged(path)) == DAMAGED_MAX


@pytest.mark.parametrize("schema", ["2", "next", None])
def test_another_schema_is_refused_and_left_alone(path, schema):
    opened(path, OPERATION).close()
    with duckdb.connect(path) as connection:
        if schema is None:
            connection.execute("DELETE FROM meta")
        else:
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", [schema])
    before = path.read_bytes()
    store = HistoryStore(path)
    for _ in range(2):  # nothing stays locked
        with pytest.raises(HistoryTooNew, match="knows 1 at most") as caught:
            store.open()
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), SetupError)
    assert path.read_bytes() == before
    assert damaged(path) == []


def test_someone_elses_database_is_refused_and_left_alone(path):
    with duckdb.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (a INT)")
    before = path.read_bytes()
    with pytest.raises(HistoryUnavailable, match="not a history"):
        HistoryStore(path).open()
    assert path.read_bytes() == before


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
from recovery.history.tracker import HistoryStore
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
from recovery.history.tracker import HistoryStore, HistoryUnavailable
from tests.unit.test_history import ids, op

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


# -- views, against the same in Python ------------------------------------------------------------

# A grid, so that no end is nearer to a beginning than rounding.
grid = st.integers(0, 400).map(lambda quarters: NOW + quarters / 4)
short = st.integers(1, 12).map(lambda quarters: quarters * 250.0)
pools = st.sampled_from(["p", "q"])
categories = st.sampled_from([Category.CRASH, Category.TIMEOUT])
operations = st.builds(
    replace,
    st.sampled_from([OPERATION, FAILED, RECOVERED, SIMULATED]),
    at=grid,
    pool=pools,
    duration_ms=short,
    strategy=st.sampled_from(["progressive", "restart"]),
).flatmap(
    lambda sample: (
        categories.map(lambda category: replace(sample, category=category))
        if sample.category
        else st.just(sample)
    )
)
steps = st.builds(
    replace,
    st.just(STEP),
    at=grid,
    pool=pools,
    browser_id=st.sampled_from(["a", "b"]),
    strategy=st.sampled_from(["progressive", "restart"]),
    rung=st.sampled_from(RecoveryLevel),
    category=categories,
    fingerprint=st.sampled_from(["f", "g"]),
    duration_ms=short,
    success=st.booleans(),
    memory_bytes=st.sampled_from([0, 10, 20, 50]),
)


def began(sample):
    return sample.at - sample.duration_ms / 1000


def middle(values):
    return statistics.median(values) if values else None


def rate(part, whole):
    return part / whole if whole else None


def wilson_low(successes, samples):
    if not samples:
        return None
    rate, z = successes / samples, 1.96
    root = math.sqrt(rate * (1 - rate) / samples + (z / 2 / samples) ** 2)
    return (rate + z * z / 2 / samples - z * root) / (1 + z * z / samples)


def impact(step, samples):
    return sum(
        bool(one.category) and one.pool == step.pool and began(one) <= step.at
        and one.at >= began(step)
        for one in samples
    )  # fmt: skip


def stability(step, samples):
    later = [
        began(one)
        for one in samples
        if (one.pool, one.browser_id) == (step.pool, step.browser_id) and began(one) > step.at
    ]
    return min(later) - step.at if step.success and later else None


def expected_scores(ops, recoveries):
    expected = {}
    groups = {(one.category, one.strategy) for one in [*ops, *recoveries] if one.category}
    for category, strategy in groups:
        mine = [s for s in recoveries if (s.category, s.strategy) == (category, strategy)]
        real = [s for s in mine if s.rung < 5]
        good = [s for s in real if s.success]
        tasks = [o for o in ops if (o.category, o.strategy) == (category, strategy)]
        done = [o for o in tasks if o.success and not o.simulated]
        impacts = [impact(s, ops) for s in real]
        stable = [value for s in real if (value := stability(s, recoveries)) is not None]
        expected[category, strategy] = {
            "samples": len(real),
            "successes": len(good),
            "simulated": len(mine) - len(real),
            "success_rate": rate(len(good), len(real)),
            "score": pytest.approx(wilson_low(len(good), len(real))),
            "recovery_time_ms": middle([s.duration_ms for s in good]),
            "resource_usage_bytes": middle([s.memory_bytes for s in real if s.memory_bytes]),
            "stability_s": middle(stable),
            "impact_score": pytest.approx(rate(sum(impacts), len(impacts))),
            "tasks": len(tasks),
            "tasks_recovered": len(done),
            "task_recovery": rate(len(done), len(tasks)),
        }
    return expected


def expected_incidents(recoveries):
    incidents = []
    browsers = defaultdict(list)
    for step in recoveries:
        browsers[step.pool, step.browser_id].append(step)
    for mine in browsers.values():
        before = None
        for step in sorted(mine, key=lambda one: one.at):  # stable: equal ones as they were stored
            if (
                before is None
                or (step.category, step.fingerprint) != (before.category, before.fingerprint)
                or (before.success and began(step) >= before.at)
                or (step.rung < before.rung and began(step) >= before.at)
                or began(step) > before.at + 60
            ):
                incidents.append([])
            incidents[-1].append(step)
            before = step
    return incidents


@settings(max_examples=20, deadline=None)
@given(ops=st.lists(operations, max_size=25), recoveries=st.lists(steps, max_size=25))
def test_views_agree_with_python(only_store, ops, recoveries):
    store = refilled(only_store, *ops, *recoveries)

    rows = store.query("SELECT * FROM recovery_performance ORDER BY seq")
    for row, step in zip(rows, recoveries, strict=True):
        assert row["impact_operations"] == impact(step, ops)
        assert row["stability_s"] == stability(step, recoveries)
        assert row["resource_usage_bytes"] == (step.memory_bytes or None)
        assert row["simulated"] == (step.rung == 5)
        same = ("at_s", "error_type", "recovery_level", "recovery_time_ms", "strategy", "success")
        assert [row[name] for name in same] == [
            step.at, step.category, step.rung, step.duration_ms, step.strategy, step.success
        ]  # fmt: skip

    rows = store.query("SELECT * FROM strategy_scores")
    assert {(row.pop("error_type"), row.pop("strategy")): row for row in rows} == expected_scores(
        ops, recoveries
    )

    groups = defaultdict(list)
    for step in recoveries:
        if step.success and step.rung < 5:
            groups[step.category, step.strategy, step.rung, step.browser_type].append(step)
    rows = store.query("SELECT * FROM adaptive_timeouts")
    keys = ("error_type", "strategy", "recovery_level", "browser_type")
    assert {tuple(row[key] for key in keys) for row in rows} == {*groups}
    for row in rows:
        times = sorted(s.duration_ms for s in groups[tuple(row[key] for key in keys)])
        at = 0.95 * (len(times) - 1)
        low, high = times[math.floor(at)], times[math.ceil(at)]
        p95 = low + (high - low) * (at - math.floor(at))
        assert [row["samples"], row["median_ms"], row["max_ms"]] == [
            len(times), middle(times), max(times)
        ]  # fmt: skip
        assert row["p95_ms"] == pytest.approx(p95)
        assert row["timeout_ms"] == (pytest.approx(2 * p95) if len(times) >= 5 else None)

    rows = store.query("SELECT * FROM progressive_recovery ORDER BY began_s, ended_s")

    def told(row):
        return sorted((name, str(value)) for name, value in row.items() if name != "incident")

    assert sorted(map(told, rows)) == sorted(
        told(
            {
                "pool": chain[0].pool,
                "browser_id": chain[0].browser_id,
                "browser_type": "chrome",
                "model_type": "text",
                "error_type": chain[0].category,
                "fingerprint": chain[0].fingerprint,
                "strategy": chain[0].strategy,
                "began_s": min(map(began, chain)),
                "ended_s": max(step.at for step in chain),
                "first_level": int(chain[0].rung),
                "recovery_level": int(max(step.rung for step in chain)),
                "attempts": len(chain),
                "escalations": len({step.rung for step in chain}) - 1,
                "success": (real := any(s.success and s.rung < 5 for s in chain)),
                "simulated": not real and any(s.success and s.rung == 5 for s in chain),
                "recovery_time_ms": (max(s.at for s in chain) - min(map(began, chain))) * 1000,
            }
        )
        for chain in expected_incidents(recoveries)
    )


def test_an_incident_climbs_until_a_step_succeeds(only_store):
    def at(second, rung, success=False, **changes):
        return replace(STEP, at=NOW + second, rung=rung, success=success, **changes)

    store = refilled(
        only_store,
        at(1, MINIMAL),
        at(2, MODERATE),
        at(3, FALLBACK, success=True),
        at(20, MINIMAL),  # after a success
        at(21, MODERATE),
        at(22, MINIMAL),  # starts again below
        at(23, SIMULATION, success=True),
        at(31, MODERATE, success=True, browser_id="raced", duration_ms=1000),
        at(32, FALLBACK, browser_id="raced", duration_ms=2000),  # lost the race
        at(40, MODERATE, browser_id="stuck"),
        at(140, MODERATE, browser_id="stuck"),  # long after
    )
    rows = store.query("SELECT * FROM progressive_recovery ORDER BY ended_s")
    told = ("first_level", "recovery_level", "attempts", "success", "simulated")
    assert [tuple(row[name] for name in told) for row in rows] == [
        (1, 4, 3, True, False),
        (1, 2, 2, False, False),
        (1, 5, 2, False, True),
        (2, 4, 2, True, False),
        (2, 2, 1, False, False),
        (2, 2, 1, False, False),
    ]


# -- the tracker ----------------------------------------------------------------------------------


def many(count, sample, **changes):
    return [replace(sample, **changes)] * count


def test_success_rates_are_of_real_steps(tracker):
    asked = tracker(
        *many(3, STEP),
        *many(1, STEP, success=False),
        *many(2, STEP, rung=MINIMAL, success=False, at=NOW - 100),
        *many(5, STEP, rung=SIMULATION),
        *many(1, STEP, rung=MINIMAL, strategy="mine", category=Category.TIMEOUT, duration_ms=50),
    )
    assert asked.success_rates(("rung",)) == [
        {"rung": 2, "samples": 4, "successes": 3, "success_rate": 0.75, "median_ms": 1000.0,
         "simulated": 0},
        {"rung": 1, "samples": 3, "successes": 1, "success_rate": pytest.approx(1 / 3),
         "median_ms": 50.0, "simulated": 0},
        {"rung": 5, "samples": 0, "successes": 0, "success_rate": None, "median_ms": None,
         "simulated": 5},
    ]  # fmt: skip
    total = {"samples": 5, "successes": 4, "success_rate": 0.8, "median_ms": 1000.0}
    assert asked.success_rates((), since=NOW - 50) == [total | {"simulated": 5}]
    rows = asked.success_rates(("strategy", "category", "browser_type", "model_type"))
    assert [tuple(row.values())[:6] for row in rows] == [
        ("progressive", "crash", "chrome", "text", 6, 3),
        ("mine", "timeout", "chrome", "text", 1, 1),
    ]
    with pytest.raises(BadInput, match="not by note"):
        asked.success_rates(("note",))


def test_rung_outcomes_are_what_history_says_works_here(tracker):
    asked = tracker(
        *many(2, STEP, rung=MINIMAL, success=False),
        *many(1, STEP, duration_ms=100),
        *many(1, STEP, duration_ms=300),
        *many(1, STEP, duration_ms=9000, success=False),
        *many(1, STEP, rung=SIMULATION),
        *many(1, STEP, fingerprint="g", browser_type=FIREFOX),
        *many(1, STEP, fingerprint="g", category=Category.TIMEOUT, at=NOW - 1000),
    )
    assert asked.rung_outcomes("f") == {
        MINIMAL: RungOutcome(0, 2, None),
        MODERATE: RungOutcome(2, 3, 200.0),
    }
    assert asked.rung_outcomes(
        category=Category.CRASH, browser_type=FIREFOX, model_type=ModelType.TEXT
    ) == {MODERATE: (1, 1, 1000.0)}
    assert asked.rung_outcomes(category=Category.CRASH)[MODERATE].attempts == 4
    assert asked.rung_outcomes("g", since=NOW - 500) == {MODERATE: (1, 1, 1000.0)}
    assert asked.rung_outcomes("never seen") == {}


def timed(durations, **changes):
    return [
        replace(OPERATION, at=NOW - len(durations) + i, duration_ms=ms, **changes)
        for i, ms in enumerate(durations)
    ]


def test_a_trend_by_hand(tracker):
    trend = tracker(
        *timed([10, 12, 11, 14, 13, 15, 17, 16, 18, 19]),
        *many(1, FAILED, duration_ms=30_000),
        *many(1, RECOVERED, duration_ms=5_000),
        *many(1, SIMULATED, duration_ms=1),
        *many(1, OPERATION, duration_ms=10**6, at=NOW - 4000),
        *many(1, OPERATION, model="other"),
    ).analyze_performance_trends("minilm", CHROME)
    # Sum of (i - 4.5)(y - 14.5) is 79.5; of (i - 4.5)^2 it is 82.5.
    assert trend["slope_ms_per_operation"] == pytest.approx(79.5 / 82.5)
    assert (trend["samples"], trend["measured"], trend["recovered"]) == (12, 10, 1)
    assert trend["success_rate"] == 11 / 12  # the simulated one ran in no chrome
    assert (trend["min_duration_ms"], trend["median_duration_ms"]) == (10, 14.5)
    assert (trend["avg_duration_ms"], trend["max_duration_ms"]) == (14.5, 19)
    assert trend["direction"] == "degrading"
    assert trend["avg_recent_duration_ms"] is None


def test_trends_tell_noise_from_change(tracker):
    rng = random.Random(1)

    def direction(durations):
        return tracker(*timed(durations)).analyze_performance_trends()["direction"]

    noise = [rng.gauss(20, 4) for _ in range(100)]
    assert direction(noise) == "stable"
    assert direction([ms + 0.1 * i for i, ms in enumerate(noise)]) == "degrading"
    assert direction([ms - 0.1 * i for i, ms in enumerate(noise)]) == "improving"
    assert direction([20 + 0.001 * i for i in range(100)]) == "stable"  # certain, but small
    assert direction([1, 100, *[5] * 7]) == "stable"
    assert direction([10 * i + 1 for i in range(9)]) == "stable"  # too few
    assert direction([10 * i + 1 for i in range(10)]) == "degrading"  # without any noise
    assert direction([7] * 30) == "stable"


def test_noise_is_seldom_called_a_trend():
    rng = random.Random(2)
    called = [
        tuple_[0]
        for _ in range(2000)
        if (tuple_ := history._direction(*_sums([rng.gauss(20, 10) for _ in range(10)])))[0]
        != "stable"
    ]
    assert len(called) < 0.02 * 2000


def _sums(ys):
    n, mean, centre = len(ys), statistics.fmean(ys), (len(ys) + 1) / 2
    sxx = sum((i - centre) ** 2 for i in range(1, n + 1))
    sxy = sum((i - centre) * (y - mean) for i, y in enumerate(ys, 1))
    return n, mean, sxx, sxy, sum((y - mean) ** 2 for y in ys)


def test_a_trend_of_nothing_claims_nothing(tracker):
    trend = tracker().analyze_performance_trends()
    assert (trend["samples"], trend["success_rate"], trend["direction"]) == (0, None, "stable")
    assert trend["slope_ms_per_operation"] is None
    assert "10 are needed" in trend["reason"]
    trend = tracker(*timed(range(1, 21))).analyze_performance_trends(op="embed")
    assert (trend["avg_oldest_duration_ms"], trend["avg_recent_duration_ms"]) == (5.5, 15.5)


def test_browsers_are_recommended_by_reliability_then_speed(tracker):
    asked = tracker(
        *many(60, OPERATION, duration_ms=20),
        *many(1, FAILED),
        *many(50, OPERATION, browser_type=FIREFOX, duration_ms=10),
        *many(20, OPERATION, browser_type=SAFARI, duration_ms=1),
        *many(4, OPERATION, browser_type=BrowserType.EDGE, duration_ms=0.5),
        *many(9, OPERATION, model_type=ModelType.AUDIO),
        *many(9, SIMULATED),
        # Safari is fast, but it had to be repaired thirty times.
        *(
            replace(STEP, browser_type=SAFARI, browser_id=f"safari-{number}")
            for number in range(30)
        ),
    )
    rows = asked.recommend_browser(ModelType.TEXT)
    told = ("browser_type", "samples", "successes", "incidents", "median_ms", "ranked")
    assert [tuple(row[name] for name in told) for row in rows] == [
        ("firefox", 50, 50, 0, 10.0, True),
        ("chrome", 61, 60, 0, 20.0, True),
        ("safari", 20, 20, 30, 1.0, True),
        ("edge", 4, 4, 0, 0.5, False),
    ]
    assert [row["reliability"] for row in rows] == [1, 60 / 61, 0.4, 1]
    assert rows[1]["score"] == pytest.approx(wilson_low(60, 61))
    assert [row["success_rate"] for row in rows] == [1, 60 / 61, 1, 1]
    assert [row["samples"] for row in asked.recommend_browser(ModelType.AUDIO)] == [9]
    assert asked.recommend_browser(ModelType.VISION) == []
    assert asked.recommend_browser(ModelType.TEXT, since=NOW) == []


def test_failure_patterns_count_operations_and_incidents(tracker):
    asked = tracker(
        OPERATION,
        *many(2, RECOVERED, at=NOW - 30),
        FAILED,
        SIMULATED,
        replace(STEP, success=False),
        replace(STEP, rung=FALLBACK, at=NOW - 9),  # the same incident
        replace(STEP, browser_id="firefox-0", browser_type=FIREFOX, success=False),
        replace(FAILED, fingerprint="g", category=Category.TIMEOUT, model_type=ModelType.AUDIO),
    )
    assert asked.failure_patterns() == [
        {
            "fingerprint": "f",
            "category": "crash",
            "operations": 4,
            "operations_recovered": 2,
            "incidents": 2,
            "incidents_recovered": 1,
            "browser_types": ["chrome", "firefox"],
            "model_types": ["text"],
            "first_at_s": NOW - 30,
            "last_at_s": NOW - 9,
        },
        {
            "fingerprint": "g",
            "category": "timeout",
            "operations": 1,
            "operations_recovered": 0,
            "incidents": 0,
            "incidents_recovered": 0,
            "browser_types": [],
            "model_types": ["audio"],
            "first_at_s": OPERATION.at,
            "last_at_s": OPERATION.at,
        },
    ]
    assert len(asked.failure_patterns(limit=1)) == 1


def test_statistics_count_simulation_apart(tracker):
    asked = tracker(
        *many(3, OPERATION),
        RECOVERED,
        FAILED,
        *many(2, SIMULATED),
        *many(2, STEP, success=False, rung=MINIMAL),
        replace(STEP, at=NOW - 8),
        replace(STEP, at=NOW - 5, rung=SIMULATION, browser_id="b", browser_type=FIREFOX),
    )
    found = asked.statistics()
    row = {"samples": 3, "successes": 1, "success_rate": pytest.approx(1 / 3)}
    row |= {"median_ms": 1000.0, "simulated": 0}
    nothing = {"samples": 0, "successes": 0, "success_rate": None, "median_ms": None}
    assert found == {
        "recovery_attempts": 3,
        "recovery_successes": 1,
        "recovery_failures": 2,
        "recovery_simulated": 1,
        "success_rate": pytest.approx(1 / 3),
        "median_recovery_ms": 1000.0,
        "incidents": {"samples": 2, "successes": 1, "simulated": 1, "median_ms": 3000.0},
        "operations": {
            "samples": 7,
            "successes": 4,
            "failures": 1,
            "simulated": 2,
            "recovered": 1,
            "success_rate": 4 / 7,
        },
        "by_strategy": {"progressive": row | {"simulated": 1}},
        "by_rung": {
            1: nothing | {"samples": 2, "success_rate": 0, "simulated": 0},
            2: {
                "samples": 1,
                "successes": 1,
                "success_rate": 1,
                "median_ms": 1000.0,
                "simulated": 0,
            },
            5: nothing | {"simulated": 1},
        },
        "by_category": {"crash": row | {"simulated": 1}},
        "by_browser": {"chrome": row, "firefox": nothing | {"simulated": 1}},
        "samples_dropped": 0,
        "notes": [],
    }
    later = asked.statistics(since=NOW)
    assert (later["recovery_attempts"], later["success_rate"]) == (0, None)
    assert later["operations"]["samples"] == 0


def test_recommendations_come_from_rows(tracker):
    assert tracker().get_performance_recommendations() == {"recommendations": {}}
    asked = tracker()
    asked.record(
        *timed([10 + i for i in range(30)]),
        *timed([5] * 20, browser_type=FIREFOX),
        *many(6, STEP, rung=MINIMAL, success=False),
        *many(6, STEP),
    )
    asked._store.flush()
    found = asked.get_performance_recommendations()["recommendations"]
    assert {key: advice["samples"] for key, advice in found.items()} == {
        "degrading:minilm:embed:chrome": 30,
        "browser:text": 50,
        "useless:crash:minimal": 6,
    }
    assert "prefer firefox" in found["browser:text"]["recommendation"]
    assert "all 6 times" in found["useless:crash:minimal"]["description"]


def test_a_browser_that_is_better_by_noise_only_is_not_recommended(tracker):
    asked = tracker(
        *timed([10.0] * 40),
        *timed([9.9] * 20, browser_type=FIREFOX),
    )
    assert asked.recommend_browser(ModelType.TEXT)[0]["browser_type"] == "firefox"
    assert asked.get_performance_recommendations() == {"recommendations": {}}
