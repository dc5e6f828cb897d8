"""Small ONNX models for the tests, written where a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None] | None

_IR_VERSION = 8  # what older runtimes read too


def add_model(path: Path, shape: Shape = ("batch", 3), *, amount: float = 1.0) -> Path:
    """y = x + amount, float32."""
    return save(
        path,
        [helper.make_node("Add", ["x", "amount"], ["y"])],
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(amount).reshape(1), "amount")],
    )


def identity_model(
    path: Path, shape: Shape = ("n",), *, dtype: int = TensorProto.FLOAT, name: str = "x"
) -> Path:
    """y = the input."""
    return save(
        path,
        [helper.make_node("Identity", [name], ["y"])],
        [value(name, dtype, shape)],
        [value("y", dtype, shape)],
    )


def pair_model(path: Path) -> Path:
    """y = a + b for float32 a (batch, length) and b (batch, length), both symbolic."""
    shape = ("batch", "length")
    return save(
        path,
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [value("a", TensorProto.FLOAT, shape), value("b", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, shape)],
    )


def external_model(path: Path, *, locations: tuple[str, str] = ("w.data", "b.data")) -> Path:
    """y = x * w + b for float32 x (4,), with w = 2 and b = 1 in a file each."""
    weights = []
    for name, location, number in zip(("w", "b"), locations, (2.0, 1.0), strict=True):
        array = np.full(4, number, np.float32)
        tensor = TensorProto(name=name, dims=[4], data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", location), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=text)
        target = path.parent / location
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(array.tobytes())
        weights.append(tensor)
    return save(
        path,
        [
            helper.make_node("Mul", ["x", "w"], ["scaled"]),
            helper.make_node("Add", ["scaled", "b"], ["y"]),
        ],
        [value("x", TensorProto.FLOAT, (4,))],
        [value("y", TensorProto.FLOAT, (4,))],
        weights,
    )


def external_in_subgraph_model(path: Path) -> Path:
    """An If whose branches hold constants; the one of `then` lies in `then.data`."""
    far = TensorProto(name="far", dims=[2], data_type=TensorProto.FLOAT)
    far.data_location = TensorProto.EXTERNAL
    far.external_data.add(key="location", value="then.data")
    (path.parent / "then.data").write_bytes(np.array([1, 2], np.float32).tobytes())
    near = numpy_helper.from_array(np.array([3, 4], np.float32), "near")
    branches = [
        helper.make_graph(
            [helper.make_node("Identity", [tensor.name], [f"{tensor.name}_out"])],
            tensor.name,
            [],
            [value(f"{tensor.name}_out", TensorProto.FLOAT, (2,))],
            [tensor],
        )
        for tensor in (far, near)
    ]
    return save(
        path,
        [helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])],
        [value("flag", TensorProto.BOOL, ())],
        [value("y", TensorProto.FLOAT, (2,))],
    )


def token_model(
    path: Path,
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    dtype: int = TensorProto.INT64,
    shape: Shape = ("batch", "sequence"),
    hidden: int = 4,
) -> Path:
    """last_hidden_state (batch, sequence, hidden) = the token's id in every component.

    Inputs beyond the first are taken and not used.
    """
    dims = [*shape] if shape is not None else ["batch", "sequence"]
    return save(
        path,
        [
            helper.make_node("Cast", [inputs[0]], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["floats", "axis"], ["column"]),
            helper.make_node("Mul", ["column", "ones"], ["last_hidden_state"]),
        ],
        [value(name, dtype, shape) for name in inputs],
        [value("last_hidden_state", TensorProto.FLOAT, (*dims, hidden))],
        [
            numpy_helper.from_array(np.array([2], np.int64), "axis"),
            numpy_helper.from_array(np.ones(hidden, np.float32), "ones"),
        ],
    )


def value(name: str, dtype: int, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[TensorProto] = (),
) -> Path:
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=_IR_VERSION
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path
