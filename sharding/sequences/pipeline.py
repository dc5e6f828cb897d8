"""A sequence at work over the stages of a model: step by step, whatever becomes of the browsers.

`Generation` is the coordinator of one sequence. It lives in the caller and holds all that is needed
to go on: the tokens, and of each stage the inputs it has had (`StageMemory`). When a stage is
lost, it is built again in the browser that `recovery.sequences` says and brought to the same
position, by copies of its caches or by its inputs in their original steps; then the sequence goes
on. A stage may be at work in several browsers at once, whose answers are compared. This module must
not know how a browser is reached (`StageHosts` does), and must not repair one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tenacity import AsyncRetrying, RetryError, retry_if_result

from recovery.errors import PageError, SequenceLost
from recovery.failures import Category, Failure, Scope, categorize_browser_failure
from recovery.kinds import Level
from recovery.levels import COPIES_MAX, REDUNDANT
from recovery.policies import SEQUENCE_FORGOTTEN
from recovery.records import HostRef, HostStatus, NumericId
from recovery.sequences import ELSEWHERE, QUORUM, Cure, choose_stage_host, copies_of_stage, cure
from recovery.voting import Ballot, Closeness, Elected, Undecided, count_votes
from sharding.models.frames import Array
from sharding.sequences.caches import CHOICE_IDS, CHOICE_SCORES, StepOrder
from sharding.sequences.decoding import Decoding, choose
from sharding.sequences.history import StageMemory, Taken
from sharding.sequences.stages import Line, Stage

_ASK_AGAIN_SECONDS = 0.05  # before the same page is asked again
_CHAIN_BREAKS_MAX = 3  # in a row, after which the caller asks stage by stage for good
_CHAIN_PART = 0.25  # of the time for a step, after which the caller takes it over from a chain
_HAPPENED_MAX = 1000  # of what is told of one sequence
_CHAIN_MIN = 2  # stages: a single one is asked at once
_LAG_MAX = 4  # steps that a copy of a stage may be behind the others, before it is let go


@dataclass(frozen=True)
class StepReply:
    """A host's answer to an order: tensors, or why there are none. `busy`: ask again."""

    tensors: Mapping[str, Array] | None = None
    failure: Failure | None = None
    busy: bool = False
    in_page_ms: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a stage is, for a chain: what `StepOrder` says of it but the position."""

    stage: Stage
    ref: HostRef
    fence: int
    choice: int | None
    deltas: bool


class Chain(Protocol):
    """A way through all stages that a step goes by itself, from browser to browser."""

    async def step(
        self, position: int, tokens: int, tensors: Mapping[str, Array], seconds: float
    ) -> tuple[list[Mapping[str, Array]], float] | None:
        """What each stage answered, and the milliseconds in all pages. None: see `trouble`."""

    @property
    def trouble(self) -> tuple[str, Failure | None]:
        """Why the last step was not answered, in words, and the failure if there was one."""

    def leave(self) -> None:
        """It is not used any more."""


class StageHosts(Protocol):
    """The browsers, as a sequence sees them."""

    def hosts(self) -> Sequence[HostStatus]:
        """All that are known of."""

    async def take(
        self,
        ref: HostRef,
        model: str,
        order: StepOrder,
        tensors: Mapping[str, Array],
        seconds: float,
    ) -> StepReply:
        """Have `ref` carry out an order on its stage `model`. Raises no `BrowserError`."""

    async def change(self, seconds: float) -> None:
        """Return when something about the hosts may have changed, or after `seconds`."""

    async def distrust(self, ref: HostRef) -> None:
        """This incarnation failed; it is not to be chosen until it is replaced."""

    def outvoted(self, ref: HostRef, failure: Failure) -> None:
        """This incarnation gave a wrong answer."""

    async def chain(
        self, sequence: str, places: Sequence[Place], *, copies: bool, seconds: float
    ) -> Chain | None:
        """A way through these places; None if there is none. `copies`: all answers are wanted."""

    def took(self, model: str, tokens: int, seconds: float) -> None:
        """A step of so many tokens was answered within `seconds`, by the first that was asked."""

    def late_after(self, model: str, tokens: int) -> float:
        """Seconds after which a step of so many tokens is begun elsewhere, too."""


@dataclass(frozen=True)
class PipelineRules:
    """How a sequence is to be kept alive.

    `step_seconds`: within which each step must have an answer, repairs included.
    `copy_bytes_max`: of the caches of one stage that are copied out of the browser (`high` and
    above); beyond it, inputs are kept instead. `history_bytes_max`: of the inputs kept for one
    sequence.
    """

    level: Level = Level.MEDIUM
    failures_max: int = 5  # of one step
    step_seconds: float = 60.0
    copy_bytes_max: int = 256 << 20
    history_bytes_max: int = 512 << 20
    closeness: Closeness = field(default_factory=Closeness)
    strict: bool = True


@dataclass(frozen=True)
class SequenceStep:
    """Something that happened to a sequence besides its steps; `at` and `seconds` since it began.

    `what`: "failed", "interrupted" (a step that went from browser to browser, which the caller then
    takes over; of no stage, -1), "restored" (from copies), "replayed" (from inputs), "hedged",
    "outvoted".
    """

    what: str
    stage: int
    where: str
    position: int
    at: float
    seconds: float
    outcome: str
    failure: Failure | None = None


@dataclass(frozen=True)
class Token:
    """One new token. `scores` (vocabulary,) if they were asked for."""

    id: int
    position: int
    scores: Array | None = None
    step_ms: float = 0.0  # from the step's begin to its answer
    in_page_ms: float = 0.0  # of these, in all pages


@dataclass(frozen=True)
class Standing:
    """Where a stage is now: the browsers at work on it, first the one whose answer was last taken.

    `position`: how many positions its caches hold there. `rebuilding`: it had answered, and no
    copy of it that there is now has.
    """

    refs: tuple[HostRef, ...] = ()
    position: int = 0
    rebuilding: bool = False


@dataclass
class Account:
    """What a sequence has cost so far, in milliseconds and bytes; and what happened to it."""

    in_page_ms: float = 0.0
    steps: int = 0
    copied_bytes: int = 0
    history_bytes: int = 0
    happened: deque[SequenceStep] = field(default_factory=lambda: deque(maxlen=_HAPPENED_MAX))


class Rendezvous:
    """Where the sequences of one model wait while a stage is rebuilt, if they are coordinated.

    All stages then stand at one position of every sequence, between two tokens.
    """

    def __init__(self) -> None:
        self._rebuilding = 0
        self._free = asyncio.Event()
        self._free.set()

    @contextlib.contextmanager
    def rebuilding(self) -> Iterator[None]:
        self._rebuilding += 1
        self._free.clear()
        try:
            yield
        finally:
            self._rebuilding -= 1
            if not self._rebuilding:
                self._free.set()

    async def passable(self) -> None:
        await self._free.wait()


@dataclass
class _Copy:
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


class Generation:
    """One sequence of one model, from its prompt to its last token."""

    def __init__(
        self,
        sequence: str,
        line: Line,
        hosts: StageHosts,
        rules: PipelineRules,
        decoding: Decoding,
        *,
        rendezvous: Rendezvous | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sequence = sequence
        self._line = line
        self._hosts = hosts
        self._rules = rules
        self._decoding = decoding
        self._rendezvous = rendezvous
        self._chain: Chain | None = None
        self._chain_breaks = 0  # in a row
        self._places: list[Place] | None = None  # that the chain leads through, if there is one
        self.account = Account()
        self._began = began = clock()
        self._clock = clock
        load: Counter[HostRef] = Counter()  # stages of this sequence, by browser
        self._workers = [
            _StageWorker(
                index, stage, sequence, hosts, rules, self.account, clock, began, rendezvous, load
            )
            for index, stage in enumerate(line.stages)
        ]

    async def tokens(self, prompt: Sequence[int]) -> AsyncGenerator[Token]:
        """The new tokens, each as soon as it is chosen. Raises `SequenceLost`.

        Ends after `max_new_tokens`, or with the first token of `decoding.stop`. However it ends,
        the browsers are told to forget the sequence.
        """
        ids, position = list(prompt), 0
        try:
            for _ in range(self._decoding.max_new_tokens):
                if self._rendezvous is not None:
                    await self._rendezvous.passable()
                began, in_page = self._clock(), self.account.in_page_ms
                answer = await self._step(ids, position)
                took_ms = (self._clock() - began) * 1e3
                position += len(ids)
                token = self._chosen(answer, position)
                row = _in_order(answer) if self._decoding.logits else None
                yield Token(token, position, row, took_ms, self.account.in_page_ms - in_page)
                if token in self._decoding.stop:
                    return
                ids = [token]
        finally:
            self._leave()
            for worker in self._workers:
                worker.end()

    def _chosen(self, answer: Mapping[str, Array], position: int) -> int:
        try:
            return choose(answer[CHOICE_IDS], answer[CHOICE_SCORES], self._decoding, position)
        except PageError as error:
            raise SequenceLost(f"position {position}: {error}") from error

    def where(self) -> list[HostRef]:
        """The browser of each stage, as far as the sequence has come."""
        return [worker.at for worker in self._workers if worker.at is not None]

    def standings(self) -> list[Standing]:
        """Where every stage is now, for whoever looks on."""
        return [worker.standing() for worker in self._workers]

    @property
    def first_failure(self) -> Failure | None:
        """The earliest failure that the sequence has met, whatever stage it struck."""
        met = [step.failure for step in self.account.happened if step.failure is not None]
        return met[0] if met else None

    async def _step(self, ids: Sequence[int], position: int) -> Mapping[str, Array]:
        inputs = self._line.inputs_of_step(ids, position)
        answer = await self._chained(inputs, position, len(ids))
        if answer is None:
            answer = await self._stage_by_stage(inputs, position, len(ids))
        self.account.steps += 1
        return answer

    async def _stage_by_stage(
        self, inputs: Mapping[str, Array], position: int, tokens: int
    ) -> Mapping[str, Array]:
        """Each stage is asked by the caller, and repaired if it must be.

        A page that has taken this step already answers it again, and computes nothing.
        """
        handed: Mapping[str, Array] = {}
        for worker in self._workers:
            tensors = _taken_by(worker.stage, inputs, handed)
            choice = self._choice(worker.stage)
            handed = await worker.take(Taken(position, tokens, tensors), choice)
        return handed

    async def _chained(
        self, inputs: Mapping[str, Array], position: int, tokens: int
    ) -> Mapping[str, Array] | None:
        """The step's answer by the chain, while every stage is in one place; None: not so."""
        places = [
            worker.place(position, self._choice(worker.stage))
            for worker in (self._workers if QUORUM.get(self._rules.level, 1) == 1 else ())
        ]
        if len(places) < _CHAIN_MIN or self._chain_breaks >= _CHAIN_BREAKS_MAX:
            return None
        whole = [place for place in places if place is not None]
        if len(whole) < len(places):
            self._leave()
            return None
        keeping = self._rules.level not in (Level.NONE, Level.LOW)
        if whole != self._places:
            self._leave()
            self._chain = await self._hosts.chain(
                self._sequence, whole, copies=keeping, seconds=self._rules.step_seconds
            )
            self._places = whole
        if self._chain is None:
            return None
        seconds, kind = self._rules.step_seconds * _CHAIN_PART, f"chain of {self._line.model}"
        if self._rules.level in REDUNDANT:
            seconds = min(self._hosts.late_after(kind, tokens), seconds)
        began = self._clock()
        found = await self._chain.step(position, tokens, inputs, seconds)
        if found is None:
            self._interrupted(position, began)
            return None
        self._chain_breaks = 0
        self._hosts.took(kind, tokens, self._clock() - began)
        answers, in_page_ms = found
        self.account.in_page_ms += in_page_ms
        handed: Mapping[str, Array] = {}
        for worker, answer in zip(self._workers, answers, strict=True):
            if keeping:
                worker.absorb(
                    Taken(position, tokens, _taken_by(worker.stage, inputs, handed)), answer
                )
            worker.moved(position + tokens)
            handed = answer
        return handed

    def _interrupted(self, position: int, began: float) -> None:
        assert self._chain is not None
        self._chain_breaks += 1
        why, failure = self._chain.trouble
        now = self._clock()
        where = str(failure.ref) if failure is not None else ""
        step = SequenceStep(
            "interrupted", -1, where, position, began - self._began, now - began, why, failure
        )
        self.account.happened.append(step)
        self._leave()

    def _choice(self, stage: Stage) -> int | None:
        return self._decoding.candidates if stage.last else None

    def _leave(self) -> None:
        if self._chain is not None:
            self._chain.leave()
        self._chain = self._places = None


