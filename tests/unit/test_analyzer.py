from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from recovery.errors import BadInput, NotAModel
from sharding.cutting import analyzer as module
from sharding.cutting.analyzer import BYTES_PER_SECOND, ModelShardingAnalyzer
from sharding.cutting.layers import find_boundaries
from sharding.cutting.spans import Host
from sharding.models.load_memory import peak_bytes
from sharding.models.native import NativeSession
from tests import models

DECODERS = Path(__file__).parents[1] / "assets" / "decoders"
LLAMA = DECODERS / "builder-llama.onnx"  # three layers
MIB = 1 << 20


def clock_of(*durations: float):
    """A clock on which the timed steps take so long, one after the other."""
    marks = accumulate(part for duration in durations for part in (0.0, duration))
    return lambda: next(marks)


class Watched(NativeSession):
    """A native session that keeps what it was asked and what it answered."""

    runs: list[tuple[dict, dict]] = []  # noqa: RUF012

    def run(self, inputs):
        outputs = super().run(inputs)
        self.runs.append((dict(inputs), outputs))
        return outputs


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(Watched, "runs", [])
    monkeypatch.setattr(module, "NativeSession", Watched)
    return Watched.runs


@pytest.fixture
def unmeasurable(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing was to be measured")

    monkeypatch.setattr(module, "cut", refuse)


def test_layers_are_those_of_the_graph_and_read_once(monkeypatch):
    analyzer = ModelShardingAnalyzer(str(LLAMA))
    assert "not read" in repr(analyzer)
    assert analyzer.layers() == find_boundaries(LLAMA)
    monkeypatch.setattr(module, "find_boundaries", None)
    assert len(analyzer.layers()) == 3
    assert "3 layers" in repr(analyzer)


def test_bytes_of_a_measurement_are_the_graphs(unmeasurable):
    analyzer = ModelShardingAnalyzer(LLAMA)
    layers, times = analyzer.layers(), analyzer.by_bytes()
    assert [layer.bytes for layer in times.layers] == [one.weight_bytes for one in layers.layers]
    assert (times.ends.embedding_bytes, times.ends.head_bytes) == (10240, 10368)
    assert times.shared_bytes == layers.shared_bytes > 0
    assert not times.measured
    assert "not measured" in times.how
    assert times.layers[0].seconds == times.layers[0].bytes / BYTES_PER_SECOND
    assert times.ends.embedding_seconds == 0
    assert times.ends.head_seconds == 10368 / BYTES_PER_SECOND


@pytest.mark.parametrize(
    "name",
    [
        "builder-gemma2",
        "builder-llama-embeds",
        "builder-phi-int4",
        "builder-phi3-long",
        "optimum-bert-int8",
        "optimum-gpt2",
        "optimum-llama",
    ],
)
def test_layers_of_an_export_are_measured(tmp_path, name):
    done = []
    analyzer = ModelShardingAnalyzer(DECODERS / f"{name}.onnx", work_dir=tmp_path)
    times = analyzer.measure(runs=1, progress=lambda at, count: done.append((at, count)))
    assert times.measured
    assert all(0 < layer.seconds < 1 for layer in times.layers)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert list(tmp_path.iterdir()) == []


def test_a_layer_takes_the_median_and_the_ends_what_is_beyond_the_layers_between():
    steps = (5, 50, 4), (3, 3, 30), (0, 7, 7)
    clock = clock_of(*(seconds for layer in steps for seconds in layer))
    times = ModelShardingAnalyzer(LLAMA, clock=clock).measure(runs=3)
    assert [layer.seconds for layer in times.layers] == [3, 3, 3]
    assert (times.ends.embedding_seconds, times.ends.head_seconds) == (2, 4)
    assert times.how == "native, one thread, 1 token after 32, median of 3"


def test_an_end_that_takes_less_than_the_layers_between_is_no_end():
    times = ModelShardingAnalyzer(LLAMA, clock=clock_of(1, 3, 2)).measure(runs=1)
    assert [layer.seconds for layer in times.layers] == [1, 3, 2]
    assert (times.ends.embedding_seconds, times.ends.head_seconds) == (0, 0)


@pytest.mark.parametrize(("tokens", "past"), [(1, 32), (3, 5), (2, 0)])
def test_what_is_timed_is_a_real_step_after_a_real_past(watched, tokens, past):
    """Handed from layer to layer, it ends in the uncut model's own logits."""
    ModelShardingAnalyzer(LLAMA).measure(tokens, past=past, runs=1)
    inputs, outputs = watched[-1]
    caches = find_boundaries(LLAMA).layers[2].caches
    assert {inputs[cache.past.name].shape[2] for cache in caches} == {past}
    assert inputs["attention_mask"].shape == (1, past + tokens)

    first, _ = watched[2 if past else 1]
    uncut = NativeSession(LLAMA)
    uncut.open()
    given = {"input_ids": first["input_ids"], "attention_mask": inputs["attention_mask"]}
    every = [cache for layer in find_boundaries(LLAMA).layers for cache in layer.caches]
    kept = {cache.past.name: np.zeros((1, 1, 0, 16), np.float32) for cache in every}
    if past:
        before, _ = watched[0]
        made = uncut.run(before | kept)
        kept = {cache.past.name: made[cache.present.name] for cache in every}
    assert uncut.run(given | kept)["logits"].tobytes() == outputs["logits"].tobytes()


def test_an_encoder_is_given_all_positions_at_once(watched):
    times = ModelShardingAnalyzer(DECODERS / "optimum-bert.onnx").measure(2, past=10, runs=1)
    assert watched[-1][0]["attention_mask"].shape == (1, 12)
    assert "12 tokens" in times.how


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"tokens": 0}, "tokens: expected a whole number from 1 .* got 0"),
        ({"past": -1}, "past: expected a whole number from 0 .* got -1"),
        ({"runs": True}, "runs: expected a whole number from 1 .* got True"),
        ({"runs": 1.5}, r"got 1\.5"),
    ],
)
def test_numbers_out_of_range_are_refused(unmeasurable, call, said):
    with pytest.raises(BadInput, match=said):
        ModelShardingAnalyzer(LLAMA).measure(**call)


