"""The browsers at work on one stage of a sequence: chosen, fenced, let go.

Each time the stage is built somewhere it gets a higher fence, so that what an older copy still does
is refused. This module must not make caches (`sharding.sequences.rebuild` does) nor judge answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Coroutine, Iterator
from dataclasses import dataclass, field

from tenacity import AsyncRetrying, RetryError, retry_if_result

from recovery.failures import Category, Failure
from recovery.policies import SEQUENCE_FORGOTTEN
from recovery.records import HostRef, NumericId
from recovery.sequences import MISADDRESSED, choose_stage_host
from sharding.sequences.caches import StepOrder
from sharding.sequences.context import StageContext


@dataclass
class Copy:
    """A stage in one browser. `position`: how many the page is known to hold of this sequence."""

    ref: HostRef
    numeric: NumericId
    fence: int
    position: int = 0
    built: bool = False  # whether it has answered a step
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # its steps go one after the other
    behind: int = 0
    asked: int = 0  # times in a row that it was asked in vain, and is asked again
    gone: bool = False  # let go: what is still said of it means nothing


@dataclass(frozen=True)
class StageStatus:
    """Where a stage is now: the browsers at work on it, first the one whose answer was last taken.

    `position`: how many positions its caches hold there. `rebuilding`: it had answered, and no
    copy of it that there is now has.
    """

    refs: tuple[HostRef, ...] = ()
    position: int = 0
    rebuilding: bool = False


class Copies:
    """Where a stage is at work. `load` counts the stages of the sequence by browser."""

    def __init__(self, context: StageContext, load: Counter[HostRef]) -> None:
        self._context = context
        self._load = load
        self._copies: list[Copy] = []
        self._fence = 0
        self._background: set[asyncio.Task[None]] = set()
        self._numeric: NumericId | None = None  # of the copy whose answers were taken
        self.at: HostRef | None = None  # where the stage's last answer is from

    def __iter__(self) -> Iterator[Copy]:
        return iter(tuple(self._copies))

    def __len__(self) -> int:
        return len(self._copies)

    def new(self, avoid: Collection[HostRef]) -> Copy | None:
        """Another copy, still empty, where nobody is at work yet; None: nowhere."""
        status = choose_stage_host(
            self._context.hosts.hosts(),
            self._context.stage.model,
            taken=self._taken(),
            avoid=avoid,
            numeric=self._numeric,
            load=self._load,
        )
        if status is None:
            return None
        self._fence += 1
        copy = Copy(status.ref, status.models[self._context.stage.model], self._fence)
        self._copies.append(copy)
        self._load[copy.ref] += 1
        return copy

    def elsewhere(self, avoid: Collection[HostRef]) -> bool:
        """Whether there is a browser for another copy."""
        hosts, model = self._context.hosts.hosts(), self._context.stage.model
        return choose_stage_host(hosts, model, taken=self._taken(), avoid=avoid) is not None

    def _taken(self) -> list[HostRef]:
        return [copy.ref for copy in self._copies]

    def believe(self, copy: Copy) -> None:
        """This one's answer was taken: the numbers that others should have, too."""
        self._numeric, self.at = copy.numeric, copy.ref

    def only_at(self, position: int) -> Copy | None:
        """The copy, if there is one alone, and it stands at `position`."""
        if len(self._copies) != 1 or not self._copies[0].built:
            return None
        copy = self._copies[0]
        return None if copy.position != position or copy.behind else copy

    def moved(self, position: int) -> None:
        """The only copy was brought to `position` by others."""
        self._copies[0].position = position

    def status(self) -> StageStatus:
        """For whoever looks on."""
        refs = sorted(self._taken(), key=lambda ref: ref != self.at)
        position = max((copy.position for copy in self._copies), default=0)
        whole = any(copy.built for copy in self._copies)
        return StageStatus(tuple(refs), position, self.at is not None and not whole)

    # -- letting go --------------------------------------------------------------------------------

    def drop(self, copy: Copy, *, forget: bool) -> None:
        """Work with it no more. `forget`: its browser is told."""
        copy.gone = True
        if copy in self._copies:
            self._copies.remove(copy)
            self._load[copy.ref] -= 1
            if forget:
                self._let_go(copy)

    def end(self) -> None:
        """Have every browser forget the sequence; nobody waits for that."""
        for copy in self._copies:
            self._let_go(copy)
        self._copies = []

    def in_background(self, work: Coroutine[None, None, None], name: str) -> None:
        """Have something done for which no step waits."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _let_go(self, copy: Copy) -> None:
        copy.gone = True
        self.in_background(self._forget(copy), "forget")

    async def _forget(self, copy: Copy) -> None:
        """Tell a page until it has heard; one that never does forgets by itself, in time."""
        context = self._context
        order = StepOrder(context.sequence, "forget", copy.fence)
        with contextlib.suppress(RetryError):
            async for attempt in AsyncRetrying(
                retry=retry_if_result(lambda heard: not heard), **SEQUENCE_FORGOTTEN
            ):
                with attempt:
                    reply = await context.hosts.take(
                        copy.ref, context.stage.model, order, {}, context.rules.step_seconds
                    )
                # After the block: its end sets a result of its own.
                attempt.retry_state.set_result(not (reply.busy or _is_cut_off(reply.failure)))


def _is_cut_off(failure: Failure | None) -> bool:
    """Whether the page may be back, with all that it had."""
    if failure is None or failure.evidence.get("what") in MISADDRESSED:
        return False
    return failure.category is Category.CONNECTION_FAILURE
