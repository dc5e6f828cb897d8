"""Fault injection: the kinds of faults, what each does at which intensity, how it must be detected
and which level recovers from it; and schedules of faults, drawn from a seed.

`actors.injection` injects the faults; the simulator uses the same
schedules. This module must not inject anything.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import FailFast, TypeAdapter, ValidationError

from recovery.bounded_files import JsonBounds, json_object_from, read_bounded, text_of
from recovery.breaker import CircuitState
from recovery.errors import BadInput
from recovery.failures import Category
from recovery.kinds import BrowserType, Level

SCHEDULE_FAULTS_MAX = 100_000
SCHEDULE_BYTES_MAX = 64 << 20
_JSON = JsonBounds("a fault schedule", SCHEDULE_BYTES_MAX, items_max=1_000_000)

_T = TypeVar("_T")
# A tuple of which pydantic reports the first error only: a million of them would fill the memory.
Rows = Annotated[tuple[_T, ...], FailFast()]


class FaultKind(StrEnum):
    LAUNCH_FAILURE = "launch_failure"
    CONNECTION_FAILURE = "connection_failure"
    TIMEOUT = "timeout"
    TAB_CRASH = "tab_crash"
    BROWSER_CRASH = "browser_crash"
    GPU_PROCESS_CRASH = "gpu_process_crash"
    DEVICE_LOSS = "device_loss"
    MEMORY_EXHAUSTION = "memory_exhaustion"
    DRIVER_DEATH = "driver_death"
    SOCKET_DROP = "socket_drop"
    API_ERROR = "api_error"
    WRONG_ANSWER = "wrong_answer"
    PAGE_REFRESH = "page_refresh"
    TAB_HIDDEN = "tab_hidden"
    MACHINE_SUSPENDED = "machine_suspended"
    MESSAGE_OVER_LIMIT = "message_over_limit"
    WORKER_DEATH = "worker_death"
    NODE_DEATH = "node_death"
    SUPERVISOR_DEATH = "supervisor_death"
    FULL_DISK = "full_disk"
    CLOCK_STEP = "clock_step"


class Intensity(StrEnum):
    MILD = "mild"
    MODERATE = "moderate"
    SEVERE = "severe"


class FaultSite(StrEnum):
    """The target of a fault: one browser's slot, or the pool's supervisor."""

    BROWSER = "browser"
    SUPERVISOR = "supervisor"


@dataclass(frozen=True)
class Dose:
    """A fault at one intensity: what is done, the lowest level whose operations all recover, and
    the categories by which the supervisor may detect it (none: it must not be detected)."""

    what: str
    level: Level
    noticed: frozenset[Category] = frozenset()
    quiet: bool = False  # it may also stay undetected


@dataclass(frozen=True)
class Facts:
    """The facts of a kind of fault. `engines`: the browser types to which it applies."""

    doses: Mapping[Intensity, Dose]
    place: FaultSite = FaultSite.BROWSER
    engines: frozenset[BrowserType] = frozenset(BrowserType)


CLOCK_STEP_SECONDS = {
    Intensity.MILD: 60.0,
    Intensity.MODERATE: 86_400.0,
    Intensity.SEVERE: -86_400.0,
}
_CHROMIUM = frozenset({BrowserType.CHROME, BrowserType.EDGE})
_LAUNCH = frozenset({Category.LAUNCH_FAILURE})
_CONNECTION = frozenset({Category.CONNECTION_FAILURE})
_TIMEOUT = frozenset({Category.TIMEOUT})
_CRASH = frozenset({Category.CRASH})
_GPU = frozenset({Category.GPU_ERROR})
_API = frozenset({Category.API_ERROR})
_INTERNAL = frozenset({Category.INTERNAL_ERROR})
_WRONG = frozenset({Category.WRONG_ANSWER})
_SPENT = frozenset({Category.RESOURCE_EXHAUSTION})


def _of(mild: Dose, moderate: Dose, severe: Dose) -> Mapping[Intensity, Dose]:
    return {Intensity.MILD: mild, Intensity.MODERATE: moderate, Intensity.SEVERE: severe}


def _signals(
    whom: str, level: Level, noticed: frozenset[Category] = _CRASH, quiet: bool = False
) -> Mapping[Intensity, Dose]:
    """Abort, core dump, kill. (Firefox may ignore SIGTERM, and WebKit SIGSEGV.)"""
    names = ("SIGABRT", "SIGQUIT", "SIGKILL")
    return _of(*(Dose(f"{name} to {whom}", level, noticed, quiet) for name in names))


FAULTS: Mapping[FaultKind, Facts] = {
    FaultKind.LAUNCH_FAILURE: Facts(
        _of(
            Dose(
                "the browser is killed, and its next launch ends at once with 1",
                Level.MEDIUM,
                _LAUNCH,
            ),
            Dose(
                "the browser is killed, and its next two launches end at once with 1",
                Level.MEDIUM,
                _LAUNCH,
            ),
            Dose("the browser is killed, and its next launch hangs", Level.MEDIUM, _LAUNCH),
        )
    ),
    FaultKind.CONNECTION_FAILURE: Facts(
        _of(
            Dose("the page's server is out of reach for 0.3 s", Level.LOW, _CONNECTION),
            Dose("the page's server is out of reach for 1 s", Level.LOW, _CONNECTION),
            Dose(
                "the page's server is out of reach for 10 s, longer than a page may be away",
                Level.MEDIUM,
                _CONNECTION,
            ),
        )
    ),
    FaultKind.TIMEOUT: Facts(
        _of(
            Dose("the page's processes are stopped for 1 s", Level.NONE),
            Dose("the page's worker loops for ever", Level.MEDIUM, _TIMEOUT),
            Dose("browser, driver and all below them are stopped for good", Level.MEDIUM, _TIMEOUT),
        )
    ),
    FaultKind.TAB_CRASH: Facts(_signals("the page's processes", Level.MEDIUM)),
    FaultKind.BROWSER_CRASH: Facts(_signals("the browser", Level.MEDIUM)),
    FaultKind.GPU_PROCESS_CRASH: Facts(
        _signals("the GPU process", Level.MEDIUM, _GPU | _CRASH, quiet=True), engines=_CHROMIUM
    ),
    FaultKind.DEVICE_LOSS: Facts(
        _of(
            Dose("the page's WebGPU device is destroyed", Level.MEDIUM, _INTERNAL | _GPU),
            Dose("it is destroyed while an operation runs", Level.MEDIUM, _INTERNAL | _GPU),
            Dose(
                "it is destroyed while an operation runs, and so is the next page's",
                Level.MEDIUM,
                _INTERNAL | _GPU,
            ),
        ),
        engines=_CHROMIUM | {BrowserType.FIREFOX},
    ),
    FaultKind.MEMORY_EXHAUSTION: Facts(
        _of(
            Dose("the page takes 512 MiB for 2 s", Level.NONE),
            Dose("the page's next operation finds no memory left", Level.MEDIUM, _SPENT),
            Dose(
                "the page's processes may not grow any more, and its next operation tries to",
                Level.MEDIUM,
                _SPENT | _CRASH,
            ),
        )
    ),
    FaultKind.DRIVER_DEATH: Facts(_signals("the driver", Level.MEDIUM)),
    FaultKind.SOCKET_DROP: Facts(
        _of(
            Dose("the page's control socket is broken", Level.LOW, _CONNECTION),
            Dose("the page's data socket is broken", Level.LOW, _CONNECTION),
            Dose("both sockets of the page are broken", Level.LOW, _CONNECTION),
        )
    ),
    FaultKind.API_ERROR: Facts(
        _of(
            Dose(
                "the page is killed, and for its successor's model the server answers 500",
                Level.MEDIUM,
                _API,
            ),
            Dose(
                "the page is killed, and its successor gets half of the model's file",
                Level.MEDIUM,
                _API,
            ),
            Dose(
                "the page is killed, and its successor gets the model with wrong bytes",
                Level.MEDIUM,
                _API,
            ),
        )
    ),
    FaultKind.WRONG_ANSWER: Facts(
        _of(
            Dose(
                "the lowest bit of a number in the next answer is flipped",
                Level.CRITICAL,
                _WRONG,
                quiet=True,  # no vote can detect it among unequal numeric ids
            ),
            Dose(
                "bit 22 of a number in each of the next 3 answers is flipped",
                Level.CRITICAL,
                _WRONG,
                quiet=True,
            ),
            Dose(
                "bit 30 of a number in each answer from now on is flipped", Level.CRITICAL, _WRONG
            ),
        )
    ),
    FaultKind.PAGE_REFRESH: Facts(
        _of(
            Dose("the page reloads itself", Level.MEDIUM, _CRASH | _CONNECTION),
            Dose("the driver reloads the page", Level.MEDIUM, _CRASH | _CONNECTION),
            Dose("the driver opens another page in its place", Level.MEDIUM, _CRASH | _CONNECTION),
        )
    ),
    FaultKind.TAB_HIDDEN: Facts(
        _of(
            Dose("the page is hidden for 1 s", Level.NONE),
            Dose("the page is hidden for 5 s", Level.NONE),
            Dose("the page is hidden for good", Level.NONE),
        )
    ),
    FaultKind.MACHINE_SUSPENDED: Facts(
        _of(
            Dose("all processes of the browser are stopped for 0.5 s", Level.NONE),
            Dose("all processes of the browser are stopped for 3 s", Level.NONE, _TIMEOUT, True),
            Dose("all processes of the browser are stopped for 30 s", Level.MEDIUM, _TIMEOUT),
        )
    ),
    FaultKind.MESSAGE_OVER_LIMIT: Facts(
        _of(
            Dose("the page finds its next answer too large to send", Level.MEDIUM, _API, True),
            Dose("the page sends a frame over the limit", Level.LOW, _CONNECTION),
            Dose("the page sends too much on both sockets", Level.LOW, _CONNECTION),
        )
    ),
    FaultKind.WORKER_DEATH: Facts(_signals("the browser's Ray worker", Level.MEDIUM)),
    FaultKind.NODE_DEATH: Facts(_signals("the browser's raylet, and its workers die", Level.HIGH)),
    FaultKind.SUPERVISOR_DEATH: Facts(
        _signals("the supervisor's process", Level.MEDIUM, frozenset()), FaultSite.SUPERVISOR
    ),
    FaultKind.FULL_DISK: Facts(
        _of(
            *(
                Dose(f"the supervisor can't write a byte for {seconds} s", Level.MEDIUM)
                for seconds in (1, 3, 10)
            )
        ),
        FaultSite.SUPERVISOR,
    ),
    FaultKind.CLOCK_STEP: Facts(
        _of(
            Dose("the supervisor's wall clock jumps a minute ahead", Level.NONE),
            Dose("the supervisor's wall clock jumps a day ahead", Level.NONE),
            Dose("the supervisor's wall clock jumps a day back", Level.NONE),
        ),
        FaultSite.SUPERVISOR,
    ),
}


@dataclass(frozen=True)
class Fault:
    """One fault. `target` is a browser's slot (its stand-in, if it has been replaced), empty for
    the supervisor."""

    kind: FaultKind
    intensity: Intensity = Intensity.MODERATE
    target: str = ""

    @property
    def dose(self) -> Dose:
        return FAULTS[self.kind].doses[self.intensity]

    def __str__(self) -> str:
        return f"{self.intensity} {self.kind}" + (f" of {self.target}" if self.target else "")


@dataclass(frozen=True)
class Injected:
    """An injected fault: what was done to which processes, and when (wall time, seconds).

    `until` is when it ends by itself, None if it doesn't. `epoch`: the affected incarnation.
    """

    fault: Fault
    at: float
    what: str
    target: str = ""
    epoch: int = -1
    pids: Rows[int] = ()
    until: float | None = None


def may_inject(circuit: CircuitState, intensity: Intensity) -> bool:
    """Whether a fault may be injected into a browser in this circuit state (source 004's table)."""
    match circuit:
        case CircuitState.CLOSED | CircuitState.DISABLED:
            return True
        case CircuitState.HALF_OPEN:
            return intensity is not Intensity.SEVERE
        case CircuitState.OPEN | CircuitState.FORCED_OPEN:
            return False


# -- schedules -------------------------------------------------------------------------------------


class Clock(StrEnum):
    """What `Due.when` counts."""

    OPERATIONS = "operations"  # begun
    STEPS = "steps"  # tokens generated
    SECONDS = "seconds"  # since the first operation


@dataclass(frozen=True)
class Due:
    """A fault and when it is to happen."""

    when: float
    fault: Fault
    clock: Clock = Clock.OPERATIONS


@dataclass(frozen=True)
class Schedule:
    """The faults of a run, and when. The same seed and limits draw the same schedule."""

    seed: int
    faults: Rows[Due]

    def to_json(self) -> str:
        return _SCHEDULE.dump_json(self, indent=1).decode()


_SCHEDULE = TypeAdapter(Schedule)


def schedule_from_json(text: str | bytes, name: str = "the schedule") -> Schedule:
    """Raises `BadInput`; `name` says there where the text is from."""
    try:
        plain = json_object_from(text, _JSON, name)
    except BadInput as error:
        raise BadInput(f"not a fault schedule: {error}", **error.fields) from error
    return schedule_from_plain(plain, name)


def schedule_from_plain(plain: Any, name: str = "the schedule") -> Schedule:
    """The schedule that `Schedule.to_json` wrote, already parsed. Raises `BadInput`."""
    faults = plain.get("faults") if isinstance(plain, dict) else None
    if isinstance(faults, list) and len(faults) > SCHEDULE_FAULTS_MAX:
        raise BadInput(
            f"{name} has {len(faults):,} faults; the limit is {SCHEDULE_FAULTS_MAX:,}.",
            expected=SCHEDULE_FAULTS_MAX,
            got=len(faults),
        )
    try:
        return _SCHEDULE.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = text_of(".".join(map(str, first["loc"])))
        raise BadInput(
            f"{name}: not a fault schedule: {where}: {text_of(first['msg'])}."
        ) from error


def read_schedule(path: str | Path) -> Schedule:
    """Raises `BadInput`."""
    data = read_bounded(path, SCHEDULE_BYTES_MAX, what="a fault schedule")
    return schedule_from_json(data, str(path))


def draw_schedule(
    seed: int,
    slots: Mapping[str, BrowserType],
    *,
    until: float,
    every: float,
    clock: Clock = Clock.OPERATIONS,
    kinds: Sequence[FaultKind] = tuple(FaultKind),
    intensities: Sequence[Intensity] = tuple(Intensity),
) -> Schedule:
    """A fault each `every` up to `until`; all kinds are equally frequent.

    Kinds that none of the engines in `slots` can have are left out. Raises `BadInput` if that
    leaves none, or for an `every` that is not over 0.
    """
    if not every > 0:
        raise BadInput(f"every: expected a number of {clock} over 0, got {every:g}.", got=every)
    targets = {
        kind: [name for name, engine in slots.items() if engine in FAULTS[kind].engines]
        for kind in kinds
    }
    possible = [kind for kind in kinds if targets[kind]]
    if not possible:
        raise BadInput(
            f"none of the faults {', '.join(kinds) or '(none)'} applies to {', '.join(slots)}.",
            got=list(kinds),
        )
    rng = random.Random(f"schedule {seed}")
    deck: list[FaultKind] = []
    drawn: list[Due] = []
    when = every
    while when <= until and len(drawn) < SCHEDULE_FAULTS_MAX:
        if not deck:
            deck = rng.sample(possible, len(possible))
        kind = deck.pop()
        target = rng.choice(targets[kind])
        aimed = target if FAULTS[kind].place is FaultSite.BROWSER else ""
        drawn.append(Due(when, Fault(kind, rng.choice(intensities), aimed), clock))
        when += every
    return Schedule(seed, tuple(drawn))
