"""Queries of the history.

`PerformanceHistoryTracker` reads: every figure comes from stored rows and is given with their
number. A simulated answer or step is counted apart, never as a success. This module must not
decide anything from the results, nor know how rows are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from recovery.errors import BadInput
from recovery.failures import Category
from recovery.history.samples import Sample
from recovery.history.schema import VIEWS
from recovery.history.significance import SAMPLES_MIN, better, trend_direction, wilson
from recovery.history.store import HistoryStore
from recovery.kinds import BrowserType, ModelType, RecoveryLevel

_TRENDS_MAX = 100  # combinations that recommendations look at


class RungOutcome(NamedTuple):
    """The outcomes of a rung; `median_ms` is of its successes."""

    successes: int
    attempts: int
    median_ms: float | None


class Trend(TypedDict):
    """How durations change from operation to operation.

    `samples` are all operations in the window. The durations are those of the `measured`: of right
    answers without a failure. Recent and oldest are means of ten each, if there are twenty.
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
    """Queries of the history, of flushed samples only.

    A success rate is of real answers: a simulated operation is a sample, but no success; a
    simulated recovery step is neither, since the steps that failed before it have been counted.
    `since` is wall time in seconds.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store

    def record(self, *samples: Sample) -> None:
        """The same as the store's `add`."""
        self._store.add(samples)

    def view(self, name: str, *, limit: int = 1000, **equal: Any) -> list[dict[str, Any]]:
        """Rows of one of `recovery.history.schema.VIEWS`, at most `limit`, the latest first.

        `equal`: columns and required values: `view("strategy_scores", error_type="crash")`.
        Raises `BadInput`, naming the views or the columns that there are.
        """
        if name not in VIEWS:
            raise BadInput(
                f"no view {name!r}; there are {', '.join(VIEWS)}.", expected=list(VIEWS), got=name
            )
        described = self._store.query(
            "SELECT column_name FROM information_schema.columns WHERE table_name = ?", [name]
        )
        columns = [str(row["column_name"]) for row in described]
        if unknown := sorted(equal.keys() - set(columns)):
            raise BadInput(
                f"{name} has no column {', '.join(unknown)}; it has {', '.join(columns)}.",
                expected=columns,
                got=unknown,
            )
        if type(limit) is not int or limit < 1:
            raise BadInput(f"limit: expected a whole number from 1, got {limit!r}.", got=limit)
        where = " AND ".join(f"{column} = ?" for column in equal) or "true"
        return self._store.query(
            f"SELECT * FROM {name} WHERE {where} ORDER BY ALL DESC LIMIT {limit}",
            [str(value) if isinstance(value, str) else value for value in equal.values()],
        )

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
        """The outcomes of each rung for such failures, without simulation."""
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
        """A straight line through the durations in the time window, in the order of their ends.

        It is called stable unless there are at least 10 durations, the slope's t value is 3.36 or
        more (p < 0.01), and the line changes by 5 % of the mean or more. Ask for one model and
        operation: durations also change with the mix.
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
        direction, reason = trend_direction(
            measured, row["mean"], row["sxx"], row["sxy"], row["syy"]
        )
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
            row["score"], row["_high"] = wilson(row["successes"], trials)
            row["ranked"] = row["samples"] >= SAMPLES_MIN
        bar = max((row["score"] for row in rows if row["ranked"]), default=0.0)

        def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
            if row["ranked"] and row["_high"] >= bar and row["median_ms"] is not None:
                return 0, row["median_ms"]
            return (1 if row["ranked"] else 2), -row["score"]

        ordered = sorted(rows, key=place)
        return [{name: value for name, value in row.items() if name != "_high"} for row in ordered]

    def failure_patterns(self, limit: int = 10) -> list[dict[str, Any]]:
        """The most frequent failures, by fingerprint and category.

        `operations` had it as their first failure, `incidents` are browsers that were
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
        """Recommendations: operations that got slower, better browsers, steps that never work."""
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
            if better(best, most):
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
