"""When a step is late: by the level, by the time, and once."""

import math

import pytest

from recovery.kinds import Level
from sharding.sequences.hedging import Hedge


@pytest.mark.parametrize("level", [Level.NONE, Level.LOW, Level.MEDIUM])
def test_levels_without_another_browser_ready_have_all_the_patience(level):
    hedge = Hedge(level, 0.0, 1.0, lambda: 50.0)
    assert hedge.until_late() == math.inf
    assert not hedge.late


def test_step_is_late_from_the_very_moment():
    now = [10.0]
    hedge = Hedge(Level.HIGH, 10.0, 2.0, lambda: now[0])
    assert hedge.until_late() == 2.0
    assert not hedge.late
    now[0] = 12.0
    assert hedge.late


def test_once_another_was_asked_nobody_is_waited_for_any_more():
    hedge = Hedge(Level.HIGH, 0.0, 1.0, lambda: 0.0)
    hedge.taken = True
    assert hedge.late
    assert hedge.until_late() == math.inf
