"""The exact search (dynamic programming) for the best cut of layers into shards on hosts.

In whole numbers only: bytes, and ticks of time. This module must not know of strategies; they come
as `classes`, `in_order` and `sizes`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from recovery.errors import BadInput

STATES_MAX = 8192  # sets of hosts that are distinguished; HOSTS_EXACT hosts have 1024

# Hosts of the shards, and where each shard ends.
FoundCut: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
# How many hosts of each class have a shard.
_Used: TypeAlias = tuple[int, ...]
# The shards from some layer on, the least being the best: ticks in all, hosts, sum of squares of
# ticks (least where the shards are most even), ends.
_Rest: TypeAlias = tuple[int, tuple[int, ...], int, tuple[int, ...]]


@dataclass(frozen=True)
class Search:
    """All cuts into so many shards, and the best of them."""

    weights: Sequence[int]  # [i]: bytes of all layers before i
    ticks: Sequence[Sequence[int]]  # [host][i]: ticks of all layers before i, on that host
    rooms: Sequence[int]  # [host]: bytes of weights that it can load
    classes: Sequence[Sequence[int]]  # hosts that are interchangeable, the earlier ones first
    in_order: bool  # the classes come one after the other, instead of in any order
    shards: int
    sizes: tuple[int, int]  # layers in a shard, at least and at most

    def states(self) -> int:
        """How many sets of up to `shards` hosts have to be distinguished."""
        if self.in_order:
            return self.shards + 1
        ways = [1] + [0] * self.shards  # [n]: sets of n hosts, of the classes so far
        for members in self.classes:
            ways = [sum(ways[max(0, n - len(members)) : n + 1]) for n in range(len(ways))]
        return sum(ways)

    def check_states(self) -> None:
        """Raises `BadInput` if there are more than `STATES_MAX`."""
        states = self.states()
        if states > STATES_MAX:
            raise BadInput(
                f"{len(self.classes)} different hosts for {self.shards} shards are too many to "
                f"search: {states:,} sets of hosts, of at most {STATES_MAX:,}. Pass fewer hosts, "
                "round capacities and speeds so that more hosts are equal, or use strategy "
                "'browser_based'.",
                expected=STATES_MAX,
                got=states,
            )

    def fits(self) -> bool:
        return self._frontiers(None) is not None

    def best(self) -> FoundCut | None:
        """The cut that `partition` promises; None if there is none that fits."""
        if not self.fits():
            return None
        least, enough = 0, max(ticks[-1] for ticks in self.ticks)
        while least < enough:
            limit = (least + enough) // 2
            if self._frontiers(limit) is None:
                least = limit + 1
            else:
                enough = limit
        return self._best_within(least)

    def _ends(self, host: int, start: int, limit: int | None) -> range:
        """Where a shard on `host` that begins at `start` can end, within `limit` ticks."""
        far = bisect_right(self.weights, self.weights[start] + self.rooms[host]) - 1
        if limit is not None:
            ticks = self.ticks[host]
            far = min(far, bisect_right(ticks, ticks[start] + limit) - 1)
        low, high = self.sizes
        return range(start + low, min(far, start + high) + 1)

    def _next(self, used: _Used) -> Iterator[tuple[int, _Used]]:
        """The classes that can give the next host, each with what is used after that."""
        for kind, members in enumerate(self.classes):
            if used[kind] < len(members):
                yield kind, (*used[:kind], used[kind] + 1, *used[kind + 1 :])
                if self.in_order:
                    return

    def _frontiers(self, limit: int | None) -> list[dict[_Used, int]] | None:
        """For each number of shards, which hosts they can use and how many layers they can have.

        The layers are the bits of a number. All counts are kept, not just the highest: a small
        host may need the light layer that comes next. None if all layers can't be reached.
        """
        last = len(self.weights) - 1
        low, high = self.sizes
        reach = [
            [_bits(self._ends(members[0], start, limit)) for start in range(last)]
            for members in self.classes
        ]
        frontiers = [{(0,) * len(self.classes): 1}]
        for left in reversed(range(self.shards)):
            # As many layers must be left as the shards that are left can have.
            sensible = _bits(range(max(0, last - left * high), last - left * low + 1))
            reached: dict[_Used, int] = defaultdict(int)
            for used, starts in frontiers[-1].items():
                positions = list(_each_bit(starts))
                for kind, after in self._next(used):
                    ends = 0
                    for start in positions:
                        ends |= reach[kind][start]
                    reached[after] |= ends & sensible
            frontiers.append({used: ends for used, ends in reached.items() if ends})
        return frontiers if frontiers[-1] else None

    def _best_within(self, limit: int) -> FoundCut:
        """The best of the cuts whose shards take `limit` ticks at most, built from the end."""
        frontiers = self._frontiers(limit)
        assert frontiers is not None
        last = len(self.weights) - 1
        rests: dict[tuple[_Used, int], _Rest] = {
            (used, last): (0, (), 0, ()) for used in frontiers[-1]
        }
        for frontier in reversed(frontiers[:-1]):
            longer: dict[tuple[_Used, int], _Rest] = {}
            for used, starts in frontier.items():
                steps = [
                    (self.classes[kind][used[kind]], after) for kind, after in self._next(used)
                ]
                for start in _each_bit(starts):
                    best: _Rest | None = None
                    for host, after in steps:
                        for end in self._ends(host, start, limit):
                            rest = rests.get((after, end))
                            if rest is None:
                                continue
                            ticks = self.ticks[host][end] - self.ticks[host][start]
                            if best is not None and ticks + rest[0] > best[0]:
                                continue
                            joined = (
                                ticks + rest[0],
                                (host, *rest[1]),
                                ticks**2 + rest[2],
                                (end, *rest[3]),
                            )
                            best = joined if best is None else min(best, joined)
                    if best is not None:
                        longer[used, start] = best
            rests = longer
        ((_, hosts, _, ends),) = rests.values()
        return hosts, ends


def _bits(ends: range) -> int:
    """A number in which the bits of a range are set."""
    return (1 << ends.stop) - (1 << ends.start) if ends else 0


def _each_bit(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
