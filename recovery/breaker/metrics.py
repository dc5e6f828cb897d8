"""The metrics of breakers: the figures of one as plain data, and the sums over many.

This module must not change a breaker, nor read a clock: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from recovery.breaker.config import BreakerConfig
from recovery.breaker.state import Breaker, CircuitState, retry_at

_SUMMED = (
    "executions",
    "successes",
    "failures",
    "recorded_failures",
    "slow_calls",
    "refused",
    "circuit_open_count",
    "openings_held",
    "recoveries",
)


def circuit_metrics(
    breaker: Breaker,
    config: BreakerConfig,
    *,
    browser: str,
    refused: int,
    now: float,
    wall: float,
) -> dict[str, Any]:
    """The figures of one breaker; see `CircuitBreaker.get_metrics`."""
    calls, outage, ledger = breaker.calls, breaker.outage, breaker.ledger
    executions = calls.successes + calls.failures
    samples = min(executions, config.metrics_window_size)
    until = (
        retry_at(breaker, config)
        if breaker.state in (CircuitState.OPEN, CircuitState.HALF_OPEN)
        else None
    )
    return {
        "current_state": str(breaker.state),
        "seconds_in_state": max(now - breaker.since, 0.0),
        "retry_after_seconds": None if until is None else max(until - now, 0.0),
        "executions": executions,
        "successes": calls.successes,
        "failures": calls.failures,
        "recorded_failures": calls.recorded,
        "slow_calls": calls.slow,
        "refused": refused,
        "samples": samples,
        "enough_samples": samples >= config.min_samples_for_stats,
        "success_rate": 1.0 - calls.recent.bit_count() / samples if samples else 0.0,
        "failures_in_row": breaker.failures,
        "circuit_open_count": ledger.openings,
        "openings_held": ledger.held,
        "recoveries": ledger.recoveries,
        "recovery_rate": ledger.recoveries / ledger.openings if ledger.openings else 0.0,
        "avg_downtime_seconds": (ledger.downtime / ledger.recoveries if ledger.recoveries else 0.0),
        "current_downtime_seconds": (0.0 if outage.began is None else max(now - outage.began, 0.0)),
        "recovery_history": [
            {
                "timestamp": datetime.fromtimestamp(wall - now + entry.at, UTC).isoformat(
                    timespec="seconds"
                ),
                "recovery_method": entry.method,
                "browser": browser,
                "downtime_seconds": entry.downtime,
            }
            for entry in ledger.history
        ],
    }


def registry_metrics(circuits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sums over all breakers, and each one's metrics by its name."""
    total = {name: _sum(circuits.values(), name) for name in _SUMMED}
    executions, openings = total["executions"], total["circuit_open_count"]
    downtime = sum(each["avg_downtime_seconds"] * each["recoveries"] for each in circuits.values())
    return {
        "circuits_by_state": {
            str(state): _count(circuits.values(), state) for state in CircuitState
        },
        **total,
        "success_rate": total["successes"] / executions if executions else 0.0,
        "recovery_rate": total["recoveries"] / openings if openings else 0.0,
        "avg_downtime_seconds": (downtime / total["recoveries"] if total["recoveries"] else 0.0),
        "circuits": circuits,
    }


def _sum(metrics: Iterable[Mapping[str, Any]], name: str) -> int:
    return sum(int(each[name]) for each in metrics)


def _count(metrics: Iterable[Mapping[str, Any]], state: CircuitState) -> int:
    return sum(each["current_state"] == state for each in metrics)
