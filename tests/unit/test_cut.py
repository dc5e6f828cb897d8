import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pool.models.bundled import minilm_folder
from recovery.errors import BadInput, NotAModel
from sharding.cutting.cut import cut
from sharding.cutting.layers import find_boundaries
from sharding.cutting.manager import ModelShardingManager
from sharding.cutting.manifest import MANIFEST_NAME, Manifest, read_manifest
from sharding.models.native import NativeSession
from sharding.models.signature import read_signature
from sharding.sequences.stages import pipeline_of_manifest
from tests import models

DECODERS = Path(__file__).parents[1] / "assets" / "decoders"
STEPS = {1: (5, 1, 3, 1), 2: (5, 1, 1)}  # batch: tokens per step; GQA takes no batch of chunks
SPANS = {
    "each layer": ((0, 1), (1, 2), (2, 3)),
    "early": ((0, 1), (1, 3)),
    "late": ((0, 2), (2, 3)),
    "whole": ((0, 3),),
}
# Not bit for bit, and how far off. Which of its sums with a norm the runtime fuses into one
# operator depends on what it can tell of their shapes, in this one after fusing others: uncut it
# fuses those at the end of each layer, cut it does not.
ROUNDED = {"optimum-bert-int8": 1e-5}


class Pieces:
    """The shards of a folder, run one after the other as a pipeline would."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.sessions = [NativeSession(folder / s.graph_file) for s in self.manifest.shards]
        for session in self.sessions:
            session.open()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of the uncut model, for its inputs. Each shard gets what is listed only."""
        found, carried = {}, {}
        for shard, session in zip(self.manifest.shards, self.sessions, strict=True):
            given = {spec.name: carried[spec.name] for spec in shard.receives}
            given |= {spec.name: inputs[spec.name] for spec in shard.shared}
            given |= {cache.past.name: inputs[cache.past.name] for cache in shard.caches}
            made = session.run(given)
            carried = {spec.name: made.pop(spec.name) for spec in shard.sends}
            for spec in shard.sends:
                assert carried[spec.name].dtype == spec.dtype
                assert carried[spec.name].ndim == spec.rank
            assert set(made) == {
                *(spec.name for spec in shard.outputs),
                *(cache.present.name for cache in shard.caches),
            }
            found |= made
        assert carried == {}
        return found


def inputs_for(manifest: Manifest, batch: int, past: int, length: int, rng) -> dict:
    made = {}
    for spec in manifest.inputs:
        if spec.name == "attention_mask":
            made[spec.name] = np.ones((batch, past + length), np.int64)
        elif spec.name == "position_ids":
            made[spec.name] = np.arange(past, past + length)[None].repeat(batch, 0)
        elif spec.name == "input_ids":
            made[spec.name] = rng.integers(0, 80, (batch, length))
        elif spec.name == "token_type_ids":
            made[spec.name] = np.zeros((batch, length), np.int64)
        else:
            assert spec.name == "inputs_embeds"
            made[spec.name] = rng.normal(size=(batch, length, 32)).astype(np.float32)
    return made


def caches_of(manifest: Manifest):
    return [cache for shard in manifest.shards for cache in shard.caches]


def compare(uncut: Path, folder: Path, *, atol: float = 0.0) -> int:
    """Over prompt, one token, a chunk, one token; returns the outputs compared.

    Bit for bit, unless a tolerance is given.
    """
    pieces = Pieces(folder)
    manifest = pieces.manifest
    whole = NativeSession(uncut)
    whole.open()
    window = {cache.present.name: cache.window for cache in caches_of(manifest)}
    compared = 0
    for batch, steps in STEPS.items():
        rng = np.random.default_rng(batch)
        kept = {}
        for cache in caches_of(manifest):
            _, heads, _, size = cache.past.shape
            kept[cache.past.name] = np.zeros((batch, heads, cache.window, size), cache.past.dtype)
        past = 0
        for length in steps:
            inputs = inputs_for(manifest, batch, past, length, rng) | kept
            expected, got = whole.run(inputs), pieces.run(inputs)
            assert set(expected) == set(got)
            for name, array in expected.items():
                # The rest of a ring is whatever was in memory.
                end = min(past + length, window[name]) if window.get(name) else None
                known, ours = (one[:, :, :end] for one in (array, got[name]))
                assert known.size
                assert np.isfinite(known).all()
                if atol:
                    np.testing.assert_allclose(known, ours, rtol=0, atol=atol)
                else:
                    assert known.tobytes() == ours.tobytes(), name
                compared += 1
            kept = {cache.past.name: expected[cache.present.name] for cache in caches_of(manifest)}
            past += length if kept else 0  # an encoder begins anew
    return compared