def test_a_past_beyond_the_models_positions_names_the_remedies(tmp_path):
    analyzer = ModelShardingAnalyzer(DECODERS / "optimum-gpt2.onnx", work_dir=tmp_path)
    with pytest.raises(BadInput, match=r"layer 0 can't be .* smaller past=; .*analyzer\.by_bytes"):
        analyzer.measure(past=100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_work_dir_that_is_not_there_is_refused(tmp_path):
    analyzer = ModelShardingAnalyzer(LLAMA, work_dir=tmp_path / "none")
    with pytest.raises(BadInput, match="Pass a work_dir= that can be written"):
        analyzer.measure()


def test_a_model_without_layers_is_refused(tmp_path):
    with pytest.raises(NotAModel, match="run whole in one browser"):
        ModelShardingAnalyzer(models.add_model(tmp_path / "a.onnx")).plan(2)


# -- plans -----------------------------------------------------------------------------------------


def spans(plan) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in plan.spans]


def test_layer_based_needs_no_times(unmeasurable):
    plan = ModelShardingAnalyzer(LLAMA).plan(3)
    assert spans(plan) == [(0, 1), (1, 2), (2, 3)]
    assert [span.host for span in plan.spans] == ["browser-0", "browser-1", "browser-2"]
    assert plan.reason.endswith("(estimated from bytes at 10 GB/s, not measured)")


