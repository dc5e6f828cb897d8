"""Frames: one message on a data socket, in the safetensors layout, so that no number becomes text.

Layout: 8 bytes little-endian header length N, N bytes of JSON header (padded with spaces, so
that the data begins at a multiple of 8), then the tensors' raw little-endian C-contiguous
bytes. `__metadata__` carries the frame's other fields, string to string, as
safetensors demands. This module must not open a socket, and must not decide whether a frame is
still wanted: it only turns bytes into frames, and validates them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from recovery.errors import BadFrame, BadInput, MessageTooLarge

Array: TypeAlias = npt.NDArray[Any]

TENSORS_MAX = 1024  # in one frame
HEADER_BYTES_MAX = 1 << 20  # of JSON; send larger values as tensors
INTEGER_MAX = (1 << 53) - 1  # the largest integer that JavaScript holds exactly

_RANK_USUAL = 8  # at most
_ENTRY_BYTES = 100  # of a tensor in a header, besides its name and shape
_METADATA_BYTES = 1 << 16  # of the fields that are no tensors, as far as their number is bounded
_CLAIMED_BYTES_MAX = 8 * HEADER_BYTES_MAX  # of a header that is read only for whom it is for
_ALIGNMENT = 8
_DIMENSIONS_MAX = 64  # numpy's own limit
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# By kind and size, since numpy has several types of the same kind and size (long, longlong).
_CODES = {(dtype.kind, dtype.itemsize): code for code, dtype in _DTYPES.items()}

SUPPORTED_DTYPES = frozenset(dtype.name for dtype in _DTYPES.values())


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Frame:
    """One message. `kind` says what it is; the rest depends on the kind.

    `epoch` is the incarnation of the browser that it is meant for or comes from; `step` and
    `position` (tokens) place it in a sequence; each is from 0 to 2**53-1. `body` is a JSON
    object, for commands and replies. `tensors` are numpy arrays of the dtypes in
    `SUPPORTED_DTYPES`; those of a decoded frame are read-only views into the message.
    """

    kind: str
    op_id: str = ""
    epoch: int = 0
    step: int = 0
    position: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)


def encode(frame: Frame, *, bytes_max: int) -> bytes:
    """The frame as one message.

    Tensors lie in order of descending item size, then name, so each is aligned to its own
    item size. Raises `MessageTooLarge` above `bytes_max` (before anything is copied) or with a
    header over `HEADER_BYTES_MAX`, and `BadInput` for what the layout cannot carry: a dtype
    such as object, string or complex, a body that is not JSON, a number out of range.
    """
    header, arrays = _plan(frame)
    size = _size(header, arrays)
    if size > bytes_max:
        raise MessageTooLarge(
            f"A {frame.kind!r} message of {size:,} bytes exceeds the limit of {bytes_max:,} bytes: "
            f"send smaller batches, or raise the pool's limit on message size.",
            size=size,
            limit=bytes_max,
            remedy="send smaller batches, or raise the pool's limit on message size",
        )
    parts: list[bytes | memoryview] = [_LENGTH.pack(len(header)), header]
    # asarray copies only what is not yet little-endian and contiguous; join copies once.
    parts += [
        np.asarray(array, dtype=_DTYPES[code], order="C").reshape(-1).view(np.uint8).data
        for code, array in arrays
    ]
    return b"".join(parts)


def encoded_size(frame: Frame) -> int:
    """Bytes that `encode` will make of the frame, without copying a tensor.

    Raises what `encode` raises, except for the limit on the message.
    """
    return _size(*_plan(frame))


def decode(data: bytes | bytearray | memoryview, *, bytes_max: int) -> Frame:
    """The frame in one message; its tensors are read-only views into `data`, not copies.

    Raises only `BadFrame`, for anything but exactly one well-formed frame.
    """
    try:
        view = memoryview(data).toreadonly().cast("B")
    except TypeError as error:
        raise BadFrame(f"A frame must be contiguous bytes: {error}.") from error
    if len(view) > bytes_max:
        raise BadFrame(
            f"A message of {len(view):,} bytes exceeds the limit of {bytes_max:,} bytes.",
            size=len(view),
            limit=bytes_max,
        )
    if len(view) < _LENGTH.size:
        _bad(f"{len(view)} bytes are too short for a frame")
    (header_bytes,) = _LENGTH.unpack_from(view)
    if header_bytes > HEADER_BYTES_MAX:
        _bad(f"the header would have {header_bytes:,} bytes, the limit is {HEADER_BYTES_MAX:,}")
    start = _LENGTH.size + header_bytes
    if start > len(view):
        _bad(f"truncated: the header ends at byte {start}, the message at {len(view)}")
    if start % _ALIGNMENT:
        _bad(f"the data begins at byte {start}, which is no multiple of {_ALIGNMENT}")
    try:
        header_text = str(view[_LENGTH.size : start], "utf-8")
    except UnicodeDecodeError as error:
        raise BadFrame(f"Malformed frame: the header is not UTF-8: {error}.") from error
    header = _parse(header_text, "header")
    metadata = header.pop(_METADATA, None)
    if not isinstance(metadata, dict):
        _bad(f"the header has no {_METADATA} object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            _bad(f"metadata {key!r} must be a string, not {type(value).__name__}")
    kind = _text(metadata.get("kind", ""), "kind")
    if not kind:
        _bad("the metadata has no kind")
    return Frame(
        kind=kind,
        op_id=_text(metadata.get("op", ""), "op"),
        epoch=_integer(metadata, "epoch"),
        step=_integer(metadata, "step"),
        position=_integer(metadata, "position"),
        body=_parse(metadata.get("body", "{}"), "body"),
        tensors=_tensors(header, view, start),
    )


def can_carry(tensors: Iterable[tuple[str, int | None]]) -> bool:
    """Whether a frame can have tensors of these names and ranks (None: unknown), as far as that
    can be told. Errs on the side of no by a few bytes for each."""
    header_bytes = count = 0
    for name, rank in tensors:
        count += 1
        shape_bytes = 17 * (_RANK_USUAL if rank is None else rank)  # 2**53 has 16 digits
        header_bytes += len(json.dumps(name)) + shape_bytes + _ENTRY_BYTES
        if name == _METADATA:
            return False
    return count <= TENSORS_MAX and header_bytes <= HEADER_BYTES_MAX - _METADATA_BYTES


def claimed_op_id(data: bytes | bytearray | memoryview) -> str:
    """The operation id in a message that is no well-formed frame; "" if it can't be told."""
    try:
        view = memoryview(data).cast("B")
        (header_bytes,) = _LENGTH.unpack_from(view)
        header = json.loads(bytes(view[_LENGTH.size :][: min(header_bytes, _CLAIMED_BYTES_MAX)]))
        claimed = header[_METADATA]["op"]
    except (TypeError, ValueError, KeyError, IndexError, struct.error, RecursionError):
        return ""
    return claimed if isinstance(claimed, str) else ""


