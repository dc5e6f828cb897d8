"""The results of a chaos run: operations, faults and their outcomes, memory, leaked resources.

Plain records, (de)serialised as JSON. This module must not evaluate them (`report` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from recovery.errors import BadInput
from recovery.faults import Due, Injected, Schedule


@dataclass(frozen=True)
class OpRecord:
    """One operation, as its caller saw it. `at` is in seconds since the run began.

    `struck`: its failed attempts, as (category, browser's id, epoch). `wrong`: its answer differs
    from the one without faults. `refused`: the pool was full. `answers`: the number of results
    that it got (1 is right).
    """

    number: int
    op_id: str
    model: str
    model_type: str
    at: float
    seconds: float
    success: bool = False
    wrong: bool = False
    recovered: bool = False
    simulated: bool = False
    refused: bool = False
    answers: int = 0
    browser_id: str = ""
    engine: str = ""
    level_effective: str = ""
    struck: tuple[tuple[str, str, int], ...] = ()
    error: str = ""


@dataclass(frozen=True)
class FaultRecord:
    """One fault of the schedule and its outcome.

    `outcome`: "happened" (there is `evidence` from other sources than the injector), "unseen" (it
    was injected, without evidence), "refused" (its target's breaker was open, or it was not in
    service), "impossible" (on this engine, back end or machine). `noticed`: the categories of the
    target's failures that the supervisor logged after it, in order; `noticed_ms`: from the fault
    to the first of them. `right`: whether they are those expected of such a fault. `ladder`: the
    rungs that were tried, such as "2 MODERATE", and `repair_seconds` until the browser or its
    replacement was ready; None if there was no repair. `struck`: the numbers of the operations
    that lost an attempt to it.
    """

    number: int
    due: Due
    outcome: str
    why: str = ""
    injected: Injected | None = None
    engine: str = ""
    evidence: str = ""
    noticed: tuple[str, ...] = ()
    noticed_ms: float | None = None
    right: bool | None = None
    ladder: tuple[str, ...] = ()
    repair_seconds: float | None = None
    struck: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemorySample:
    """Resident bytes after `operations`. `control` is of client, supervisor and history,
    `workers` of the browsers' Ray workers, `browsers` of all their process trees."""

    operations: int
    at: float
    control: Mapping[str, int]
    workers: int = 0
    browsers: int = 0


@dataclass(frozen=True)
class ChaosRun:
    """A run. `began` is wall time in seconds, `settings` its options as plain values."""

    seed: int
    began: float
    seconds: float
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    browsers: Mapping[str, str]  # slot -> product and version
    schedule: Schedule
    operations: tuple[OpRecord, ...]
    faults: tuple[FaultRecord, ...]
    memory: tuple[MemorySample, ...] = ()
    leaked: tuple[str, ...] = ()
    repaired: bool = True  # whether every browser was repaired or replaced at the end
    notes: tuple[str, ...] = field(default=())

    def with_leaked(self, leaked: tuple[str, ...]) -> ChaosRun:
        """The same run, with what its pool leaked."""
        return replace(self, leaked=leaked)

    def to_json(self) -> str:
        return _RUN.dump_json(self, indent=1).decode()


_RUN = TypeAdapter(ChaosRun)


def run_from_json(text: str | bytes) -> ChaosRun:
    """Raises `BadInput`."""
    try:
        return _RUN.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"not the JSON of a chaos run: {where}: {first['msg']}") from error


def read_run(path: str | Path) -> ChaosRun:
    """Raises `BadInput`."""
    try:
        return run_from_json(Path(path).read_bytes())
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error}") from error
