"""A model as a graph of plain nodes and their connections, without the weights.

One of the modules that import `onnx`. It reads the graph file once and turns it into plain data, so
that the search for layer boundaries needs no onnx. This module must not open external data files,
must not interpret what a node is for, and must not change the model.
"""

from __future__ import annotations

import contextlib
import graphlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # what onnx raises

from recovery.bounded_files import read_bounded
from recovery.errors import NotAModel
from sharding.models.signature import GRAPH_BYTES_MAX, TensorSpec

DIMENSIONS_MAX = 64  # of a tensor; numpy has no more either


@dataclass(frozen=True)
class Node:
    """One operation. `index` is its place in the file; a missing optional input is "".

    `captured` are the tensors of this graph that the bodies of an If, Loop or Scan use.
    `ints` are its integer attributes, by name.
    """

    index: int
    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: tuple[str, ...]
    ints: Mapping[str, int]

    @property
    def uses(self) -> tuple[str, ...]:
        """Every tensor that it needs, each once."""
        return tuple(dict.fromkeys(name for name in (*self.inputs, *self.captured) if name))

    def __str__(self) -> str:
        return f"{self.name or self.outputs[0]} ({self.op})"


@dataclass(frozen=True)
class Constant:
    """A weight stored in the graph file or in an external file: its shape, numpy dtype and size."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Graph:
    """A model's nodes, sorted topologically.

    `specs` holds what is known of tensors between the nodes, after shape inference; tensors
    that are not in it, and dimensions that are None, are unknown.
    """

    path: Path
    nodes: tuple[Node, ...]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    constants: Mapping[str, Constant]
    specs: Mapping[str, TensorSpec]
    producer: Mapping[str, Node]
    consumers: Mapping[str, tuple[Node, ...]]

    def refuse(self, got: str, expected: str, remedy: str) -> NotAModel:
        """The error to raise if this graph can't be used."""
        return NotAModel(
            f"{self.path}: expected {expected}, got {got}. {remedy}",
            path=str(self.path),
            expected=expected,
            got=got,
        )


def load_proto(path: Path) -> onnx.ModelProto:
    """The model of the file at `path`; weights in external files stay there.

    Raises `NotAModel` if there is no such file, or no ONNX in it, or nothing to compute.
    """
    try:
        data = read_bounded(path, GRAPH_BYTES_MAX, what="an ONNX model", error=NotAModel)
        model = onnx.load_model_from_string(data, format="protobuf")
    except (DecodeError, UnicodeDecodeError) as error:
        raise _not_a_model(path, "a file that is no ONNX") from error
    if not model.graph.node or not model.graph.output:
        raise _not_a_model(path, "a file without any nodes or outputs")
    if model.graph.sparse_initializer:
        raise NotAModel(
            f"{path}: expected dense weights, got sparse initializers. "
            "Convert them to dense ones before cutting.",
            path=str(path),
            expected="dense weights",
            got="sparse initializers",
        )
    return model


