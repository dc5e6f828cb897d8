import itertools
import math
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.errors import BadInput
from sharding.cutting import partition as module
from sharding.cutting.partition import (
    HOSTS_MAX,
    LAYERS_MAX,
    LOAD_OVERHEAD_BYTES,
    PEAK_FACTOR,
    STRATEGIES,
    Ends,
    Host,
    Layer,
    Partition,
    Span,
    partition,
    peak_bytes,
)

MIB = 1 << 20
NO_ENDS = Ends()


def room_for(mib: float) -> int:
    """The capacity of a host that can load so many MiB of weights."""
    return int(2 * mib * MIB) + LOAD_OVERHEAD_BYTES


def evenly(count: int, mib: int = 10, seconds: float = 1.0) -> list[Layer]:
    return [Layer(seconds, mib * MIB)] * count


def hosts_for(*mib: float, speed: float = 1.0) -> list[Host]:
    return [Host(f"b{at}", room_for(each), speed) for at, each in enumerate(mib)]


def cut(found: Partition) -> list[tuple[int, int, str]]:
    return [(span.start, span.end, span.host) for span in found.spans]


def lengths(found: Partition) -> list[int]:
    return [span.end - span.start for span in found.spans]


# -- brute force -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    layers: list[Layer]
    ends: Ends
    hosts: list[Host]

    def run(self, strategy: str, shards: int | None = None) -> Partition:
        return partition(self.layers, self.ends, self.hosts, shards=shards, strategy=strategy)

    def weigh(self, start: int, end: int, host: Host) -> tuple[float, int]:
        """Seconds and bytes of a span."""
        seconds = sum(layer.seconds for layer in self.layers[start:end])
        size = sum(layer.bytes for layer in self.layers[start:end])
        if start == 0:
            seconds, size = seconds + self.ends.embedding_seconds, size + self.ends.embedding_bytes
        if end == len(self.layers):
            seconds, size = seconds + self.ends.head_seconds, size + self.ends.head_bytes
        return seconds / host.speed, size

    def best(self, strategy: str, shards: int) -> list[tuple[int, int, str]] | None:
        """Every cut and every order of hosts is tried; None if none fits."""
        places = range(len(self.hosts))
        if strategy == "browser_based":
            orders = [tuple(places[:shards])]
        else:
            orders = list(itertools.permutations(places, shards))
        best = None
        for inner in itertools.combinations(range(1, len(self.layers)), shards - 1):
            spans = list(itertools.pairwise((0, *inner, len(self.layers))))
            counts = [end - start for start, end in spans]
            if strategy == "layer_based" and max(counts) - min(counts) > 1:
                continue
            for order in orders:
                chosen = [self.hosts[at] for at in order]
                weighed = [
                    self.weigh(*span, host) for span, host in zip(spans, chosen, strict=True)
                ]
                if any(
                    2 * size + LOAD_OVERHEAD_BYTES > host.capacity_bytes
                    for (_, size), host in zip(weighed, chosen, strict=True)
                ):
                    continue
                times = [seconds for seconds, _ in weighed]
                key = (max(times), sum(times), order, sum(time**2 for time in times), inner)
                if best is None or key < best[0]:
                    best = (
                        key,
                        [
                            (start, end, host.name)
                            for (start, end), host in zip(spans, chosen, strict=True)
                        ],
                    )
        return None if best is None else best[1]

    def fewest(self, strategy: str) -> int | None:
        if strategy == "browser_based":
            counts = [len(self.hosts)]
        else:
            counts = range(1, min(len(self.layers), len(self.hosts)) + 1)
        return next((count for count in counts if self.best(strategy, count) is not None), None)