exports = pytest.mark.parametrize(
    "path", sorted(DECODERS.glob("*.onnx")), ids=lambda path: path.stem
)


@exports
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_shards_of_an_export_compute_what_the_uncut_model_does(tmp_path, path, spans):
    manifest = cut(path, spans, tmp_path)
    assert [shard.span for shard in manifest.shards] == list(spans)
    assert read_manifest(tmp_path) == manifest
    assert compare(path, tmp_path, atol=ROUNDED.get(path.stem, 0.0)) > 0


def test_logits_depend_on_the_past_and_on_the_last_layer():
    """So that the comparisons of this module can fail."""
    path = DECODERS / "builder-llama.onnx"
    session = NativeSession(path)
    session.open()
    ids = {"input_ids": np.array([[3]]), "attention_mask": np.ones((1, 3), np.int64)}
    ones = {
        f"past_key_values.{i}.{kind}": np.ones((1, 1, 2, 16), np.float32)
        for i in range(3)
        for kind in ("key", "value")
    }
    before = session.run(ids | ones)["logits"]
    ones["past_key_values.2.value"] = 2 * ones["past_key_values.2.value"]
    assert np.abs(before - session.run(ids | ones)["logits"]).max() > 1e-3


def test_minilm_in_three_pieces_computes_the_same_bits(tmp_path):
    path = minilm_folder() / "model.onnx"
    manifest = cut(path, ((0, 2), (2, 3), (3, 6)), tmp_path)
    assert manifest.kind == "encoder"
    assert [len(shard.sends) for shard in manifest.shards] == [2, 2, 0]
    assert caches_of(manifest) == []
    assert compare(path, tmp_path) > 0


def test_weights_are_divided_and_only_tied_ones_are_copied(tmp_path):
    for name, copies in (("builder-llama", 1), ("builder-llama-tied", 2)):
        source = DECODERS / f"{name}.onnx"
        manifest = cut(source, SPANS["late"], tmp_path / name)
        tables = 0
        for shard in manifest.shards:
            model = onnx.load(tmp_path / name / shard.graph_file)
            tables += sum(np.prod(tensor.dims) == 80 * 32 for tensor in model.graph.initializer)
        assert tables == 2
        # Both have a table to look up and one for the logits; uncut and tied they are one.
        tensors = onnx.load(source).graph.initializer
        assert sum(np.prod(tensor.dims) == 80 * 32 for tensor in tensors) == 3 - copies