def _taken_by(
    stage: Stage, inputs: Mapping[str, Array], handed: Mapping[str, Array]
) -> dict[str, Array]:
    """A stage's inputs, caches left out."""
    shared = {spec.name: inputs[spec.name] for spec in stage.shared}
    return shared | {spec.name: handed[spec.name] for spec in stage.receives}


def _in_order(answer: Mapping[str, Array]) -> Array:
    """All scores by token id, from all candidates."""
    row = answer[CHOICE_SCORES].copy()
    row[answer[CHOICE_IDS]] = answer[CHOICE_SCORES]
    return row


def _is_cut_off(failure: Failure | None) -> bool:
    """Whether the page may be back, with all that it had."""
    if failure is None or failure.evidence.get("what") in ELSEWHERE:
        return False
    return failure.category is Category.CONNECTION_FAILURE


@dataclass(frozen=True)
class Ask:
    """One step and how it is to be answered: of every copy in the same form."""

    step: Taken
    choice: int | None
    deltas: bool


class _StageWorker:
    """One stage of one sequence: where it runs, and what it takes to have its answer."""

    def __init__(
        self,
        index: int,
        stage: Stage,
        sequence: str,
        hosts: StageHosts,
        rules: PipelineRules,
        account: Account,
        clock: Callable[[], float],
        began: float,
        rendezvous: Rendezvous | None,
        load: Counter[HostRef],
    ) -> None:
        self.stage = stage
        self._load = load
        self.index = index
        self._sequence = sequence
        self.hosts = hosts
        self.rules = rules
        self.account = account
        self.clock = clock
        self._began = began
        self._rendezvous = rendezvous
        copying = rules.level in REDUNDANT
        self._memory = StageMemory(stage, copies=copying, copy_bytes_max=rules.copy_bytes_max)
        self._replaying = rules.level not in (Level.NONE, Level.LOW)
        self.copies: list[_Copy] = []
        self._held = self._copied = 0  # bytes in the memory, as last added to the account
        self._fence = 0
        self.numeric: NumericId | None = None  # of the copy whose answers were taken
        self.at: HostRef | None = None  # where its last answer is from
        self._background: set[asyncio.Task[None]] = set()

    # -- one step ----------------------------------------------------------------------------------

    async def take(self, step: Taken, choice: int | None) -> Mapping[str, Array]:
        """The answer to a step: what the stage sends on, or its choice. Raises `SequenceLost`."""
        if self._replaying:
            self._note(step)
        contest = _Contest(self, Ask(step, choice, self._memory.copying))
        try:
            answer = await contest.run()
        finally:
            contest.release()
        if self._replaying:
            self._memory.copy(answer)
            self._tally()
        return answer

    def place(self, position: int, choice: int | None) -> Place | None:
        """Where the stage is, if it is in one browser that stands at `position`."""
        if len(self.copies) != 1 or not self.copies[0].built:
            return None
        copy = self.copies[0]
        if copy.position != position or copy.behind:
            return None
        return Place(self.stage, copy.ref, copy.fence, choice, self._memory.copying)

    def absorb(self, step: Taken, answer: Mapping[str, Array]) -> None:
        """Keep a step that was taken by the chain. Raises `SequenceLost`: too much is kept."""
        self._note(step)
        self._memory.copy(answer)
        self._tally()

    def moved(self, position: int) -> None:
        """The chain has brought the stage to `position`."""
        self.copies[0].position = position

    def _note(self, step: Taken) -> None:
        self._memory.note(step)
        self._tally()
        if self.account.history_bytes > self.rules.history_bytes_max:
            raise SequenceLost(
                f"the inputs kept of this sequence take {self.account.history_bytes:,} bytes; the "
                f"limit is {self.rules.history_bytes_max:,}. Ask for fewer tokens.",
            )

    def _tally(self) -> None:
        held, copied = self._memory.step_bytes, self._memory.copy_bytes
        self.account.history_bytes += held - self._held
        self.account.copied_bytes += copied - self._copied
        self._held, self._copied = held, copied

    def end(self) -> None:
        """Have every browser forget the sequence; nobody waits for that."""
        for copy in self.copies:
            self._let_go(copy)
        self.copies = []

    def _let_go(self, copy: _Copy) -> None:
        copy.gone = True
        self.keep(asyncio.create_task(self._forget(copy), name="forget"))

    async def _forget(self, copy: _Copy) -> None:
        """Tell a page until it has heard; one that never does forgets by itself, in time."""
        order = StepOrder(self._sequence, "forget", copy.fence)
        with contextlib.suppress(RetryError):
            async for attempt in AsyncRetrying(
                retry=retry_if_result(lambda heard: not heard), **SEQUENCE_FORGOTTEN
            ):
                with attempt:
                    reply = await self.hosts.take(
                        copy.ref, self.stage.model, order, {}, self.rules.step_seconds
                    )
                    attempt.retry_state.set_result(not (reply.busy or _is_cut_off(reply.failure)))

    def keep(self, task: asyncio.Task[None]) -> None:
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def standing(self) -> Standing:
        refs = sorted((copy.ref for copy in self.copies), key=lambda ref: ref != self.at)
        position = max((copy.position for copy in self.copies), default=0)
        whole = any(copy.built for copy in self.copies)
        return Standing(tuple(refs), position, self.at is not None and not whole)

    # -- one copy ----------------------------------------------------------------------------------

    def new_copy(self, avoid: set[HostRef]) -> _Copy | None:
        status = choose_stage_host(
            self.hosts.hosts(),
            self.stage.model,
            taken=[copy.ref for copy in self.copies],
            avoid=avoid,
            numeric=self.numeric,
            load=self._load,
        )
        if status is None:
            return None
        self._fence += 1
        copy = _Copy(status.ref, status.models[self.stage.model], self._fence)
        self.copies.append(copy)
        self._load[copy.ref] += 1
        return copy

    def drop(self, copy: _Copy, *, forget: bool) -> None:
        copy.gone = True
        if copy in self.copies:
            self.copies.remove(copy)
            self._load[copy.ref] -= 1
            if forget:
                self._let_go(copy)

    async def advance(self, copy: _Copy, ask: Ask, seconds: float, pause: float = 0.0) -> StepReply:
        """The copy's answer to a step, after it was brought to where the step begins."""
        step = ask.step
        copy.behind += 1
        try:
            async with copy.lock:  # also while it pauses: the next step must not overtake this one
                await asyncio.sleep(pause)
                if copy.gone:
                    return StepReply(busy=True)  # nobody listens
                if copy.position < step.position:
                    lost = await self._catch_up(copy, step.position, seconds)
                    if lost is not None:
                        return lost
                order = StepOrder(
                    self._sequence,
                    "step",
                    copy.fence,
                    step.position,
                    step.tokens,
                    ask.choice,
                    ask.deltas,
                )
                began = self.clock()
                reply = await self.hosts.take(
                    copy.ref, self.stage.model, order, step.tensors, seconds
                )
                if reply.tensors is not None:
                    copy.position, copy.built = step.position + step.tokens, True
                    self.hosts.took(self.stage.model, step.tokens, self.clock() - began)
                return reply
        finally:
            copy.behind -= 1

    async def _catch_up(self, copy: _Copy, position: int, seconds: float) -> StepReply | None:
        """Bring a new copy to `position`. Returns the reply that failed, if one did."""
        began, covered = self.clock(), self._memory.covered
        with self._rendezvous.rebuilding() if self._rendezvous else contextlib.nullcontext():
            if covered:
                caches = self._memory.caches()
                order = StepOrder(self._sequence, "restore", copy.fence, covered)
                reply = await self.hosts.take(copy.ref, self.stage.model, order, caches, seconds)
                if reply.tensors is None:
                    return reply
                copy.position = covered
            rest = self._memory.rest(position)
            for step in rest:
                if step.position < copy.position:
                    continue
                order = StepOrder(self._sequence, "step", copy.fence, step.position, step.tokens)
                reply = await self.hosts.take(
                    copy.ref, self.stage.model, order, step.tensors, seconds
                )
                if reply.tensors is None:
                    return reply
                copy.position = step.position + step.tokens
        what = "restored" if covered else "replayed"
        outcome = f"{covered} positions copied, {len(rest)} steps replayed"
        self.tell(what, copy.ref, position, began, outcome)
        return None

    def tell(
        self,
        what: str,
        where: HostRef,
        position: int,
        began: float,
        outcome: str,
        failure: Failure | None = None,
    ) -> None:
        now = self.clock()
        self.account.happened.append(
            SequenceStep(
                what,
                self.index,
                str(where),
                position,
                began - self._began,
                now - began,
                outcome,
                failure,
            )
        )


