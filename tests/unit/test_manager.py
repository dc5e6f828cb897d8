import json
import shutil
from pathlib import Path

import pytest

from recovery.errors import BadInput, NotAModel
from sharding.cutting import manager as module
from sharding.cutting.analyzer import ModelShardingAnalyzer
from sharding.cutting.manager import ModelShardingManager
from sharding.cutting.manifest import MANIFEST_NAME, read_manifest
from sharding.cutting.partition import partition
from sharding.cutting.spans import Host
from tests import models

DECODERS = Path(__file__).parents[1] / "assets" / "decoders"
THIRDS = [(0, 1), (1, 2), (2, 3)]


@pytest.fixture
def model(tmp_path):
    """A decoder of three layers, in a folder of its own."""
    (tmp_path / "llama").mkdir()
    return shutil.copy(DECODERS / "builder-llama.onnx", tmp_path / "llama" / "llama.onnx")


@pytest.fixture
def cuts(monkeypatch):
    """The spans of every cut that was really made."""
    made, cut = [], module.cut
    monkeypatch.setattr(module, "cut", lambda *given: (made.append(given[1]), cut(*given))[1])
    return made


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_model_is_cut_once_and_its_folder_used_again(model, cuts, tmp_path):
    manager = ModelShardingManager(model)
    first = manager.shard(3, out_dir=tmp_path / "out")
    assert [shard.span for shard in first.shards] == THIRDS
    assert read_manifest(tmp_path / "out") == first
    assert manager.shard(3, out_dir=tmp_path / "out") == first
    assert manager.find(THIRDS, tmp_path / "out") == first
    # By another process, of the same content under another name, planned in another way.
    other = ModelShardingManager(shutil.copy(model, tmp_path / "b.onnx"), tmp_path / "out")
    times = other.analyzer.by_bytes()
    assert other.shard(3, strategy="optimal", measured=times) == first
    assert other.shard(hosts=[Host(n, 1 << 30) for n in "abc"], strategy="layer_based", shards=3)
    assert len(cuts) == 1


def test_the_folder_is_beside_the_model_unless_told(model):
    manager = ModelShardingManager(model)
    assert manager.folder() == Path(model).parent / "llama.shards"
    manager.shard(2)
    assert read_manifest(manager.folder())
    assert ModelShardingManager(model, "here").folder() == Path("here").absolute()
    assert ModelShardingManager(model, "here").folder("there") == Path("there").absolute()


@pytest.mark.parametrize("damage", ["shard", "missing", "manifest", "other version"])
def test_a_damaged_folder_is_cut_again(model, cuts, tmp_path, damage):
    manager = ModelShardingManager(model, tmp_path)
    first = manager.shard(2)
    manifest = tmp_path / MANIFEST_NAME
    if damage == "shard":
        data = bytearray((tmp_path / "shard-1.onnx.data").read_bytes())
        data[100] ^= 1
        (tmp_path / "shard-1.onnx.data").write_bytes(data)
    elif damage == "missing":
        (tmp_path / "shard-1.onnx").unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:100])
    else:
        manifest.write_text(json.dumps({"format": 0}))
    assert manager.find([(0, 2), (2, 3)]) is None
    assert manager.shard(2) == first == read_manifest(tmp_path)
    assert len(cuts) == 2


def test_a_model_that_changed_is_cut_again(model, cuts, tmp_path):
    first = ModelShardingManager(model, tmp_path / "out").shard(2)
    shutil.copy(DECODERS / "builder-qwen2.onnx", model)
    again = ModelShardingManager(model, tmp_path / "out").shard(2)
    assert again.source != first.source
    assert len(cuts) == 2


def test_fewer_shards_leave_no_files_of_the_older_cut(model, tmp_path):
    manager = ModelShardingManager(model, tmp_path / "out")
    manager.shard(3)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    manifest = manager.shard(1)
    files = {file.name for file in manifest.shards[0].files}
    assert names(tmp_path / "out") == {MANIFEST_NAME, "notes.txt", *files}


def test_a_manifest_of_somebody_else_is_left_alone(model, tmp_path):
    (tmp_path / MANIFEST_NAME).write_text('{"manifest_version": 3}')
    with pytest.raises(BadInput, match=r"not the manifest of a cut model.*Name another folder"):
        ModelShardingManager(model, tmp_path).shard(2)
    assert (tmp_path / MANIFEST_NAME).read_text() == '{"manifest_version": 3}'


