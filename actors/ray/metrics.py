"""What Ray's dashboard can plot of a pool: counters, histograms and gauges, by name and tags.

The only door to `ray.util.metrics`. Where they appear is told in
docs/monitoring.md. A process makes them once, when it is in Ray. This module must not decide.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from recovery.breaker import CircuitState
from recovery.control import BrowserRecord, Phase, PoolState, Repair
from recovery.history.samples import OperationSample
from recovery.records import HostStatus

_LATENCY_MS = [1.0, 2.0, 5.0, 1e1, 2e1, 5e1, 1e2, 2e2, 5e2, 1e3, 2e3, 5e3, 1e4, 3e4, 6e4]
_CIRCUIT_VALUE = {
    CircuitState.CLOSED: 0,
    CircuitState.DISABLED: 0,
    CircuitState.HALF_OPEN: 1,
    CircuitState.OPEN: 2,
    CircuitState.FORCED_OPEN: 3,
}


class ClientMetrics:
    """Of one client: operations, their latency, and how many are in flight."""

    def __init__(self, pool: str) -> None:
        self._pool = {"pool": pool}
        self._operations = Counter(
            "tabpool_operations",
            "Operations that ended, by outcome: answered, recovered, simulated or failed",
            tag_keys=("pool", "model", "op", "browser", "outcome"),
        )
        self._latency = Histogram(
            "tabpool_operation_ms",
            "The caller's whole wait for an answer, in milliseconds",
            boundaries=_LATENCY_MS,
            tag_keys=("pool", "model", "op"),
        )
        self._in_flight = Gauge(
            "tabpool_in_flight", "Operations of one client under way", tag_keys=("pool", "client")
        )
        self._queue = Gauge(
            "tabpool_browser_queue",
            "Operations that a browser has not answered, as a client last heard",
            tag_keys=("pool", "client", "browser"),
        )

    def ended(self, sample: OperationSample) -> None:
        outcome = "failed" if not sample.success else "answered"
        if sample.success and sample.recovered:
            outcome = "recovered"
        if sample.simulated:
            outcome = "simulated"
        which = {**self._pool, "model": sample.model, "op": sample.op}
        browser = str(sample.browser_type or "")
        self._operations.inc(1, {**which, "browser": browser, "outcome": outcome})
        if sample.success:
            self._latency.observe(sample.duration_ms, which)

    def now(self, client: str, in_flight: int, hosts: Iterable[HostStatus]) -> None:
        which = {**self._pool, "client": client}
        self._in_flight.set(in_flight, which)
        for host in hosts:
            self._queue.set(host.queue, {**which, "browser": host.ref.browser_id})


class PoolMetrics:
    """Of the pool as its supervisor sees it: browsers, circuits, repairs and memory."""

    def __init__(self, pool: str) -> None:
        self._pool = {"pool": pool}
        self._browsers = Gauge(
            "tabpool_browsers", "Browsers by phase of life", tag_keys=("pool", "phase")
        )
        self._circuit = Gauge(
            "tabpool_circuit",
            "A circuit breaker: 0 closed, 1 half-open, 2 open, 3 forced open",
            tag_keys=("pool", "browser", "model"),
        )
        self._memory = Gauge(
            "tabpool_browser_memory_bytes",
            "Resident memory of a browser's whole process tree",
            tag_keys=("pool", "browser"),
        )
        self._recoveries = Counter(
            "tabpool_recoveries",
            "Recovery steps that ended, by rung and outcome",
            tag_keys=("pool", "browser", "category", "rung", "outcome"),
        )
        self._repair_ms = Histogram(
            "tabpool_repair_ms",
            "From a failure to a browser that is ready again, in milliseconds",
            boundaries=_LATENCY_MS,
            tag_keys=("pool", "outcome"),
        )

    def repaired(self, record: BrowserRecord, repair: Repair) -> None:
        which = {
            **self._pool,
            "browser": str(record.kind),
            "category": str(repair.failure.category),
        }
        for step in repair.steps:
            for rung in step.rungs:
                outcome = "worked" if rung is step.worked else "failed"
                self._recoveries.inc(1, {**which, "rung": rung.name.lower(), "outcome": outcome})
        if repair.ready is not None:
            took = (repair.ready - repair.began) * 1e3
            self._repair_ms.observe(took, {**self._pool, "outcome": repair.outcome.split(" ")[0]})

    def update(self, state: PoolState, memory: Mapping[str, int]) -> None:
        """Set every gauge to what is true now."""
        phases = Tally(record.phase for record in state.browsers.values())
        for phase in Phase:
            self._browsers.set(phases[phase], {**self._pool, "phase": str(phase)})
        for record in state.browsers.values():
            for model, snapshot in record.breakers.items():
                which = {**self._pool, "browser": record.id, "model": model}
                self._circuit.set(_CIRCUIT_VALUE[snapshot.breaker.state], which)
        for browser_id, resident in memory.items():
            self._memory.set(resident, {**self._pool, "browser": browser_id})