def _plan(frame: Frame) -> tuple[bytes, list[tuple[str, Array]]]:
    """The padded header, and the tensors with their dtype codes in the order of the data."""
    if not frame.kind:
        raise BadInput("A frame needs a kind.", expected="a non-empty string", got=frame.kind)
    if len(frame.tensors) > TENSORS_MAX:
        raise BadInput(
            f"A frame holds at most {TENSORS_MAX} tensors, not {len(frame.tensors)}.",
            expected=TENSORS_MAX,
            got=len(frame.tensors),
        )
    coded = {name: (_code(name, array), array) for name, array in frame.tensors.items()}
    names = sorted(coded, key=lambda name: (-coded[name][1].itemsize, name))
    header: dict[str, Any] = {
        _METADATA: {
            "kind": frame.kind,
            "op": frame.op_id,
            "epoch": _number_text(frame.epoch, "epoch"),
            "step": _number_text(frame.step, "step"),
            "position": _number_text(frame.position, "position"),
            "body": _json(dict(frame.body), "body", ascii_only=True),
        }
    }
    end = 0
    for name in names:
        code, array = coded[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, end]}
    try:
        encoded = _json(header, "header", ascii_only=False).encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"A frame's names must be valid Unicode: {error}.") from error
    encoded += b" " * (-(_LENGTH.size + len(encoded)) % _ALIGNMENT)
    if len(encoded) > HEADER_BYTES_MAX:
        raise MessageTooLarge(
            f"The header of a {frame.kind!r} message has {len(encoded):,} bytes, the limit is "
            f"{HEADER_BYTES_MAX:,}: send long values as tensors, or in smaller batches.",
            size=len(encoded),
            limit=HEADER_BYTES_MAX,
            remedy="send long values as tensors, or in smaller batches",
        )
    return encoded, [coded[name] for name in names]


def _size(header: bytes, arrays: list[tuple[str, Array]]) -> int:
    return _LENGTH.size + len(header) + sum(array.nbytes for _, array in arrays)


