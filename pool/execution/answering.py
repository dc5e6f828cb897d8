"""The answering loop of one operation: sends copies, compares answers, retries after failures.

`recovery.answering`, `recovery.levels` and `recovery.voting` decide what to do next; this module
sends, waits and records. It must not know how a browser is reached (`routing` does), nor repair
one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from actors.messages import RunReply, RunRequest
from pool.results import RecoveryStep, Result
from pool.routing import Routing
from recovery.answering import (
    Action,
    AnsweringPolicy,
    Attempt,
    GiveUp,
    Refuse,
    Send,
    WaitForHost,
    next_action,
)
from recovery.errors import BrowserError, PoolBusy
from recovery.failures import Category, Failure, Scope, categorize_browser_failure
from recovery.kinds import Backend, Level
from recovery.levels import COPIES, COPIES_MAX, REDUNDANT, copies_wanted, effective_level
from recovery.records import HostRef, HostStatus, NumericId
from recovery.voting import (
    QUORUM,
    Ballot,
    Elected,
    Tolerance,
    Undecided,
    Verdict,
    count_votes,
    quorum,
)

Tensors: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
Simulate: TypeAlias = Callable[[Tensors, float], Awaitable[RunReply]]

_FROZEN_GRACE_SECONDS = 0.5  # maximum wait past an operation's deadline


@dataclass(frozen=True)
class Question:
    """One operation as it is sent: its model, level and tolerance."""

    op_id: str
    model: str
    op: str
    level: Level
    digest: str = ""
    client: str = ""
    tolerance: Tolerance = field(default_factory=Tolerance)


@dataclass(frozen=True)
class Rules:
    """Rules for all operations of a call.

    `strict`: `critical` needs two answers that agree, even if few browsers are left.
    `late_seconds`: after this, levels with hedging send another copy.
    """

    attempts_max: int = 3
    wait_when_full: bool = True
    strict: bool = True
    late_seconds: float = 1.0


@dataclass(frozen=True)
class _Copy:
    """One copy of the operation, in flight on one host."""

    status: HostStatus
    began: float
    task: asyncio.Task[RunReply | None]


@dataclass(frozen=True)
class _Answer:
    status: HostStatus
    reply: RunReply
    ballot: Ballot


class Answering:
    """The answering loop of one operation.

    `on_wrong(ref, failure)` is called for each outvoted host, also after the answer was returned;
    `on_audit` gets the tasks that wait for those. `on_stuck()` is called when no host is
    available, and returns why waiting can't help, if so. `simulate` computes natively, as the last
    resort; None forbids it.
    """

    def __init__(
        self,
        question: Question,
        rules: Rules,
        routing: Routing,
        rng: random.Random,
        *,
        on_wrong: Callable[[HostRef, Failure], None] = lambda ref, failure: None,
        on_audit: Callable[[asyncio.Task[None]], None] = lambda task: None,
        on_stuck: Callable[[], str] = lambda: "",
        simulate: Simulate | None = None,
    ) -> None:
        self._question = question
        self._rules = rules
        self._routing = routing
        self._rng = rng
        self._on_wrong = on_wrong
        self._on_audit = on_audit
        self._on_stuck = on_stuck
        self._simulate = simulate
        self._begun = time.monotonic()
        self._attempts: list[Attempt] = []
        self._steps: list[RecoveryStep] = []
        self._copies: list[_Copy] = []
        self._answers: list[_Answer] = []
        self._verdict: Verdict = Undecided("")  # on the answers so far
        copies = COPIES[question.level]
        self._policy = AnsweringPolicy(
            question.level, rules.attempts_max * copies, rules.wait_when_full
        )
        self._level_effective = effective_level(question.level, 0)
        self._quorum = quorum(question.level)
        self._sent = False

    async def run(self, tensors: Tensors, seconds: float) -> tuple[Result, RunReply | None]:
        """The answer within `seconds`, or why there is none. Raises `PoolBusy`."""
        end = self._begun + seconds
        try:
            while True:
                seen = self._routing.changes
                settled = self._settled()
                if settled is not None:
                    return settled
                if self._routing.gone is not None:
                    return self._failed(str(self._routing.gone)), None
                stuck = self._send_copies(tensors, end)
                if not self._copies:
                    ended = await self._last_resort(stuck, tensors, end)
                    if ended is not None:
                        return ended
                await self._wait(stuck, end, seen)
        finally:
            for copy in self._copies:
                copy.task.cancel()

    def _begin(self) -> None:
        """Before the first copy: fix the effective level by the browsers ready now."""
        ready = self._ready()
        self._level_effective = effective_level(self._question.level, ready)
        if not self._rules.strict and ready < QUORUM:
            self._quorum = 1
        self._sent = True

    # -- sending ----------------------------------------------------------------------------------

    def _send_copies(self, tensors: Tensors, end: float) -> Action | None:
        """Send the copies that are due; returns what prevented one, if anything did."""
        while len(self._copies) + len(self._answers) < copies_wanted(
            self._question.level, len(self._answers), len(self._copies), late=self._is_late()
        ):
            left = end - time.monotonic()
            sent = [one.status for one in self._copies] + [one.status for one in self._answers]
            action = next_action(
                self._policy,
                self._question.model,
                self._attempts,
                self._routing.candidates(),
                left,
                self._rng,
                coming=self._routing.any_left(self._question.model),
                taken=[status.ref for status in sent],
                engines=[status.browser for status in sent],
            )
            if not isinstance(action, Send):
                return action
            if not self._sent:
                self._begin()
            if self._is_late() and not self._recorded("hedged"):
                ref, at = self._copies[0].status.ref, self._elapsed()
                why = f"no answer within {self._rules.late_seconds:.3f} s"
                self._steps.append(RecoveryStep("hedged", str(ref), at, 0.0, why))
            task = asyncio.create_task(self._send(action.status, tensors, left), name="copy")
            self._copies.append(_Copy(action.status, self._elapsed(), task))
        return None

    def _is_late(self) -> bool:
        if not self._copies:
            return False
        return self._elapsed() - self._copies[0].began >= self._rules.late_seconds

    async def _send(self, status: HostStatus, tensors: Tensors, left: float) -> RunReply | None:
        """One attempt on one host: its answer; None if it had none, which is on record then."""
        question, ref, began = self._question, status.ref, self._elapsed()
        # Two clients may give their operations the same names; a host must not mix them up.
        whole_id = f"{question.client}/{question.op_id}" if question.client else question.op_id
        failed = sum(attempt.failure is not None for attempt in self._attempts)
        last = question.level is Level.NONE or failed + 1 >= self._policy.attempts_max
        request = RunRequest(whole_id, ref, question.model, left, question.digest, last=last)
        try:
            # The browser answers at the deadline at the latest, unless it is frozen itself.
            async with asyncio.timeout(left + _FROZEN_GRACE_SECONDS):
                reply = await self._routing.run(ref, request, tensors)
        except (BrowserError, TimeoutError) as error:
            fields = error.fields if isinstance(error, BrowserError) else {}
            failure = categorize_browser_failure(
                error, {**fields, "ref": ref, "op_id": question.op_id, "at": time.time()}
            )
            await self._failed_attempt(ref, failure, began)
            return None
        if reply is None:
            return None  # the table changed under us: choose again
        await self._routing.learn(reply.status)
        if reply.failure is not None:
            if reply.failure.evidence.get("what") in ("replaced", "not_loaded"):
                # Our table was old; nothing was tried, so nothing has failed.
                await self._routing.exclude(ref)
                return None
            await self._failed_attempt(ref, reply.failure, began)
            return None
        if reply.busy:
            return None
        if self._recorded("failed", "hedged"):
            took = self._elapsed() - began
            self._steps.append(RecoveryStep("resubmitted", str(ref), began, took, "answered"))
        return reply

    async def _failed_attempt(self, ref: HostRef, failure: Failure, began: float) -> None:
        self._attempts.append(Attempt(ref, failure))
        took = self._elapsed() - began
        self._steps.append(
            RecoveryStep("failed", str(ref), began, took, str(failure.category), failure)
        )
        gone = failure.category is not Category.CONNECTION_FAILURE and failure.scope in (
            Scope.PAGE,
            Scope.BROWSER,
        )
        if gone:
            await self._routing.exclude(ref)

    # -- waiting ----------------------------------------------------------------------------------

    async def _wait(self, stuck: Action | None, end: float, seen: int) -> None:
        """Wait until a copy ends, another one is due, or (if that can help) the table changes."""
        if not self._copies:
            why = stuck.why if isinstance(stuck, WaitForHost) else ""
            await self._wait_for_table(why, self._patience(end), seen)
            return
        waiting: set[asyncio.Future[Any]] = {copy.task for copy in self._copies}
        changes = None
        if isinstance(stuck, WaitForHost):
            left = max(end - time.monotonic(), 0.0)
            changes = asyncio.create_task(self._routing.change(left, seen), name="change")
            waiting.add(changes)
        try:
            await asyncio.wait(
                waiting, timeout=self._until_late(), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            if changes is not None:
                changes.cancel()
        for copy in [copy for copy in self._copies if copy.task.done()]:
            self._copies.remove(copy)
            reply = copy.task.result()
            if reply is not None:
                self._answers.append(self._answer(copy.status, reply))
                if self._quorum > 1:
                    self._verdict = self._count()

    def _until_late(self) -> float | None:
        if self._is_late() or self._question.level not in REDUNDANT:
            return None  # each copy has its own limit
        return self._copies[0].began + self._rules.late_seconds - self._elapsed()

    async def _wait_for_table(self, why: str, seconds: float, seen: int) -> None:
        began = self._elapsed()
        await self._routing.change(seconds, seen)
        if self._steps:
            took = self._elapsed() - began
            last = self._steps[-1]
            if last.what == "waited":  # one step, even after several changes
                self._steps.pop()
                began, took = last.at, took + last.seconds
            self._steps.append(RecoveryStep("waited", "", began, took, why))

    def _patience(self, end: float) -> float:
        """How long to wait for a browser; leaves time for the native runtime."""
        left = end - time.monotonic()
        if self._simulate is None:
            return left
        return max(left - (end - self._begun) / 2, 0.0)

    # -- coming to an end -------------------------------------------------------------------------

    async def _last_resort(
        self, stuck: Action | None, tensors: Tensors, end: float
    ) -> tuple[Result, RunReply | None] | None:
        """With no copy in flight: wait on (None), refuse, compute natively, or give up."""
        left = end - time.monotonic()
        if len(self._answers) >= COPIES[Level.CRITICAL] and not self._others():
            return self._failed(self._with_spread("no other browser is available")), None
        match stuck:
            case Refuse(why):
                raise PoolBusy(f"{why}; pass when_full='wait', or add browsers.")
            case GiveUp(why):
                pass
            case _:
                why = stuck.why if isinstance(stuck, WaitForHost) else "no browser answered"
                hopeless = self._on_stuck() if stuck is not None else ""
                if not hopeless and self._patience(end) > 0:
                    return None
                why = hopeless or why
        if self._simulate is not None and left > 0:
            return await self._simulated(why, tensors, left, final=isinstance(stuck, GiveUp))
        return self._failed(self._with_spread(why)), None

    def _others(self) -> bool:
        """Whether another browser in service has the model."""
        answered = {answer.status.ref for answer in self._answers}
        if len(answered) >= COPIES_MAX:
            return False
        return any(
            status.ref not in answered and status.can_take(self._question.model)
            for status in self._routing.candidates()
        )

    async def _simulated(
        self, why: str, tensors: Tensors, left: float, *, final: bool
    ) -> tuple[Result, RunReply | None] | None:
        """The native answer. None: it failed, but a browser may still be ready in time."""
        assert self._simulate is not None
        began = self._elapsed()
        try:
            async with asyncio.timeout(left):
                reply = await self._simulate(tensors, left)
        except (BrowserError, TimeoutError) as error:
            self._simulate = None  # try once
            if not final:
                return None
            return self._failed(f"{why}; the native runtime failed, too: {error}"), None
        took = self._elapsed() - began
        self._steps.append(RecoveryStep("simulated", str(reply.status.ref), began, took, why))
        result = self._answered(reply.status, reply)
        return replace(result, simulated=True, level_effective=Level.NONE), reply

    def _settled(self) -> tuple[Result, RunReply | None] | None:
        """The result, once enough answers agree."""
        if len(self._answers) < self._quorum:
            return None
        if self._quorum == 1:
            first = self._answers[0]
            self._release(_ended)
            return self._answered(first.status, first.reply), first.reply
        verdict = self._verdict
        if not isinstance(verdict, Elected):
            return None
        for ref in verdict.outvoted:
            self._outvoted(ref, verdict.winner.voter)
        winner = next(a for a in self._answers if a.ballot is verdict.winner)
        self._release(partial(self._compare, verdict))
        result = self._answered(winner.status, winner.reply)
        votes = {"votes": float(len(verdict.supporters)), "doubtful": float(len(verdict.doubtful))}
        return replace(result, metrics={**result.metrics, **votes}), winner.reply

    def _release(self, follow: Callable[[_Copy], Coroutine[Any, Any, None]]) -> None:
        """Let copies in flight finish in the background; until then their hosts count as busy.

        `follow` handles the outcome of each.
        """
        rest, self._copies = self._copies, []
        for copy in rest:
            self._on_audit(asyncio.create_task(follow(copy), name="audit"))

    async def _compare(self, verdict: Elected, copy: _Copy) -> None:
        reply = await copy.task
        if reply is None:
            return
        late = self._answer(copy.status, reply)
        again = self._count(late)
        if isinstance(again, Elected) and copy.status.ref in again.outvoted:
            self._outvoted(copy.status.ref, verdict.winner.voter)

    def _outvoted(self, ref: HostRef, by: HostRef) -> None:
        failure = categorize_browser_failure(
            f"{ref} was outvoted: its answer differs from that of {by} and another",
            {
                "what": "wrong_answer",
                "ref": ref,
                "op_id": self._question.op_id,
                "at": time.time(),
                "model": self._question.model,
            },
        )
        self._attempts.append(Attempt(ref, failure))
        at = self._elapsed()
        self._steps.append(RecoveryStep("outvoted", str(ref), at, 0.0, "wrong_answer", failure))
        self._on_wrong(ref, failure)

    def _with_spread(self, why: str) -> str:
        if self._quorum == 1 or not self._answers:
            return why
        if len(self._answers) == 1:
            return f"only one browser answered, and level critical needs two: {why}"
        if isinstance(self._verdict, Elected):
            return why
        return f"no two of {len(self._answers)} answers agree: {self._verdict.spread}; {why}"

    def _count(self, *late: _Answer) -> Verdict:
        ballots = [answer.ballot for answer in (*self._answers, *late)]
        return count_votes(ballots, self._question.tolerance)

    # -- results ----------------------------------------------------------------------------------

    def _ready(self) -> int:
        model = self._question.model
        return sum(status.serves(model) for status in self._routing.candidates())

    def _answer(self, status: HostStatus, reply: RunReply) -> _Answer:
        numeric = reply.status.models.get(self._question.model) or status.models.get(
            self._question.model, NumericId("", reply.backend or Backend.WASM)
        )
        return _Answer(status, reply, Ballot(status.ref, numeric, reply.outputs or {}))

    def _recorded(self, *what: str) -> bool:
        return any(step.what in what for step in self._steps)

    def _elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _first_failure(self) -> Failure | None:
        return next((a.failure for a in self._attempts if a.failure is not None), None)

    def _answered(self, status: HostStatus, reply: RunReply) -> Result:
        return Result(
            self._question.op_id,
            self._question.model,
            self._question.op,
            success=True,
            level_effective=self._level_effective,
            browser_id=status.ref.browser_id,
            browser_type=status.browser,
            epoch=status.ref.epoch,
            backend=reply.backend,
            recovery=tuple(self._steps),
            original_error=self._first_failure(),
            metrics={
                "duration_ms": self._elapsed() * 1e3,
                "in_page_ms": reply.in_page_ms,
                "queue_ms": max(reply.host_ms - reply.in_page_ms, 0.0),
                "bytes_out": float(reply.bytes),
                "attempts": float(
                    len(self._attempts) + max(len(self._answers), 1) + len(self._copies)
                ),
            },
        )

    def _failed(self, why: str) -> Result:
        first = self._first_failure()
        return Result(
            self._question.op_id,
            self._question.model,
            self._question.op,
            success=False,
            level_effective=self._level_effective,
            recovery=tuple(self._steps),
            original_error=first,
            error=f"{why} (first failure: {first})" if first else why,
            metrics={
                "duration_ms": self._elapsed() * 1e3,
                "attempts": float(len(self._attempts) + len(self._copies)),
            },
        )


async def _ended(copy: _Copy) -> None:
    await copy.task
