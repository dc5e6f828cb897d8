"""How many browsers and copies each level of fault tolerance needs, and which level is in effect.

A level is a promise about an operation; how many browsers it takes and how many copies of an
operation run follow from it. This module must not choose hosts.
"""

from __future__ import annotations

from collections.abc import Mapping

from recovery.kinds import Level

LEVELS_ASCENDING = (Level.NONE, Level.LOW, Level.MEDIUM, Level.HIGH, Level.CRITICAL)

# Browsers that must have a model ready: one to lose at `high`, a majority at `critical`.
BROWSERS_NEEDED: Mapping[Level, int] = {
    Level.NONE: 1,
    Level.LOW: 1,
    Level.MEDIUM: 1,
    Level.HIGH: 2,
    Level.CRITICAL: 3,
}

COPIES: Mapping[Level, int] = {**dict.fromkeys(LEVELS_ASCENDING, 1), Level.CRITICAL: 3}
REDUNDANT = (Level.HIGH, Level.CRITICAL)
COPIES_MAX = 5  # of one operation at `critical`, while no two answers agree


def effective_level(level: Level, ready: int) -> Level:
    """The level that `ready` browsers can provide, at most the requested `level`."""
    while level in REDUNDANT and ready < BROWSERS_NEEDED[level]:
        level = LEVELS_ASCENDING[LEVELS_ASCENDING.index(level) - 1]
    return level


def copies_wanted(level: Level, answers: int, under_way: int, *, late: bool) -> int:
    """How many copies of an operation there should be, including those that have answered.

    `answers` have arrived, and no two agree. `late`: the oldest copy under way is overdue; then
    one more is sent (a hedge), at the levels that keep another browser ready.
    """
    copies = COPIES[level]
    if level in REDUNDANT and late:
        copies += 1
    if answers and not under_way:
        copies = max(copies, answers + 1)
    return min(copies, COPIES_MAX)
