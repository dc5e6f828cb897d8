"""Whatever strategy cuts a model, its parts compute what the uncut file does natively."""

from __future__ import annotations

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
    assert parts[1].known_answer() is not None
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
