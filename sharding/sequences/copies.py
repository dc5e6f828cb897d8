"""The browsers at work on one stage of a sequence: chosen, fenced, dropped.

Each time the stage is built on a browser it gets a higher fence, so that steps of older copies are
refused. This module must not make caches (`sharding.sequences.rebuild` does) nor judge answers.
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
    """A stage in one browser. `position`: how many positions its page's caches hold."""

    ref: HostRef
    numeric: NumericId
    fence: int
    position: int = 0
    built: bool = False  # whether it has answered a step
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # its steps go one after the other
    lag: int = 0  # steps that it has been given and has not answered
    retries: int = 0  # in a row, without an answer
    dropped: bool = False  # no longer used: its answers are ignored


@dataclass(frozen=True)
class StageStatus:
    """Where a stage is now: the browsers at work on it, first the one whose answer was last taken.

    `position`: how many positions its caches hold there. `rebuilding`: it has answered before, but
    no present copy has.
    """

    refs: tuple[HostRef, ...] = ()
    position: int = 0
    rebuilding: bool = False


class Copies:
    """The copies of a stage. `load` counts the stages of the sequence by browser."""

    def __init__(self, context: StageContext, load: Counter[HostRef]) -> None:
        self._context = context
        self._load = load
        self._copies: list[Copy] = []
        self._fence = 0
        self._background: set[asyncio.Task[None]] = set()
        self._numeric: NumericId | None = None  # of the copy whose answer was accepted last
        self.at: HostRef | None = None  # the browser that gave the stage's last answer

    def __iter__(self) -> Iterator[Copy]:
        return iter(tuple(self._copies))

    def __len__(self) -> int:
        return len(self._copies)

    def new(self, avoid: Collection[HostRef]) -> Copy | None:
        """A further, empty copy, on a browser without one; None if there is no such browser."""
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

    def accept(self, copy: Copy) -> None:
        """This copy's answer was accepted: further copies should have the same numeric id."""
        self._numeric, self.at = copy.numeric, copy.ref

    def only_at(self, position: int) -> Copy | None:
        """The copy, if it is the only one, and is at `position`."""
        if len(self._copies) != 1 or not self._copies[0].built:
            return None
        copy = self._copies[0]
        return None if copy.position != position or copy.lag else copy

    def moved(self, position: int) -> None:
        """The only copy has moved to `position`."""
        self._copies[0].position = position

    def status(self) -> StageStatus:
        """For monitoring."""
        refs = sorted(self._taken(), key=lambda ref: ref != self.at)
        position = max((copy.position for copy in self._copies), default=0)
        built = any(copy.built for copy in self._copies)
        return StageStatus(tuple(refs), position, self.at is not None and not built)

    # -- dropping ----------------------------------------------------------------------------------

    def drop(self, copy: Copy, *, forget: bool) -> None:
        """Stop using a copy. `forget`: have its browser forget the sequence."""
        copy.dropped = True
        if copy in self._copies:
            self._copies.remove(copy)
            self._load[copy.ref] -= 1
            if forget:
                self._send_forget(copy)

    def end(self) -> None:
        """Have every browser forget the sequence, in the background."""
        for copy in self._copies:
            self._send_forget(copy)
        self._copies = []

    def in_background(self, work: Coroutine[None, None, None], name: str) -> None:
        """Run `work` in the background; no step waits for it."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _send_forget(self, copy: Copy) -> None:
        copy.dropped = True
        self.in_background(self._forget(copy), "forget")

    async def _forget(self, copy: Copy) -> None:
        """Send "forget" until a page confirms it; else the page evicts the idle sequence."""
        context = self._context
        order = StepOrder(context.sequence, "forget", copy.fence)
        with contextlib.suppress(RetryError):
            async for attempt in AsyncRetrying(
                retry=retry_if_result(lambda confirmed: not confirmed), **SEQUENCE_FORGOTTEN
            ):
                with attempt:
                    reply = await context.hosts.take(
                        copy.ref, context.stage.model, order, {}, context.rules.step_seconds
                    )
                # After the block, whose end sets its own result.
                attempt.retry_state.set_result(not (reply.busy or _is_cut_off(reply.failure)))


def _is_cut_off(failure: Failure | None) -> bool:
    """Whether the page may reconnect with its caches."""
    if failure is None or failure.evidence.get("what") in MISADDRESSED:
        return False
    return failure.category is Category.CONNECTION_FAILURE
