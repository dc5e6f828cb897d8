import random
from contextlib import closing
from dataclasses import replace

import pytest

from recovery.errors import BadInput
from recovery.failures import Category
from recovery.history.schema import VIEWS
from recovery.history.tracker import PerformanceHistoryTracker, RungOutcome
from recovery.kinds import BrowserType, ModelType
from tests.histories import (
    CHROME,
    FAILED,
    FALLBACK,
    FIREFOX,
    MINIMAL,
    MODERATE,
    NOW,
    OPERATION,
    RECOVERED,
    SAFARI,
    SIMULATED,
    SIMULATION,
    STEP,
    many,
    opened,
    refilled,
    wilson_low,
)


@pytest.fixture(scope="module")
def only_store():
    with closing(opened()) as store:
        yield store


@pytest.fixture
def tracker(only_store):
    """Makes a tracker of the given samples alone. Opening takes longer than most tests."""
    return lambda *samples: PerformanceHistoryTracker(refilled(only_store, *samples))


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


def test_a_trend_of_nothing_claims_nothing(tracker):
    trend = tracker().analyze_performance_trends()
    assert (trend["samples"], trend["success_rate"], trend["direction"]) == (0, None, "stable")
    assert trend["slope_ms_per_operation"] is None
    assert "at least 10 needed" in trend["reason"]
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


# -- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_can_be_asked_and_filtered(tracker, view):
    asked = tracker(*many(3, STEP), replace(STEP, category=Category.TIMEOUT, pool="q"), FAILED)
    rows = asked.view(view)
    assert rows
    assert {row["error_type"] for row in rows} == {"crash", "timeout"}
    assert {row["error_type"] for row in asked.view(view, error_type=Category.TIMEOUT)} == {
        "timeout"
    }
    assert len(asked.view(view, limit=1)) == 1
    assert asked.view(view, error_type="api_error") == []


@pytest.mark.parametrize(
    ("view", "options", "said"),
    [
        ("nothing", {}, "there are recovery_performance, strategy_scores"),
        ("strategy_scores", {"colour": "red"}, "no column colour; it has error_type, strategy"),
        ("strategy_scores", {"limit": 0}, "whole number from 1"),
        ("strategy_scores", {"limit": "1; DROP TABLE operations"}, "whole number from 1"),
        ("operations", {}, "no view 'operations'"),
    ],
)
def test_view_or_column_that_there_is_not_is_refused_with_those_that_there_are(
    tracker, view, options, said
):
    with pytest.raises(BadInput, match=said):
        tracker(STEP).view(view, **options)


def test_values_are_no_part_of_the_query(tracker):
    assert tracker(STEP).view("recovery_performance", error_type="' OR true --") == []
