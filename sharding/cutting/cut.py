"""Writes shards: an ordinary ONNX file per span of layers, its weights beside it, a manifest.

One of the modules that import `onnx`. Weights in external files are copied range by range, so never
more than the graph and a piece of one weight is in memory. (A graph file with embedded weights is
parsed by onnx, which for a moment takes twice its size.) onnx's own `Extractor` does not see what
the bodies of an If or Loop capture, and copies weights in memory, so the nodes of a shard are
collected here. This module must not decide where to cut (`sharding.cutting.layers` does) and must
not run anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import TensorProto, helper

from recovery.errors import BadInput, NotAModel
from sharding.cutting.graph import Graph, Node, graph_of, load_proto
from sharding.cutting.layers import LayerMap, map_layers
from sharding.cutting.liveness import ShapeOf
from sharding.cutting.manifest import MANIFEST_NAME, Cache, Manifest, Shard, ShardFile
from sharding.models.signature import ModelSpec, TensorSpec, external_name, read_signature

INLINE_BYTES_MAX = 1024  # a smaller weight stays in the graph, where shape inference sees it

_ALIGNMENT = 4096  # of each weight in the data file, so that the runtime can map it
_PIECE_BYTES = 4 << 20  # copied at a time
_CACHE_SHAPE = "Shape"  # the only operator that may read another layer's cache


def cut(path: str | Path, spans: Sequence[tuple[int, int]], out_dir: str | Path) -> Manifest:
    """Cuts the ONNX model at `path` and returns the manifest that it wrote.

    `spans` are ranges of layers `[start, end)`, one per shard, that follow one another from 0
    to the number of layers (`find_boundaries` says how many there are). Shard `i` becomes
    `shard-i.onnx` with its weights in `shard-i.onnx.data`; `manifest.json` is written last, so
    a folder with one is complete.

    Run in order, each shard on the previous one's `sends`, they compute what the uncut model
    does: bit for bit if the runtime fuses the same nodes in them (it does in every decoder that
    was tried; `tests/unit/test_cut.py` lists an encoder where it does not), else within rounding.

    Raises `NotAModel` for a model that cannot be cut there, saying where, and `BadInput` for
    spans that leave out a layer or repeat one, and for a folder that cannot be written, or in
    which the model itself would be overwritten.
    """
    path, folder = Path(path).absolute(), Path(out_dir).absolute()
    spec = read_signature(path, name=path.stem)  # checks the external data and hashes all files
    model = load_proto(path)
    graph = graph_of(path, model)
    layers = map_layers(graph)
    spans = _checked_spans(spans, len(layers))
    _check_folder(spec, folder, len(spans))
    source = _Source(path, model, graph, layers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        manifest = Manifest(
            name=spec.name,
            source=spec.digest,
            kind=layers.kind,
            layers=len(layers),
            inputs=layers.inputs,
            shards=tuple(
                _write_shard(source, span, folder, f"shard-{index}.onnx")
                for index, span in enumerate(spans)
            ),
            order=tuple(output.name for output in layers.outputs),
        )
        partial = folder / f".{MANIFEST_NAME}.partial"
        partial.write_text(manifest.to_json(), encoding="utf-8")
        os.replace(partial, folder / MANIFEST_NAME)
    except OSError as error:
        raise BadInput(
            f"The shards of {path} could not be written to {folder}: {error}. "
            "Name a folder with room for them.",
            expected="a folder that can be written",
            got=str(error),
        ) from error
    return manifest


def _checked_spans(spans: Sequence[tuple[int, int]], layers: int) -> tuple[tuple[int, int], ...]:
    checked = tuple((int(start), int(end)) for start, end in spans)
    ends = [0, *(end for _, end in checked)]
    starts = [*(start for start, _ in checked), layers]
    if ends != starts or any(start >= end for start, end in checked):
        raise BadInput(
            f"The spans {list(checked)} must follow one another from layer 0 to {layers}, each "
            "with at least one layer.",
            expected=f"spans of layers 0 to {layers}",
            got=list(checked),
        )
    return checked


def _check_folder(spec: ModelSpec, folder: Path, shards: int) -> None:
    targets = {folder / f"shard-{index}.onnx{end}" for index in range(shards) for end in _ENDINGS}
    for file in spec.files:
        if Path(file.path).resolve() in {target.resolve() for target in targets}:
            raise BadInput(
                f"The shards would overwrite the model's own file {file.path}. "
                "Name another folder.",
                expected="another folder",
                got=str(folder),
            )


_ENDINGS = ("", ".data")


@dataclass(frozen=True)
class _Source:
    path: Path
    model: onnx.ModelProto
    graph: Graph
    layers: LayerMap


@dataclass(frozen=True)
class _Part:
    """What one shard consists of. `rename` maps inputs of its nodes to what they read here."""

    nodes: tuple[Node, ...]
    shapes: tuple[ShapeOf, ...]  # computed from ids, in front of the nodes
    inputs: frozenset[str]
    constants: frozenset[str]
    rename: dict[str, str]


def _write_shard(source: _Source, span: tuple[int, int], folder: Path, name: str) -> Shard:
    start, end = span
    layers = source.layers
    receives = layers.cuts[start - 1].tensors if start > 0 else ()
    sends = layers.cuts[end - 1].tensors if end < len(layers) else ()
    caches = tuple(cache for layer in layers.layers[start:end] for cache in layer.caches)
    outputs = tuple(spec for spec in layers.outputs if start <= _owner(source, spec.name) < end)
    made = (*sends, *outputs, *(cache.present for cache in caches))
    part = _collect(source, span, {spec.name for spec in receives}, [spec.name for spec in made])
    shared = tuple(spec for spec in layers.inputs if spec.name in part.inputs)
    proto = helper.make_model(
        helper.make_graph(
            [],
            f"{source.model.graph.name or source.path.stem}, layers {start} to {end}",
            [
                *(_value(source, spec) for spec in receives),
                *(
                    value
                    for value in source.model.graph.input
                    if value.name in {s.name for s in shared}
                    or value.name in {cache.past.name for cache in caches}
                ),
            ],
            _outputs(source, sends, {spec.name for spec in made}),
        ),
        opset_imports=source.model.opset_import,
        ir_version=source.model.ir_version,
        functions=source.model.functions,
        producer_name="tabpool",
    )
    _add_nodes(source, part, proto.graph)
    data = folder / f"{name}.data"
    with data.open("wb") as stream:
        writer = _Writer(stream)
        for tensor in source.model.graph.initializer:
            if tensor.name in part.constants:
                _add_weight(source, proto.graph, tensor, writer, data.name)
    files = [_write_graph(folder / name, proto)]
    if writer.bytes:
        files.append(ShardFile(data.name, writer.bytes, writer.digest))
    else:
        data.unlink()
    return Shard(span, tuple(files), receives, sends, shared, outputs, caches)


def _owner(source: _Source, output: str) -> int:
    """The layer whose shard has this output; the first one, if it is not live."""
    node = source.graph.producer.get(output)
    return source.layers.owner.get(node.index, 0) if node is not None else 0


def _collect(
    source: _Source, span: tuple[int, int], stops: set[str], wanted: Iterable[str]
) -> _Part:
    """Everything that `wanted` needs, back to `stops`, inputs and weights."""
    graph, layers = source.graph, source.layers
    # A shard that has the embedding takes its shape from it, as the uncut model does.
    shape_of = {shape.output: shape for shape in layers.shapes} if span[0] > 0 else {}
    others = _other_caches(layers, span)
    nodes: dict[int, Node] = {}
    shapes: dict[str, ShapeOf] = {}
    leaves: set[str] = set()
    rename: dict[str, str] = {}
    seen = set(stops)
    stack = list(wanted)
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        node = graph.producer.get(name)
        if node is None:
            leaves.add(name)
        elif name in shape_of:
            shapes[name] = shape_of[name]
            stack += [ids for ids, _ in shape_of[name].tables]
        elif node.index not in nodes:
            owner = layers.owner.get(node.index)
            if owner is not None and not span[0] <= owner < span[1]:
                raise graph.refuse(
                    f"{node}, which belongs to layer {owner} and is needed there too",
                    f"layers {span[0]} to {span[1]} to need nothing of others but "
                    f"{', '.join(sorted(stops)) or 'inputs'}",
                    "Choose other spans, or run the uncut model in one browser.",
                )
            nodes[node.index] = node
            for used in node.uses:
                if used in others:
                    rename[used] = _own_cache(source, span, node, others[used])
                stack.append(rename.get(used, used))
    return _Part(
        tuple(node for node in graph.nodes if node.index in nodes),
        tuple(shapes.values()),
        frozenset(leaves & set(graph.inputs)),
        frozenset(leaves & set(graph.constants)),
        rename,
    )


def _other_caches(layers: LayerMap, span: tuple[int, int]) -> dict[str, Cache]:
    return {
        cache.past.name: cache
        for layer in layers.layers
        for cache in layer.caches
        if not span[0] <= layer.index < span[1]
    }


def _own_cache(source: _Source, span: tuple[int, int], node: Node, cache: Cache) -> str:
    """What a shard reads instead of a cache that it does not have.

    Exporters take the past length from the shape of the first layer's cache. All caches of one
    sequence that are no rings are of the same length, so that of the shard's own first such
    layer will do.
    """
    place = source.layers.layers[cache.layer].caches.index(cache)
    for layer in source.layers.layers[span[0] : span[1]] if node.op == _CACHE_SHAPE else ():
        for own in layer.caches[place : place + 1]:
            if own.window == cache.window and _same_dims(cache.past, own.past):
                return own.past.name
    raise source.graph.refuse(
        f"{node}, which reads {cache.past.name!r} and is needed by layers {span[0]} to {span[1]}",
        "layers that look at other layers' caches only for a shape that is their own cache's too",
        f"Choose spans that keep layer {cache.layer} with them.",
    )


def _same_dims(one: TensorSpec, other: TensorSpec) -> bool:
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    # Symbols may be named by layer; numbers must agree.
    pairs = zip(one.shape, other.shape, strict=True)
    return all(a == b if isinstance(a, int) or isinstance(b, int) else True for a, b in pairs)


# -- protos ----------------------------------------------------------------------------------------


def _value(source: _Source, spec: TensorSpec) -> onnx.ValueInfoProto:
    """With the shape inferred from the graph alone, although the manifest may have more: known
    shapes decide what the runtime fuses, and it must fuse as it does in the uncut model."""
    inferred = source.graph.specs.get(spec.name)
    shape = inferred.shape if inferred is not None else None
    element = next(
        number
        for number in TensorProto.DataType.values()
        if number and _is_dtype(number, spec.dtype)
    )
    return helper.make_tensor_value_info(spec.name, element, shape)


def _is_dtype(element: int, dtype: str) -> bool:
    try:
        return helper.tensor_dtype_to_np_dtype(element).name == dtype
    except KeyError:
        return False


def _outputs(
    source: _Source, sends: Sequence[TensorSpec], made: set[str]
) -> list[onnx.ValueInfoProto]:
    originals = {value.name for value in source.model.graph.output}
    return [
        *(_value(source, spec) for spec in sends if spec.name not in originals),
        *(value for value in source.model.graph.output if value.name in made),
    ]


def _add_nodes(source: _Source, part: _Part, graph: onnx.GraphProto) -> None:
    protos = source.model.graph.node
    late = {shape.output: shape for shape in part.shapes}
    made: set[str] = set()
    given = part.inputs | part.constants

    def add_shapes() -> None:
        for output, shape in list(late.items()):
            if all(ids in given or ids in made for ids, _ in shape.tables):
                graph.node.extend(_shape_nodes(late.pop(output)))

    add_shapes()
    for node in part.nodes:
        copy = graph.node.add()
        copy.CopyFrom(protos[node.index])
        for place, name in enumerate(copy.input):
            copy.input[place] = part.rename.get(name, name)
        for tensor in _attribute_tensors([copy]):
            if tensor.data_location == TensorProto.EXTERNAL:
                _embed(source, tensor)
        made.update(node.outputs)
        add_shapes()
    outer = {value.name for value in (*graph.input, *graph.output)}
    graph.value_info.extend(
        value
        for value in source.model.graph.value_info
        if value.name in made and value.name not in outer
    )


def _shape_nodes(shape: ShapeOf) -> Iterator[onnx.NodeProto]:
    several = len(shape.tables) > 1
    for number, (ids, width) in enumerate(shape.tables):
        name = f"{shape.output}/of_ids_{number}"
        whole = f"{name}/whole" if several else shape.output
        yield helper.make_node("Shape", [ids], [name], f"{name}/Shape")
        yield helper.make_node(
            "Constant", [], [f"{name}/width"], f"{name}/Constant", value_ints=[width]
        )
        yield helper.make_node("Concat", [name, f"{name}/width"], [whole], f"{name}/Concat", axis=0)
    if several:
        wholes = [f"{shape.output}/of_ids_{i}/whole" for i in range(len(shape.tables))]
        yield helper.make_node("Max", wholes, [shape.output], f"{shape.output}/Max")


def _attribute_tensors(nodes: Any) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from body.initializer
                yield from _attribute_tensors(body.node)


# -- weights ---------------------------------------------------------------------------------------


class _Writer:
    """Writes a data file, and keeps its digest, size and alignment."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.bytes = 0

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def begin(self) -> int:
        """The offset of the next weight."""
        self.write(bytes(-self.bytes % _ALIGNMENT))
        return self.bytes

    def write(self, piece: bytes) -> None:
        self._stream.write(piece)
        self._hash.update(piece)
        self.bytes += len(piece)


