import math
import pickle
import statistics
from collections import defaultdict
from contextlib import closing
from dataclasses import replace

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.errors import SetupError
from recovery.failures import Category
from recovery.history import schema
from recovery.history.store import HistoryStore, HistoryTooNew, HistoryUnavailable
from recovery.kinds import RecoveryLevel
from tests.histories import (
    FAILED,
    FALLBACK,
    MINIMAL,
    MODERATE,
    NOW,
    OPERATION,
    RECOVERED,
    SIMULATED,
    SIMULATION,
    STEP,
    damaged,
    opened,
    refilled,
    wilson_low,
)


@pytest.fixture(scope="module")
def only_store():
    with closing(opened()) as store:
        yield store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "corrupt.duckdb"  # no name may look like an error to it


# -- migrations -----------------------------------------------------------------------------------


def test_views_of_an_older_version_are_replaced(path):
    opened(path, STEP).close()
    with duckdb.connect(path) as connection:
        connection.execute("DROP VIEW recovery_performance")
        connection.execute("CREATE OR REPLACE VIEW strategy_scores AS SELECT 1 AS old")
        connection.execute("UPDATE meta SET value = 'old' WHERE key = 'views'")
    with closing(opened(path)) as store:
        assert store.query("SELECT samples FROM strategy_scores") == [{"samples": 1}]


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


def test_file_that_is_up_to_date_needs_no_statement():
    meta = {"schema": "1", "views": schema.VIEWS_DIGEST}
    assert schema.is_readable(meta)
    assert schema.migration(meta) == []
    assert [each.sql.split()[0] for each in schema.migration({"schema": "1"})] == [
        *["CREATE"] * len(schema.VIEWS),
        "DELETE",
        "INSERT",
    ]


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
