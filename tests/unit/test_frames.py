import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recovery.errors import BadFrame, BadInput, MessageTooLarge
from sharding.models.frames import (
    HEADER_BYTES_MAX,
    SUPPORTED_DTYPES,
    TENSORS_MAX,
    Frame,
    can_carry,
    claimed_op_id,
    decode,
    encode,
    encoded_size,
)

LIMIT = 1 << 24

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
arrays = st.sampled_from(sorted(SUPPORTED_DTYPES)).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False).filter(math.isfinite)
    | st.text()
)
bodies = st.dictionaries(
    st.text(),
    st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
    max_size=4,
)
counters = st.integers(0, 2**53 - 1)
frames = st.builds(
    Frame,
    kind=names.filter(bool),
    op_id=names,
    epoch=counters,
    step=counters,
    position=counters,
    body=bodies,
    tensors=st.dictionaries(names, arrays, max_size=6),
)


def raw(header: Any, data: bytes = b"") -> bytes:
    """A frame with any header, padded as it should be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def with_tensor(data: bytes = b"\0" * 8, **changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return raw({"__metadata__": {"kind": "run"}, "x": entry}, data)


SAMPLE = encode(
    Frame(
        kind="run",
        op_id="op-1",
        epoch=3,
        step=4,
        position=5,
        body={"model": "m", "list": [1, 2.5, None]},
        tensors={
            "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
            "mask": np.array([True, False]),
            "hidden": np.ones((2, 3), np.float32),
        },
    ),
    bytes_max=LIMIT,
)


@settings(max_examples=50)
@given(frames)
def test_what_is_encoded_is_decoded(frame):
    message = encode(frame, bytes_max=LIMIT)
    assert len(message) == encoded_size(frame)
    back = decode(message, bytes_max=LIMIT)
    assert (back.kind, back.op_id) == (frame.kind, frame.op_id)
    assert (back.epoch, back.step, back.position) == (frame.epoch, frame.step, frame.position)
    assert back.body == frame.body
    assert back.tensors.keys() == frame.tensors.keys()
    for name, tensor in frame.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].shape == tensor.shape
        # As bytes, since a NaN's bits must survive too.
        assert back.tensors[name].tobytes() == tensor.tobytes()


@settings(max_examples=50)
@given(frames)
def test_every_tensor_is_aligned_to_its_own_item_size(frame):
    message = encode(frame, bytes_max=LIMIT)
    (length,) = struct.unpack_from("<Q", message)
    assert (8 + length) % 8 == 0
    header = json.loads(message[8 : 8 + length])
    for name, tensor in frame.tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0


def test_decoded_tensors_are_read_only_views_of_the_message():
    message = bytearray(SAMPLE)
    ids = decode(message, bytes_max=LIMIT).tensors["ids"]
    assert not ids.flags.writeable
    assert np.shares_memory(ids, np.frombuffer(message, np.uint8))
    assert not decode(memoryview(SAMPLE), bytes_max=LIMIT).tensors["ids"].flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
        np.arange(12, dtype=np.int16)[::-2],
        np.broadcast_to(np.float16(2), (3, 2)),
    ],
)
def test_other_byte_orders_and_layouts_are_normalised(array):
    (back,) = decode(
        encode(Frame("run", tensors={"x": array}), bytes_max=LIMIT), bytes_max=LIMIT
    ).tensors.values()
    np.testing.assert_array_equal(back, array)
    assert back.dtype.isnative
    assert back.flags.c_contiguous


def test_a_message_over_the_limit_names_size_limit_and_remedy():
    frame = Frame("run", tensors={"x": np.zeros(1000, np.float64)})
    size = encoded_size(frame)
    assert len(encode(frame, bytes_max=size)) == size
    with pytest.raises(MessageTooLarge, match="smaller batches") as caught:
        encode(frame, bytes_max=size - 1)
    assert caught.value.fields["size"] == size
    assert caught.value.fields["limit"] == size - 1


def test_a_body_too_large_for_a_header_is_refused_before_it_is_sent():
    with pytest.raises(MessageTooLarge, match="as tensors"):
        encode(Frame("run", body={"text": "x" * HEADER_BYTES_MAX}), bytes_max=LIMIT)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(""),
        Frame("run", epoch=-1),
        Frame("run", step=2**53),
        Frame("run", position=True),
        Frame("run", op_id="\ud800"),
        Frame("run", body={"x": float("nan")}),
        Frame("run", body={"x": b"bytes"}),
        Frame("run", tensors={"__metadata__": np.zeros(1)}),
        Frame("run", tensors={"x": [1.0]}),  # type: ignore[dict-item]
        Frame("run", tensors={"x": np.array(["text"])}),
        Frame("run", tensors={"x": np.array([None])}),
        Frame("run", tensors={"x": np.zeros(1, np.complex64)}),
        Frame("run", tensors={"x": np.zeros(1, "M8[s]")}),
        Frame("run", tensors={str(i): np.zeros(0) for i in range(TENSORS_MAX + 1)}),
    ],
)
def test_what_no_frame_carries_is_the_callers_error(frame):
    with pytest.raises(BadInput):
        encode(frame, bytes_max=LIMIT)


def test_half_a_surrogate_pair_in_a_body_survives():
    # As a page's JSON.stringify writes it.
    message = raw({"__metadata__": {"kind": "error", "body": '{"message": "\\ud83d"}'}})
    back = decode(message, bytes_max=LIMIT)
    assert back.body == {"message": "\ud83d"}
    assert decode(encode(back, bytes_max=LIMIT), bytes_max=LIMIT).body == back.body


def test_metadata_without_counters_and_with_unknown_keys_is_a_frame():
    frame = decode(raw({"__metadata__": {"kind": "ping", "extra": "1"}}), bytes_max=LIMIT)
    assert (frame.kind, frame.op_id, frame.epoch, frame.body) == ("ping", "", 0, {})


@pytest.mark.parametrize(
    "message",
    {
        "empty": b"",
        "short": b"\0" * 7,
        "no header": struct.pack("<Q", 0),
        "header longer than the message": struct.pack("<Q", 16) + b"{}      ",
        "absurd header length": struct.pack("<Q", 2**64 - 1) + b"{}      ",
        "header over the limit": struct.pack("<Q", HEADER_BYTES_MAX + 8),
        "unpadded": struct.pack("<Q", 2) + b"{}",
        "no metadata": raw({}),
        "array": raw([]),
        "null metadata": raw({"__metadata__": None}),
        "no kind": raw({"__metadata__": {}}),
        "empty kind": raw({"__metadata__": {"kind": ""}}),
        "number as kind": raw({"__metadata__": {"kind": 1}}),
        "surrogate in kind": raw(b'{"__metadata__": {"kind": "\\ud800"}}'),
        "epoch as number": raw({"__metadata__": {"kind": "k", "epoch": 1}}),
        "epoch as float": raw({"__metadata__": {"kind": "k", "epoch": "1.0"}}),
        "epoch negative": raw({"__metadata__": {"kind": "k", "epoch": "-1"}}),
        "epoch in other digits": raw({"__metadata__": {"kind": "k", "epoch": "\u0663"}}),
        "epoch too large": raw({"__metadata__": {"kind": "k", "epoch": "9007199254740992"}}),
        "epoch too long": raw({"__metadata__": {"kind": "k", "epoch": "1" * 5000}}),
        "body is an array": raw({"__metadata__": {"kind": "k", "body": "[]"}}),
        "body is not JSON": raw({"__metadata__": {"kind": "k", "body": "{"}}),
        "NaN": raw({"__metadata__": {"kind": "k", "body": '{"x": NaN}'}}),
        "infinity": raw({"__metadata__": {"kind": "k", "body": '{"x": 1e999}'}}),
        "long integer": raw({"__metadata__": {"kind": "k", "body": f'{{"x": {"1" * 5000}}}'}}),
        "same key twice": raw(b'{"__metadata__": {"kind": "k", "kind": "k"}}'),
        "same key twice in body": raw(
            {"__metadata__": {"kind": "k", "body": '{"a": {"b": 1, "b": 2}}'}}
        ),
        "deep header": raw(b'{"a":' * 100_000 + b"}" * 100_000),
        "deep body": raw({"__metadata__": {"kind": "k", "body": '{"a":' + "[" * 100_000}}),
        "not UTF-8": raw(b'{"__metadata__": {"kind": "\xff"}}'),
        "UTF-16": raw('{"__metadata__": {"kind": "k"}}'.encode("utf-16")),
        "data of no tensor": raw({"__metadata__": {"kind": "k"}}, b"\0"),
        "tensor is null": raw({"__metadata__": {"kind": "k"}, "x": None}),
        "unknown dtype": with_tensor(dtype="BF16"),
        "dtype is a list": with_tensor(dtype=["F32"]),
        "shape is a number": with_tensor(shape=2),
        "negative dimensions": with_tensor(shape=[-1, -2]),
        "float dimension": with_tensor(shape=[2.0]),
        "boolean dimension": with_tensor(shape=[2, True]),
        "65 dimensions": with_tensor(shape=[2] + [1] * 64),
        "shape too large for numpy": with_tensor(
            b"", shape=[0, 2**53 - 1, 2**53 - 1], data_offsets=[0, 0]
        ),
        "shape of other size": with_tensor(shape=[3]),
        "offsets beyond the data": with_tensor(data_offsets=[8, 16]),
        "offsets backwards": with_tensor(data_offsets=[8, 0]),
        "three offsets": with_tensor(data_offsets=[0, 8, 8]),
        "more data than tensors": with_tensor(b"\0" * 9),
        "less data than tensors": with_tensor(b"\0" * 7),
        "surplus field": with_tensor(color="red"),
        "boolean 2": with_tensor(b"\2\1", dtype="BOOL", data_offsets=[0, 2]),
        "overlap": raw(
            {
                "__metadata__": {"kind": "k"},
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            b"\0" * 6,
        ),
        "hole": raw(
            {
                "__metadata__": {"kind": "k"},
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]},
            },
            b"\0" * 6,
        ),
        "misaligned": raw(
            {
                "__metadata__": {"kind": "k"},
                "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
            },
            b"\0" * 5,
        ),
        "too many tensors": raw(
            {
                "__metadata__": {"kind": "k"},
                **{
                    str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                    for i in range(TENSORS_MAX + 1)
                },
            }
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_malformed_frames_are_refused(message):
    with pytest.raises(BadFrame):
        decode(message[1], bytes_max=LIMIT)


def test_a_message_over_the_receivers_limit_is_refused():
    with pytest.raises(BadFrame, match="limit"):
        decode(SAMPLE, bytes_max=len(SAMPLE) - 1)


def test_text_and_strided_memory_are_no_frames():
    with pytest.raises(BadFrame):
        decode("text", bytes_max=LIMIT)  # type: ignore[arg-type]
    with pytest.raises(BadFrame):
        decode(memoryview(SAMPLE)[::2], bytes_max=LIMIT)


def refused_or_decoded(message: bytes) -> None:
    try:
        frame = decode(message, bytes_max=LIMIT)
    except BadFrame:
        return
    # What is accepted can be sent on.
    encode(frame, bytes_max=LIMIT)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(message):
    refused_or_decoded(message)


@given(st.binary(max_size=200), st.binary(max_size=32))
def test_random_headers_never_raise_anything_else(header, data):
    refused_or_decoded(raw(header, data))


@given(st.recursive(leaves, lambda i: st.lists(i) | st.dictionaries(st.text(), i)), st.binary())
def test_random_json_headers_never_raise_anything_else(header, data):
    refused_or_decoded(raw({"__metadata__": {"kind": "k"}, "x": header}, data))


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(SAMPLE)),
)
def test_mutated_and_truncated_frames_never_raise_anything_else(changes, end):
    message = bytearray(SAMPLE)
    for index, byte in changes:
        message[index] = byte
    refused_or_decoded(bytes(message))
    refused_or_decoded(bytes(message[:end]))


def test_every_truncation_is_refused():
    for end in range(len(SAMPLE)):
        with pytest.raises(BadFrame):
            decode(SAMPLE[:end], bytes_max=LIMIT)


@pytest.mark.peer
@settings(max_examples=50)
@given(frames)
def test_safetensors_reads_ours(frame):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    back = safetensors_numpy.load(encode(frame, bytes_max=LIMIT))
    assert back.keys() == frame.tensors.keys()
    for name, tensor in frame.tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].tobytes() == tensor.tobytes()


@pytest.mark.peer
@settings(max_examples=50)
@given(st.dictionaries(names, arrays, max_size=6))
def test_we_read_what_safetensors_writes(tensors):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    message = safetensors_numpy.save(tensors, metadata={"kind": "run", "epoch": "7"})
    back = decode(message, bytes_max=LIMIT)
    assert (back.kind, back.epoch) == ("run", 7)
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.tensors[name].tobytes() == tensor.tobytes()


# -- what no frame can carry, and whom a broken one was for ----------------------------------------


@pytest.mark.parametrize(
    ("names", "carried"),
    [
        (["y"] * TENSORS_MAX, True),
        (["y"] * (TENSORS_MAX + 1), False),
        (["y", "__metadata__"], False),
        (["y" * (HEADER_BYTES_MAX - 1024)], False),
        (["y" * (HEADER_BYTES_MAX // 2)], True),
        (["\u00e9" * (HEADER_BYTES_MAX // 4)], False),
        ([], True),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, list) else str(value),
)
def test_what_a_frame_can_carry_is_known_before_there_is_one(names, carried):
    assert can_carry((name, 2) for name in names) is carried
    if carried:
        tensors = {f"{name}{n or ''}": np.zeros((1, 1)) for n, name in enumerate(names)}
        encode(Frame("result", "op", tensors=tensors), bytes_max=LIMIT + HEADER_BYTES_MAX)


def test_broken_frame_still_says_whom_it_was_for():
    assert claimed_op_id(SAMPLE[:-1]) == decode(SAMPLE, bytes_max=LIMIT).op_id
    long = raw({"__metadata__": {"kind": "k", "op": "it"}, "x": "y" * HEADER_BYTES_MAX})
    with pytest.raises(BadFrame, match="limit"):
        decode(long, bytes_max=LIMIT + 2 * HEADER_BYTES_MAX)
    assert claimed_op_id(long) == "it"
    for nameless in (b"", b"x" * 7, b"x" * 99, SAMPLE[:20], raw({"a": 1}), raw(b"[" * 99_999), "x"):
        assert claimed_op_id(nameless) == ""
    assert claimed_op_id(raw({"__metadata__": {"op": 5}})) == ""


@given(st.binary(max_size=200))
def test_no_bytes_make_the_search_for_a_name_fail(message):
    assert isinstance(claimed_op_id(message), str)
    assert isinstance(claimed_op_id(raw(message)), str)
