"""What is kept of a chaos run: every operation, every fault and what came of it, memory, leaked.

Plain records that go to JSON and back. This module must not judge them (`report` does).
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

    `struck`: what its attempts failed of on the way, as (category, browser's id, epoch). `wrong`:
    it was answered, and with something else than without faults. `refused`: a full pool took it
    not at all. `answers`: how many results came for it (1, if all is well).
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
    """One fault of the schedule and what came of it.

    `outcome`: "happened" (something other than the injector shows it: `evidence`), "unseen" (it
    was made, and nothing shows it), "refused" (by the gate, or its target was not in service),
    "impossible" (this engine, back end or machine can't have it). `noticed`: the categories of the
    failures that the supervisor logged of the target after it, in order; `noticed_ms`: from the
    fault to the first of them. `right`: whether they are what such a fault must be noticed as.
    `ladder`: the rungs that were tried, such as "2 MODERATE", and `repair_seconds` until the
    browser, or another in its place, was ready again; None if there was no repair. `struck`: the
    numbers of the operations that it cost an attempt.
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
    """Resident bytes after so many operations. `control` is of client, supervisor and history,
    `workers` of the browsers' Ray workers, `browsers` of all their process trees."""

    operations: int
    at: float
    control: Mapping[str, int]
    workers: int = 0
    browsers: int = 0


@dataclass(frozen=True)
class ChaosRun:
    """A run. `began` is wall time in seconds, `settings` what it was asked for, as plain values."""

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
    repaired: bool = True  # whether every browser was back, or replaced, in the end
    notes: tuple[str, ...] = field(default=())

    def with_leaked(self, left: tuple[str, ...]) -> ChaosRun:
        """The same run, with what was left behind when its pool was closed."""
        return replace(self, leaked=left)

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
        raise BadInput(f"this is no account of a chaos run: {where}: {first['msg']}") from error


def read_run(path: str | Path) -> ChaosRun:
    """Raises `BadInput`."""
    try:
        return run_from_json(Path(path).read_bytes())
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error}") from error
