"""What goes wrong in a simulation, and when: plans of faults, drawn from a seed or written down.

This module must not know how a fault is carried out (`tests.simulator.faults` does).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from recovery.kinds import BrowserType, Level, Strategy
from recovery.levels import BROWSERS_NEEDED

BROWSERS: Mapping[str, int] = {"chrome": 2, "firefox": 1}
NEVER = 1e9  # seconds


class _Word(StrEnum):
    def __repr__(self) -> str:  # so that a plan's repr makes the plan
        return f"{type(self).__name__}.{self.name}"


class Kind(_Word):
    BROWSER_CRASH = "browser crash"
    PAGE_CRASH = "page crash"
    WORKER_DEATH = "worker death"
    SOCKETS_DROPPED = "sockets dropped"  # back after `seconds`, or never
    LAUNCHES_FAIL = "launches fail"  # the browser crashes, and its next `times` launches fail
    LOADS_FAIL = "loads fail"  # likewise
    ERROR_REPORTED = "error reported"  # by the page, of its next operation
    OPERATION_HANGS = "operation hangs"  # the next one, until its deadline
    WORKER_SILENT = "worker silent"  # it lives, and answers nobody
    SUPERVISOR_DEATH = "supervisor death"  # the next incarnation begins after `seconds`
    LOG_FULL = "log full"  # for `seconds`
    # What only schedules have (see `plan_of`): plans drawn from a seed stay what they were.
    PAGE_HANGS = "page hangs"  # until it is found out and ended
    MEMORY_RUNS_OUT = "memory runs out"  # of the page
    DEVICE_LOST = "device lost"  # by the page
    ANSWERS_WRONG = "answers wrong"  # the next `times` of them
    CLOCK_STEPS = "clock steps"  # that of the supervisor, by `seconds`


DRAWN = tuple(kind for kind in Kind if kind not in tuple(Kind)[-5:])


class Clock(_Word):
    """What `Fault.when` counts: virtual time, operations that browsers began, logged events."""

    SECONDS = "seconds"
    OPERATIONS = "operations"
    EVENTS = "events"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. An empty target is the browser that is just asked, or any.

    `logged` is for a supervisor's death at an event: whether that event is in the log.
    """

    kind: Kind
    when: float
    clock: Clock = Clock.SECONDS
    target: str = ""
    seconds: float = 0.0
    times: int = 1
    logged: bool = True


@dataclass(frozen=True)
class FaultPlan:
    """`seconds`: over how much virtual time operations are spread."""

    seed: int
    faults: tuple[Fault, ...]
    seconds: float = 60.0


def slots(browsers: Mapping[str, int]) -> dict[str, BrowserType]:
    return {
        f"{kind}-{n}": BrowserType(kind) for kind, count in browsers.items() for n in range(count)
    }


def make_plan(
    seed: int,
    *,
    browsers: Mapping[str, int] = BROWSERS,
    operations: int = 150,
    faults: int = 8,
    seconds: float = 60.0,
    kinds: Sequence[Kind] = DRAWN,
) -> FaultPlan:
    """Draw faults over the first four fifths of a simulation."""
    rng = random.Random(f"plan {seed}")
    drawn: list[Fault] = []
    for _ in range(rng.randint(1, 2 * faults - 1)):
        kind = rng.choice(kinds)
        deaths = [fault for fault in drawn if fault.kind is Kind.SUPERVISOR_DEATH]
        if kind is Kind.SUPERVISOR_DEATH and len(deaths) == 2:
            continue  # clients give up a supervisor that is away for 15 s
        clock = rng.choice(tuple(Clock) if kind is Kind.SUPERVISOR_DEATH else tuple(Clock)[:2])
        most = {Clock.SECONDS: seconds, Clock.OPERATIONS: operations, Clock.EVENTS: 10 * faults}
        when = rng.uniform(0.02, 0.8) * most[clock]
        how_long = {
            Kind.SOCKETS_DROPPED: rng.choice((0.01, 0.5, 1.5, 1.99, 2.5, NEVER)),
            Kind.SUPERVISOR_DEATH: rng.choice((0.05, 0.5, 1.5)),
            Kind.LOG_FULL: rng.choice((0.5, 5.0, 20.0)),
        }
        drawn.append(
            Fault(
                kind,
                round(when, 3) if clock is Clock.SECONDS else max(int(when), 1),
                clock,
                rng.choice(("", *slots(browsers))),
                how_long.get(kind, 0.0),
                rng.choice((1, 1, 2, 3, 5)) if kind in (Kind.LAUNCHES_FAIL, Kind.LOADS_FAIL) else 1,
                rng.random() < 0.5,
            )
        )
    return FaultPlan(
        seed, tuple(sorted(drawn, key=lambda fault: (fault.clock, fault.when))), seconds
    )


def case(seed: int) -> dict[str, Any]:
    """The simulation that a bare seed stands for: all levels and strategies take their turn."""
    level = tuple(Level)[seed % len(Level)]
    strategy = tuple(Strategy)[seed // len(Level) % len(Strategy)]
    browsers = (BROWSERS, {"firefox": 1}, {"chrome": 1, "edge": 1, "safari": 1})[seed % 3]
    if sum(browsers.values()) < BROWSERS_NEEDED[level]:
        browsers = BROWSERS
    return {
        "plan": make_plan(seed, browsers=browsers),
        "browsers": browsers,
        "level": level,
        "strategy": strategy,
    }
