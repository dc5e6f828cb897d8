from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pool.models.bundled import minilm_folder, ocr_detector_path
from recovery.errors import NotAModel
from sharding.cutting.cut import cut
from sharding.cutting.layers import find_boundaries
from sharding.models.native import NativeSession
from tests import models

DECODERS = Path(__file__).parents[1] / "assets" / "decoders"
HIDDEN, VOCABULARY = 16, 40


def decoder(
    path: Path,
    *,
    layers: int = 3,
    heads: int = 2,
    kv_heads: int = 1,
    tied: bool = False,
    parallel: bool = False,
    bias: bool = False,
    prefix: str = "a",
    long_skip: bool = False,
    third_path: bool = False,
    seed: int = 0,
) -> Path:
    """An unfused decoder whose names say nothing: input x, caches, output y.

    Its mask is made once, from the shape of the first layer's cache and of the embedding, and
    used by all layers. `parallel`: attention and MLP beside one another, as in Phi.
    """
    rng = np.random.default_rng(seed)
    size = HIDDEN // heads
    nodes, weights, inputs, outputs = [], [], [], []
    count = iter(range(100_000))

    def name() -> str:
        return f"{prefix}{next(count)}"

    def op(kind: str, *given: str, **attributes) -> str:
        made = name()
        nodes.append(helper.make_node(kind, list(given), [made], **attributes))
        return made

    def weight(*shape: int) -> str:
        made = name()
        array = rng.normal(size=shape).astype(np.float32) / 2
        weights.append(numpy_helper.from_array(array, made))
        return made

    def ints(*values: int) -> str:
        made = name()
        weights.append(numpy_helper.from_array(np.array(values, np.int64), made))
        return made

    def linear(x: str, width: int, out: int) -> str:
        x = op("MatMul", x, weight(width, out))
        return op("Add", x, weight(out)) if bias else x

    def norm(x: str) -> str:
        return op("LayerNormalization", x, weight(HIDDEN), weight(HIDDEN), axis=-1)

    def split(x: str, n: int) -> str:
        return op("Transpose", op("Reshape", x, ints(0, 0, n, size)), perm=[0, 2, 1, 3])

    table = weight(VOCABULARY, HIDDEN)
    inputs.append(models.value("x", TensorProto.INT64, ("b", "s")))
    hidden = start = op("Gather", table, "x")
    pasts = [[name(), name()] for _ in range(layers)]
    length = op("Gather", op("Shape", op("Cast", hidden, to=TensorProto.FLOAT)), ints(1))
    past = op("Gather", op("Shape", pasts[0][0]), ints(2))
    total = op("Add", length, past)
    keys = op("Range", op("Squeeze", ints(0)), op("Squeeze", total), op("Squeeze", ints(1)))
    queries = op("Range", op("Squeeze", past), op("Squeeze", total), op("Squeeze", ints(1)))
    mask = op(
        "Where",
        op("Greater", keys, op("Unsqueeze", queries, ints(1))),
        numpy_name(weights, name(), -1e9),
        numpy_name(weights, name(), 0.0),
    )
    aside = None
    for layer in range(layers):
        normed = norm(hidden)
        q = split(linear(normed, HIDDEN, HIDDEN), heads)
        states = []
        for kind in (0, 1):
            new = split(linear(normed, HIDDEN, kv_heads * size), kv_heads)
            whole = op("Concat", pasts[layer][kind], new, axis=2)
            inputs.append(
                models.value(pasts[layer][kind], TensorProto.FLOAT, ("b", kv_heads, "p", size))
            )
            outputs.append(models.value(whole, TensorProto.FLOAT, ("b", kv_heads, "t", size)))
            if kv_heads < heads:
                whole = op("Concat", *[whole] * (heads // kv_heads), axis=1)
            states.append(whole)
        scores = op("MatMul", q, op("Transpose", states[0], perm=[0, 1, 3, 2]))
        scores = op("Softmax", op("Add", scores, mask), axis=-1)
        mixed = op("Transpose", op("MatMul", scores, states[1]), perm=[0, 2, 1, 3])
        attended = linear(op("Reshape", mixed, ints(0, 0, HIDDEN)), HIDDEN, HIDDEN)
        if parallel:
            hidden = op("Add", hidden, op("Add", attended, mlp(op, linear, normed)))
        else:
            hidden = op("Add", hidden, attended)
            if third_path:
                aside = op("Add", norm(hidden), aside) if aside else norm(hidden)
            hidden = op("Add", hidden, mlp(op, linear, norm(hidden)))
    if long_skip:
        hidden = op("Add", hidden, start)
    if third_path:
        hidden = op("Add", hidden, aside)
    head = op("Transpose", table, perm=[1, 0]) if tied else weight(HIDDEN, VOCABULARY)
    nodes.append(helper.make_node("MatMul", [norm(hidden), head], ["y"]))
    outputs.insert(0, models.value("y", TensorProto.FLOAT, ("b", "s", VOCABULARY)))
    return models.save(path, nodes, inputs, outputs, weights)


def numpy_name(weights: list, name: str, number: float) -> str:
    weights.append(numpy_helper.from_array(np.array(number, np.float32), name))
    return name


def mlp(op, linear, x: str) -> str:
    return linear(op("Relu", linear(x, HIDDEN, 24)), 24, HIDDEN)


# -- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(DECODERS.glob("*.onnx")) if "bert" not in path.stem],
    ids=lambda path: path.stem,
)
def test_layers_of_exported_decoders(path):
    found = find_boundaries(path)
    assert (found.kind, len(found), len(found.cuts)) == ("decoder", 3, 2)
    for index, layer in enumerate(found.layers):
        assert layer.index == index
        caches = [(cache.past.name, cache.present.name) for cache in layer.caches]
        assert sorted(caches) == [
            (f"past_key_values.{index}.{kind}", f"present.{index}.{kind}")
            for kind in ("key", "value")
        ]
        assert all(isinstance(cache.past.shape[-1], int) for cache in layer.caches)
    for place in found.cuts:
        hidden = 16 if path.stem.startswith("optimum") else 32
        dtype = "float16" if path.stem == "builder-llama-positions" else "float32"
        shape = ("batch_size", "sequence_length", hidden)
        assert [(spec.dtype, spec.shape) for spec in place.tensors] == 2 * [(dtype, shape)]
    assert len({layer.weight_bytes for layer in found.layers}) == 1
    weights = sum(layer.weight_bytes for layer in found.layers)
    assert min(found.embedding_bytes, found.head_bytes) * 5 < weights or "int4" in path.stem


def test_layers_of_a_bert_whose_norms_are_many_nodes():
    found = find_boundaries(DECODERS / "optimum-bert.onnx")
    assert (found.kind, len(found)) == ("encoder", 3)
    for place in found.cuts:
        assert [spec.shape for spec in place.tensors] == 2 * [("batch_size", "sequence_length", 16)]


def test_layers_of_minilm():
    found = find_boundaries(minilm_folder() / "model.onnx")
    assert (found.kind, len(found)) == ("encoder", 6)
    assert all(layer.caches == () for layer in found.layers)
    assert found.embedding_bytes > 30522 * 384  # int8


def test_a_ring_cache_says_how_long_it_is():
    layers = find_boundaries(DECODERS / "builder-gemma2.onnx").layers
    assert [[cache.window for cache in layer.caches] for layer in layers] == [
        [16, 16],
        [0, 0],
        [16, 16],
    ]


def test_names_do_not_matter(tmp_path):
    found = find_boundaries(decoder(tmp_path / "a.onnx", layers=4))
    other = find_boundaries(decoder(tmp_path / "b.onnx", layers=4, prefix="layers.7/"))
    assert len(found) == len(other) == 4
    assert [len(place.tensors) for place in found.cuts] == [2, 2, 2]
    assert [layer.weight_bytes for layer in found.layers] == [
        layer.weight_bytes for layer in other.layers
    ]


def test_order_of_the_nodes_does_not_matter(tmp_path):
    path = decoder(tmp_path / "a.onnx")
    model = onnx.load(path)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shuffled = tmp_path / "b.onnx"
    shuffled.write_bytes(model.SerializeToString())
    found, expected = find_boundaries(shuffled), find_boundaries(path)
    assert [place.tensors for place in found.cuts] == [place.tensors for place in expected.cuts]
    assert [layer.caches for layer in found.layers] == [layer.caches for layer in expected.layers]


# -- what cannot be cut ----------------------------------------------------------------------------


def test_a_third_path_past_all_layers_is_named(tmp_path):
    path = decoder(tmp_path / "a.onnx", third_path=True, long_skip=True)
    with pytest.raises(NotAModel, match=r"3 .* between layers 1 and 2") as caught:
        find_boundaries(path)
    assert caught.value.fields["expected"] == "at most 2 live tensors there"


def test_a_layer_that_reads_more_of_anothers_cache_than_its_shape_is_refused(tmp_path):
    path = decoder(tmp_path / "a.onnx")
    model = onnx.load(path)
    past = find_boundaries(path).layers[0].caches[0].past.name
    (reader,) = [n for n in model.graph.node if n.op_type == "Shape" and list(n.input) == [past]]
    reader.op_type = "Size"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(NotAModel, match="only for a shape") as caught:
        cut(path, [(0, 1), (1, 3)], tmp_path / "cut")
    assert past in caught.value.fields["got"]


def test_a_model_without_attention_is_refused(tmp_path):
    with pytest.raises(NotAModel, match="attention"):
        find_boundaries(ocr_detector_path())


def test_a_model_without_an_embedding_is_refused(tmp_path):
    with pytest.raises(NotAModel, match="looks up token ids"):
        find_boundaries(models.add_model(tmp_path / "add.onnx"))


def test_a_cycle_is_named(tmp_path):
    path = models.save(
        tmp_path / "cycle.onnx",
        [
            helper.make_node("Add", ["x", "b"], ["a"], "first"),
            helper.make_node("Add", ["a", "x"], ["b"], "second"),
        ],
        [models.value("x", TensorProto.FLOAT, (3,))],
        [models.value("a", TensorProto.FLOAT, (3,))],
    )
    with pytest.raises(NotAModel, match=r"cycle.*first \(Add\)"):
        find_boundaries(path)


def test_a_tensor_that_nobody_makes_or_two_do_is_named(tmp_path):
    x, y = (models.value(name, TensorProto.FLOAT, (3,)) for name in "xy")
    missing = models.save(
        tmp_path / "missing.onnx", [helper.make_node("Add", ["x", "z"], ["y"])], [x], [y]
    )
    with pytest.raises(NotAModel, match="no node produces 'z'"):
        find_boundaries(missing)
    twice = models.save(
        tmp_path / "twice.onnx", 2 * [helper.make_node("Neg", ["x"], ["y"])], [x], [y]
    )
    with pytest.raises(NotAModel, match="two nodes produce 'y'"):
        find_boundaries(twice)


@pytest.mark.parametrize("data", [None, b"", b"no model", b"\x08\x07"])
def test_what_is_no_onnx_is_refused(tmp_path, data):
    path = tmp_path / "model.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(NotAModel, match=r"model\.onnx"):
        find_boundaries(path)


# -- any small decoder, cut anywhere ---------------------------------------------------------------


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_shards_of_any_small_decoder_compute_the_same_bits(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    layers = data.draw(st.integers(1, 5))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]))
    path = decoder(
        folder / "model.onnx",
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        tied=data.draw(st.booleans()),
        parallel=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        long_skip=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    places = data.draw(st.sets(st.integers(1, layers - 1)) if layers > 1 else st.just(set()))
    ends = [0, *sorted(places), layers]
    manifest = cut(path, list(pairwise(ends)), folder / "cut")
    whole = NativeSession(path)
    whole.open()
    pieces = [NativeSession(folder / "cut" / shard.graph_file) for shard in manifest.shards]
    for piece in pieces:
        piece.open()
    caches = [cache for shard in manifest.shards for cache in shard.caches]
    assert len(caches) == 2 * layers
    rng = np.random.default_rng(0)
    kept = {
        cache.past.name: np.zeros((2, kv_heads, 0, HIDDEN // heads), np.float32) for cache in caches
    }
    for length in (4, 1, 2):
        x = rng.integers(0, VOCABULARY, (2, length))
        expected = whole.run({"x": x, **kept})
        carried = {"x": x, **kept}
        for piece, shard in zip(pieces, manifest.shards, strict=True):
            wanted = [*shard.receives, *shard.shared, *(cache.past for cache in shard.caches)]
            carried |= piece.run({spec.name: carried[spec.name] for spec in wanted})
        for name, array in expected.items():
            assert array.tobytes() == carried[name].tobytes(), name
        kept = {cache.past.name: expected[cache.present.name] for cache in caches}