def test_manifest_says_what_each_shard_takes_and_gives(tmp_path):
    manifest = cut(DECODERS / "builder-llama.onnx", SPANS["late"], tmp_path)
    first, last = manifest.shards
    assert (manifest.layers, manifest.kind) == (3, "decoder")
    assert manifest.source == read_signature(DECODERS / "builder-llama.onnx", name="x").digest
    assert [spec.name for spec in first.shared] == ["input_ids", "attention_mask"]
    assert [spec.name for spec in last.shared] == ["attention_mask"]
    assert first.receives == () == last.sends == first.outputs
    assert last.receives == first.sends
    assert [str(spec) for spec in first.sends] == 2 * [
        "float32[batch_size, sequence_length, 32]",
    ]
    assert [spec.name for spec in last.outputs] == ["logits"]
    assert [(cache.layer, cache.past.name, cache.present.name) for cache in last.caches] == [
        (layer, f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
        for layer in (2,)
        for kind in ("key", "value")
    ]
    assert last.caches[0].past.shape == ("batch_size", 1, "past_sequence_length", 16)
    spec = read_signature(tmp_path / last.graph_file, name="last")
    assert [file.name for file in spec.files] == [file.name for file in last.files]
    assert [file.digest for file in spec.files] == [file.digest for file in last.files]


def test_external_data_is_copied_range_by_range(tmp_path):
    uncut = tmp_path / "uncut" / "model.onnx"
    uncut.parent.mkdir()
    model = onnx.load(DECODERS / "builder-llama.onnx")
    onnx.save(model, uncut, save_as_external_data=True, location="all.bin", size_threshold=0)
    manifest = cut(uncut, SPANS["early"], tmp_path / "cut")
    assert compare(uncut, tmp_path / "cut") > 0
    weights = (uncut.parent / "all.bin").stat().st_size
    assert manifest.shards[0].bytes < weights / 2


def test_a_later_shard_reads_the_past_length_from_its_own_first_layer(tmp_path):
    path = DECODERS / "optimum-llama.onnx"
    cut(path, SPANS["late"], tmp_path)
    uncut = onnx.load(path).graph
    assert ["past_key_values.0.key"] in [list(n.input) for n in uncut.node if n.op_type == "Shape"]
    graph = onnx.load(tmp_path / "shard-1.onnx").graph
    assert not any("past_key_values.0." in name for node in graph.node for name in node.input)


def test_cutting_again_gives_the_same_bytes(tmp_path):
    path = DECODERS / "builder-llama-int4.onnx"
    first = cut(path, SPANS["late"], tmp_path / "a")
    assert cut(path, SPANS["late"], tmp_path / "b") == first
    assert cut(path, SPANS["late"], tmp_path / "a") == first


@pytest.mark.parametrize(
    "spans",
    [(), ((0, 2),), ((0, 4),), ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 0), (0, 3)), ((2, 3),)],
)
def test_spans_that_leave_out_or_repeat_layers_are_refused(tmp_path, spans):
    with pytest.raises(BadInput, match="from layer 0 to 3") as caught:
        cut(DECODERS / "builder-llama.onnx", spans, tmp_path / "out")
    assert caught.value.fields["got"] == list(spans)
    assert not (tmp_path / "out").exists()


def test_the_model_itself_is_never_overwritten(tmp_path):
    path = tmp_path / "shard-0.onnx"
    path.write_bytes((DECODERS / "builder-llama.onnx").read_bytes())
    before = path.read_bytes()
    with pytest.raises(BadInput, match="Name another folder"):
        cut(path, SPANS["whole"], tmp_path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_the_callers_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="could not be written"):
        cut(DECODERS / "builder-llama.onnx", SPANS["whole"], tmp_path / "file")