# Whole seconds and speeds that are powers of two: no sum rounds, so that ties are ties.
def cases(seconds_min: int = 0):
    return st.builds(
        Case,
        layers=st.lists(
            st.builds(
                Layer,
                st.integers(seconds_min, 4).map(float),
                st.integers(0, 4).map(lambda mib: mib * MIB),
            ),
            min_size=1,
            max_size=7,
        ),
        ends=st.builds(
            Ends,
            st.integers(0, 3).map(lambda mib: mib * MIB),
            st.sampled_from([0.0, 2.0]),
            st.integers(0, 3).map(lambda mib: mib * MIB),
            st.sampled_from([0.0, 3.0]),
        ),
        hosts=st.lists(
            st.tuples(
                # From too small for anything, to large enough for all; some a byte too small.
                st.sampled_from(
                    [0, *(room_for(mib) - less for mib in range(25) for less in (0, 1))]
                ),
                st.sampled_from([0.5, 1.0, 1.0, 2.0]),
            ),
            min_size=1,
            max_size=4,
        ).map(lambda made: [Host(f"b{at}", *each) for at, each in enumerate(made)]),
    )


each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
quickly = settings(max_examples=100, deadline=None)


@each_strategy
@quickly
@given(case=cases(), data=st.data())
def test_told_cut_is_the_one_that_brute_force_finds(strategy, case, data):
    shards = data.draw(st.integers(1, min(len(case.layers), len(case.hosts))))
    best = case.best(strategy, shards)
    if best is None:
        with pytest.raises(BadInput, match=r"on each would do|while it loads"):
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


@quickly
@given(case=cases(seconds_min=1))
def test_hosts_left_out_of_a_large_pool_are_never_missed(case):
    fewest = case.fewest("optimal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HOSTS_EXACT", 0)
        if fewest is None:
            with pytest.raises(BadInput):
                case.run("optimal")
        else:
            assert cut(case.run("optimal")) == case.best("optimal", fewest)


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


@quickly
@given(case=cases(), strategy=st.sampled_from(STRATEGIES))
def test_memory_said_to_be_lacking_is_just_enough(case, strategy):
    try:
        case.run(strategy)
        return
    except BadInput as error:
        if "would do" not in str(error):
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
        reason="optimal, 3 shards as told; the slowest is chrome-1, 4.5 s for layers 0 to 3",
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
    assert found.reason == f"optimal, 1 shard as told; the slowest is b0, {said} for layers 0 to 0"


def test_only_the_first_of_many_browsers_are_named_in_a_refusal():
    with pytest.raises(BadInput, match=r"b7 84 MiB, and 4 others; 20 MiB more on each"):
        partition(evenly(24), NO_ENDS, hosts_for(*[10] * 12), shards=12, strategy="optimal")


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
        ("layer_based", 2, "layer_based, 2 shards as told; "),
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


def test_too_many_different_browsers_are_refused_rather_than_searched_for_ever():
    hosts = [Host(f"b{at}", room_for(900 - at), 1 + at / 64) for at in range(32)]
    with pytest.raises(BadInput, match=r"are too many to search.*'browser_based'") as caught:
        partition(evenly(32), NO_ENDS, hosts, shards=16, strategy="optimal")
    assert caught.value.fields["got"] > caught.value.fields["expected"] == module.STATES_MAX
    assert partition(evenly(32), NO_ENDS, hosts, shards=16, strategy="browser_based")
    assert partition(evenly(32), NO_ENDS, hosts, shards=2, strategy="optimal")


# -- refusals --------------------------------------------------------------------------------------

