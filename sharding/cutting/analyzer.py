"""The bytes and times of a model's layers, and plans that assign them to browsers.

Layers and bytes come from the graph. Times are measured on demand: each layer is cut out, into a
temporary folder, and run in the native runtime. `sharding.cutting.partition` then makes the plan.
This module must not keep what it cuts (`sharding.cutting.manager` does) and must not contact a
browser.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import numpy as np

from recovery.errors import BadInput, NotAModel, PageError
from sharding.cutting.cut import cut
from sharding.cutting.layers import LayerMap, find_boundaries
from sharding.cutting.manifest import Cache, Manifest, Shard
from sharding.cutting.partition import partition
from sharding.cutting.spans import Ends, Host, Layer, Partition
from sharding.cutting.strategies import STRATEGIES, STRATEGY_RULES
from sharding.models.frames import Array
from sharding.models.load_memory import PEAK_FACTOR, peak_bytes
from sharding.models.native import NativeSession
from sharding.models.signature import TensorSpec
from sharding.sequences.stages import inputs_of_step

# Memory bandwidth of a processor, in bytes per second. One token reads each weight once, so times
# that were not measured are estimated as the time of reading the weights.
BYTES_PER_SECOND = 10e9
RUNS_MAX = 10_000
POSITIONS_MAX = 1 << 20  # tokens and past

_STEP_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
_IDS = 64  # every vocabulary has more words
_SEED = 20_250
_BY_BYTES = "to plan without times, pass measured=analyzer.by_bytes()"


@dataclass(frozen=True)
class Measurement:
    """What `partition` needs to know of a model. `how` says where the times come from.

    `shared_bytes` are weights that each shard has, whichever layers it gets.
    """

    layers: tuple[Layer, ...]
    ends: Ends
    shared_bytes: int
    measured: bool
    how: str


class ModelShardingAnalyzer:
    """The layers of one ONNX file, and plans for cutting it. Calls block.

    `work_dir` is where layers are cut out to be measured (by default the system's temporary
    folder); it must have room for the whole model, and is left as it was.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        work_dir: str | Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._path = Path(path)
        self._work_dir = work_dir
        self._clock = clock
        self._layers: LayerMap | None = None
        self._measurement: Measurement | None = None

    def __repr__(self) -> str:
        layers = "not read" if self._layers is None else f"{len(self._layers)} layers"
        return f"<ModelShardingAnalyzer {self._path} {layers}>"

    def layers(self) -> LayerMap:
        """Read once. Raises `NotAModel` if the file can't be cut by layers."""
        if self._layers is None:
            self._layers = find_boundaries(self._path)
        return self._layers

    def by_bytes(self) -> Measurement:
        """Times estimated from the bytes of the weights, at `BYTES_PER_SECOND`.

        The embedding's is 0: only the rows of the step's tokens are read from its table.
        """
        return self._measurement_of(
            [layer.weight_bytes / BYTES_PER_SECOND for layer in self.layers().layers],
            0.0,
            self.layers().head_bytes / BYTES_PER_SECOND,
            measured=False,
            how=f"estimated from bytes at {BYTES_PER_SECOND / 1e9:g} GB/s, not measured",
        )

    def measure(
        self,
        tokens: int = 1,
        *,
        past: int = 32,
        runs: int = 9,
        progress: Callable[[int, int], None] | None = None,
    ) -> Measurement:
        """Time each layer in the native runtime, on one thread: the median of `runs` steps.

        A step is `tokens` tokens after `past` others, with real caches. An encoder has
        no past, so it gets `past + tokens` positions at once. `progress` is called with the number
        of layers done, and of all.

        Each layer is a shard of its own here, and computes masks and positions again; so a shard
        of several layers takes a little less than their sum. The first also does the embedding and
        the last the head. Their time beyond the median of the layers between them counts as that
        of these ends; with fewer than three layers it stays in the layers' times.

        Raises `NotAModel` if it can't be cut between all layers, and `BadInput` for a number out of
        range, a `work_dir` without room, or a model whose inputs can't be made up.
        """
        _check_count("tokens", tokens, 1, POSITIONS_MAX)
        _check_count("past", past, 0, POSITIONS_MAX)
        _check_count("runs", runs, 1, RUNS_MAX)
        count = len(self.layers())
        seconds = []
        with self._each_layer_cut() as (folder, manifest):
            steps = _Steps(manifest, tokens, past)
            for done, shard in enumerate(manifest.shards, start=1):
                seconds.append(self._median_seconds(folder, shard, steps, runs))
                if progress is not None:
                    progress(done, count)
        layers, embedding, head = _without_ends(seconds)
        many = f"{tokens} token{'s' * (tokens != 1)}"
        what = f"{many} after {past}" if manifest.kind == "decoder" else f"{past + tokens} tokens"
        self._measurement = self._measurement_of(
            layers,
            embedding,
            head,
            measured=True,
            how=f"native, one thread, {what}, median of {runs}",
        )
        return self._measurement

    def plan(
        self,
        shards: int | None = None,
        *,
        capacity_bytes: int | None = None,
        hosts: Sequence[Host] | None = None,
        strategy: str = "layer_based",
        measured: Measurement | None = None,
    ) -> Partition:
        """Which layers each browser gets; see `sharding.cutting.partition.partition` for strategies
        and errors.

        `hosts` are the browsers. Without them, as many equal browsers as needed are assumed,
        each with room for `capacity_bytes` while it loads (by default for the whole model). Without
        `shards` it is the fewest that fit, or for `browser_based` one for each host.

        Times are those given as `measured`, else those of the last `measure`. Without either,
        `layer_based` takes them `by_bytes` and the others measure now, after checking that a plan
        exists. Bytes of the spans include the weights that every shard has.
        """
        hosts = self._hosts(shards, capacity_bytes, hosts, strategy)
        times = measured or self._measurement or self.by_bytes()
        plan = _fitted(times, hosts, shards, strategy)
        if not times.measured and measured is None and STRATEGY_RULES[strategy].by_time:
            times = self.measure()
            plan = _fitted(times, hosts, shards, strategy)
        return replace(plan, reason=f"{plan.reason} ({times.how})")

    def recommend_shard_count(self, capacity_bytes: int) -> int:
        """The fewest shards that browsers of so much memory can load, cut anywhere."""
        fewest = self.plan(
            capacity_bytes=capacity_bytes, strategy="optimal", measured=self.by_bytes()
        )
        return len(fewest.spans)

    def _hosts(
        self,
        shards: int | None,
        capacity_bytes: int | None,
        hosts: Sequence[Host] | None,
        strategy: str,
    ) -> Sequence[Host]:
        if hosts is not None:
            if capacity_bytes is not None:
                raise BadInput(
                    "hosts= already include capacities: leave out capacity_bytes.",
                    expected="hosts or capacity_bytes",
                    got="both",
                )
            return hosts
        rule = STRATEGY_RULES[strategy] if strategy in STRATEGIES else None
        if rule is not None and rule.in_order and shards is None:
            raise BadInput(
                f"{strategy} gives each browser a shard, so pass the browsers as hosts=, or how "
                "many there are as shards=.",
                expected="hosts or shards",
                got="neither",
            )
        if rule is not None and shards is None and capacity_bytes is None:
            raise BadInput(
                "The number of shards is not given: pass shards=, capacity_bytes= (what a "
                "browser can hold while it loads) or hosts=.",
                expected="shards, capacity_bytes or hosts",
                got="none of them",
            )
        if capacity_bytes is not None:
            _check_count("capacity_bytes", capacity_bytes, 1, 1 << 62)
        layers = self.layers()
        total = sum(layer.weight_bytes for layer in layers.layers) + layers.shared_bytes
        total += layers.embedding_bytes + layers.head_bytes
        capacity = peak_bytes(total) if capacity_bytes is None else int(capacity_bytes)
        return [Host(f"browser-{at}", capacity) for at in range(len(layers))]

    def _measurement_of(
        self, seconds: Sequence[float], embedding: float, head: float, *, measured: bool, how: str
    ) -> Measurement:
        layers = self.layers()
        return Measurement(
            tuple(
                Layer(time, layer.weight_bytes)
                for time, layer in zip(seconds, layers.layers, strict=True)
            ),
            Ends(layers.embedding_bytes, embedding, layers.head_bytes, head),
            layers.shared_bytes,
            measured,
            how,
        )

    @contextmanager
    def _each_layer_cut(self) -> Iterator[tuple[Path, Manifest]]:
        spans = [(layer, layer + 1) for layer in range(len(self.layers()))]
        try:
            made = tempfile.TemporaryDirectory(prefix="tabpool-layers-", dir=self._work_dir)
        except OSError as error:
            raise BadInput(
                f"Layers can't be cut out to be measured: {error}. Pass a work_dir= that can be "
                f"written, with room for the model; or, {_BY_BYTES}.",
                expected="a folder that can be written",
                got=str(error),
            ) from error
        with made as folder:
            try:
                manifest = cut(self._path, spans, folder)
            except NotAModel as error:
                raise NotAModel(
                    f"{error} (To measure it, every layer is cut out; {_BY_BYTES}.)",
                    **error.fields,
                ) from error
            yield Path(folder), manifest

    def _median_seconds(self, folder: Path, shard: Shard, steps: _Steps, runs: int) -> float:
        session = NativeSession(folder / shard.graph_file, threads=1)
        session.open()
        try:
            inputs = steps.advance(shard, session)
            taken = []
            for _ in range(runs):
                begun = self._clock()
                session.run(inputs)
                taken.append(self._clock() - begun)
        except (BadInput, PageError) as error:
            raise BadInput(
                f"{self._path}: layer {shard.span[0]} can't be measured with made-up inputs: "
                f"{error} Perhaps the model has fewer positions: pass a smaller past=; or, "
                f"{_BY_BYTES}.",
                expected="a model that takes token ids, masks and positions, or embeddings",
                got=[spec.name for spec in (*shard.receives, *shard.shared)],
            ) from error
        finally:
            session.close()
        return statistics.median(taken)


