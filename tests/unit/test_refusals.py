"""What is said when no cut fits, and what would help."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.errors import BadInput
from sharding.cutting.partition import partition
from sharding.cutting.spans import Ends, Host, Layer
from sharding.cutting.strategies import STRATEGIES
from tests.partitions import MIB, NO_ENDS, cases, evenly, hosts_for, quickly


@quickly
@given(case=cases(), strategy=st.sampled_from(STRATEGIES))
def test_memory_said_to_be_lacking_is_just_enough(case, strategy):
    try:
        case.run(strategy)
        return
    except BadInput as error:
        if "would be enough" not in str(error):
            return
        lacking = int(re.match(r"(\d+) MiB more on each host", error.fields["expected"])[1])

    def with_more(mib):
        hosts = [
            replace(host, capacity_bytes=host.capacity_bytes + mib * MIB) for host in case.hosts
        ]
        return replace(case, hosts=hosts)

    assert with_more(lacking).run(strategy)
    with pytest.raises(BadInput):
        with_more(lacking - 1).run(strategy)


def test_only_the_first_of_many_browsers_are_named_in_a_refusal():
    with pytest.raises(BadInput, match=r"b7 84 MiB, and 4 others; 20 MiB more on each"):
        partition(evenly(24), NO_ENDS, hosts_for(*[10] * 12), shards=12, strategy="optimal")


@pytest.mark.parametrize(
    ("layers", "ends", "hosts", "shards", "strategy", "message"),
    [
        (
            [*evenly(2), Layer(1.0, 100 * MIB), *evenly(2)],
            NO_ENDS,
            hosts_for(50, 60),
            None,
            "optimal",
            (
                "layer 2 takes 264 MiB while it loads, and the largest host, b1, has 184 MiB. "
                "Add a browser with more memory, or use a model with smaller weights (int8 or q4)."
            ),
        ),
        (
            evenly(4),
            Ends(head_bytes=100 * MIB),
            hosts_for(60),
            1,
            "layer_based",
            "layer 3 with the head takes 284 MiB while it loads, and",
        ),
        (
            evenly(1, mib=10),
            Ends(100 * MIB, 0.0, 100 * MIB, 0.0),
            hosts_for(60),
            None,
            "browser_based",
            "layer 0 with the embedding with the head takes 484 MiB",
        ),
        (
            evenly(4),
            NO_ENDS,
            [Host("small", 10 * MIB), Host("less", MIB)],
            None,
            "optimal",
            "layer 0 takes 84 MiB while it loads, and the largest host, small, has 10 MiB.",
        ),
        (
            evenly(8),
            NO_ENDS,
            hosts_for(20, 20),
            None,
            "optimal",
            (
                "80 MiB of weights don't fit (optimal, any number of shards). Loading takes 2 "
                "times a shard's bytes and 64 MiB. The hosts have: b0 104 MiB, b1 104 MiB; 40 MiB "
                "more on each would be enough. Add browsers or memory, or use a model with smaller "
                "weights (int8 or q4)."
            ),
        ),
        (
            evenly(8),
            NO_ENDS,
            hosts_for(20, 20, 20, 20),
            2,
            "optimal",
            "40 MiB more on each would be enough. It fits with strategy='optimal', shards=4.",
        ),
        (
            evenly(8),
            NO_ENDS,
            hosts_for(20, 60),
            2,
            "layer_based",
            "40 MiB more on each would be enough. It fits with strategy='optimal', shards=2.",
        ),
        (
            evenly(8),
            NO_ENDS,
            hosts_for(90, 5, 90),
            None,
            "browser_based",
            (
                "10 MiB more on each would be enough. It fits with strategy='browser_based', "
                "shards=1 or with strategy='optimal', shards=1."
            ),
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would_help(
    layers, ends, hosts, shards, strategy, message
):
    with pytest.raises(BadInput) as caught:
        partition(layers, ends, hosts, shards=shards, strategy=strategy)
    assert message in str(caught.value)
