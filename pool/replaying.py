"""What of a failure bundle may be used to run its operation again.

A bundle may be anybody's. Taken from it are the operation, harmless options of the pool
(`pool.bundles.REPLAYED_OPTIONS`), and inputs; never an address, a folder, or anything that would
be kept. Its model is used only if whoever replays it agrees to the path, and if what lies there is
what the bundle says. This module must not run an operation, nor load a model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pool.bundles import REPLAYED_OPTIONS
from pool.config import PoolConfig
from recovery.bounded_files import open_regular, stays_inside, text_of, unreadable
from recovery.errors import BadInput
from sharding.models.frames import SUPPORTED_DTYPES, TENSORS_MAX

FILES_MAX = 4096  # of a model
SHARDS_MAX = 1024
TEXT_CHARACTERS_MAX = 1_000_000  # as `pool.models.tokens` takes
MADE_UP_BYTES_MAX = 256 << 20  # of all inputs together
_NAME_MAX = 200
_PATH_MAX = 4096
_DIMENSIONS_MAX = 64
_FILE_BYTES_MAX = (1 << 53) - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEXTS = re.compile(r"str\d{1,9}")  # numpy's name of the dtype of texts


@dataclass(frozen=True)
class FileOfModel:
    """A file of the bundle's model: its name relative to the model's folder, and what was in it."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class ReplayOrder:
    """An operation to be run again. `ignored`: options of the bundle that are not used.

    `loaded_as`, `shards`, `strategy` and `path` are of the loaded model, `digest` is its entry's;
    `model` is what was asked, one of its parts perhaps. `path` is "" if the bundle does not say.
    """

    model: str
    op: str
    loaded_as: str
    digest: str
    shards: int | None
    strategy: str | None
    path: str
    files: tuple[FileOfModel, ...]
    inputs: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    ignored: tuple[str, ...]


def order_from(facts: Mapping[str, Any]) -> ReplayOrder:
    """The order in a bundle's facts (`pool.bundles.read_bundle`), all of it checked.

    Raises `BadInput`, naming what is missing or makes no sense.
    """
    operation, model = facts["operation"], facts["model"]
    inputs = operation.get("inputs")
    if not isinstance(inputs, dict) or not all(isinstance(each, dict) for each in inputs.values()):
        raise _bad("operation.inputs", "descriptions by name", inputs)
    if len(inputs) > TENSORS_MAX:
        raise _bad("operation.inputs", f"at most {TENSORS_MAX} inputs", len(inputs))
    shards, strategy = model.get("shards"), model.get("strategy")
    if shards is not None and not (type(shards) is int and 1 <= shards <= SHARDS_MAX):
        raise _bad("model.shards", f"1 to {SHARDS_MAX}, or null", shards)
    options, ignored = _options(facts["pool"])
    return ReplayOrder(
        model=_text(operation, "operation", "model"),
        op=_text(operation, "operation", "op"),
        loaded_as=_text(model, "model", "name"),
        digest=_digest(model, "model"),
        shards=shards,
        strategy=None if strategy is None else _text(model, "model", "strategy"),
        path=_text(model, "model", "path", _PATH_MAX) if model.get("path") else "",
        files=_files(model.get("files", [])),
        inputs=inputs,
        options=options,
        ignored=ignored,
    )


def _bad(what: str, expected: str, got: object) -> BadInput:
    return BadInput(
        f"the bundle's {what}: expected {expected}, got {text_of(got)}.",
        expected=expected,
        got=text_of(got),
    )


def _text(part: Mapping[str, Any], of: str, name: str, chars_max: int = _NAME_MAX) -> str:
    value = part.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= chars_max or "\0" in value:
        raise _bad(f"{of}.{name}", f"a text of 1 to {chars_max} characters", value)
    return value


def _digest(part: Mapping[str, Any], of: str) -> str:
    value = part.get("digest")
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _bad(f"{of}.digest", "a SHA-256 in hexadecimal", value)
    return value


def _files(listed: Any) -> tuple[FileOfModel, ...]:
    if not isinstance(listed, list) or len(listed) > FILES_MAX:
        raise _bad("model.files", f"at most {FILES_MAX} files", type(listed).__name__)
    found: dict[str, FileOfModel] = {}
    for file in listed:
        if not isinstance(file, dict):
            raise _bad("model.files", "objects", file)
        name, size = _text(file, "model.files", "name"), file.get("bytes")
        if not stays_inside(name) or name in found:
            raise _bad("model.files.name", "each a file of its own in the model's folder", name)
        if type(size) is not int or not 0 <= size <= _FILE_BYTES_MAX:
            raise _bad("model.files.bytes", "a size", size)
        found[name] = FileOfModel(name, size, _digest(file, "model.files"))
    return tuple(found.values())


