import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from onnx import TensorProto
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

from pool.models.registry import read_model
from pool.models.tokens import TEXT_CHARACTERS_MAX, TEXTS_MAX, TextEncoder, encoder_for
from recovery.errors import BadInput, NotAModel
from sharding.models.signature import TensorSpec
from tests import models

ASSETS = Path(__file__).parents[2] / "pool" / "assets" / "minilm"
ALL = tuple(
    TensorSpec(name, "int64", ("batch", "sequence"))
    for name in ("input_ids", "attention_mask", "token_type_ids")
)
CLS, SEP, HELLO, WORLD = 101, 102, 7592, 2088


@pytest.fixture(scope="module")
def bert() -> TextEncoder:
    return TextEncoder(ASSETS / "tokenizer.json")


def write_words(path: Path, *words: str, pad: str | None = None, **changes: object) -> Path:
    """A tokenizer.json of whole words, numbered from 0, without special tokens."""
    vocabulary = {word: index for index, word in enumerate([*words, *([pad] if pad else [])])}
    tokenizer = tokenizers.Tokenizer(token_models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}))
    return path


def test_pads_to_the_longest_and_not_to_what_the_file_fixes(bert):
    arrays = bert.encode(["hello world", "hello"], ALL)
    assert arrays["input_ids"].tolist() == [[CLS, HELLO, WORLD, SEP], [CLS, HELLO, SEP, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert arrays["token_type_ids"].tolist() == [[0] * 4, [0] * 4]
    assert {array.dtype.name for array in arrays.values()} == {"int64"}


def test_one_string_is_a_batch_of_one(bert):
    assert bert.encode("hello", ALL)["input_ids"].tolist() == [[CLS, HELLO, SEP]]
    assert bert.encode("", ALL)["input_ids"].tolist() == [[CLS, SEP]]
    assert bert.decode([CLS, HELLO, WORLD, SEP]) == "hello world"


def test_gives_only_what_the_graph_has_with_its_dtype(bert):
    inputs = [
        TensorSpec("attention_mask", "float32", ("b", "s")),
        TensorSpec("input_ids", "int32", ("b", "s")),
        TensorSpec("pixel_values", "float32", ("b", 3)),
    ]
    arrays = bert.encode("hello", inputs)
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "attention_mask": "float32",
        "input_ids": "int32",
    }


def test_truncates_to_the_smaller_of_both_limits(bert):
    text = "hello " * 600
    assert bert.encode(text, ALL)["input_ids"].shape == (1, 128)  # the file's own
    short = TextEncoder(ASSETS / "tokenizer.json", length_max=4)
    assert short.encode(text, ALL)["input_ids"].tolist() == [[CLS, HELLO, HELLO, SEP]]
    long = TextEncoder(ASSETS / "tokenizer.json", length_max=512)
    assert long.encode(text, ALL)["input_ids"].shape == (1, 128)


def test_a_fixed_length_is_padded_to_and_truncated_to():
    fixed = TextEncoder(ASSETS / "tokenizer.json", length=4)
    arrays = fixed.encode(["hello", "hello world hello"], ALL)
    assert arrays["input_ids"].tolist() == [[CLS, HELLO, SEP, 0], [CLS, HELLO, WORLD, SEP]]
    with pytest.raises(BadInput, match="takes 1 tokens"):
        TextEncoder(ASSETS / "tokenizer.json", length=1).encode("hello", ALL)


def test_the_pad_token_is_the_files_or_the_configs_or_a_known_one(tmp_path):
    def ids(**options: int) -> list[list[int]]:
        return TextEncoder(path, **options).encode(["a b", "a"], ALL)["input_ids"].tolist()

    path = write_words(tmp_path / "t.json", "?", "a", "b", pad="<pad>")
    assert ids() == [[1, 2], [1, 3]]
    assert ids(pad_id=2) == [[1, 2], [1, 2]]
    path = write_words(tmp_path / "t.json", "?", "a", "b")
    assert ids() == [[1, 2], [1, 0]]
    padding = {
        "strategy": "BatchLongest",
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "b",
    }
    path = write_words(tmp_path / "t.json", "?", "a", "b", padding=padding)
    assert ids(pad_id=0) == [[1, 2], [2, 1]]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "1 to 1024 texts, not 0"),
        (["a"] * (TEXTS_MAX + 1), "not 1025"),
        ([1], "Text 0 must be a string, not int"),
        (["a", None], "Text 1 must be a string, not NoneType"),
        ([["a"]], "not list"),
        (b"a", "not bytes"),
        (None, "not NoneType"),
        ({"a": 1}, "not dict"),
        (["\ud800"], "not valid Unicode"),
        ("a" * (TEXT_CHARACTERS_MAX + 1), "the limit is 1,000,000"),
    ],
)
def test_what_is_no_batch_of_texts_is_refused(bert, texts, words):
    with pytest.raises(BadInput, match=words):
        bert.encode(texts, ALL)


def test_texts_without_a_token_are_refused(tmp_path):
    path = write_words(tmp_path / "t.json", "?", "a")
    with pytest.raises(BadInput, match="no token"):
        TextEncoder(path).encode(["", " "], ALL)
    assert TextEncoder(path).encode(["", "a"], ALL)["attention_mask"].tolist() == [[0], [1]]


def test_opened_when_first_needed(tmp_path):
    encoder = TextEncoder(tmp_path / "none.json")
    assert repr(encoder).endswith("closed>")
    with pytest.raises(NotAModel, match=r"none\.json"):
        encoder.encode("a", ALL)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(NotAModel, match=r"tokenizer\.json"):
        encoder.encode("a", ALL)


def test_a_models_encoder_has_its_limits(tmp_path):
    path = models.token_model(tmp_path / "model.onnx")
    assert encoder_for(read_model("m", path)) is None
    write_words(tmp_path / "tokenizer.json", "?", "a", pad="<pad>")

    def width(**config: object) -> int:
        (tmp_path / "config.json").write_text(json.dumps(config))
        entry = read_model("m", tmp_path)
        encoder = encoder_for(entry)
        assert encoder is not None
        return encoder.encode("a " * 900, entry.spec.inputs)["input_ids"].shape[1]

    assert width() == 900
    assert width(max_position_embeddings=512) == 512
    assert width(max_position_embeddings=514, model_type="roberta", pad_token_id=1) == 512
    assert width(max_position_embeddings=514, model_type="mpnet") == 512
    assert width(max_position_embeddings="many", pad_token_id=-1) == 900
    models.token_model(path, shape=("batch", 16))
    assert width(max_position_embeddings=512) == 16


def test_agrees_with_the_tokenizers_library_on_a_graphs_dtype(tmp_path):
    path = models.token_model(tmp_path / "model.onnx", dtype=TensorProto.INT32)
    (tmp_path / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    entry = read_model("m", path)
    encoder = encoder_for(entry)
    assert encoder is not None
    text = "Naïve café, 東京 — it's 3.14!"
    arrays = encoder.encode(text, entry.spec.inputs)
    reference = tokenizers.Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    reference.no_padding()
    np.testing.assert_array_equal(
        arrays["input_ids"], np.array([reference.encode(text).ids], np.int32), strict=True
    )
