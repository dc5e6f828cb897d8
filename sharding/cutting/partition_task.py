"""One partitioning task: layers and hosts. Sets up its search, and makes spans of the result.

This module must not validate its arguments (`partition_checks` does), nor explain why nothing fits
(`refusals` does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from sharding.cutting.search import STATES_MAX, FoundCut, Search
from sharding.cutting.spans import Ends, Host, Partition, Span
from sharding.cutting.strategies import Strategy
from sharding.models.load_memory import room

HOSTS_EXACT = 10  # with more, hosts that are never needed are left out

# Time is counted in whole ticks, finer than any clock: sums of floats depend on their order, and
# would decide between equals by chance.
_TICKS_PER_SECOND = 1e12


@dataclass(frozen=True)
class Task:
    """The layers and hosts. `weights` (bytes) and `seconds` are of the layers, with the ends
    included in the first and the last."""

    weights: tuple[int, ...]
    seconds: tuple[float, ...]
    ends: Ends
    hosts: tuple[Host, ...]

    def counts(self, strategy: Strategy, shards: int | None) -> Sequence[int]:
        """The numbers of shards to try, in this order."""
        return strategy.counts(len(self.weights), len(self.hosts), shards)

    def may_fit(self, count: int) -> bool:
        """Whether the largest hosts could hold it all if it could be cut anywhere."""
        rooms = sorted((room(host.capacity_bytes) for host in self.hosts), reverse=True)
        return sum(rooms[:count]) >= sum(self.weights)

    def search(self, count: int, strategy: Strategy) -> Search:
        """The cuts into `count` shards that `strategy` allows."""
        if strategy.in_order:
            classes = [[host] for host in range(count)]
        else:
            alike: dict[tuple[int, float], list[int]] = {}
            for at in self._useful(count):
                host = self.hosts[at]
                alike.setdefault((host.capacity_bytes, host.speed), []).append(at)
            classes = list(alike.values())
        return Search(
            weights=list(accumulate(self.weights, initial=0)),
            ticks=[
                list(accumulate((_ticks(time, host) for time in self.seconds), initial=0))
                for host in self.hosts
            ],
            rooms=[room(host.capacity_bytes) for host in self.hosts],
            classes=classes,
            in_order=strategy.in_order,
            shards=count,
            sizes=strategy.sizes(len(self.weights), count),
        )

    def _useful(self, count: int) -> list[int]:
        """The hosts that `count` shards may need.

        One is left out where so many others hold as much and are faster (or as fast, and
        earlier): one of those is always free to do its part. Of few hosts all are kept, since
        layers that take no time are to go to the earlier one, not to the faster one.
        """
        everyone = range(len(self.hosts))
        if len(everyone) <= HOSTS_EXACT:
            return list(everyone)
        rooms = [room(host.capacity_bytes) for host in self.hosts]
        ranks = [(host.speed, -at) for at, host in enumerate(self.hosts)]

        def betters(one: int) -> int:
            return sum(
                rooms[other] >= rooms[one] and ranks[other] > ranks[one] for other in everyone
            )

        return [one for one in everyone if betters(one) < count]

    def result(self, cut: FoundCut, why: str) -> Partition:
        """The cut as spans, with their times and bytes."""
        spans = []
        for at, (start, end) in zip(cut[0], pairwise((0, *cut[1])), strict=True):
            host = self.hosts[at]
            seconds = math.fsum(self.seconds[start:end]) / host.speed
            spans.append(Span(start, end, host.name, seconds, sum(self.weights[start:end])))
        slowest = max(spans, key=lambda span: span.seconds)
        return Partition(
            spans=tuple(spans),
            bottleneck_seconds=slowest.seconds,
            total_seconds=math.fsum(span.seconds for span in spans),
            reason=f"{why}; the slowest is {slowest.host}, {_time(slowest.seconds)} for "
            f"layers {slowest.start} to {slowest.end - 1}",
        )

    def with_more(self, more_bytes: int) -> Task:
        """The same with so much more memory on each host."""
        hosts = [
            replace(host, capacity_bytes=host.capacity_bytes + more_bytes) for host in self.hosts
        ]
        return replace(self, hosts=tuple(hosts))

    def fits(self, count: int, strategy: Strategy) -> bool:
        """Whether it is known to fit; False if there are too many sets of hosts to search."""
        if not self.may_fit(count):
            return False
        search = self.search(count, strategy)
        return search.states() <= STATES_MAX and search.fits()


def _ticks(seconds: float, host: Host) -> int:
    return round(seconds / host.speed * _TICKS_PER_SECOND)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
