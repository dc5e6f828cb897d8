"""Layers and hosts to cut for, and every cut of them tried by brute force."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from sharding.cutting.partition import partition
from sharding.cutting.spans import Ends, Host, Layer, Partition
from sharding.cutting.strategies import STRATEGIES
from sharding.models.load_memory import LOAD_OVERHEAD_BYTES

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


FOUR = evenly(4)
TWO = hosts_for(900, 900)
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
quickly = settings(max_examples=100, deadline=None)
