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


def matching_model(path: Path, axis: str = "batch") -> Path:
    """CLIP's form: per_image (images, texts) of int64 input_ids (texts, 4) and float32 pixel_values
    (images, 4), where both call their first dimension `axis`."""
    return save(
        path,
        [
            helper.make_node("Cast", ["input_ids"], ["texts"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["texts"], ["columns"]),
            helper.make_node("MatMul", ["pixel_values", "columns"], ["per_image"]),
        ],
        [
            value("input_ids", TensorProto.INT64, (axis, 4)),
            value("pixel_values", TensorProto.FLOAT, (axis, 4)),
        ],
        [value("per_image", TensorProto.FLOAT, (None, None))],
    )


def detector_model(path: Path) -> Path:
    """scores float32 (n,), labels int64 (n,) and boxes float64 (n,), declared in this order, of a
    float32 x (n,). (No two have elements of one size but the last two.)"""
    return save(
        path,
        [
            helper.make_node("Cast", ["x"], ["labels"], to=TensorProto.INT64),
            helper.make_node("Cast", ["x"], ["boxes"], to=TensorProto.DOUBLE),
            helper.make_node("Identity", ["x"], ["scores"]),
        ],
        [value("x", TensorProto.FLOAT, ("n",))],
        [
            value("scores", TensorProto.FLOAT, ("n",)),
            value("labels", TensorProto.INT64, ("n",)),
            value("boxes", TensorProto.DOUBLE, ("n",)),
        ],
    )


def chatty_model(path: Path, outputs: int, name: str = "y{}") -> Path:
    """Each of so many outputs is x, float32 (1,)."""
    names = [name.format(number) for number in range(outputs)]
    return save(
        path,
        [helper.make_node("Identity", ["x"], [each]) for each in names],
        [value("x", TensorProto.FLOAT, (1,))],
        [value(each, TensorProto.FLOAT, (1,)) for each in names],
    )


def sized_model(path: Path, numbers: int = 5) -> Path:
    """total = the sum of as many ones as `size`, int64 (numbers,), asks for."""
    one = numpy_helper.from_array(np.ones(1, np.float32))
    return save(
        path,
        [
            helper.make_node("ConstantOfShape", ["size"], ["ones"], value=one),
            helper.make_node("ReduceSum", ["ones"], ["total"], keepdims=0),
        ],
        [value("size", TensorProto.INT64, (numbers,))],
        [value("total", TensorProto.FLOAT, ())],
    )


def looping_model(path: Path) -> Path:
    """y = x after a billion additions of nothing, float32 (1,)."""
    one = value("step", TensorProto.INT64, ())
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["going"]),
            helper.make_node("Mul", ["before", "one"], ["after"]),
        ],
        "body",
        [one, value("go_on", TensorProto.BOOL, ()), value("before", TensorProto.FLOAT, (1,))],
        [value("going", TensorProto.BOOL, ()), value("after", TensorProto.FLOAT, (1,))],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    return save(
        path,
        [helper.make_node("Loop", ["often", "", "x"], ["y"], body=body)],
        [value("x", TensorProto.FLOAT, (1,))],
        [value("y", TensorProto.FLOAT, (1,))],
        [numpy_helper.from_array(np.array(10**9, np.int64), "often")],
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