def _options(pool: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options to use, and the names of those that are not used."""
    taken: dict[str, Any] = {}
    for name, types in REPLAYED_OPTIONS.items():
        if name not in pool:
            continue
        value = pool[name]
        # True is an int in Python.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _bad(f"pool.{name}", " or ".join(kind.__name__ for kind in types), value)
        taken[name] = value
    browsers = pool.get("browsers")
    if not isinstance(browsers, dict):
        raise _bad("pool.browsers", "numbers by kind of browser", browsers)
    taken["browsers"] = browsers
    PoolConfig(**taken).checked()  # of the values: words, and ranges of numbers
    return taken, tuple(sorted(text_of(name) for name in pool.keys() - taken.keys()))


def verified_path(order: ReplayOrder) -> Path:
    """Where the bundle's model was, after a check that it is still the same, file by file.

    Raises `BadInput`: the bundle does not say where or what it was, a file is missing, of another
    content, or of another user of this machine (who might change it again).
    """
    if not order.path or not order.files:
        raise BadInput(
            "the bundle does not say which files its model was: pass its path with --model.",
            expected="--model",
        )
    path = Path(order.path).absolute()
    folder = path if path.is_dir() else path.parent
    if folder != path and path.name not in {file.name for file in order.files}:
        raise _bad("model.files", f"{text_of(path.name)} among them", order.files[0].name)
    for file in order.files:
        _verify(folder / file.name, file)
    return path


def _verify(path: Path, file: FileOfModel) -> None:
    try:
        with open_regular(path) as stream:
            status = os.fstat(stream.fileno())
            found = (status.st_size, "")
            if status.st_size == file.bytes:  # the cheapest check first
                found = (file.bytes, hashlib.file_digest(stream, "sha256").hexdigest())
    except OSError as error:
        raise unreadable(path, "the bundle's model (pass another with --model)", error) from error
    expected = (file.bytes, file.digest)
    if found != expected:
        raise BadInput(
            f"{path} is not the model of the bundle: expected {file.bytes:,} bytes with sha256 "
            f"{file.digest}, got {found[0]:,} bytes{f' with {found[1]}' if found[1] else ''}. Pass "
            "the right one with --model.",
            path=str(path),
            expected=expected,
            got=found,
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise BadInput(
            f"{path} belongs to another user of this machine. If you trust it, pass it with "
            "--model.",
            path=str(path),
            expected="a file of yours",
            got=status.st_uid,
        )


# -- inputs ----------------------------------------------------------------------------------------


def made_up(described_inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Inputs of the same names, dtypes and shapes as those of a bundle without data.

    Raises `BadInput` for what describes no input, or one that is too large.
    """
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    room = MADE_UP_BYTES_MAX
    for name, about in described_inputs.items():
        where = f"operation.inputs.{text_of(name)}"
        match about.get("kind"):
            case "text":
                characters = about.get("characters")
                if type(characters) is not int or not 0 <= characters <= TEXT_CHARACTERS_MAX:
                    raise _bad(where, f"0 to {TEXT_CHARACTERS_MAX:,} characters", characters)
                found[name] = _words(characters)
            case "option":
                value = about.get("value")
                if value is not None and not isinstance(value, bool | int | float):
                    raise _bad(where, "a number, a boolean or null", value)
                found[name] = value
            case "array":
                shape = _shape(about.get("shape"), where)
                room -= _bytes_to_make(about.get("dtype"), shape, where)
                if room < 0:
                    raise _bad(where, f"inputs of at most {MADE_UP_BYTES_MAX:,} bytes", shape)
                found[name] = _made_up_array(about["dtype"], shape, rng)
            case other:
                raise _bad(where, "a text, an option or an array", other)
    return found


def _words(characters: int) -> str:
    return " ".join(["word"] * (1 + characters // 5))


def _shape(value: Any, where: str) -> tuple[int, ...]:
    sides = value if isinstance(value, list) else [None]
    if len(sides) > _DIMENSIONS_MAX or not all(type(n) is int and 0 <= n < 1 << 40 for n in sides):
        raise _bad(where, f"a shape of at most {_DIMENSIONS_MAX} dimensions", value)
    return tuple(sides)


def _bytes_to_make(dtype: Any, shape: tuple[int, ...], where: str) -> int:
    """What making such an array takes, a side of length 0 taken as 1. Raises `BadInput`."""
    if not isinstance(dtype, str) or not (dtype in SUPPORTED_DTYPES or _TEXTS.fullmatch(dtype)):
        raise _bad(where, f"a dtype among {', '.join(sorted(SUPPORTED_DTYPES))}, or text", dtype)
    each = 64 + int(dtype[3:]) if _TEXTS.fullmatch(dtype) else 16  # made as float64 or int64
    return each * math.prod(max(side, 1) for side in shape)


def _made_up_array(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    if _TEXTS.fullmatch(dtype):
        words = _words(min(int(dtype[3:]) // 32, TEXT_CHARACTERS_MAX))  # of 32 bits each
        return np.full(shape, words).tolist()
    whole = np.dtype(dtype).kind in "iub"
    values = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)
    return values.astype(dtype)