class _Contest:
    """One step of a stage, in as many browsers as it takes."""

    def __init__(self, worker: _StageWorker, ask: Ask) -> None:
        self._worker = worker
        self._ask = ask
        self._step = step = ask.step
        self._tasks: dict[asyncio.Task[StepReply], _Copy] = {}
        self._answers: list[tuple[_Copy, Mapping[str, Array]]] = []
        self._avoid: set[HostRef] = set()
        self._failures = 0
        self._first: Failure | None = None
        self._began = worker.clock()
        self._late_seconds = worker.hosts.late_after(worker.stage.model, step.tokens)
        self._hedged = False

    async def run(self) -> Mapping[str, Array]:
        """The answer that may be believed. Raises `SequenceLost`."""
        worker = self._worker
        end = self._began + worker.rules.step_seconds
        for copy in worker.copies:
            self._send(copy, end)
        while True:
            answer = self._settled()
            if answer is not None:
                return answer
            short = not self._reinforce(end)
            left = end - worker.clock()
            if left <= 0:
                raise self._lost(self._why_late())
            if not self._tasks and self._pardoned():
                await asyncio.sleep(_ASK_AGAIN_SECONDS)
                continue
            await self._wait(left, short=short)
            for task in [task for task in self._tasks if task.done()]:
                await self._take_in(self._tasks.pop(task), task.result(), end)

    async def _wait(self, left: float, *, short: bool) -> None:
        """Until an answer is here, another browser should be asked, or (if `short`) may be."""
        waiting: set[asyncio.Future[Any]] = set(self._tasks)
        changes = None
        if short or not self._tasks:
            changes = asyncio.create_task(self._worker.hosts.change(left), name="change")
            waiting.add(changes)
        until_late = self._until_late()
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

    def _why_late(self) -> str:
        if len(self._answers) >= QUORUM.get(self._worker.rules.level, 1):
            return f"no two of {len(self._answers)} answers agree: {self._spread()}"
        return f"no answer within {self._worker.rules.step_seconds:g} s"

    def release(self) -> None:
        """Stop what is still under way: those copies are in no known state."""
        for task, copy in self._tasks.items():
            task.cancel()
            self._worker.drop(copy, forget=True)
        self._tasks = {}

    def _send(self, copy: _Copy, end: float, pause: float = 0.0) -> None:
        seconds = max(end - self._worker.clock(), 0.0)
        work = self._worker.advance(copy, self._ask, seconds, pause)
        self._tasks[asyncio.create_task(work, name="stage")] = copy

    def _is_late(self) -> bool:
        """By the time; a new copy, which has to be built first, is given as long again."""
        return self._until_late() <= 0

    def _until_late(self) -> float:
        rules = self._worker.rules
        if self._hedged or rules.level not in REDUNDANT:
            return math.inf
        return self._began + self._late_seconds - self._worker.clock()

    def _reinforce(self, end: float) -> bool:
        """Have the step taken by as many browsers as it should be; whether there are so many."""
        late = self._hedged or self._is_late()
        wanted = copies_of_stage(
            self._worker.rules.level, len(self._answers), len(self._tasks), late=late
        )
        while len(self._answers) + len(self._tasks) < wanted:
            waited_for = [copy.ref for copy in self._tasks.values()]
            copy = self._worker.new_copy(self._avoid | {copy.ref for copy, _ in self._answers})
            if copy is None:
                return False
            if late and waited_for and not self._hedged:
                self._hedged = True
                began = self._began
                why = f"no answer of {waited_for[0]} within {self._worker.clock() - began:.3f} s"
                self._worker.tell("hedged", copy.ref, self._step.position, began, why)
            self._send(copy, end)
        return True

    async def _take_in(self, copy: _Copy, reply: StepReply, end: float) -> None:
        worker, failure = self._worker, reply.failure
        if copy.gone:
            return
        if reply.tensors is not None:
            copy.asked = 0
            worker.account.in_page_ms += reply.in_page_ms
            self._answers.append((copy, reply.tensors))
        elif failure is None:
            self._send(copy, end, _ASK_AGAIN_SECONDS)
        else:
            await self._failed(copy, failure, end)

    async def _failed(self, copy: _Copy, failure: Failure, end: float) -> None:
        worker, elsewhere = self._worker, failure.evidence.get("what") in ELSEWHERE
        self._failures += not elsewhere
        self._first = self._first or failure
        rules = worker.rules
        decision = cure(rules.level, failure, self._failures, rules.failures_max, copy.asked)
        worker.tell(
            "failed", copy.ref, self._step.position, self._began, str(failure.category), failure
        )
        if decision is Cure.ASK_AGAIN:
            copy.asked += 1
            self._send(copy, end, _ASK_AGAIN_SECONDS)
            return
        lives = elsewhere or failure.scope is Scope.OPERATION
        # One that is cut off may be back, and would keep what nobody needs.
        worker.drop(copy, forget=lives or failure.category is Category.CONNECTION_FAILURE)
        self._avoid.add(copy.ref)
        if not lives:
            await worker.hosts.distrust(copy.ref)
        if decision is Cure.GIVE_UP and not self._tasks and not self._answers:
            often = self._failures > rules.failures_max
            why = f"{self._failures} attempts failed" if often else "does not survive that"
            raise self._lost(why if often else f"level {rules.level} {why}")

    def _pardoned(self) -> bool:
        """With nobody at work: whether somebody who failed may be tried again.

        Raises `SequenceLost` if there is nothing to wait for.
        """
        if len(self._answers) >= COPIES_MAX:
            raise self._lost(f"no two of {len(self._answers)} answers agree: {self._spread()}")
        if self._failures > self._worker.rules.failures_max:
            raise self._lost(f"{self._failures} attempts failed")
        pardoned, self._avoid = bool(self._avoid), set()
        return pardoned

    # -- what is believed --------------------------------------------------------------------------

    def _settled(self) -> Mapping[str, Array] | None:
        worker = self._worker
        few = len(self._answers) < QUORUM.get(worker.rules.level, 1)
        more = worker.rules.strict or not self._answers or self._tasks
        if few and (more or self._others()):
            return None
        if len(self._answers) == 1:
            winner, answer = self._answers[0]
            for copy in [copy for copy in worker.copies if copy is not winner]:
                worker.drop(copy, forget=True)
            for task in self._tasks:
                task.cancel()
            self._tasks = {}
            worker.numeric, worker.at = winner.numeric, winner.ref
            return answer
        verdict = self._count()
        if isinstance(verdict, Undecided):
            return None
        self._charge(verdict)
        winner, answer = next(
            (copy, answer) for copy, answer in self._answers if copy.ref == verdict.winner.voter
        )
        worker.numeric, worker.at = winner.numeric, winner.ref
        for task, copy in self._tasks.items():
            if copy.behind > _LAG_MAX:
                task.cancel()
                worker.drop(copy, forget=True)
            else:
                worker.keep(asyncio.create_task(self._audit(task, copy), name="audit"))
        self._tasks = {}
        return answer

    def _others(self) -> bool:
        taken = [copy.ref for copy in self._worker.copies]
        hosts, model = self._worker.hosts.hosts(), self._worker.stage.model
        return choose_stage_host(hosts, model, taken=taken, avoid=self._avoid) is not None

    def _count(self) -> Elected | Undecided:
        ballots = [Ballot(copy.ref, copy.numeric, answer) for copy, answer in self._answers]
        return count_votes(ballots, self._worker.rules.closeness)

    def _spread(self) -> str:
        verdict = self._count()
        return verdict.spread if isinstance(verdict, Undecided) else ""

    def _charge(self, verdict: Elected) -> None:
        worker = self._worker
        wrong = [copy for copy, _ in self._answers if copy.ref in verdict.outvoted]
        for copy in [copy for copy in wrong if not copy.gone]:  # each is charged once
            failure = categorize_browser_failure(
                f"{copy.ref} was outvoted: its answer is not that of {verdict.winner.voter} and "
                "another",
                {"what": "wrong_answer", "ref": copy.ref, "model": worker.stage.model},
            )
            worker.tell(
                "outvoted", copy.ref, self._step.position, self._began, "wrong_answer", failure
            )
            worker.drop(copy, forget=True)
            worker.hosts.outvoted(copy.ref, failure)

    async def _audit(self, task: asyncio.Task[StepReply], copy: _Copy) -> None:
        """Compare an answer that came after the vote; without one, the copy is let go."""
        reply = await task
        if copy.gone:
            return
        if reply.tensors is None:
            self._worker.drop(copy, forget=True)
            return
        self._answers.append((copy, reply.tensors))
        verdict = self._count()
        if isinstance(verdict, Elected) and copy.ref in verdict.outvoted:
            self._charge(Elected(verdict.winner, (), (copy.ref,)))

    def _lost(self, why: str) -> SequenceLost:
        worker = self._worker
        return SequenceLost(
            f"stage {worker.index} of {worker.stage.model} had no answer at position "
            f"{self._step.position}: {why}"
            + (f" (first failure: {self._first})" if self._first else ""),
            failure=self._first,
        )
