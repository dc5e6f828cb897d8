"""Whether a fault really happened, by sources other than the injector: the kernel, the
supervisor's log, the page, the answers.

`pool.chaos.watch` collects the observations; this module evaluates them. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recovery.failures import Category
from recovery.faults import CLOCK_STEP_SECONDS, FaultKind, Injected, Intensity

GONE, STOPPED = "gone", "stopped"
_SKEW_SECONDS = 30.0  # tolerated difference from the expected clock step
_GROWTH_MIN_BYTES = 256 << 20  # growth that shows an allocation of 512 MiB


@dataclass(frozen=True)
class Noticed:
    """A failure that the supervisor detected. `what` is its cause, `seq` the event's number in the
    log, `at` wall time in seconds (of the client's clock)."""

    browser_id: str
    epoch: int
    category: str
    what: str
    at: float
    model: str = ""  # of one that could not be loaded
    seq: int = 0


@dataclass(frozen=True)
class Seen:
    """Observations of a fault.

    `processes`: state of each process that it hit: "gone", "stopped", "limited" (by a memory
    limit), "mute" (may not write to files) or "there". `noticed`: later failures of its target.
    `grown_bytes`: growth of the browser's processes. `answers`: results of operations there, such
    as "wrong" or a failure's cause. `skew_seconds`: change of the supervisor's clock, None if
    unknown. `term_before`, `term_after`: the supervisor's.
    """

    processes: Mapping[int, str] = field(default_factory=dict)
    noticed: Sequence[Noticed] = ()
    visibility: str = ""
    grown_bytes: int = 0
    answers: Sequence[str] = ()
    skew_seconds: float | None = None
    term_before: int = 0
    term_after: int = 0


ENDS = frozenset(  # kinds that end the processes they hit
    {
        FaultKind.TAB_CRASH,
        FaultKind.BROWSER_CRASH,
        FaultKind.GPU_PROCESS_CRASH,
        FaultKind.DRIVER_DEATH,
        FaultKind.WORKER_DEATH,
        FaultKind.NODE_DEATH,
    }
)
# Kinds whose only evidence is a failure of one of these categories in the supervisor's log.
_LOGGED: Mapping[FaultKind, frozenset[str]] = {
    FaultKind.LAUNCH_FAILURE: frozenset({Category.LAUNCH_FAILURE}),
    FaultKind.CONNECTION_FAILURE: frozenset({Category.CONNECTION_FAILURE}),
    FaultKind.SOCKET_DROP: frozenset({Category.CONNECTION_FAILURE}),
    FaultKind.API_ERROR: frozenset({Category.API_ERROR}),
    FaultKind.DEVICE_LOSS: frozenset({Category.GPU_ERROR, Category.INTERNAL_ERROR}),
    FaultKind.PAGE_REFRESH: frozenset({Category.CRASH, Category.CONNECTION_FAILURE}),
    FaultKind.TIMEOUT: frozenset({Category.TIMEOUT}),
    FaultKind.MEMORY_EXHAUSTION: frozenset({Category.RESOURCE_EXHAUSTION}),
    FaultKind.WRONG_ANSWER: frozenset({Category.WRONG_ANSWER}),
    FaultKind.MESSAGE_OVER_LIMIT: frozenset({Category.CONNECTION_FAILURE}),
}


def evidence(injected: Injected, seen: Seen) -> str:
    """The evidence that a fault happened, in words; empty if there is none."""
    kind, how = injected.fault.kind, injected.fault.intensity
    if kind in ENDS:
        return _processes(seen, GONE, "ended")
    if stopped := _processes(seen, STOPPED, "were stopped"):
        return stopped
    if logged := _logged(kind, seen):
        return logged
    match kind:
        case FaultKind.SUPERVISOR_DEATH if seen.term_after > seen.term_before:
            return f"the supervisor's term went from {seen.term_before} to {seen.term_after}"
        case FaultKind.FULL_DISK:
            return _processes(seen, "mute", "can't write to files")
        case FaultKind.CLOCK_STEP if seen.skew_seconds is not None:
            return _skew(how, seen.skew_seconds)
        case FaultKind.TAB_HIDDEN if seen.visibility == "hidden":
            return "the page reports that it is hidden"
        case FaultKind.MEMORY_EXHAUSTION if how is not Intensity.MILD:
            return _processes(seen, "limited", "have a memory limit")
        case FaultKind.MEMORY_EXHAUSTION if seen.grown_bytes >= _GROWTH_MIN_BYTES:
            return f"the browser has grown by {seen.grown_bytes >> 20} MiB"
        case FaultKind.WRONG_ANSWER if "wrong" in seen.answers:
            return "an answer of the browser was wrong"
        case FaultKind.MESSAGE_OVER_LIMIT if "too_large" in seen.answers:
            return "an operation's answer was too large"
    return ""


def _processes(seen: Seen, state: str, words: str) -> str:
    pids = [str(pid) for pid, now in seen.processes.items() if now == state]
    # Some of a page's processes are spare ones, which may have ended before.
    if not pids or (state == GONE and len(pids) < len(seen.processes)):
        return ""
    return f"processes {', '.join(pids)} {words}"


def _logged(kind: FaultKind, seen: Seen) -> str:
    wanted = _LOGGED.get(kind, frozenset())
    for failure in seen.noticed:
        if failure.category in wanted:
            return f"the supervisor logged {failure.category} ({failure.what})"
    return ""


def _skew(how: Intensity, skew: float) -> str:
    ahead = CLOCK_STEP_SECONDS[how]
    return f"the log's clock jumped by {skew:.0f} s" if abs(skew - ahead) < _SKEW_SECONDS else ""


def judged(injected: Injected, noticed: Sequence[Noticed]) -> bool:
    """Whether the supervisor detected a fault as the right category; a harmless one, not at all."""
    dose = injected.fault.dose
    own = [failure for failure in noticed if failure.epoch == injected.epoch or failure.model]
    if injected.fault.kind in (FaultKind.LAUNCH_FAILURE, FaultKind.API_ERROR):
        own = list(noticed)  # these affect the next incarnation
    if not dose.noticed:
        return not own
    return any(f.category in dose.noticed for f in own) or (dose.quiet and not own)
