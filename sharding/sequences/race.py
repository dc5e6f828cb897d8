"""One step of a stage, on as many browsers as needed for an answer that can be accepted.

Browsers that fail are retried or dropped, a late step is hedged, the answers of replicas are
compared. This module must not know what a step computes, nor how a copy catches up with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeAlias

from recovery.errors import SequenceLost
from recovery.failures import Category, Failure, Scope, categorize_browser_failure
from recovery.levels import COPIES_MAX, copies_wanted
from recovery.records import HostRef
from recovery.sequences import MISADDRESSED, RecoveryAction, recovery_action
from recovery.voting import Elected, Undecided
from sharding.models.frames import Array
from sharding.sequences.context import StageContext
from sharding.sequences.copies import Copies, Copy
from sharding.sequences.hedging import Hedge
from sharding.sequences.history import RecordedStep
from sharding.sequences.hosts import StepReply
from sharding.sequences.votes import Votes

_RETRY_SECONDS = 0.05  # before the same page is retried
_LAG_MAX = 4  # steps that a copy may be behind the others before it is dropped

# A copy's answer to the step: within so many seconds, after a pause of so many.
Advance: TypeAlias = Callable[[Copy, float, float], Coroutine[None, None, StepReply]]


class Race:
    """One step of one stage. Call `run`, then always `release`."""

    def __init__(
        self, context: StageContext, copies: Copies, step: RecordedStep, advance: Advance
    ) -> None:
        self._context = context
        self._rules = context.rules
        self._copies = copies
        self._step = step
        self._advance = advance
        self._tasks: dict[asyncio.Task[StepReply], Copy] = {}
        self._votes = Votes(context.rules)
        self._avoid: set[HostRef] = set()
        self._failures = 0
        self._first: Failure | None = None
        self._clock = context.events.clock
        self._began = self._clock()
        late_seconds = context.hosts.late_after(context.stage.model, step.tokens)
        self._hedge = Hedge(context.rules.level, self._began, late_seconds, self._clock)

    async def run(self) -> Mapping[str, Array]:
        """The accepted answer. Raises `SequenceLost`."""
        end = self._began + self._rules.step_seconds
        for copy in self._copies:
            self._send(copy, end)
        while True:
            answer = self._accepted_answer()
            if answer is not None:
                return answer
            short = not self._add_copies(end)
            left = end - self._clock()
            if left <= 0:
                raise self._sequence_lost(self._why_late())
            if not self._tasks and self._readmitted():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            await self._wait(left, short=short)
            for task in [task for task in self._tasks if task.done()]:
                await self._handle_reply(self._tasks.pop(task), task.result(), end)

    async def _wait(self, left: float, *, short: bool) -> None:
        """Wait for an answer, until a hedge is due, or (if `short`) until the hosts change."""
        waiting: set[asyncio.Future[Any]] = set(self._tasks)
        changes = None
        if short or not self._tasks:
            changes = asyncio.create_task(self._context.hosts.change(left), name="change")
            waiting.add(changes)
        until_late = self._hedge.until_late()
        try:
            await asyncio.wait(
                waiting,
                timeout=min(left, until_late if until_late > 0 else left),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            if changes is not None:
                changes.cancel()
                await asyncio.gather(changes, return_exceptions=True)

    def release(self) -> None:
        """Cancel what is still under way, and drop those copies: their state is unknown."""
        for task, copy in self._tasks.items():
            task.cancel()
            self._copies.drop(copy, forget=True)
        self._tasks = {}

    # -- sending -----------------------------------------------------------------------------------

    def _send(self, copy: Copy, end: float, pause: float = 0.0) -> None:
        seconds = max(end - self._clock(), 0.0)
        work = self._advance(copy, seconds, pause)
        self._tasks[asyncio.create_task(work, name="stage")] = copy

    def _add_copies(self, end: float) -> bool:
        """Start the step on as many browsers as wanted; False if there are too short_of_quorum."""
        late = self._hedge.late
        wanted = copies_wanted(self._rules.level, len(self._votes), len(self._tasks), late=late)
        while len(self._votes) + len(self._tasks) < wanted:
            waited_for = [copy.ref for copy in self._tasks.values()]
            copy = self._copies.new(self._avoid | self._votes.voters())
            if copy is None:
                return False
            if late and waited_for and not self._hedge.taken:
                self._hedge.taken = True
                began = self._began
                why = f"no answer of {waited_for[0]} within {self._clock() - began:.3f} s"
                self._context.record("hedged", copy.ref, self._step.position, began, why)
            self._send(copy, end)
        return True

    async def _handle_reply(self, copy: Copy, reply: StepReply, end: float) -> None:
        if copy.dropped:
            return
        if reply.tensors is not None:
            copy.retries = 0
            self._context.events.statistics.in_page_ms += reply.in_page_ms
            self._votes.add(copy, reply.tensors)
        elif reply.failure is None:
            self._send(copy, end, _RETRY_SECONDS)
        else:
            await self._failed(copy, reply.failure, end)

    # -- failures ----------------------------------------------------------------------------------

    async def _failed(self, copy: Copy, failure: Failure, end: float) -> None:
        misaddressed = failure.evidence.get("what") in MISADDRESSED
        self._failures += not misaddressed
        self._first = self._first or failure
        rules = self._rules
        decision = recovery_action(
            rules.level, failure, self._failures, rules.failures_max, copy.retries
        )
        self._context.record(
            "failed", copy.ref, self._step.position, self._began, str(failure.category), failure
        )
        if decision is RecoveryAction.ASK_AGAIN:
            copy.retries += 1
            self._send(copy, end, _RETRY_SECONDS)
            return
        alive = misaddressed or failure.scope is Scope.OPERATION
        # A browser that is cut off may reconnect, and would keep caches that nobody needs.
        self._copies.drop(copy, forget=alive or failure.category is Category.CONNECTION_FAILURE)
        self._avoid.add(copy.ref)
        if not alive:
            await self._context.hosts.exclude(copy.ref)
        if decision is RecoveryAction.GIVE_UP and not self._tasks and not self._votes:
            why = f"level {rules.level} does not recover from this failure"
            if self._failures > rules.failures_max:
                why = f"{self._failures} attempts failed"
            raise self._sequence_lost(why)

    def _readmitted(self) -> bool:
        """With no copy at work: whether browsers that failed may be tried again.

        Raises `SequenceLost` if there is nothing to wait for.
        """
        if len(self._votes) >= COPIES_MAX:
            raise self._sequence_lost(self._why_undecided())
        if self._failures > self._rules.failures_max:
            raise self._sequence_lost(f"{self._failures} attempts failed")
        readmitted, self._avoid = bool(self._avoid), set()
        return readmitted

    def _why_late(self) -> str:
        if not self._votes.short_of_quorum:
            return self._why_undecided()
        return f"no answer within {self._rules.step_seconds:g} s"

    def _why_undecided(self) -> str:
        return f"no two of {len(self._votes)} answers agree: {self._votes.spread()}"

    def _sequence_lost(self, why: str) -> SequenceLost:
        context = self._context
        return SequenceLost(
            f"stage {context.index} of {context.stage.model} had no answer at position "
            f"{self._step.position}: {why}"
            + (f" (first failure: {self._first})" if self._first else ""),
            failure=self._first,
        )

    # -- accepting an answer -----------------------------------------------------------------------

    def _accepted_answer(self) -> Mapping[str, Array] | None:
        more = self._rules.strict or not self._votes or self._tasks
        if self._votes.short_of_quorum and (more or self._copies.elsewhere(self._avoid)):
            return None
        if len(self._votes) == 1:
            return self._accept_first()
        verdict = self._votes.count()
        if isinstance(verdict, Undecided):
            return None
        self._report_outvoted(verdict)
        winner, answer = self._votes.answer_of(verdict.winner.voter)
        self._copies.accept(winner)
        for task, copy in self._tasks.items():
            if copy.lag > _LAG_MAX:
                task.cancel()
                self._copies.drop(copy, forget=True)
            else:
                self._copies.in_background(self._audit(task, copy), "audit")
        self._tasks = {}
        return answer

    def _accept_first(self) -> Mapping[str, Array]:
        """Accept the first answer; the other copies are dropped."""
        winner, answer = self._votes.first
        for copy in self._copies:
            if copy is not winner:
                self._copies.drop(copy, forget=True)
        for task in self._tasks:
            task.cancel()
        self._tasks = {}
        self._copies.accept(winner)
        return answer

    def _report_outvoted(self, verdict: Elected) -> None:
        context = self._context
        wrong = self._votes.copies_of(verdict.outvoted)
        for copy in [copy for copy in wrong if not copy.dropped]:  # each is reported once
            failure = categorize_browser_failure(
                f"{copy.ref} was outvoted: its answer differs from that of "
                f"{verdict.winner.voter} and another host",
                {"what": "wrong_answer", "ref": copy.ref, "model": context.stage.model},
            )
            context.record(
                "outvoted", copy.ref, self._step.position, self._began, "wrong_answer", failure
            )
            self._copies.drop(copy, forget=True)
            context.hosts.outvoted(copy.ref, failure)

    async def _audit(self, task: asyncio.Task[StepReply], copy: Copy) -> None:
        """Compare an answer that came after the vote; without one, the copy is dropped."""
        reply = await task
        if copy.dropped:
            return
        if reply.tensors is None:
            self._copies.drop(copy, forget=True)
            return
        self._votes.add(copy, reply.tensors)
        verdict = self._votes.count()
        if isinstance(verdict, Elected) and copy.ref in verdict.outvoted:
            self._report_outvoted(Elected(verdict.winner, (), (copy.ref,)))
