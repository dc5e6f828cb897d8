"""The spec of a model file, read once: inputs, outputs, files, digest.

Imports `onnx`. A spec is plain data: using one needs neither the file nor onnx. This module must
not run a model, and must not load the weights that lie in external data files (it reads them once,
in pieces, for their digest).
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # what onnx raises

from recovery.bounded_files import open_regular, read_bounded
from recovery.errors import NotAModel
from recovery.kinds import ModelType
from recovery.voting import Tolerance
from sharding.models.frames import SUPPORTED_DTYPES, TENSORS_MAX, can_carry
from sharding.models.load_memory import peak_bytes

GRAPH_BYTES_MAX = 2**31 - 1  # protobuf's limit on one message

_HEAD_SHOWN = 16  # bytes of a file that is no model, in the error


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    `dtype` is numpy's name of it. `shape` has an integer where a dimension is fixed, its name
    where it is symbolic, and None where nothing is known of it; `shape` itself is None when the
    graph does not even give the number of dimensions. A scalar has the shape `()`.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype} of any shape"
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.dtype}[{dims}]"


@dataclass(frozen=True)
class ModelFile:
    """One file of a model: where it lies on this machine, and how the graph refers to it.

    `path` is absolute. `name` is relative to the graph file, with forward slashes (the graph
    file's own is its file name). `digest` is SHA-256, in hexadecimal. `spellings` are what the
    graph calls it, where that is not `name` ("./w", "a//w"): a runtime that is handed the file
    looks it up by those.
    """

    path: str
    name: str
    bytes: int
    digest: str
    spellings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheSpec:
    """A tensor that a host keeps for a sequence, from one step to the next.

    `past` is the graph's input, `present` the output that becomes the next step's `past`. A
    sequence begins with zeros of `shape`, which has none of them if the cache grows: by a
    position per token, along `axis`. A ring does not grow: its `axis` is -1.
    """

    past: str
    present: str
    dtype: str
    shape: tuple[int, ...]
    axis: int


@dataclass(frozen=True)
class ModelSpec:
    """All that the pool knows of a model without running it. Picklable.

    `digest` names the content: of a model in one file it is the SHA-256 of that file; external
    data files enter it with their names. `files` begins with the graph file. `span` is the
    range of layers `[start, end)` if this is a piece of a larger model. `load_peak_bytes` is an
    estimate, see `read_signature`; what it reads knows no `caches` (`sharding.sequences.stages`
    does).
    """

    name: str
    digest: str
    type: ModelType
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: tuple[ModelFile, ...]
    load_peak_bytes: int
    tolerance: Tolerance
    opset: int
    span: tuple[int, int] | None = None
    caches: tuple[CacheSpec, ...] = ()  # of a decoder, or of a piece of one

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


def read_signature(
    path: str | Path,
    *,
    name: str,
    type: ModelType = ModelType.UNKNOWN,  # noqa: A002
    tolerance: Tolerance | None = None,
) -> ModelSpec:
    """The spec of the ONNX model at `path` (a file; its external data files lie beside it).

    Graph inputs that have an initializer are parameters, not inputs. A dimension given as 0
    without a name counts as unknown (Silero VAD's exporter writes those). `load_peak_bytes` is
    an estimate by the files' bytes (`load_memory.peak_bytes`), not a measurement.

    Raises `NotAModel`, saying what was expected and what was found: no such file, a folder, no
    ONNX, truncated, external data that is missing, too short or outside the model's folder (links
    followed), inputs or outputs that are no tensors of a supported dtype.
    """
    path = Path(path).absolute()
    data = _read_graph_file(path)
    try:
        model = onnx.load_model_from_string(data, format="protobuf")
        graph = model.graph
        parameters = {tensor.name for tensor in graph.initializer}
        parameters |= {tensor.values.name for tensor in graph.sparse_initializer}
        inputs = tuple(
            _tensor_spec(path, "input", value)
            for value in graph.input
            if value.name not in parameters
        )
        outputs = tuple(_tensor_spec(path, "output", value) for value in graph.output)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        external = _external_data(path, model)
    except (DecodeError, UnicodeDecodeError) as error:
        raise _not_onnx(path, data) from error
    if not outputs or not opsets:
        # Other files, and models truncated between two fields, can parse as an empty model.
        raise _not_onnx(path, data)
    graph_file = ModelFile(str(path), path.name, len(data), hashlib.sha256(data).hexdigest())
    files = (graph_file, *_external_files(path, external))
    return ModelSpec(
        name=name,
        digest=_digest(files),
        type=type,
        inputs=inputs,
        outputs=outputs,
        files=files,
        load_peak_bytes=peak_bytes(sum(file.bytes for file in files)),
        tolerance=tolerance or Tolerance(),
        opset=opsets.get("", opsets.get("ai.onnx", 0)),
    )


def check_carried(spec: ModelSpec) -> None:
    """Raises `NotAModel` for inputs or outputs that no message to or from a page can carry.

    An uncut model may have more of them than its parts do, so this is for what is loaded.
    """
    path = Path(spec.files[0].path)
    remedy = "(export it without those of inner layers, or cut it into shards)"
    for what, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        if len(tensors) > TENSORS_MAX:
            expected = f"at most {TENSORS_MAX:,} {what}, as many as a message to a page carries"
            raise _refuse(path, f"{len(tensors):,} {remedy}", expected)
        if not can_carry((tensor.name, tensor.rank) for tensor in tensors):
            expected = f"{what} whose names fit into the header of a message to a page"
            raise _refuse(path, f"longer ones, or one that is reserved {remedy}", expected)


def _read_graph_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise _refuse(path, "a folder", "an ONNX file")
        size = path.stat().st_size
        if size > GRAPH_BYTES_MAX:
            raise _refuse(
                path,
                f"a file of {size:,} bytes",
                f"a graph of at most {GRAPH_BYTES_MAX:,} bytes (larger models keep their weights "
                "in external data files)",
            )
        return read_bounded(path, GRAPH_BYTES_MAX, what="an ONNX model", error=NotAModel)
    except OSError as error:
        raise _refuse(
            path, str(error.strerror or error), "an ONNX file that can be read"
        ) from error


def _refuse(path: Path, got: str, expected: str) -> NotAModel:
    return NotAModel(
        f"{path}: expected {expected}, got {got}.", path=str(path), expected=expected, got=got
    )


def _not_onnx(path: Path, data: bytes) -> NotAModel:
    if not data:
        got = "an empty file"
    elif data.startswith(b"version https://git-lfs"):
        got = "a Git LFS pointer (fetch the file itself with `git lfs pull`)"
    else:
        got = f"{len(data):,} bytes that are no ONNX, or not all of it: {data[:_HEAD_SHOWN]!r}"
    return _refuse(path, got, "a complete ONNX model")


def _tensor_spec(path: Path, what: str, value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    label = f"{what} {value.name!r}"
    if kind != "tensor_type":
        got = f"{label} of {kind or 'no type'}, which is not supported"
        raise _refuse(path, got, "a model whose inputs and outputs are tensors")
    tensor = value.type.tensor_type
    dtype = _dtype_name(tensor.elem_type)
    if dtype not in SUPPORTED_DTYPES:
        raise _refuse(
            path,
            f"{label} of dtype {dtype}, which is not supported",
            f"inputs and outputs of {', '.join(sorted(SUPPORTED_DTYPES))}",
        )
    shape = tuple(_dim(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return TensorSpec(value.name, dtype, shape)


def _dtype_name(element: int) -> str:
    if element == onnx.TensorProto.STRING:
        return "string"  # whose numpy dtype would be "object"
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element)).name
    except KeyError:
        return f"number {element}"


def _dim(dim: Any) -> int | str | None:
    if dim.dim_param:
        return str(dim.dim_param)
    return int(dim.dim_value) if dim.dim_value > 0 else None


@dataclass
class _External:
    """An external data file: the bytes that it must have, and how the graph writes its name."""

    bytes_min: int = 0
    spellings: set[str] = field(default_factory=set)


def _external_data(path: Path, model: onnx.ModelProto) -> dict[str, _External]:
    """The external data files by name: relative to the graph's folder, without `.` or `//`."""
    needed: dict[str, _External] = {}
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        name = external_name(location)
        if not name:
            raise _refuse(
                path,
                f"external data at {location!r} (tensor {tensor.name!r})",
                "external data inside the model's own folder",
            )
        try:
            parts = [int(entries.get(key) or 0) for key in ("offset", "length")]
            if min(parts) < 0:
                raise ValueError("a negative number")
            end = sum(parts)
        except ValueError:
            raise _refuse(
                path,
                f"external data of tensor {tensor.name!r} with offset {entries.get('offset')!r} "
                f"and length {entries.get('length')!r}",
                "integers there",
            ) from None
        file = needed.setdefault(name, _External())
        file.bytes_min = max(end, file.bytes_min)
        if location != name:
            file.spellings.add(location)
    return dict(sorted(needed.items()))


def external_name(location: str) -> str:
    """The name of an external data file, relative to the graph's folder, that a spelling means;
    "" if it means none there."""
    name = posixpath.normpath(location) if location else ""
    # A backslash or a colon would mean something else on Windows.
    outside = name.startswith(("/", "../")) or name in ("", ".", "..")
    return "" if outside or set("\\:\0") & set(location) else name


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that can lie in a file of its own, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


def _external_files(path: Path, needed: dict[str, _External]) -> Iterator[ModelFile]:
    for name, external in needed.items():
        file = path.parent / name
        _check_inside(path, file)
        try:
            size, digest = digest_of(file)
        except OSError as error:
            raise _refuse(
                path,
                f"{file}: {error.strerror or error}",
                f"the external data file {name!r} beside it",
            ) from error
        if size < external.bytes_min:
            raise _refuse(
                path,
                f"{size:,} bytes in {file}",
                f"at least {external.bytes_min:,} bytes of external data in {name!r}",
            )
        yield ModelFile(str(file), name, size, digest, tuple(sorted(external.spellings)))


def _check_inside(path: Path, file: Path) -> None:
    """Raises `NotAModel` for external data that a link leads out of the model's folder.

    If the graph file is a link itself, its data may lie where that leads to: a snapshot of
    huggingface_hub links every file of a model to one folder of blobs.
    """
    real, graph = Path(os.path.realpath(file)), Path(os.path.realpath(path))
    folders = (Path(os.path.realpath(path.parent)), graph.parent)
    if not any(real.is_relative_to(folder) for folder in folders):
        raise _refuse(
            path,
            f"{file}, a link to {real}",
            "external data inside the model's own folder (copy the file there)",
        )


def digest_of(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a regular file, which is read in pieces. Raises `OSError`."""
    with open_regular(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def _digest(files: tuple[ModelFile, ...]) -> str:
    graph, *external = files
    if not external:
        return graph.digest
    # Without the graph file's name: a model that was renamed is still the same model.
    text = "".join([graph.digest, *(f"\n{file.digest} {file.name}" for file in external)])
    return hashlib.sha256(text.encode()).hexdigest()
