"""Files of others: what is read of them, and what is refused before it is."""

from __future__ import annotations

import json
import os
import time
import tracemalloc

import pytest

from recovery.bounded_files import (
    JsonBounds,
    json_from,
    json_object_from,
    open_regular,
    read_bounded,
    read_json,
    read_json_object,
    stays_inside,
    text_of,
)
from recovery.errors import BadInput, NotAModel

BOUNDS = JsonBounds("a recipe", 1 << 20, items_max=1000, depth_max=8)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        "ä\u2028\U0001f600",
        {"a": [1, 2.5, -3e-300, True, None, '\\"[{,}]'], "b": {"c": {"d": [[]]}}},
        list(range(998)),
        10**300,
    ],
)
def test_json_within_its_bounds_is_what_it_says(value, tmp_path):
    path = tmp_path / "recipe.json"
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=3)):
        path.write_text(text, encoding="utf-8")
        assert read_json(path, BOUNDS) == value
        assert json_from(text, BOUNDS, "it") == value
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())  # as some editors begin a file
    assert read_json(path, BOUNDS) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'"\\ud800"', "surrogates"),
        (b'{"a\\uDfff": 1}', "surrogates"),
        (b'{"a": 1, "b": 2, "a": 3}', "the name 'a' twice"),
        (b'[{"x": {"a": 1, "a": 1}}]', "the name 'a' twice"),
        (b"[NaN]", "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b"1e999", "1e999"),
        (b"9" * 5000, "integer string conversion"),
        (b"[" * 9 + b"]" * 9, "at most 8 levels"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "at most 8 levels"),
        (b"[" * 200_000, "at most 8 levels"),
        (b"[" + b"1," * 1000 + b"1]", "at most 1,000 values"),
        (b"[" + b"[]," * 1000 + b"[]]", "at most 1,000 values"),
        (b"[" + b'{"":0},' * 600 + b"1]", "at most 1,000 values"),
        (b" " * ((1 << 20) + 1), "at most 1,048,576 bytes"),
    ],
)
def test_json_beyond_its_bounds_is_refused_with_file_and_bound(text, words, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_bytes(text)
    with pytest.raises(BadInput, match=words) as caught:
        read_json(path, BOUNDS)
    assert str(path) in str(caught.value)
    assert "a recipe" in str(caught.value)
    assert {"path", "expected", "got"} <= caught.value.fields.keys()
    assert len(str(caught.value)) < 1000


def test_marks_within_texts_are_no_structure():
    assert json_from(json.dumps(["[" * 500, "]" * 500, "," * 5000, '\\"[' * 50]), BOUNDS, "it")


@pytest.mark.parametrize(
    "text",
    [
        b'["' + b'\\"' * 400_000,  # a string that does not end, with a mark of its end everywhere
        b'["' + b"," * 900_000 + b'"]',
        b'"' * 900_000,
        b"\\" * 900_000,
        b"[" + b"[],{}," * 150_000 + b"1]",
    ],
    ids=["endless", "commas", "quotes", "backslashes", "empties"],
)
def test_measuring_takes_time_and_memory_by_the_length_alone(text):
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(BadInput):
            json_object_from(text, BOUNDS, "it")  # the second is a list
        took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20  # parsed, the last of them takes 30 MB
    assert took < 60  # quadratic, the first takes hours


def test_not_a_number_is_taken_where_models_have_it():
    lenient = JsonBounds("a configuration", 1000, finite=False)
    assert json_from('{"a": [0.0, Infinity]}', lenient, "it") == {"a": [0.0, float("inf")]}


@pytest.mark.parametrize(("text", "kind"), [("[]", "array"), ("1", "number"), ('""', "string")])
def test_what_is_to_be_an_object_is_one(text, kind, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(NotAModel, match=f"as a JSON object, got a JSON {kind}"):
        read_json_object(tmp_path / "a.json", JsonBounds("a thing", 100, error=NotAModel))


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("pipe", "not a regular file"),
        ("link", "not a regular file"),
        ("folder", "a folder"),
        ("missing", "No such file"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            read_bounded(tmp_path / name, 10)
        assert str(tmp_path / name) in str(caught.value)
        with pytest.raises(OSError, match=words):
            open_regular(tmp_path / name)
    (tmp_path / "real").write_bytes(b"0123456789")
    (tmp_path / "to real").symlink_to("real")  # as huggingface_hub links files
    assert read_bounded(tmp_path / "to real", 10) == b"0123456789"
    with pytest.raises(BadInput, match="of at most 9 bytes, got 10 bytes"):
        read_bounded(tmp_path / "real", 9)


def test_a_huge_file_is_not_read_to_be_refused(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="1,099,511,627,776 bytes"):
            read_bounded(tmp_path / "sparse", 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a", "a.json", "a/b c/d-1.npy", "ä.bin", "..a", "a..b"])
def test_names_that_stay_inside(name):
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a/../b", "../a", "a/..", "/a", "a//b", "a/", "./a", "a\\b", "c:a"),
        *("a\0b", "a\nb", "\x1b[2J", "\u202ea", "a" * 256),
    ],
)
def test_names_that_do_not(name):
    assert not stays_inside(name)


def test_text_of_others_can_be_shown():
    assert text_of("\x1b]0;owned\x07\r\n\u202e\ud800é") == "\\x1b]0;owned\\x07\\r\\n\\u202e\\ud800é"
    assert text_of("x" * 300, 10) == "x" * 10 + "..."
    assert text_of({"a": "\x00"}).isprintable()