def _code(name: str, array: Array) -> str:
    if name == _METADATA:
        raise BadInput(f"{name!r} cannot name a tensor.", expected="another string", got=name)
    if not isinstance(array, np.ndarray):
        raise BadInput(
            f"Tensor {name!r} must be a numpy array, not {type(array).__name__}.",
            expected="numpy.ndarray",
            got=type(array).__name__,
        )
    try:
        return _CODES[array.dtype.kind, array.dtype.itemsize]
    except KeyError:
        raise BadInput(
            f"Tensor {name!r} has dtype {array.dtype}, which no frame carries: expected one of "
            f"{', '.join(sorted(SUPPORTED_DTYPES))}.",
            expected=sorted(SUPPORTED_DTYPES),
            got=str(array.dtype),
        ) from None


def _number_text(value: int, name: str) -> str:
    if type(value) is not int or not 0 <= value <= INTEGER_MAX:
        raise BadInput(
            f"A frame's {name} must be an integer from 0 to 2**53-1, not {value!r}.",
            expected="an integer from 0 to 2**53-1",
            got=repr(value),
        )
    return str(value)


def _json(value: Mapping[str, Any], what: str, *, ascii_only: bool) -> str:
    """JSON text; a body is ASCII, since an error's text may hold half a surrogate pair, which
    an escape can carry and UTF-8 cannot."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=ascii_only, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            f"A frame's {what} must be plain JSON without NaN or infinity: {error}.",
            expected="a JSON object",
            got=str(error),
        ) from error


def _bad(why: str) -> NoReturn:
    raise BadFrame(f"Malformed frame: {why}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has the same key twice")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"Malformed frame: the {what} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        _bad(f"the {what} must be a JSON object, not {type(value).__name__}")
    return value


def _text(value: str, what: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadFrame(f"Malformed frame: {what} is not valid Unicode: {error}.") from error
    return value


def _integer(metadata: Mapping[str, str], name: str) -> int:
    text = metadata.get(name, "0")
    # 16 digits hold 2**53-1; without the bound a long text would cost time to read as a number.
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= INTEGER_MAX):
        _bad(f"{name} must be an integer from 0 to 2**53-1, not {text[:40]!r}")
    return int(text)


def _tensors(header: Mapping[str, Any], view: memoryview, start: int) -> dict[str, Array]:
    """Views of all tensors; refuses data that is shared by two tensors or claimed by none."""
    if len(header) > TENSORS_MAX:
        _bad(f"{len(header)} tensors, the limit is {TENSORS_MAX}")
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, Array] = {}
    data_bytes = len(view) - start
    for raw_name, entry in header.items():
        name = _text(raw_name, "a tensor's name")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            _bad(f"tensor {name!r} must have exactly dtype, shape and data_offsets")
        code = entry["dtype"]
        if not isinstance(code, str) or code not in _DTYPES:
            _bad(f"tensor {name!r} has unknown dtype {code!r}")
        dtype = _DTYPES[code]
        shape = _naturals(entry["shape"], f"the shape of tensor {name!r}")
        offsets = _naturals(entry["data_offsets"], f"the offsets of tensor {name!r}")
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
            _bad(f"tensor {name!r} has offsets {offsets} in {data_bytes} bytes of data")
        begin, end = offsets
        if end - begin != math.prod(shape) * dtype.itemsize:
            _bad(f"tensor {name!r} of {code} {shape} cannot have {end - begin} bytes")
        if begin % dtype.itemsize:
            _bad(f"tensor {name!r} of {code} is not aligned at offset {begin}")
        try:
            tensor: Array = np.ndarray(shape, dtype, buffer=view, offset=start + begin)
        except (ValueError, OverflowError) as error:  # such as [0, 2**53, 2**53]
            raise BadFrame(f"Malformed frame: tensor {name!r} of {shape}: {error}.") from error
        if code == "BOOL" and tensor.size and tensor.view(np.uint8).max() > 1:
            _bad(f"tensor {name!r} holds a boolean that is neither 0 nor 1")
        tensors[name] = tensor
        spans.append((begin, end, name))
    cursor = 0
    for begin, end, name in sorted(spans):
        if begin != cursor:
            _bad(f"tensor {name!r} begins at {begin}, where {cursor} was expected")
        cursor = end
    if cursor != data_bytes:
        _bad(f"the tensors cover {cursor} of {data_bytes} bytes of data")
    return tensors


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > _DIMENSIONS_MAX
        or not all(type(item) is int and 0 <= item <= INTEGER_MAX for item in value)
    ):
        _bad(f"{what} must be at most {_DIMENSIONS_MAX} integers from 0 to 2**53-1")
    return tuple(value)