def without_weights(model: onnx.ModelProto, inline_bytes_max: int) -> onnx.ModelProto:
    """A copy of `model` whose initializers of more than `inline_bytes_max` bytes have no data.

    They are marked as external, with no location. That is what makes the copy cheap.
    """
    light = onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        producer_name=model.producer_name,
        functions=model.functions,
    )
    graph = model.graph
    light.graph.name = graph.name
    for field in ("node", "input", "output", "value_info", "quantization_annotation"):
        getattr(light.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or (
            len(tensor.raw_data) <= inline_bytes_max
        ):
            light.graph.initializer.append(tensor)
            continue
        light.graph.initializer.add(
            name=tensor.name,
            dims=tensor.dims,
            data_type=tensor.data_type,
            data_location=onnx.TensorProto.EXTERNAL,
        )
    return light


def read_graph(path: str | Path) -> Graph:
    """The graph of the ONNX model at `path`.

    Raises `NotAModel`: no such file, no ONNX, sparse weights, a cycle, a tensor that no node
    produces, or one that two nodes produce.
    """
    path = Path(path).absolute()
    return graph_of(path, load_proto(path))


def graph_of(path: Path, model: onnx.ModelProto) -> Graph:
    """The same for a model that is already loaded. `path` is for errors only."""
    # A product over dimensions without number would take for ever.
    if any(len(tensor.dims) > DIMENSIONS_MAX for tensor in model.graph.initializer):
        raise _not_a_model(path, f"a weight of more than {DIMENSIONS_MAX} dimensions")
    light = without_weights(model, inline_bytes_max=1024)
    # It leaves out what it can't infer (unknown operators); if it fails, only the shapes that the
    # exporter wrote are used.
    with contextlib.suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        light = onnx.shape_inference.infer_shapes(light, data_prop=True)
    graph = light.graph
    constants = {tensor.name: _constant(tensor) for tensor in graph.initializer}
    specs = {value.name: _spec(value) for value in graph.value_info}
    # A value that the exporter declared takes precedence over an inferred one.
    specs |= {value.name: _spec(value) for value in model.graph.value_info}
    inputs = {value.name: _spec(value) for value in graph.input if value.name not in constants}
    outputs = {value.name: _spec(value) for value in graph.output}
    nodes = _sorted(path, [_node(index, node) for index, node in enumerate(graph.node)])
    producer: dict[str, Node] = {}
    consumers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.uses:
            consumers.setdefault(name, []).append(node)
        for name in filter(None, node.outputs):
            if name in producer or name in inputs or name in constants:
                raise _not_a_model(path, f"a graph in which two nodes produce {name!r}")
            producer[name] = node
    for name in (*consumers, *outputs):
        if name not in producer and name not in inputs and name not in constants:
            raise _not_a_model(path, f"a graph in which no node produces {name!r}")
    return Graph(
        path,
        nodes,
        inputs,
        outputs,
        constants,
        specs | inputs | outputs,
        producer,
        {name: tuple(nodes) for name, nodes in consumers.items()},
    )


def _not_a_model(path: Path, got: str) -> NotAModel:
    expected = "a complete ONNX model"
    return NotAModel(
        f"{path}: expected {expected}, got {got}.", path=str(path), expected=expected, got=got
    )


def captured_names(node: onnx.NodeProto) -> Iterable[str]:
    """The names that the bodies of `node` use but do not define."""
    for attribute in node.attribute:
        for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            made = {tensor.name for tensor in body.initializer} | {v.name for v in body.input}
            used = [value.name for value in body.output]
            for inner in body.node:
                used += [*inner.input, *captured_names(inner)]
                made |= set(inner.output)
            yield from (name for name in used if name and name not in made)


def _node(index: int, node: onnx.NodeProto) -> Node:
    return Node(
        index,
        node.name,
        node.op_type,
        tuple(node.input),
        tuple(node.output),
        tuple(dict.fromkeys(captured_names(node))),
        {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT},
    )


def _sorted(path: Path, nodes: list[Node]) -> tuple[Node, ...]:
    """Sorted topologically: the runtime accepts any order, although the standard does not."""
    maker = {name: node.index for node in nodes for name in node.outputs if name}
    needs = {node.index: {maker[name] for name in node.uses if name in maker} for node in nodes}
    if all(max(before, default=-1) < index for index, before in needs.items()):
        return tuple(nodes)
    try:
        return tuple(nodes[index] for index in graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        names = ", ".join(str(nodes[index]) for index in error.args[1])
        raise _not_a_model(path, f"a graph with a cycle: {names}") from error


def _constant(tensor: onnx.TensorProto) -> Constant:
    shape = tuple(tensor.dims)
    bits = 8 * _dtype_bytes(tensor.data_type)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        bits = 4
    return Constant(shape, _dtype_name(tensor.data_type), math.ceil(math.prod(shape) * bits / 8))


def _dtype_bytes(element: int) -> int:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element)).itemsize
    except KeyError:
        return 1


def _dtype_name(element: int) -> str:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element)).name
    except KeyError:
        return ""


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(_dim(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return TensorSpec(value.name, _dtype_name(tensor.elem_type), shape)


def _dim(dim: Any) -> int | str | None:
    if dim.dim_param:
        # A name invented by inference carries no information, and clashes with others.
        return None if dim.dim_param.startswith("unk__") else str(dim.dim_param)
    return int(dim.dim_value) if dim.dim_value > 0 else None
