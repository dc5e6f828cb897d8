"""One step of a stage in as many browsers as it takes, with the copies' answers on paper."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque

import numpy as np
import pytest

from recovery.errors import SequenceLost
from recovery.kinds import Level
from recovery.records import HostRef
from sharding.sequences.copies import Copies, Copy
from sharding.sequences.history import RecordedStep
from sharding.sequences.hosts import StepReply
from sharding.sequences.race import Race
from tests.stage_hosts import A, B, C, PaperHosts, context_of, fails

D = HostRef("d")
STEP = RecordedStep(7, 1, {})
SLOW = 0.15


def says(number: float) -> StepReply:
    return StepReply({"sent": np.array([number], np.float32)}, in_page_ms=2.0)


class Match:
    """A race whose copies answer what `replies` says, a reply that is a number after `SLOW`."""

    def __init__(self, hosts: PaperHosts, level: Level, **options) -> None:
        self.hosts = hosts
        self.context = context_of(hosts, level, **options)
        self.copies = Copies(self.context, Counter())
        self.replies: dict[HostRef, deque] = defaultdict(deque)
        self.asked: list[HostRef] = []

    async def advance(self, copy: Copy, seconds: float, pause: float) -> StepReply:
        copy.lag += 1
        try:
            await asyncio.sleep(pause)
            self.asked.append(copy.ref)
            reply = self.replies[copy.ref].popleft() if self.replies[copy.ref] else says(1)
            if isinstance(reply, float):
                await asyncio.sleep(SLOW)
                reply = says(reply)
            return reply
        finally:
            copy.lag -= 1

    async def run(self) -> float:
        race = Race(self.context, self.copies, STEP, self.advance)
        try:
            answer = await race.run()
        finally:
            race.release()
        return float(answer["sent"][0])

    def happened(self) -> list[tuple[str, str]]:
        return [(step.what, step.where) for step in self.context.events.statistics.events]


async def test_one_browser_takes_the_step_and_is_believed():
    match = Match(PaperHosts(A, B), Level.MEDIUM)
    assert await match.run() == 1
    assert match.asked == [A]
    assert match.copies.at == A
    assert match.context.events.statistics.in_page_ms == 2
    assert match.happened() == []


async def test_browser_that_failed_is_left_for_another_and_distrusted():
    match = Match(PaperHosts(A, B), Level.MEDIUM)
    match.replies[A].append(fails("browser_exited"))
    assert await match.run() == 1
    assert match.asked == [A, B]
    assert match.hosts.excluded == [A]
    assert match.happened() == [("failed", "a#0")]
    assert [copy.ref for copy in match.copies] == [B]


async def test_page_that_was_cut_off_is_asked_again():
    match = Match(PaperHosts(A, B), Level.MEDIUM)
    match.replies[A].append(fails("socket_closed"))
    assert await match.run() == 1
    assert match.asked == [A, A]
    assert match.hosts.excluded == []
    assert [copy.retries for copy in match.copies] == [0]


async def test_busy_page_is_asked_again_and_nothing_told():
    match = Match(PaperHosts(A), Level.NONE)
    match.replies[A].append(StepReply(busy=True))
    assert await match.run() == 1
    assert match.asked == [A, A]
    assert match.happened() == []


async def test_level_that_survives_nothing_says_so():
    match = Match(PaperHosts(A, B), Level.NONE)
    match.replies[A].append(fails("browser_exited"))
    with pytest.raises(
        SequenceLost, match=r"position 7: level none does not recover from this.*first"
    ):
        await match.run()
    assert match.asked == [A]


async def test_too_many_failures_of_one_step_end_the_sequence():
    match = Match(PaperHosts(A, B, C), Level.MEDIUM, failures_max=1)
    for ref in (A, B, C):
        match.replies[ref].append(fails("browser_exited", ref))
    with pytest.raises(SequenceLost, match="2 attempts failed") as lost:
        await match.run()
    assert match.asked == [A, B]
    assert lost.value.fields["failure"].evidence["what"] == "browser_exited"


async def test_step_without_any_browser_ends_in_time():
    match = Match(PaperHosts(), Level.MEDIUM, step_seconds=0.1)
    with pytest.raises(SequenceLost, match=r"no answer within 0\.1 s"):
        await match.run()


async def test_late_browser_is_hedged_once_and_let_go():
    match = Match(PaperHosts(A, B, C), Level.HIGH)
    match.hosts.late_seconds = SLOW / 5
    match.replies[A].append(1.0)
    match.replies[B].append(1.0)
    assert await match.run() == 1
    assert match.asked == [A, B]
    assert match.happened() == [("hedged", "b#0")]
    assert len(match.copies) == 1


async def test_at_critical_the_one_that_differs_is_charged_and_let_go():
    match = Match(PaperHosts(A, B, C), Level.CRITICAL)
    match.replies[A].append(says(5))
    assert await match.run() == 1
    assert sorted(match.asked) == [A, B, C]
    assert match.hosts.charged == [A]
    assert match.happened() == [("outvoted", "a#0")]
    assert [copy.ref for copy in match.copies] == [B, C]


async def test_answer_that_comes_after_the_vote_is_compared_too():
    match = Match(PaperHosts(A, B, C), Level.CRITICAL)
    match.replies[C].append(5.0)
    assert await match.run() == 1
    assert match.hosts.charged == []
    await asyncio.sleep(2 * SLOW)
    assert match.hosts.charged == [C]
    assert [copy.ref for copy in match.copies] == [A, B]


async def test_copy_that_fails_after_the_vote_is_let_go_but_not_charged():
    match = Match(PaperHosts(A, B, C), Level.CRITICAL)
    advance = match.advance

    async def late(copy, seconds, pause):
        if copy.ref == C:
            await asyncio.sleep(SLOW)
            return fails("browser_exited", C)
        return await advance(copy, seconds, pause)

    match.advance = late
    assert await match.run() == 1
    await asyncio.sleep(2 * SLOW)
    assert match.hosts.charged == []
    assert [copy.ref for copy in match.copies] == [A, B]


async def test_copy_that_is_too_far_behind_is_let_go():
    match = Match(PaperHosts(A, B, C), Level.CRITICAL)
    for _ in range(3):
        match.copies.new(set())
    *_, last = match.copies
    last.lag = 5
    match.replies[C].append(1.0)
    assert await match.run() == 1
    assert last.dropped
    assert [copy.ref for copy in match.copies] == [A, B]


async def test_answers_that_never_agree_end_the_sequence_with_how_far_apart_they_are():
    match = Match(PaperHosts(A, B, C, D), Level.CRITICAL, step_seconds=0.3)
    for number, ref in enumerate((A, B, C, D)):
        match.replies[ref].append(says(10.0**number))
    with pytest.raises(SequenceLost, match=r"no two of \d answers agree: "):
        await match.run()


async def test_lone_answer_at_critical_is_believed_only_if_the_rules_are_not_strict():
    lenient = Match(PaperHosts(A), Level.CRITICAL, strict=False)
    assert await lenient.run() == 1
    with pytest.raises(SequenceLost):
        await Match(PaperHosts(A), Level.CRITICAL, step_seconds=0.1).run()


async def test_what_is_under_way_when_a_race_ends_is_let_go():
    match = Match(PaperHosts(A), Level.MEDIUM)
    match.replies[A].append(1.0)
    race = Race(match.context, match.copies, STEP, match.advance)
    running = asyncio.create_task(race.run())
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    race.release()
    assert not len(match.copies)
    await asyncio.sleep(0.01)
    assert match.hosts.asked("forget")
