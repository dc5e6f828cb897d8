"""The table of strategies: what each allows, and that a row of it is all that a new one takes."""

import pytest

from sharding.cutting import partition_checks
from sharding.cutting.partition import partition
from sharding.cutting.strategies import (
    STRATEGIES,
    STRATEGY_RULES,
    Strategy,
    any_sizes,
    equal_sizes,
)
from tests.partitions import NO_ENDS, evenly, hosts_for, lengths


def test_strategies_are_those_of_the_table():
    assert STRATEGIES == ("layer_based", "browser_based", "optimal")
    assert all(STRATEGY_RULES[name].name == name for name in STRATEGIES)
    assert [name for name in STRATEGIES if not STRATEGY_RULES[name].by_time] == ["layer_based"]
    assert [name for name in STRATEGIES if STRATEGY_RULES[name].in_order] == ["browser_based"]


@pytest.mark.parametrize(
    ("layers", "shards", "sizes"), [(9, 3, (3, 3)), (10, 3, (3, 4)), (1, 1, (1, 1))]
)
def test_equal_sizes_differ_by_one_at_most(layers, shards, sizes):
    assert equal_sizes(layers, shards) == sizes
    assert any_sizes(layers, shards) == (1, layers)


def test_counts_are_those_told_or_the_hosts_or_all_from_the_fewest():
    in_order, free = STRATEGY_RULES["browser_based"], STRATEGY_RULES["optimal"]
    assert list(in_order.counts(9, 4, None)) == [4]
    assert list(free.counts(9, 4, None)) == [1, 2, 3, 4]
    assert list(free.counts(2, 4, None)) == [1, 2]
    for strategy in (in_order, free):
        assert list(strategy.counts(9, 4, 3)) == [3]


def test_why_names_the_strategy():
    in_order, free = STRATEGY_RULES["browser_based"], STRATEGY_RULES["optimal"]
    assert free.why(2, 2) == "optimal, 2 shards as requested"
    assert free.why(None, 1) == "optimal, 1 shard, the fewest that fit"
    assert in_order.why(None, 3) == "browser_based, 3 shards, one for each host"


def test_row_of_the_table_is_all_that_a_new_strategy_takes(monkeypatch):
    def first_heavy(layers: int, shards: int) -> tuple[int, int]:
        return 2, layers

    added = Strategy("in_pairs_at_least", first_heavy)
    monkeypatch.setitem(STRATEGY_RULES, added.name, added)
    monkeypatch.setattr(partition_checks, "STRATEGIES", tuple(STRATEGY_RULES))
    found = partition(evenly(5), NO_ENDS, hosts_for(*[90] * 4), shards=2, strategy=added.name)
    assert min(lengths(found)) == 2
