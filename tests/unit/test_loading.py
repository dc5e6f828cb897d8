"""Whatever strategy cuts a model, its parts compute what the uncut file does natively."""

from __future__ import annotations

import onnx
import pytest

from pool.models.loading import read_parts
from recovery.errors import BadInput, NotAModel
from recovery.kinds import Level
from sharding.cutting.manager import ModelShardingManager
from sharding.cutting.manifest import MANIFEST_NAME
from sharding.cutting.strategies import STRATEGIES
from tests import models
from tests.native_hosts import NativeHosts
from tests.unit.test_pipeline import DECODERS, GREEDY, PROMPT, generate, reference, same

LLAMA = DECODERS / "builder-llama.onnx"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TABPOOL_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shards", [1, 2, 3])
async def test_every_strategy_computes_the_uncut_models_function(strategy, shards, cache):
    entry, parts = read_parts("m", LLAMA, shards=shards, strategy=strategy)
    assert entry.parts == tuple(f"m@{n}" for n in range(shards))
    hosts = NativeHosts(entry.pipeline, [part.spec for part in parts])
    same(await generate(entry.pipeline, hosts, Level.MEDIUM, GREEDY, PROMPT), reference(LLAMA))


def test_what_was_cut_is_found_again_and_planned_no_second_time(cache, monkeypatch):
    # Times are measured anew by every plan: the same model must still be cut in the same places.
    entry, _ = read_parts("m", LLAMA, shards=2, strategy="optimal")
    monkeypatch.setattr(ModelShardingManager, "plan", lambda *_, **__: pytest.fail("planned again"))
    again, _ = read_parts("m", LLAMA, shards=2, strategy="optimal")
    assert again.spec.digest == entry.spec.digest


def test_one_wrong_byte_in_a_shard_is_refused_or_cut_anew(cache):
    read_parts("m", LLAMA, shards=2)
    (folder,) = [path.parent for path in cache.rglob("manifest.json")]
    weights = folder / "shard-1.onnx.data"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(NotAModel, match=r"shard-1\.onnx\.data"):
        read_parts("m", folder)  # a folder that somebody made is taken as it is, or not at all
    _, parts = read_parts("m", LLAMA, shards=2)  # our own is made anew
    assert parts[1].recording().run().answer is not None
    with pytest.raises(BadInput, match="holds 2 shards, not 3"):
        read_parts("m", folder, shards=3)


@pytest.mark.parametrize("strategy", ["layer_based", "optimal", "misspelt"])
def test_strategy_without_a_number_of_shards_is_refused_and_not_ignored(tmp_path, strategy):
    path = models.add_model(tmp_path / "m.onnx")
    with pytest.raises(BadInput, match=r"strategy: .*pass shards="):
        read_parts("m", path, strategy=strategy)


def test_misspelt_strategy_is_refused_with_those_that_there_are():
    with pytest.raises(BadInput, match="expected one of layer_based, browser_based, optimal"):
        read_parts("m", LLAMA, shards=2, strategy="misspelt")


def test_strategy_for_what_is_cut_already_is_refused(tmp_path):
    (tmp_path / MANIFEST_NAME).write_text("{}")
    with pytest.raises(BadInput, match="already cut"):
        read_parts("m", tmp_path, strategy="optimal")


def test_model_with_more_outputs_than_a_message_carries_is_refused_before_any_browser(tmp_path):
    with pytest.raises(NotAModel, match=r"at most 1,024 outputs, .*, got 1,025"):
        read_parts("m", models.chatty_model(tmp_path / "m.onnx", 1025))
    entry, _ = read_parts("m", models.chatty_model(tmp_path / "m.onnx", 1024))
    assert len(entry.spec.outputs) == 1024


def test_path_that_no_system_reads_is_no_model(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / "m.onnx" / "inner"):
        (tmp_path / "m.onnx").touch()
        with pytest.raises(NotAModel, match=r"expected .*, got"):
            read_parts("m", path)


@pytest.mark.parametrize("written", ["sub//w.bin", "./w.bin", "sub/./w.bin"])
def test_cut_reads_weights_wherever_the_graph_says_they_are(tmp_path, cache, written):
    """In initializers and in the nodes' own constants."""
    model = onnx.load(DECODERS / "optimum-bert.onnx")
    folder = tmp_path / "model"
    (folder / written).parent.mkdir(parents=True)
    large = [t for t in model.graph.initializer if len(t.raw_data) > 1024]
    inner = [
        a.t
        for node in model.graph.node
        for a in node.attribute
        if node.op_type == "Constant" and a.HasField("t") and a.t.raw_data
    ]
    assert large
    assert inner
    with (folder / written).open("wb") as stream:
        for tensor in (*large, *inner):
            offset = stream.tell()
            stream.write(tensor.raw_data)
            length = stream.tell() - offset
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", written), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    _, parts = read_parts("m", folder, shards=2)
    assert all(part.recording().run().answer is not None for part in parts)
