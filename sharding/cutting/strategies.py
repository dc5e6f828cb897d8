"""The strategies by which a model is cut between its layers, in one table.

All use the same exact search; they differ in which host may come next and in how many layers a
shard may have. A new one is a function here and a row of `STRATEGY_RULES`. This module must not
search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sharding.cutting.spans import shards_in_words


@dataclass(frozen=True)
class Strategy:
    """The constraints of a strategy.

    `sizes`: of so many layers in so many shards, how many a shard has at least and at most.
    `in_order`: the hosts get a shard each in the order in which they are given, and without a
    number of shards all do. `by_time`: it uses measured times.
    """

    name: str
    sizes: Callable[[int, int], tuple[int, int]]
    in_order: bool = False
    by_time: bool = True

    def counts(self, layers: int, hosts: int, shards: int | None) -> Sequence[int]:
        """The numbers of shards to try, in this order."""
        if shards is not None:
            return (shards,)
        if self.in_order:
            return (hosts,)
        return range(1, min(layers, hosts) + 1)

    def why(self, shards: int | None, count: int) -> str:
        """Why there are `count` shards, for people."""
        if shards is not None:
            return f"{self.name}, {shards_in_words(count)} as requested"
        if self.in_order:
            return f"{self.name}, {shards_in_words(count)}, one for each host"
        return f"{self.name}, {shards_in_words(count)}, the fewest that fit"


def equal_sizes(layers: int, shards: int) -> tuple[int, int]:
    """Counts of layers that differ by at most one."""
    return layers // shards, -(-layers // shards)


def any_sizes(layers: int, shards: int) -> tuple[int, int]:
    """No bounds but that each shard has a layer."""
    return 1, layers


STRATEGY_RULES: Mapping[str, Strategy] = {
    rule.name: rule
    for rule in (
        Strategy("layer_based", equal_sizes, by_time=False),
        Strategy("browser_based", any_sizes, in_order=True),
        Strategy("optimal", any_sizes),
    )
}
STRATEGIES = tuple(STRATEGY_RULES)