@pytest.mark.parametrize("strategy", ["optimal", "browser_based"])
def test_the_others_measure_once_and_go_by_time(strategy):
    # The last layer alone takes longer than the two before it.
    analyzer = ModelShardingAnalyzer(LLAMA, clock=clock_of(*[1] * 9, *[1] * 9, *[5] * 9))
    plan = analyzer.plan(2, strategy=strategy)
    assert spans(plan) == [(0, 2), (2, 3)]
    assert (plan.bottleneck_seconds, plan.total_seconds) == (5, 7)
    assert "median of 9" in plan.reason
    assert spans(analyzer.plan(2, strategy=strategy)) == [(0, 2), (2, 3)]  # the clock stands still


def test_times_that_are_given_are_taken(unmeasurable):
    analyzer = ModelShardingAnalyzer(LLAMA)
    plan = analyzer.plan(2, strategy="optimal", measured=analyzer.by_bytes())
    assert "not measured" in plan.reason


def test_a_plan_that_cannot_be_is_refused_before_anything_is_measured(unmeasurable):
    analyzer = ModelShardingAnalyzer(LLAMA)
    for call in ({"shards": 4}, {"capacity_bytes": 50 * MIB}):
        with pytest.raises(BadInput):
            analyzer.plan(strategy="optimal", **call)


def test_capacity_gives_the_fewest_shards_that_fit():
    analyzer = ModelShardingAnalyzer(LLAMA)
    layers = analyzer.layers()
    one = layers.layers[0].weight_bytes
    whole = 3 * one + layers.embedding_bytes + layers.head_bytes
    enough = peak_bytes(whole + layers.shared_bytes)
    assert spans(analyzer.plan(capacity_bytes=enough)) == [(0, 3)]
    assert analyzer.recommend_shard_count(enough) == 1
    # All shards hold the shared weights, too: without them it would still fit.
    plan = analyzer.plan(capacity_bytes=enough - 1)
    assert enough - 1 > peak_bytes(whole)
    assert len(plan.spans) == analyzer.recommend_shard_count(enough - 1) == 2
    assert sum(span.bytes for span in plan.spans) == whole + 2 * layers.shared_bytes


def test_a_host_too_small_for_the_shared_weights_says_so():
    analyzer = ModelShardingAnalyzer(LLAMA)
    layers = analyzer.layers()
    end = layers.layers[2].weight_bytes + layers.head_bytes
    with pytest.raises(BadInput, match="8,192 bytes of each host are taken off here, for weights"):
        analyzer.plan(3, capacity_bytes=peak_bytes(end))


def test_hosts_are_taken_as_they_are():
    hosts = [Host("slow", 1 << 30, speed=0.5), Host("fast", 1 << 30, speed=2.0)]
    analyzer = ModelShardingAnalyzer(LLAMA)
    plan = analyzer.plan(hosts=hosts, strategy="browser_based", measured=analyzer.by_bytes())
    assert [(span.host, span.start, span.end) for span in plan.spans] == [
        ("slow", 0, 1),
        ("fast", 1, 3),
    ]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({}, "pass shards=, capacity_bytes= .* or hosts="),
        ({"strategy": "browser_based", "capacity_bytes": MIB}, "pass the browsers as hosts="),
        ({"hosts": [Host("a", MIB)], "capacity_bytes": MIB}, "leave out capacity_bytes"),
        ({"capacity_bytes": 0}, "capacity_bytes: expected a whole number from 1"),
        ({"capacity_bytes": "512MiB"}, "got '512MiB'"),
        ({"hosts": [Host("a", "much")]}, "hosts.0..capacity_bytes: expected a whole number"),
        ({"shards": 0}, "shards: expected a whole number from 1"),
        ({"shards": 4}, "more than the 3 layers.*pass shards=3 or less"),
        ({"shards": 2, "strategy": "component_based"}, "see ModelShardingManager"),
        ({"strategy": "best"}, "expected one of layer_based"),
    ],
)
def test_a_plan_that_asks_for_nonsense_is_refused(unmeasurable, call, said):
    with pytest.raises(BadInput, match=said):
        ModelShardingAnalyzer(LLAMA).plan(**call)
