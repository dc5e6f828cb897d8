"""Cuts of layers over hosts: the best that there are, whatever the strategy."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.errors import BadInput
from sharding.cutting.partition import partition
from sharding.cutting.spans import Ends, Host, Layer, Partition, Span
from sharding.models.load_memory import peak_bytes
from tests.partitions import (
    FOUR,
    MIB,
    NO_ENDS,
    TWO,
    Case,
    cases,
    cut,
    each_strategy,
    evenly,
    hosts_for,
    lengths,
    quickly,
    room_for,
)

# -- brute force -----------------------------------------------------------------------------------


@each_strategy
@quickly
@given(case=cases(), data=st.data())
def test_told_cut_is_the_one_that_brute_force_finds(strategy, case, data):
    shards = data.draw(st.integers(1, min(len(case.layers), len(case.hosts))))
    best = case.best(strategy, shards)
    if best is None:
        with pytest.raises(BadInput, match=r"on each would be enough|while it loads"):
            case.run(strategy, shards)
    else:
        assert cut(case.run(strategy, shards)) == best


@each_strategy
@quickly
@given(case=cases())
def test_untold_cut_has_the_fewest_shards_that_fit(strategy, case):
    fewest = case.fewest(strategy)
    if fewest is None:
        with pytest.raises(BadInput):
            case.run(strategy)
    else:
        assert cut(case.run(strategy)) == case.best(strategy, fewest)


@each_strategy
@quickly
@given(case=cases(), data=st.data())
def test_spans_cover_all_layers_and_load_within_the_memory_of_their_hosts(strategy, case, data):
    most = min(len(case.layers), len(case.hosts))
    shards = data.draw(st.none() | st.integers(1, most))
    try:
        found = case.run(strategy, shards)
    except BadInput:
        return  # whether it should be is the brute force's to say
    assert shards in (None, len(found.spans))
    assert [span.start for span in found.spans] == [0, *(span.end for span in found.spans[:-1])]
    assert found.spans[-1].end == len(case.layers)
    assert all(span.start < span.end for span in found.spans)
    assert len({span.host for span in found.spans}) == len(found.spans)
    by_name = {host.name: host for host in case.hosts}
    for span in found.spans:
        host = by_name[span.host]
        assert (span.seconds, span.bytes) == case.weigh(span.start, span.end, host)
        assert peak_bytes(span.bytes) <= host.capacity_bytes
    assert found.bottleneck_seconds == max(span.seconds for span in found.spans)
    assert found.total_seconds == sum(span.seconds for span in found.spans)
    assert found == case.run(strategy, shards)
    if strategy == "layer_based":
        assert max(lengths(found)) - min(lengths(found)) <= 1
    if strategy == "browser_based":
        names = [host.name for host in case.hosts]
        assert [span.host for span in found.spans] == names[: shards or len(names)]


measured = st.floats(1e-6, 10.0)


@quickly
@given(
    st.lists(measured, min_size=1, max_size=6),
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=3),
    st.data(),
)
def test_measured_times_are_cut_as_well_as_brute_force_can(seconds, speeds, data):
    layers = [Layer(each, MIB) for each in seconds]
    hosts = [Host(f"b{at}", room_for(100), speed) for at, speed in enumerate(speeds)]
    case = Case(layers, Ends(0, 0.1, 0, 0.2), hosts)
    shards = data.draw(st.integers(1, min(len(layers), len(hosts))))
    found = case.run("optimal", shards)
    by_name = {host.name: host for host in hosts}
    best = case.best("optimal", shards)
    bottleneck = max(case.weigh(start, end, by_name[name])[0] for start, end, name in best)
    assert math.isclose(found.bottleneck_seconds, bottleneck, rel_tol=1e-9, abs_tol=1e-9)


@quickly
@given(st.lists(st.integers(0, 10), min_size=2, max_size=7))
def test_bottleneck_is_exact_to_a_picosecond(picoseconds):
    # On a browser of half the speed, so that fewer seconds in all would tempt to a slower cut.
    layers = [Layer(each * 1e-12, MIB) for each in picoseconds]
    hosts = [Host("fast", room_for(900)), Host("slow", room_for(900), 0.5)]
    found = partition(layers, NO_ENDS, hosts, shards=2, strategy="optimal")
    halves = [(sum(picoseconds[:at]), sum(picoseconds[at:])) for at in range(1, len(layers))]
    least = min(max(a, 2 * b) for pair in halves for a, b in (pair, pair[::-1]))
    assert round(found.bottleneck_seconds * 1e12) == least


# -- examples --------------------------------------------------------------------------------------


def test_llama_over_three_browsers_of_two_speeds():
    hosts = [
        Host("chrome-1", room_for(400)),
        Host("firefox-1", room_for(400), speed=0.5),
        Host("chrome-2", room_for(400)),
    ]
    ends = Ends(40 * MIB, 0.5, 40 * MIB, 1.0)
    found = partition(evenly(9, mib=50), ends, hosts, shards=3, strategy="optimal")
    assert found == Partition(
        (
            Span(0, 4, "chrome-1", 4.5, 240 * MIB),
            Span(4, 6, "firefox-1", 4.0, 100 * MIB),
            Span(6, 9, "chrome-2", 4.0, 190 * MIB),
        ),
        bottleneck_seconds=4.5,
        total_seconds=12.5,
        reason="optimal, 3 shards as requested; the slowest is chrome-1, 4.5 s for layers 0 to 3",
    )


def test_fast_browser_gets_more_layers_and_a_slow_one_fewer():
    hosts = [Host("slow", room_for(900), 0.5), Host("fast", room_for(900), 2.0)]
    found = partition(evenly(10), NO_ENDS, hosts, shards=2, strategy="optimal")
    assert cut(found) == [(0, 2, "slow"), (2, 10, "fast")]
    assert (found.bottleneck_seconds, found.total_seconds) == (4.0, 8.0)


def test_head_makes_the_last_shard_shorter():
    ends = Ends(embedding_seconds=0.0, head_seconds=2.0)
    hosts = hosts_for(900, 900, 900)
    assert lengths(partition(evenly(7), ends, hosts, shards=3, strategy="optimal")) == [3, 3, 1]
    assert lengths(partition(evenly(7), ends, hosts, shards=3, strategy="layer_based")) == [2, 3, 2]


def test_tied_table_is_counted_on_both_ends():
    table = 30 * MIB
    hosts = hosts_for(50, 50)
    found = partition(
        evenly(4),
        Ends(embedding_bytes=table, head_bytes=table),
        hosts,
        shards=2,
        strategy="optimal",
    )
    assert [span.bytes for span in found.spans] == [50 * MIB, 50 * MIB]


def test_equal_cuts_are_told_apart_by_evenness():
    layers = [Layer(9.0, MIB), *evenly(6)]
    found = partition(layers, NO_ENDS, hosts_for(*[900] * 3), shards=3, strategy="optimal")
    assert lengths(found) == [1, 3, 3]


def test_small_browser_may_need_the_light_layer_in_the_middle():
    layers = [Layer(1.0, mib * MIB) for mib in (50, 10, 50, 50)]
    hosts = hosts_for(100, 10, 100)
    found = partition(layers, NO_ENDS, hosts, shards=3, strategy="browser_based")
    assert lengths(found) == [1, 1, 2]


@pytest.mark.parametrize(("seconds", "said"), [(0.0125, "12.5 ms"), (0.0, "0 ms"), (2.0, "2 s")])
def test_reason_says_how_long_the_slowest_takes(seconds, said):
    found = partition(evenly(1, seconds=seconds), NO_ENDS, TWO, shards=1, strategy="optimal")
    assert (
        found.reason
        == f"optimal, 1 shard as requested; the slowest is b0, {said} for layers 0 to 0"
    )


def test_small_browser_is_passed_over_if_it_need_not_be_used():
    found = partition(evenly(4), NO_ENDS, hosts_for(1, 20, 20), shards=None, strategy="layer_based")
    assert cut(found) == [(0, 2, "b1"), (2, 4, "b2")]


def test_browser_based_with_fewer_shards_takes_the_first_hosts():
    hosts = hosts_for(900, 900, 900)
    found = partition(evenly(4), NO_ENDS, hosts, shards=2, strategy="browser_based")
    assert cut(found) == [(0, 2, "b0"), (2, 4, "b1")]


@pytest.mark.parametrize(
    ("strategy", "shards", "reason"),
    [
        ("optimal", None, "optimal, 1 shard, the fewest that fit; "),
        ("layer_based", 2, "layer_based, 2 shards as requested; "),
        ("browser_based", None, "browser_based, 3 shards, one for each host; "),
    ],
)
def test_reason_says_why_there_are_so_many_shards(strategy, shards, reason):
    found = partition(evenly(6), NO_ENDS, hosts_for(*[90] * 3), shards=shards, strategy=strategy)
    assert found.reason.startswith(reason)
    assert "the slowest is b0, " in found.reason


def test_numbers_of_numpy_are_as_good():
    plain = partition(evenly(4), NO_ENDS, hosts_for(20, 20), shards=2, strategy="optimal")
    found = partition(
        [Layer(np.float32(1.0), np.int64(10 * MIB))] * 4,
        NO_ENDS,
        [Host(f"b{at}", np.int64(room_for(20)), np.float32(1.0)) for at in range(2)],
        shards=np.int64(2),
        strategy="optimal",
    )
    assert found == plain
    assert {type(span.bytes) for span in found.spans} == {int}


# -- large pools -----------------------------------------------------------------------------------


def test_hundred_equal_browsers_are_no_more_work_than_one_class():
    found = partition(evenly(100), NO_ENDS, hosts_for(*[20] * 100), shards=None, strategy="optimal")
    assert lengths(found) == [2] * 50
    assert [span.host for span in found.spans] == [f"b{at}" for at in range(50)]


def test_of_many_different_browsers_the_fastest_that_fit_are_taken():
    hosts = [Host(f"b{at}", room_for(900), 1 + at / 64) for at in range(32)]
    found = partition(evenly(12), NO_ENDS, hosts, shards=3, strategy="optimal")
    assert {span.host for span in found.spans} == {"b29", "b30", "b31"}


# -- what it stands on -----------------------------------------------------------------------------


def test_module_needs_no_onnx():
    code = "import sys, sharding.cutting.partition; sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_that_crosses_processes_pickles():
    found = partition(FOUR, NO_ENDS, TWO, shards=2, strategy="optimal")
    things = [FOUR, NO_ENDS, TWO, found]
    assert pickle.loads(pickle.dumps(things)) == things
