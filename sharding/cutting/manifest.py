"""The manifest of a cut model: the layers, inputs and outputs of each shard.

Plain data and its JSON, and the check that the files are those that were cut. It is all that
loading shards needs, so this module must not import onnx, and must not cut.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recovery.bounded_files import JsonBounds, read_json_object, stays_inside, text_of
from recovery.errors import BadInput, NotAModel
from sharding.models.signature import TensorSpec, digest_of

MANIFEST_NAME = "manifest.json"
FORMAT = 1  # of the JSON; another number is refused
MANIFEST_BYTES_MAX = 16 << 20
SHARDS_MAX = 4096
COUNT_MAX = (1 << 53) - 1  # bytes, and layers
DIMENSIONS_MAX = 64
ELEMENTS_MAX = 1 << 31  # of the fixed dimensions of a tensor: more go into no message

_BOUNDS = JsonBounds("the manifest of a cut model", MANIFEST_BYTES_MAX, items_max=1_000_000)
_DTYPE = re.compile(r"(?:[a-z][a-z0-9_]{0,31})?")  # numpy's names; "" if it has none
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Cache:
    """One tensor that a layer keeps from step to step.

    `past` is the graph's input and `present` the output that becomes `past` of the next step.
    Most begin empty and grow by a position per token. One with a `window` (positions; 0 for
    none) is a ring of fixed length: it begins as zeros of at least that length.
    """

    layer: int
    past: TensorSpec
    present: TensorSpec
    window: int = 0


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard, beside the manifest. `digest` is SHA-256, in hexadecimal."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Shard:
    """One piece of the model: an ONNX file of its own, with the layers `[span[0], span[1])`.

    Its inputs are `receives` (the previous shard's `sends`, by the same names), `shared` (the
    uncut model's own inputs that this shard needs too, such as masks) and the caches' `past`.
    Its outputs are `sends`, `outputs` (the uncut model's own) and the caches' `present`.
    `files` begins with the graph file; the others are its external data.
    """

    span: tuple[int, int]
    files: tuple[ShardFile, ...]
    receives: tuple[TensorSpec, ...]
    sends: tuple[TensorSpec, ...]
    shared: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    caches: tuple[Cache, ...]

    @property
    def graph_file(self) -> str:
        return self.files[0].name

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """All shards of one model, first to last. `source` is the uncut model's `ModelSpec.digest`.

    `inputs` are those of the uncut model that are no caches, whether a shard takes them or not.
    `order` names its outputs as its graph declares them: a later shard may have an earlier one.
    """

    name: str
    source: str
    kind: str
    layers: int
    inputs: tuple[TensorSpec, ...]
    shards: tuple[Shard, ...]
    order: tuple[str, ...] = ()  # empty: cut by a version that did not keep it

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Those of the uncut model that are no caches, in its order."""
        found = {spec.name: spec for shard in self.shards for spec in shard.outputs}
        declared = {name: found[name] for name in self.order if name in found}
        return tuple((declared | found).values())

    def to_json(self) -> str:
        """The text of the manifest file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: str | Path, *, verify: bool = True) -> Manifest:
    """The manifest in `folder`, after a check of every shard file's size and SHA-256.

    Without `verify` the shard files are not looked at.

    Raises `NotAModel`: no manifest, another format, a field that is missing or of the wrong
    kind, spans that leave out a layer, a file that lies elsewhere, is missing, or differs.
    """
    path = Path(folder).absolute() / MANIFEST_NAME
    try:
        data = read_json_object(path, _BOUNDS)
    except BadInput as error:
        raise _refuse(path, error.fields["expected"], error.fields["got"]) from error
    try:
        manifest = _parse(path, data)
        _check_files(manifest)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _refuse(path, "the manifest of a cut model", text_of(repr(error))) from error
    if verify:
        for shard in manifest.shards:
            for file in shard.files:
                _verify(path.parent, file)
    return manifest


def _refuse(path: Path, expected: str, got: str) -> NotAModel:
    return NotAModel(
        f"{path}: expected {expected}, got {got}. Cut the model again.",
        path=str(path),
        expected=expected,
        got=got,
    )


def _verify(folder: Path, file: ShardFile) -> None:
    path = folder / file.name
    try:
        size, digest = digest_of(path)
    except OSError as error:
        raise _refuse(path, "a shard's file", str(error.strerror)) from error
    if (size, digest) != (file.bytes, file.digest):
        raise _refuse(
            path,
            f"{file.bytes:,} bytes with SHA-256 {file.digest}",
            f"{size:,} bytes with SHA-256 {digest}",
        )


def _parse(path: Path, data: dict[str, Any]) -> Manifest:
    if data["format"] != FORMAT:
        raise _refuse(path, f"a manifest of format {FORMAT}", f"format {data['format']!r}")
    manifest = Manifest(
        name=_text(data["name"]),
        source=_text(data["source"]),
        kind=_text(data["kind"]),
        layers=_count(data["layers"]),
        inputs=_specs(data["inputs"]),
        shards=tuple(_shard(shard) for shard in data["shards"]),
        order=tuple(_text(name) for name in data.get("order", ())),
    )
    expected = 0
    for before, shard in zip((None, *manifest.shards), manifest.shards, strict=False):
        start, end = shard.span
        if start != expected or end <= start:
            raise _refuse(path, f"a shard that begins at layer {expected}", f"{shard.span}")
        if shard.receives != (before.sends if before else ()):
            raise _refuse(path, f"shard {shard.span} to receive what is sent", "other tensors")
        expected = end
    if expected != manifest.layers or manifest.shards[-1].sends:
        raise _refuse(path, f"shards of all {manifest.layers} layers", f"{expected} layers")
    return manifest


def _check_files(manifest: Manifest) -> None:
    """Raises `ValueError` for too many shards, and for a file that is listed twice: a few bytes
    would have it read as often as they like."""
    if len(manifest.shards) > SHARDS_MAX:
        raise ValueError(f"{len(manifest.shards):,} shards, where {SHARDS_MAX:,} are the most")
    names = [file.name for shard in manifest.shards for file in shard.files]
    if len(set(names)) < len(names):
        raise ValueError("a file that is listed twice")


def _shard(data: dict[str, Any]) -> Shard:
    start, end = data["span"]
    files = tuple(
        ShardFile(_file_name(file["name"]), _count(file["bytes"]), _digest(file["digest"]))
        for file in data["files"]
    )
    if not files:
        raise ValueError("a shard without files")
    return Shard(
        span=(_count(start), _count(end)),
        files=files,
        receives=_specs(data["receives"]),
        sends=_specs(data["sends"]),
        shared=_specs(data["shared"]),
        outputs=_specs(data["outputs"]),
        caches=tuple(
            Cache(
                _count(cache["layer"]),
                _spec(cache["past"]),
                _spec(cache["present"]),
                _count(cache["window"]),
            )
            for cache in data["caches"]
        ),
    )


def _specs(data: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(one) for one in data)


def _spec(data: dict[str, Any]) -> TensorSpec:
    shape = data["shape"]
    if shape is not None:
        shape = tuple(shape)
        if not all(dim is None or type(dim) in (int, str) for dim in shape):
            raise ValueError(f"a shape of {shape!r}")
        fixed = [dim for dim in shape if isinstance(dim, int)]
        if len(shape) > DIMENSIONS_MAX or any(dim < 0 for dim in fixed):
            raise ValueError(f"a shape of {shape!r}")
        if math.prod(dim for dim in fixed if dim) > ELEMENTS_MAX:
            raise ValueError(f"a shape of more than {ELEMENTS_MAX:,} elements: {shape!r}")
    dtype = _text(data["dtype"])
    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"a dtype of {dtype!r}")
    return TensorSpec(_text(data["name"]), dtype, shape)


def _file_name(value: Any) -> str:
    name = _text(value)
    # Files lie beside the manifest; a name with a path is refused.
    if "/" in name or not stays_inside(name):
        raise ValueError(f"a file name of {name!r}")
    return name


def _digest(value: Any) -> str:
    digest = _text(value)
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"a SHA-256 of {digest!r}")
    return digest


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= COUNT_MAX:
        raise ValueError(f"expected a count, got {value!r}")
    return value