def test_one_wrong_byte_in_any_file_is_refused(tmp_path):
    manifest = cut(DECODERS / "builder-llama-int4.onnx", SPANS["late"], tmp_path)
    for shard in manifest.shards:
        for file in shard.files:
            path = tmp_path / file.name
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            with pytest.raises(NotAModel, match="SHA-256") as caught:
                read_manifest(tmp_path)
            assert file.digest in caught.value.fields["expected"]
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert read_manifest(tmp_path) == manifest
    (tmp_path / "shard-1.onnx").unlink()
    with pytest.raises(NotAModel, match=r"shard-1\.onnx"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, verify=False) == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format=2),
        lambda data: data.update(layers=5),
        lambda data: data.update(layers=True),
        lambda data: data.pop("shards"),
        lambda data: data.update(shards=[]),
        lambda data: data["shards"].pop(0),
        lambda data: data["shards"][1].update(receives=[]),
        lambda data: data["shards"][1].update(span=[2, 2]),
        lambda data: data["shards"][0].update(files=[]),
        lambda data: data["shards"][0]["files"][0].update(name="../shard-0.onnx"),
        lambda data: data["shards"][0]["files"][0].update(name="/etc/passwd"),
        lambda data: data["shards"][0]["files"][0].update(bytes="1"),
        lambda data: data["shards"][0]["sends"][0].update(shape=[1.5]),
        lambda data: data["shards"][0]["sends"][0].update(dtype=1),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, change):
    cut(DECODERS / "builder-llama-int4.onnx", SPANS["late"], tmp_path)
    path = tmp_path / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(NotAModel, match="Cut the model again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "\xff"])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(NotAModel, match="Cut the model again"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(NotAModel, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_a_failed_cut_leaves_no_manifest(tmp_path, monkeypatch):
    path = DECODERS / "builder-llama-int4.onnx"
    cut(path, SPANS["late"], tmp_path)
    monkeypatch.setattr(Path, "write_bytes", _fail)
    with pytest.raises(BadInput, match="no space"):
        cut(path, SPANS["each layer"], tmp_path)
    with pytest.raises(NotAModel):
        read_manifest(tmp_path)


def _fail(self, data):
    raise OSError("no space left")


def test_bodies_of_an_if_keep_what_they_capture(tmp_path):
    """And a branch's own weights; the condition is computed in every shard from the mask."""
    from onnx import helper

    path = DECODERS / "builder-llama.onnx"
    model = onnx.load(path)
    graph = model.graph
    (norm,) = [node for node in graph.node if "layers.1/post_attention_layernorm" in node.name]
    weight = norm.input[2]
    norm.input[2] = "chosen"
    index = list(graph.node).index(norm)
    made = [
        helper.make_node("ReduceMax", ["attention_mask"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["any"], to=TensorProto.BOOL),
        helper.make_node(
            "If",
            ["any"],
            ["chosen"],
            then_branch=helper.make_graph(
                [helper.make_node("Identity", [weight], ["then"])],
                "then",
                [],
                [models.value("then", TensorProto.FLOAT, (32,))],
            ),
            else_branch=helper.make_graph(
                [helper.make_node("Neg", [weight], ["else"])],
                "else",
                [],
                [models.value("else", TensorProto.FLOAT, (32,))],
            ),
        ),
    ]
    for offset, node in enumerate(made):
        graph.node.insert(index + offset, node)
    changed = tmp_path / "if.onnx"
    onnx.save(model, changed)
    assert len(find_boundaries(changed)) == 3
    cut(changed, SPANS["each layer"], tmp_path / "cut")
    assert compare(changed, tmp_path / "cut") > 0


def test_outputs_of_a_cut_model_are_in_the_order_of_its_graph(tmp_path):
    """Although an early shard may make a late one."""
    path = tmp_path / "m.onnx"
    model = onnx.load(DECODERS / "optimum-bert.onnx")
    inner = find_boundaries(DECODERS / "optimum-bert.onnx").cuts[0].tensors[0]
    hidden = models.value(inner.name, TensorProto.FLOAT, (None, None, None))
    model.graph.output.append(hidden)
    path.write_bytes(model.SerializeToString())
    names = [output.name for output in model.graph.output]
    manifest = cut(path, [(0, 1), (1, 2), (2, 3)], tmp_path / "cut")
    assert [spec.name for shard in manifest.shards for spec in shard.outputs] != names
    assert [spec.name for spec in manifest.outputs] == names
    again = read_manifest(tmp_path / "cut")
    assert again == manifest
    pipeline = pipeline_of_manifest("m", again)
    assert [spec.name for spec in pipeline.outputs] == names


def test_folder_of_a_version_that_kept_no_order_is_read_and_cut_anew(tmp_path):
    path = DECODERS / "optimum-bert.onnx"
    manager = ModelShardingManager(path, tmp_path)
    manifest = manager.cut([(0, 1), (1, 3)])
    assert manager.find() == manifest
    written = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del written["order"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(written))
    assert read_manifest(tmp_path).outputs == manifest.outputs
    assert manager.find() is None
    assert manager.cut([(0, 1), (1, 3)]) == manifest