FOUR = evenly(4)
TWO = hosts_for(900, 900)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "component_based"}, "component_based cuts between models, see Model"),
        ({"strategy": "best"}, "expected one of layer_based, browser_based, optimal, got 'best'"),
        ({"layers": []}, f"layers: expected from 1 to {LAYERS_MAX} of them, got 0"),
        ({"layers": evenly(LAYERS_MAX + 1)}, f"got {LAYERS_MAX + 1}"),
        ({"hosts": []}, f"hosts: expected from 1 to {HOSTS_MAX} of them, got 0"),
        ({"hosts": [TWO[0], TWO[0]]}, "two hosts are called 'b0'.*name each once"),
        ({"shards": 0}, "shards: expected a whole number from 1, or None .*got 0"),
        ({"shards": -1}, "got -1"),
        ({"shards": 2.0}, r"got 2\.0"),
        ({"shards": True}, "got True"),
        ({"shards": math.nan}, "got nan"),
        ({"shards": 5}, r"5 shards \(as told\) are more than the 4 layers.*say shards=2 or less"),
        ({"shards": 3}, "3 shards are more than the 2 hosts.*add 1 browsers or say shards=2"),
        (
            {"layers": FOUR[:1], "strategy": "browser_based", "shards": None},
            r"2 shards \(one for each host\) are more than the 1 layers.*say shards=1",
        ),
        ({"layers": [Layer(-1.0, 1)]}, r"layers\[0\]\.seconds: expected a number from 0 to 86400"),
        ({"layers": [*FOUR, Layer(math.nan, 1)]}, r"layers\[4\]\.seconds: .*got nan"),
        ({"layers": [Layer(math.inf, 1)]}, r"layers\[0\]\.seconds: .*got inf"),
        ({"layers": [Layer("1", 1)]}, r"layers\[0\]\.seconds: .*got '1'"),
        ({"layers": [Layer(1.0, -1)]}, r"layers\[0\]\.bytes: .*got -1"),
        ({"layers": [Layer(1.0, 1.5)]}, r"layers\[0\]\.bytes: expected a whole number of bytes"),
        ({"layers": [Layer(1.0, math.nan)]}, r"layers\[0\]\.bytes: .*got nan"),
        ({"ends": Ends(embedding_bytes=-1)}, r"ends\.embedding_bytes: "),
        ({"ends": Ends(embedding_seconds=math.nan)}, r"ends\.embedding_seconds: "),
        ({"ends": Ends(head_bytes=1 << 64)}, r"ends\.head_bytes: "),
        ({"ends": Ends(head_seconds=-0.1)}, r"ends\.head_seconds: "),
        ({"hosts": [Host("b", -1)]}, r"hosts\[0\]\.capacity_bytes: "),
        ({"hosts": [Host("b", MIB, 0.0)]}, r"hosts\[0\]\.speed: .*1\.0 where it is unknown.*got 0"),
        ({"hosts": [Host("b", MIB, math.nan)]}, r"hosts\[0\]\.speed: .*got nan"),
        ({"hosts": [Host("b", MIB, -2.0)]}, r"hosts\[0\]\.speed: .*got -2"),
    ],
)
def test_what_cannot_be_right_is_refused(changes, message):
    call = {
        "layers": FOUR,
        "ends": NO_ENDS,
        "hosts": TWO,
        "shards": 2,
        "strategy": "optimal",
    } | changes
    with pytest.raises(BadInput, match=message) as caught:
        partition(
            call["layers"],
            call["ends"],
            call["hosts"],
            shards=call["shards"],
            strategy=call["strategy"],
        )
    assert {"expected", "got"} <= caught.value.fields.keys()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


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
                "more on each would do. Add browsers or memory, or use a model with smaller "
                "weights (int8 or q4)."
            ),
        ),
        (
            evenly(8),
            NO_ENDS,
            hosts_for(20, 20, 20, 20),
            2,
            "optimal",
            "40 MiB more on each would do. It fits with strategy='optimal', shards=4.",
        ),
        (
            evenly(8),
            NO_ENDS,
            hosts_for(20, 60),
            2,
            "layer_based",
            "40 MiB more on each would do. It fits with strategy='optimal', shards=2.",
        ),
        (
            evenly(8),
            NO_ENDS,
            hosts_for(90, 5, 90),
            None,
            "browser_based",
            (
                "10 MiB more on each would do. It fits with strategy='browser_based', shards=1 or "
                "with strategy='optimal', shards=1."
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


# -- what it stands on -----------------------------------------------------------------------------


def test_peak_is_what_the_signature_of_a_model_says():
    from sharding.models import signature

    assert signature.LOAD_OVERHEAD_BYTES == LOAD_OVERHEAD_BYTES
    assert "twice the files' bytes" in signature.read_signature.__doc__
    assert peak_bytes(100) == PEAK_FACTOR * 100 + LOAD_OVERHEAD_BYTES


def test_module_needs_no_onnx():
    code = "import sys, sharding.cutting.partition; sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_that_crosses_processes_pickles():
    found = partition(FOUR, NO_ENDS, TWO, shards=2, strategy="optimal")
    things = [FOUR, NO_ENDS, TWO, found]
    assert pickle.loads(pickle.dumps(things)) == things
