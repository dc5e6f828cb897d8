"""Whether a fault really happened, by the word of anybody but the injector: the kernel, the
supervisor's log, the page itself, the answers.

What was seen is gathered by `pool.chaos.watch`; here it is weighed. Pure: nothing is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recovery.failures import Category
from recovery.faults import CLOCK_STEP_SECONDS, FaultKind, Injected, Intensity

GONE, STOPPED = "gone", "stopped"
_SKEW_SECONDS = 30.0  # between what a clock says and what it should
_HELD_BYTES = 256 << 20  # by which a browser must have grown to have been given 512 MiB


@dataclass(frozen=True)
class Noticed:
    """A failure as the supervisor took it in. `what` is the fact behind it, `seq` the event's
    number in the log, `at` wall time in seconds (ours, wherever the supervisor's clock is)."""

    browser_id: str
    epoch: int
    category: str
    what: str
    at: float
    model: str = ""  # of one that could not be loaded
    seq: int = 0


@dataclass(frozen=True)
class Seen:
    """What others saw of a fault.

    `processes`: of each that was hit, "gone", "stopped", "limited" (the kernel lets it grow no
    more), "mute" (it may write no byte) or "there". `noticed`: of its target, from then on.
    `grown_bytes`: of the browser's processes meanwhile. `answers`: what operations got there, in
    words such as "wrong" or a failure's fact. `skew_seconds`: by how much the supervisor's clock is
    further ahead than before, None if nobody could tell. `term_before`, `term_after`: the
    supervisor's.
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
# What the supervisor must have heard of, for kinds of which nothing else tells.
_HEARD: Mapping[FaultKind, frozenset[str]] = {
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
    """What shows that it happened, in words; empty if nothing does."""
    kind, how = injected.fault.kind, injected.fault.intensity
    if kind in ENDS:
        return _processes(seen, GONE, "ended")
    if stopped := _processes(seen, STOPPED, "were stopped"):
        return stopped
    if heard := _heard(kind, seen):
        return heard
    match kind:
        case FaultKind.SUPERVISOR_DEATH if seen.term_after > seen.term_before:
            return f"the supervisor's term went from {seen.term_before} to {seen.term_after}"
        case FaultKind.FULL_DISK:
            return _processes(seen, "mute", "may write no byte")
        case FaultKind.CLOCK_STEP if seen.skew_seconds is not None:
            return _skew(how, seen.skew_seconds)
        case FaultKind.TAB_HIDDEN if seen.visibility == "hidden":
            return "the page says that it is hidden"
        case FaultKind.MEMORY_EXHAUSTION if how is not Intensity.MILD:
            return _processes(seen, "limited", "may grow no more")
        case FaultKind.MEMORY_EXHAUSTION if seen.grown_bytes >= _HELD_BYTES:
            return f"the browser has grown by {seen.grown_bytes >> 20} MiB"
        case FaultKind.WRONG_ANSWER if "wrong" in seen.answers:
            return "an answer from there was wrong"
        case FaultKind.MESSAGE_OVER_LIMIT if "too_large" in seen.answers:
            return "an operation's answer was too large"
    return ""


def _processes(seen: Seen, state: str, words: str) -> str:
    pids = [str(pid) for pid, now in seen.processes.items() if now == state]
    # Of a page's processes some are spare ones, which may have gone by themselves before.
    if not pids or (state == GONE and len(pids) < len(seen.processes)):
        return ""
    return f"processes {', '.join(pids)} {words}"


def _heard(kind: FaultKind, seen: Seen) -> str:
    wanted = _HEARD.get(kind, frozenset())
    for failure in seen.noticed:
        if failure.category in wanted:
            return f"the supervisor logged {failure.category} ({failure.what})"
    return ""


def _skew(how: Intensity, skew: float) -> str:
    ahead = CLOCK_STEP_SECONDS[how]
    return f"the log's clock jumped by {skew:.0f} s" if abs(skew - ahead) < _SKEW_SECONDS else ""


def judged(injected: Injected, noticed: Sequence[Noticed]) -> bool:
    """Whether the supervisor noticed a fault as what it is, or, of one that hurts nobody, not."""
    dose = injected.fault.dose
    own = [failure for failure in noticed if failure.epoch == injected.epoch or failure.model]
    if injected.fault.kind in (FaultKind.LAUNCH_FAILURE, FaultKind.API_ERROR):
        own = list(noticed)  # what is broken is the next incarnation
    if not dose.noticed:
        return not own
    return any(f.category in dose.noticed for f in own) or (dose.quiet and not own)