def _add_weight(
    source: _Source, graph: onnx.GraphProto, tensor: TensorProto, writer: _Writer, location: str
) -> None:
    external = tensor.data_location == TensorProto.EXTERNAL
    if not external and len(tensor.raw_data) <= INLINE_BYTES_MAX:
        graph.initializer.append(tensor)
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = (
        int(entries.get("length") or source.graph.constants[tensor.name].bytes)
        if external
        else len(tensor.raw_data)
    )
    light = graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    if external and length <= INLINE_BYTES_MAX:
        light.raw_data = b"".join(_pieces(source, entries, length))
        return
    offset = writer.begin()
    if external:
        for piece in _pieces(source, entries, length):
            writer.write(piece)
    else:
        writer.write(tensor.raw_data)
    light.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        light.external_data.add(key=key, value=str(value))


def _embed(source: _Source, tensor: TensorProto) -> None:
    """Takes a constant's data into the graph (onnx's own helper refuses files that are links)."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = int(entries.get("length") or 0)
    if not length:  # to the end of the file
        size = _external_file(source, entries).stat().st_size
        length = size - int(entries.get("offset") or 0)
    tensor.raw_data = b"".join(_pieces(source, entries, length))
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT


def _pieces(source: _Source, entries: dict[str, str], length: int) -> Iterator[bytes]:
    file = _external_file(source, entries)
    with file.open("rb") as stream:
        stream.seek(int(entries.get("offset") or 0))
        while length > 0:
            piece = stream.read(min(length, _PIECE_BYTES))
            if not piece:
                raise NotAModel(
                    f"{file}: expected {length:,} more bytes, got the end of the file. "
                    "Export the model again.",
                    path=str(file),
                    expected=f"{length:,} more bytes",
                    got="the end of the file",
                )
            yield piece
            length -= len(piece)


def _external_file(source: _Source, entries: dict[str, str]) -> Path:
    return source.path.parent / external_name(entries["location"])


def _write_graph(path: Path, model: onnx.ModelProto) -> ShardFile:
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return ShardFile(path.name, len(data), hashlib.sha256(data).hexdigest())
