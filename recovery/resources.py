"""Resource limits: which models to park, browsers to recycle and loads to refuse.

Pure functions of measurements; the caller measures and carries out the result. One step at a time:
its effect must be measured before the next. This module must not read a clock, a process or a
node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

MIB = 2**20
SWOLLEN_RATIO = 1.5  # of the pool's median: a larger browser is swollen


@dataclass(frozen=True)
class ResourceLimits:
    """When memory is short, and when a browser is overused. Fractions are of a node's memory."""

    memory_low: float = 0.15  # less available: idle models are parked, swollen browsers recycled
    memory_min: float = 0.08  # a load whose peak would leave less is refused
    idle_seconds: float = 30.0  # a model or browser unused for so long is idle
    # A browser beyond one of these limits (age, operations, memory) is restarted. 0: no limit.
    recycle_seconds: float = 0.0
    recycle_operations: int = 0
    recycle_bytes: int = 0  # must exceed a new browser with its models, or it never stops


@dataclass(frozen=True)
class NodeLoad:
    """A node's memory, all of it and what is available. With `memory_bytes` 0 it is unknown."""

    node: str
    memory_bytes: int
    available_bytes: int

    def has_less_than(self, fraction: float, taken_bytes: int = 0) -> bool:
        left = self.available_bytes - taken_bytes
        return self.memory_bytes > 0 and left < fraction * self.memory_bytes


@dataclass(frozen=True)
class BrowserLoad:
    """A browser as it was measured. With `memory_bytes` 0 its memory is unknown."""

    browser_id: str
    epoch: int
    node: str
    age_seconds: float
    served: int  # operations since it was started
    memory_bytes: int
    queue: int  # operations admitted and not answered
    idle_seconds: float  # since its last operation, or its start
    ready: bool
    models: Mapping[str, float]  # name -> seconds since its last use here, or since it was loaded
    kind: str = ""  # its engine


@dataclass(frozen=True)
class Park:
    """Unload an idle model from every browser; it is loaded again at its next use."""

    model: str
    why: str


@dataclass(frozen=True)
class Recycle:
    """Restart an idle browser. `epoch`: the measured incarnation; a later one is not restarted."""

    browser_id: str
    epoch: int
    why: str


def relieve(
    limits: ResourceLimits,
    nodes: Iterable[NodeLoad],
    browsers: Sequence[BrowserLoad],
    *,
    recycling: bool = False,
) -> tuple[Park | Recycle, ...]:
    """What to do now: at most one `Park` and one `Recycle`, in this order.

    `recycling`: a browser is being recycled already, so no other is. A busy browser never is.
    """
    short = {load.node: load for load in nodes if load.has_less_than(limits.memory_low)}
    park = _park(limits, short, browsers)
    recycle = None
    if not recycling:
        recycle = _recycle_overused(limits, browsers)
        if recycle is None and park is None:
            recycle = _recycle_swollen(limits, short, browsers)
    return tuple(action for action in (park, recycle) if action is not None)


def refuse_load(
    limits: ResourceLimits,
    nodes: Iterable[NodeLoad],
    browsers: Iterable[BrowserLoad],
    peak_bytes: int,
) -> str:
    """Why a model can't be loaded now, in words; empty if it can.

    All ready browsers of a node load it at once, and each holds `peak_bytes` at its peak. Of
    several nodes that are too small, the one that lacks most is named.
    """
    counts: dict[str, int] = {}
    for browser in browsers:
        if browser.ready:
            counts[browser.node] = counts.get(browser.node, 0) + 1
    refused = [
        load
        for load in nodes
        if load.node in counts
        and load.has_less_than(limits.memory_min, taken_bytes=peak_bytes * counts[load.node])
    ]
    if not refused:
        return ""

    def lacking(load: NodeLoad) -> float:
        taken = peak_bytes * counts[load.node]
        return taken + limits.memory_min * load.memory_bytes - load.available_bytes

    worst = min(refused, key=lambda load: (-lacking(load), load.node))
    count = counts[worst.node]
    return (
        f"node {worst.node}: {_mib(peak_bytes * count)} would be needed at the peak "
        f"({count} x {_mib(peak_bytes)}), {_mib(worst.available_bytes)} of "
        f"{_mib(worst.memory_bytes)} are available and "
        f"{_mib(limits.memory_min * worst.memory_bytes)} must stay free, which is "
        f"{_mib(lacking(worst))} too little. Use fewer browsers, unload a model or give the node "
        "more memory."
    )


