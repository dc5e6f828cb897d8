"""The answers to one step: how many a level believes, and whose is elected."""

import numpy as np

from recovery.kinds import Level
from recovery.voting import Elected, Undecided
from sharding.sequences.copies import Copy
from sharding.sequences.rules import PipelineRules
from sharding.sequences.votes import Votes
from tests.stage_hosts import NUMERIC, A, B, C


def votes(level: Level, **answers: float) -> Votes:
    made = Votes(PipelineRules(level))
    refs = {"a": A, "b": B, "c": C}
    for name, number in answers.items():
        made.add(Copy(refs[name], NUMERIC, 1), {"sent": np.array([number], np.float32)})
    return made


def test_one_answer_is_few_at_critical_only():
    assert not votes(Level.HIGH, a=1).short_of_quorum
    assert votes(Level.HIGH).short_of_quorum
    assert votes(Level.CRITICAL, a=1).short_of_quorum
    assert not votes(Level.CRITICAL, a=1, b=1).short_of_quorum


def test_two_that_agree_elect_and_outvote_a_third():
    three = votes(Level.CRITICAL, a=2, b=1, c=1)
    verdict = three.count()
    assert isinstance(verdict, Elected)
    winner, answer = three.answer_of(verdict.winner.voter)
    assert (winner.ref, answer["sent"].tolist()) == (B, [1])
    assert [copy.ref for copy in three.copies_of(verdict.outvoted)] == [A]
    assert three.spread() == ""


def test_answers_that_all_differ_elect_nobody_and_say_how_far_apart_they_are():
    two = votes(Level.CRITICAL, a=1, b=5)
    assert isinstance(two.count(), Undecided)
    assert two.spread()


def test_answers_are_in_the_order_in_which_they_came():
    two = votes(Level.CRITICAL, b=1, a=1)
    assert two.first[0].ref == B
    assert two.voters() == {A, B}
    assert len(two) == 2
    assert not votes(Level.CRITICAL)