class _Steps:
    """The same two steps through all shards in turn: the past, and the one that is timed."""

    def __init__(self, manifest: Manifest, tokens: int, past: int) -> None:
        decoder = manifest.kind == "decoder"
        self._past = past if decoder else 0
        self._tokens = tokens if decoder else past + tokens
        self._sent_past: Mapping[str, Array] = {}
        self._sent: Mapping[str, Array] = {}

    def advance(self, shard: Shard, session: NativeSession) -> dict[str, Array]:
        """The inputs of the timed step, after a first run of it (in which the runtime plans)."""
        caches = {cache.past.name: _empty(cache) for cache in shard.caches}
        if self._past:
            made = session.run(_inputs(shard, self._sent_past, self._past, 0) | caches)
            self._sent_past = {spec.name: made[spec.name] for spec in shard.sends}
            caches = {cache.past.name: made[cache.present.name] for cache in shard.caches}
        inputs = _inputs(shard, self._sent, self._tokens, self._past) | caches
        made = session.run(inputs)
        self._sent = {spec.name: made[spec.name] for spec in shard.sends}
        return inputs


def _inputs(
    shard: Shard, received: Mapping[str, Array], count: int, position: int
) -> dict[str, Array]:
    ids = [1 + place % (_IDS - 1) for place in range(position, position + count)]
    known = [spec for spec in shard.shared if spec.name in _STEP_INPUTS]
    other = [spec for spec in shard.shared if spec.name not in _STEP_INPUTS]
    return {
        **{spec.name: received[spec.name] for spec in shard.receives},
        **inputs_of_step(known, ids, position),
        **{spec.name: _made_up(spec, count) for spec in other},
    }