def _park(
    limits: ResourceLimits, short: Mapping[str, NodeLoad], browsers: Sequence[BrowserLoad]
) -> Park | None:
    """Park the model that is idle longest, of those that hold memory where it is short."""
    idle: dict[str, float] = {}
    helps: set[str] = set()
    for browser in browsers:
        for model, seconds in browser.models.items():
            idle[model] = min(seconds, idle.get(model, seconds))
        if browser.node in short:
            helps.update(browser.models)
    parkable = [model for model in helps if idle[model] >= limits.idle_seconds]
    if not parkable:
        return None
    model = min(parkable, key=lambda model: (-idle[model], model))
    # Of the nodes on which it frees memory, the one that has least is named.
    homes = {browser.node for browser in browsers if model in browser.models}
    tightest = _tightest(load for node, load in short.items() if node in homes)
    return Park(model, f"not used for {idle[model]:.0f} s, and {_shortage(tightest)}")


def _recycle_overused(limits: ResourceLimits, browsers: Sequence[BrowserLoad]) -> Recycle | None:
    overused = [
        (*_usage(limits, browser), browser)
        for browser in browsers
        if _may_be_recycled(limits, browser, browsers)
    ]
    overused = [(ratio, why, browser) for ratio, why, browser in overused if ratio >= 1]
    if not overused:
        return None
    _, why, browser = min(overused, key=lambda entry: (-entry[0], entry[2].browser_id))
    return Recycle(browser.browser_id, browser.epoch, why)


def _recycle_swollen(
    limits: ResourceLimits, short: Mapping[str, NodeLoad], browsers: Sequence[BrowserLoad]
) -> Recycle | None:
    """Recycle the largest browser where memory is short, if it is much larger than others."""
    sizes: dict[str, list[int]] = {}  # by type: they differ by more than that
    for load in browsers:
        if load.ready and load.memory_bytes > 0:
            sizes.setdefault(load.kind, []).append(load.memory_bytes)
    usual = {kind: median(each) for kind, each in sizes.items() if len(each) > 1}
    swollen = [
        browser
        for browser in browsers
        if browser.node in short
        and browser.kind in usual
        and browser.memory_bytes > SWOLLEN_RATIO * usual[browser.kind]
        # One that is as large when new would be recycled again and again.
        and browser.age_seconds >= limits.idle_seconds
        and _may_be_recycled(limits, browser, browsers)
    ]
    if not swollen:
        return None
    browser = min(swollen, key=lambda browser: (-browser.memory_bytes, browser.browser_id))
    why = (
        f"holds {_mib(browser.memory_bytes)} where {_mib(usual[browser.kind])} are usual, and "
        f"{_shortage(short[browser.node])}"
    )
    return Recycle(browser.browser_id, browser.epoch, why)


def _may_be_recycled(
    limits: ResourceLimits, browser: BrowserLoad, browsers: Iterable[BrowserLoad]
) -> bool:
    """Whether its queue is empty, and it has been idle for long or another browser is ready."""
    if not browser.ready or browser.queue > 0:
        return False
    if browser.idle_seconds >= limits.idle_seconds:
        return True
    return any(other.ready for other in browsers if other.browser_id != browser.browser_id)


def _usage(limits: ResourceLimits, browser: BrowserLoad) -> tuple[float, str]:
    """How overused it is, 1 being the limit, and by what."""
    usage = [(0.0, "")]
    if limits.recycle_seconds > 0:
        why = f"{browser.age_seconds:.0f} s old, of at most {limits.recycle_seconds:g} s"
        usage.append((browser.age_seconds / limits.recycle_seconds, why))
    if limits.recycle_operations > 0:
        why = f"served {browser.served} operations, of at most {limits.recycle_operations}"
        usage.append((browser.served / limits.recycle_operations, why))
    if limits.recycle_bytes > 0:
        why = f"holds {_mib(browser.memory_bytes)}, of at most {_mib(limits.recycle_bytes)}"
        usage.append((browser.memory_bytes / limits.recycle_bytes, why))
    return max(usage, key=lambda entry: entry[0])


def _tightest(short: Iterable[NodeLoad]) -> NodeLoad:
    return min(short, key=lambda load: (load.available_bytes / load.memory_bytes, load.node))


def _shortage(load: NodeLoad) -> str:
    available, memory = _mib(load.available_bytes), _mib(load.memory_bytes)
    return f"node {load.node} has {available} of {memory} available"


def _mib(size: float) -> str:
    return f"{size / MIB:.0f} MiB"