def test_a_shard_is_not_cut_into_its_own_folder(model, tmp_path):
    ModelShardingManager(model, tmp_path / "out").shard(3)
    before = names(tmp_path / "out")
    with pytest.raises(BadInput, match=r"is itself a shard in .*Name another folder"):
        ModelShardingManager(tmp_path / "out" / "shard-2.onnx", tmp_path / "out").cut([(0, 1)])
    assert names(tmp_path / "out") == before
    assert read_manifest(tmp_path / "out")


def test_spans_may_be_given(model, tmp_path):
    manifest = ModelShardingManager(model, tmp_path).cut([(0, 1), (1, 3)])
    assert [shard.span for shard in manifest.shards] == [(0, 1), (1, 3)]
    with pytest.raises(BadInput, match="must follow one another"):
        ModelShardingManager(model, tmp_path).cut([(0, 1), (2, 3)])


def test_an_analyzer_may_be_given(model, tmp_path):
    analyzer = ModelShardingAnalyzer(model, work_dir=tmp_path)
    manager = ModelShardingManager(model, tmp_path / "out", analyzer=analyzer)
    analyzer.measure(runs=1)
    assert "median of 1" in manager.plan(2, strategy="optimal").reason
    assert not (tmp_path / "out").exists()


def test_a_folder_has_no_layers(tmp_path):
    with pytest.raises(NotAModel, match=r"got a folder. Give the file's path; .*component_specs"):
        ModelShardingManager(tmp_path).shard(2)


# -- components ------------------------------------------------------------------------------------


def test_components_are_the_models_of_a_folder(tmp_path):
    for folder in ("onnx", "vocoder", "unet", "variants", "empty", ".cache"):
        (tmp_path / folder).mkdir()
    detector = models.add_model(tmp_path / "detector.onnx")
    recogniser = models.identity_model(tmp_path / "onnx" / "recogniser.onnx")
    vocoder = models.pair_model(tmp_path / "vocoder" / "graph.onnx")
    unet = models.add_model(tmp_path / "unet" / "model.onnx")
    models.add_model(tmp_path / "unet" / "model_int8.onnx")
    small = models.add_model(tmp_path / "variants" / "small.onnx", amount=2.0)
    large = models.add_model(tmp_path / "variants" / "large.onnx", amount=3.0)
    models.add_model(tmp_path / ".cache" / "model.onnx")
    models.add_model(tmp_path / "._detector.onnx")
    manager = ModelShardingManager(tmp_path)
    assert manager.components() == {
        "detector": detector,
        "recogniser": recogniser,
        "vocoder": vocoder,
        "unet": unet,
        "variants.small": small,
        "variants.large": large,
    }
    specs = manager.component_specs()
    assert list(specs) == list(manager.components())
    assert specs["vocoder"].name == "vocoder"
    assert [spec.name for spec in specs["vocoder"].inputs] == ["a", "b"]
    assert list(manager.component_specs("unet", "detector")) == ["unet", "detector"]
    with pytest.raises(BadInput, match="no component 'encoder': it has detector, recogniser"):
        manager.component_specs("encoder")


def test_shards_of_a_component_are_no_components(tmp_path):
    for name in ("llama", "qwen2"):
        shutil.copy(DECODERS / f"builder-{name}.onnx", tmp_path / f"{name}.onnx")
    ModelShardingManager(tmp_path / "llama.onnx").shard(2)
    assert set(ModelShardingManager(tmp_path).components()) == {"llama", "qwen2"}


@pytest.mark.parametrize("what", ["file", "nothing", "one", "none", "twice"])
def test_what_has_no_components_is_refused_with_a_remedy(tmp_path, what):
    path, said = tmp_path, "got none"
    if what == "file":
        path, said = models.add_model(tmp_path / "a.onnx"), "got a file"
    elif what == "nothing":
        path, said = tmp_path / "nothing", "got no such folder"
    elif what == "one":
        models.add_model(tmp_path / "a.onnx")
        said = "got a"
    elif what == "twice":
        (tmp_path / "onnx").mkdir()
        models.add_model(tmp_path / "a.onnx")
        models.add_model(tmp_path / "onnx" / "a.onnx")
        said = "got two called 'a'"
    with pytest.raises(NotAModel, match=rf"{said}.* strategy 'layer_based' or"):
        ModelShardingManager(path).components()


def test_component_based_leads_from_the_partition_to_the_components(model):
    """The remedy that `partition` names is one."""
    analyzer = ModelShardingAnalyzer(model)
    times = analyzer.by_bytes()
    with pytest.raises(BadInput, match="see ModelShardingManager"):
        partition(times.layers, times.ends, [Host("a", 1)], shards=1, strategy="component_based")
    for call in (ModelShardingManager(model).shard, ModelShardingManager(model).plan):
        with pytest.raises(BadInput, match=r"nothing to cut: .*component_specs\(\)"):
            call(strategy="component_based")
