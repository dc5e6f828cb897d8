"""Which browser gets which layers: contiguous cuts of a decoder, by measured time and memory.

Pure functions of what was measured. All strategies are one exact search: they differ in which
host may come next and how many layers a shard may have. A shard's time is that of its layers;
hand-offs between shards (about a millisecond each) are not counted, being the same for every cut
into as many shards. This module must not read a model, look at a clock, or ask a browser.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Integral, Real
from typing import TypeAlias

from recovery.errors import BadInput

STRATEGIES = ("layer_based", "browser_based", "optimal")

# What loading takes: the estimate of `load_peak_bytes` in sharding/models/signature.py, twice the
# bytes (a page holds what it fetched and the runtime's copy of it at the same time) plus its
# LOAD_OVERHEAD_BYTES. Repeated here, because that module imports onnx.
PEAK_FACTOR = 2.0
LOAD_OVERHEAD_BYTES = 64 << 20

LAYERS_MAX = 512
HOSTS_MAX = 1000
HOSTS_EXACT = 10  # with more, hosts are left out where others always do as well
STATES_MAX = 8192  # sets of hosts that are told apart; HOSTS_EXACT hosts have 1024

_MIB = 1 << 20
_HOSTS_SHOWN = 8  # in an error
_SECONDS_MAX = 86_400.0
_SPEEDS = (1e-6, 1e6)
_BYTES_MAX = 1 << 63
# Time is counted in whole ticks, finer than any clock: sums of floats depend on their order, and
# would decide between equals by chance.
_TICKS_PER_SECOND = 1e12
_COMPONENTS_CUT_BY = "ModelShardingManager"  # what splits encoder from decoder


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its time for one step, in seconds, and the bytes of its weights."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Ends:
    """What the first shard has besides its layers, and what the last one has.

    Where embedding and head are tied, each end needs the table, so count its bytes in both.
    (One shard with both ends holds it once, and is then overestimated by the table.)
    """

    embedding_bytes: int = 0
    embedding_seconds: float = 0.0
    head_bytes: int = 0
    head_seconds: float = 0.0


@dataclass(frozen=True)
class Host:
    """A browser. `capacity_bytes` is what it can hold at the peak, while a shard loads.

    `speed`: how many times as fast it is as the machine on which the layers were measured.
    """

    name: str
    capacity_bytes: int
    speed: float = 1.0


@dataclass(frozen=True)
class Span:
    """Layers `[start, end)`, counted from 0, on one host.

    `seconds` is its time for one step on that host, `bytes` its weights (`peak_bytes` of it is
    what loading takes). Both include the embedding or head, in the first and last span.
    """

    start: int
    end: int
    host: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Partition:
    """Spans in order of layers: one token takes `total_seconds`, a full pipeline gives one every
    `bottleneck_seconds`. `reason` is for people."""

    spans: tuple[Span, ...]
    bottleneck_seconds: float
    total_seconds: float
    reason: str


def peak_bytes(weight_bytes: int) -> int:
    """An estimate of the memory that a shard of so many bytes takes while it loads."""
    return int(PEAK_FACTOR * weight_bytes) + LOAD_OVERHEAD_BYTES


def partition(
    layers: Sequence[Layer],
    ends: Ends,
    hosts: Sequence[Host],
    *,
    shards: int | None,
    strategy: str,
) -> Partition:
    """Cut `layers` into contiguous spans, each on a host of its own that can load it.

    - `layer_based`: equal counts of layers, differing by at most one.
    - `browser_based`: the hosts in the given order, one shard each; with `shards`, the first ones.
    - `optimal`: any cut.

    Within that, the slowest shard is as fast as can be, over all cuts and (but for
    `browser_based`) all assignments of hosts. Of equals, the one with the fewest seconds in all
    is taken, then the one with earlier hosts, then the most even. With `shards` None it is the
    fewest that fit (`browser_based`: as many as hosts). Equal input gives an equal answer.

    The search is exact, to a picosecond a layer. Above `HOSTS_EXACT` hosts a tie may go to a later
    but faster host, where layers take no time at all.

    Raises `BadInput`, saying what was expected and what came: an unknown strategy, no layers or
    hosts or too many of them, two hosts of one name, a number that is negative, no number or out
    of range, `shards` below 1 or above the number of layers or hosts, layers that don't fit, and
    (only above `HOSTS_EXACT`) too many different hosts to search.
    """
    _check(layers, ends, hosts, shards, strategy)
    shards = None if shards is None else int(shards)
    weights = [int(layer.bytes) for layer in layers]
    seconds = [float(layer.seconds) for layer in layers]
    # From here on the ends are part of their layers: the first shard always has layer 0.
    weights[0] += int(ends.embedding_bytes)
    weights[-1] += int(ends.head_bytes)
    seconds[0] += float(ends.embedding_seconds)
    seconds[-1] += float(ends.head_seconds)
    plain_hosts = tuple(
        Host(host.name, int(host.capacity_bytes), float(host.speed)) for host in hosts
    )
    task = _Task(tuple(weights), tuple(seconds), ends, plain_hosts)

    counts = task.counts(strategy, shards)
    for count in counts:
        if shards is None and not task.may_fit(count):
            continue  # so that most often only one count has to be searched
        search = task.search(count, strategy)
        search.check_states()
        if (found := search.best()) is not None:
            return task.result(found, _why(strategy, shards, count))
    raise task.refusal(strategy, shards, counts)


# Hosts of the shards, and where each shard ends.
_Cut: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
# How many hosts of each class have a shard.
_Used: TypeAlias = tuple[int, ...]
# The shards from some layer on, the least being the best: ticks in all, hosts, sum of squares of
# ticks (least where the shards are most even), ends.
_Rest: TypeAlias = tuple[int, tuple[int, ...], int, tuple[int, ...]]


@dataclass(frozen=True)
class _Search:
    """All cuts into so many shards, and the best of them."""

    weights: Sequence[int]  # [i]: bytes of all layers before i
    ticks: Sequence[Sequence[int]]  # [host][i]: ticks of all layers before i, on that host
    rooms: Sequence[int]  # [host]: bytes of weights that it can load
    classes: Sequence[Sequence[int]]  # hosts that are interchangeable, the earlier ones first
    in_order: bool  # the classes come one after the other, instead of in any order
    shards: int
    sizes: tuple[int, int]  # layers in a shard, at least and at most

    def states(self) -> int:
        """How many sets of up to `shards` hosts there are to tell apart."""
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

    def best(self) -> _Cut | None:
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

    def _best_within(self, limit: int) -> _Cut:
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


@dataclass(frozen=True)
class _Task:
    """What is to be cut, and for whom. `weights` (bytes) and `seconds` are of the layers, the
    ends being included in the first and the last."""

    weights: tuple[int, ...]
    seconds: tuple[float, ...]
    ends: Ends
    hosts: tuple[Host, ...]

    def counts(self, strategy: str, shards: int | None) -> Sequence[int]:
        """The numbers of shards to try, in this order."""
        if shards is not None:
            return (shards,)
        if strategy == "browser_based":
            return (len(self.hosts),)
        return range(1, min(len(self.weights), len(self.hosts)) + 1)

    def may_fit(self, count: int) -> bool:
        """Whether the largest hosts could hold it all if it could be cut anywhere."""
        rooms = sorted((_room(host) for host in self.hosts), reverse=True)
        return sum(rooms[:count]) >= sum(self.weights)

    def search(self, count: int, strategy: str) -> _Search:
        """The cuts into `count` shards that `strategy` allows."""
        in_order = strategy == "browser_based"
        if in_order:
            classes = [[host] for host in range(count)]
        else:
            alike: dict[tuple[int, float], list[int]] = {}
            for at in self._useful(count):
                host = self.hosts[at]
                alike.setdefault((host.capacity_bytes, host.speed), []).append(at)
            classes = list(alike.values())
        layers = len(self.weights)
        even = layers // count, -(-layers // count)
        return _Search(
            weights=list(accumulate(self.weights, initial=0)),
            ticks=[
                list(accumulate((_ticks(time, host) for time in self.seconds), initial=0))
                for host in self.hosts
            ],
            rooms=[_room(host) for host in self.hosts],
            classes=classes,
            in_order=in_order,
            shards=count,
            sizes=even if strategy == "layer_based" else (1, layers),
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
        rooms = [_room(host) for host in self.hosts]
        ranks = [(host.speed, -at) for at, host in enumerate(self.hosts)]

        def betters(one: int) -> int:
            return sum(
                rooms[other] >= rooms[one] and ranks[other] > ranks[one] for other in everyone
            )

        return [one for one in everyone if betters(one) < count]

    def result(self, cut: _Cut, why: str) -> Partition:
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

    # -- what to say when nothing fits -------------------------------------------------------------

    def refusal(self, strategy: str, shards: int | None, counts: Sequence[int]) -> BadInput:
        """Names the layer that no host can hold, or how much memory the hosts lack."""
        return self._layer_too_large() or self._memory_too_small(strategy, shards, counts)

    def _layer_too_large(self) -> BadInput | None:
        host = max(self.hosts, key=lambda host: host.capacity_bytes)
        layer = max(range(len(self.weights)), key=lambda layer: self.weights[layer])
        needed = peak_bytes(self.weights[layer])
        if self.weights[layer] <= _room(host):
            return None
        name = f"layer {layer}"
        if layer == 0 and self.ends.embedding_bytes:
            name += " with the embedding"
        if layer == len(self.weights) - 1 and self.ends.head_bytes:
            name += " with the head"
        return BadInput(
            f"{name} takes {_mib(needed)} "
            f"while it loads, and the largest host, {host.name}, has {_mib(host.capacity_bytes)}. "
            "Add a browser with more memory, or use a model with smaller weights (int8 or q4).",
            expected=host.capacity_bytes,
            got=needed,
        )

    def _memory_too_small(
        self, strategy: str, shards: int | None, counts: Sequence[int]
    ) -> BadInput:
        enough = -(-peak_bytes(sum(self.weights)) // _MIB)  # on each host: anything fits
        lacking = bisect_left(
            range(enough),
            True,
            key=lambda mib: any(self._with_more(mib * _MIB)._fits(n, strategy) for n in counts),
        )
        shown = [f"{host.name} {_mib(host.capacity_bytes)}" for host in self.hosts[:_HOSTS_SHOWN]]
        if len(self.hosts) > len(shown):
            shown.append(f"and {len(self.hosts) - len(shown)} others")
        count = "any number of shards" if len(counts) > 1 else _shards(counts[0])
        return BadInput(
            f"{_mib(sum(self.weights))} of weights don't fit ({strategy}, {count}). Loading takes "
            f"{PEAK_FACTOR:g} times a shard's bytes and {_mib(LOAD_OVERHEAD_BYTES)}. The hosts "
            f"have: {', '.join(shown)}; {lacking} MiB more on each would do. "
            f"{self._remedy(strategy, shards)}",
            expected=f"{lacking} MiB more on each host",
            got=[host.capacity_bytes for host in self.hosts],
        )

    def _remedy(self, strategy: str, shards: int | None) -> str:
        most = min(len(self.weights), len(self.hosts))
        tried_all = shards is None and strategy != "browser_based"
        remedies = []
        for other in dict.fromkeys((strategy, "optimal")):
            if other == strategy and tried_all:
                continue
            fewest = next((n for n in range(1, most + 1) if self._fits(n, other)), None)
            if fewest is not None:
                remedies.append(f"strategy={other!r}, shards={fewest}")
        if remedies:
            return f"It fits with {' or with '.join(remedies)}."
        return "Add browsers or memory, or use a model with smaller weights (int8 or q4)."

    def _with_more(self, more_bytes: int) -> _Task:
        hosts = [
            replace(host, capacity_bytes=host.capacity_bytes + more_bytes) for host in self.hosts
        ]
        return replace(self, hosts=tuple(hosts))

    def _fits(self, count: int, strategy: str) -> bool:
        """Whether it is known to fit: too many hosts to search are no help."""
        if not self.may_fit(count):
            return False
        search = self.search(count, strategy)
        return search.states() <= STATES_MAX and search.fits()


def _why(strategy: str, shards: int | None, count: int) -> str:
    if shards is not None:
        return f"{strategy}, {_shards(count)} as told"
    if strategy == "browser_based":
        return f"{strategy}, {_shards(count)}, one for each host"
    return f"{strategy}, {_shards(count)}, the fewest that fit"


def _check(
    layers: Sequence[Layer],
    ends: Ends,
    hosts: Sequence[Host],
    shards: int | None,
    strategy: str,
) -> None:
    if strategy == "component_based":
        raise BadInput(
            f"component_based cuts between models, see {_COMPONENTS_CUT_BY}; here one model is cut "
            f"between its layers, with strategy {' or '.join(map(repr, STRATEGIES))}.",
            expected=list(STRATEGIES),
            got=strategy,
        )
    if strategy not in STRATEGIES:
        raise BadInput(
            f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}.",
            expected=list(STRATEGIES),
            got=strategy,
        )
    _check_length("layers", len(layers), LAYERS_MAX, "Give each layer's time and bytes.")
    _check_length("hosts", len(hosts), HOSTS_MAX, "Give the browsers that are ready.")
    for at, layer in enumerate(layers):
        _check_seconds(f"layers[{at}].seconds", layer.seconds)
        _check_bytes(f"layers[{at}].bytes", layer.bytes)
    _check_seconds("ends.embedding_seconds", ends.embedding_seconds)
    _check_seconds("ends.head_seconds", ends.head_seconds)
    _check_bytes("ends.embedding_bytes", ends.embedding_bytes)
    _check_bytes("ends.head_bytes", ends.head_bytes)
    for at, host in enumerate(hosts):
        _check_bytes(f"hosts[{at}].capacity_bytes", host.capacity_bytes)
        _check_number(f"hosts[{at}].speed", host.speed, *_SPEEDS, "1.0 where it is unknown")
    names = [host.name for host in hosts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(
            f"two hosts are called {twice!r}: a browser takes one shard, so name each once.",
            expected="different names",
            got=names,
        )
    _check_shards(len(layers), len(hosts), shards, strategy)


def _check_shards(layers: int, hosts: int, shards: int | None, strategy: str) -> None:
    if shards is not None and (not _is_whole(shards) or shards < 1):
        raise BadInput(
            f"shards: expected a whole number from 1, or None for the fewest that fit, "
            f"got {shards!r}.",
            expected=[1, min(layers, hosts)],
            got=shards,
        )
    wanted = shards
    if wanted is None and strategy == "browser_based":
        wanted = hosts
    if wanted is None:
        return
    if wanted > layers:
        what = "one for each host" if shards is None else "as told"
        raise BadInput(
            f"{_shards(wanted)} ({what}) are more than the {layers} layers: each needs at least "
            f"one layer, so say shards={min(layers, hosts)} or less.",
            expected=[1, min(layers, hosts)],
            got=wanted,
        )
    if wanted > hosts:
        raise BadInput(
            f"{_shards(wanted)} are more than the {hosts} hosts: each needs a browser of its own, "
            f"so add {wanted - hosts} browsers or say shards={hosts} or less.",
            expected=[1, hosts],
            got=wanted,
        )


def _check_length(name: str, length: int, most: int, remedy: str) -> None:
    if not 1 <= length <= most:
        raise BadInput(
            f"{name}: expected from 1 to {most} of them, got {length}. {remedy}",
            expected=[1, most],
            got=length,
        )


def _check_seconds(name: str, value: float) -> None:
    _check_number(name, value, 0.0, _SECONDS_MAX, "what was measured, in seconds")


def _check_bytes(name: str, value: int) -> None:
    if not _is_whole(value):
        raise BadInput(
            f"{name}: expected a whole number of bytes, got {value!r}.",
            expected=[0, _BYTES_MAX],
            got=value,
        )
    _check_number(name, value, 0, _BYTES_MAX, "what was counted, in bytes")


def _check_number(name: str, value: object, low: float, high: float, meaning: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise BadInput(
            f"{name}: expected a number from {low:g} to {high:g} ({meaning}), got {value!r}.",
            expected=[low, high],
            got=value,
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _room(host: Host) -> int:
    """Bytes of weights whose peak is what the host holds; negative if it can load nothing."""
    return int((host.capacity_bytes - LOAD_OVERHEAD_BYTES) // PEAK_FACTOR)


def _ticks(seconds: float, host: Host) -> int:
    return round(seconds / host.speed * _TICKS_PER_SECOND)


def _bits(ends: range) -> int:
    """A number in which the bits of a range are set."""
    return (1 << ends.stop) - (1 << ends.start) if ends else 0


def _each_bit(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _shards(count: int) -> str:
    return f"{count} shard{'s' * (count != 1)}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB"
