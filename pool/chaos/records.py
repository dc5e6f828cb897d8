"""The results of a chaos run: operations, faults and their outcomes, memory, leaked resources.

Plain records, (de)serialised as JSON. This module must not evaluate them (`report` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from recovery.bounded_files import JsonBounds, json_object_from, read_bounded, text_of
from recovery.errors import BadInput
from recovery.faults import Due, Injected, Rows, Schedule

RUN_BYTES_MAX = 256 << 20
_JSON = JsonBounds("the JSON of a chaos run", RUN_BYTES_MAX, items_max=4_000_000)
_NAMED_MAX = 1000  # settings, versions, browsers


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
    struck: Rows[tuple[str, str, int]] = ()
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
    noticed: Rows[str] = ()
    noticed_ms: float | None = None
    right: bool | None = None
    ladder: Rows[str] = ()
    repair_seconds: float | None = None
    struck: Rows[int] = ()


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
    operations: Rows[OpRecord]
    faults: Rows[FaultRecord]
    memory: Rows[MemorySample] = ()
    leaked: Rows[str] = ()
    repaired: bool = True  # whether every browser was repaired or replaced at the end
    notes: Rows[str] = field(default=())

    def with_leaked(self, leaked: tuple[str, ...]) -> ChaosRun:
        """The same run, with what its pool leaked."""
        return replace(self, leaked=leaked)

    def to_json(self) -> str:
        return _RUN.dump_json(self, indent=1).decode()


_RUN = TypeAdapter(ChaosRun)


def run_from_json(text: str | bytes, name: str = "the run") -> ChaosRun:
    """Raises `BadInput`; `name` says there where the text is from."""
    try:
        plain = json_object_from(text, _JSON, name)
    except BadInput as error:
        raise BadInput(f"not the JSON of a chaos run: {error}", **error.fields) from error
    for part in ("settings", "versions", "browsers"):
        if isinstance(plain.get(part), dict) and len(plain[part]) > _NAMED_MAX:
            raise BadInput(f"{name} has {len(plain[part]):,} {part}; the limit is {_NAMED_MAX:,}.")
    try:
        return _RUN.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = text_of(".".join(map(str, first["loc"])))
        raise BadInput(
            f"{name}: not the JSON of a chaos run: {where}: {text_of(first['msg'])}."
        ) from error


def read_run(path: str | Path) -> ChaosRun:
    """Raises `BadInput`."""
    return run_from_json(read_bounded(path, RUN_BYTES_MAX, what="a chaos run"), str(path))