def _made_up(spec: TensorSpec, count: int) -> Array:
    """Noise for embeddings or an image: a batch of one, and `count` for other open dimensions."""
    shape = [
        dim if isinstance(dim, int) else 1 if axis == 0 else count
        for axis, dim in enumerate(spec.shape or ())
    ]
    dtype = np.dtype(spec.dtype)
    if dtype.kind != "f":
        return np.ones(shape, dtype)
    return np.random.default_rng(_SEED).standard_normal(shape).astype(dtype)


def _empty(cache: Cache) -> Array:
    shape = [
        dim if isinstance(dim, int) else 1 if axis == 0 else cache.window
        for axis, dim in enumerate(cache.past.shape or ())
    ]
    return np.zeros(shape, np.dtype(cache.past.dtype))


def _without_ends(seconds: Sequence[float]) -> tuple[list[float], float, float]:
    """The layers' times, that of the embedding, and that of the head."""
    if len(seconds) < 3:
        return list(seconds), 0.0, 0.0
    usual = statistics.median(seconds[1:-1])
    embedding, head = (max(end - usual, 0.0) for end in (seconds[0], seconds[-1]))
    return [seconds[0] - embedding, *seconds[1:-1], seconds[-1] - head], embedding, head


def _fitted(
    times: Measurement, hosts: Sequence[Host], shards: int | None, strategy: str
) -> Partition:
    """A plan in which each host also has room for the weights that every shard has."""
    shared = times.shared_bytes
    plan = partition(times.layers, times.ends, hosts, shards=shards, strategy=strategy)
    capacity = {host.name: host.capacity_bytes for host in hosts}
    if any(peak_bytes(span.bytes + shared) > capacity[span.host] for span in plan.spans):
        kept = int(PEAK_FACTOR * shared)
        smaller = [
            replace(host, capacity_bytes=max(host.capacity_bytes - kept, 0)) for host in hosts
        ]
        try:
            plan = partition(times.layers, times.ends, smaller, shards=shards, strategy=strategy)
        except BadInput as error:
            raise BadInput(
                f"{error} ({kept:,} bytes of each host are taken off here, for weights that "
                "every shard has.)",
                **error.fields,
            ) from error
    return replace(
        plan, spans=tuple(replace(span, bytes=span.bytes + shared) for span in plan.spans)
    )


def _check_count(name: str, value: object, low: int, high: int) -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:  # type: ignore[call-overload]
        raise BadInput(
            f"{name}: expected a whole number from {low} to {high}, got {value!r}.",
            expected=[low, high],
            got=value,
        )
