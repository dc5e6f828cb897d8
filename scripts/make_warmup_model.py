"""Write actors/page/warmup.onnx: the operators that most models spend their time in, once each.

Browsers cache compiled wasm of functions that were used enough. A profile template is warmed by
running this model for a while, so that what later launches find in their cache are the kernels
(float32, int8 and 4-bit matrix products, convolutions, attention, normalisation, LSTM) and the
session-building code that real models use. The file it writes is committed; run this again only
to change it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

H, HEADS, FF, CHANNELS = 64, 4, 128, 8
MICROSOFT = "com.microsoft"


class Graph:
    """Collects nodes and weights."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.count = 0

    def weight(self, *shape: int, dtype: type = np.float32, scale: float = 0.1) -> str:
        self.count += 1
        name = f"w{self.count}"
        values = self.rng.standard_normal(shape) * scale
        if dtype is np.int8:
            values = self.rng.integers(-90, 90, shape)
        elif dtype is np.uint8:
            values = self.rng.integers(0, 255, shape)
        self.weights.append(numpy_helper.from_array(values.astype(dtype), name))
        return name

    def const(self, value: object, dtype: type = np.int64) -> str:
        self.count += 1
        name = f"c{self.count}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: object):
        self.count += 1
        names = [f"t{self.count}_{i}" for i in range(outputs)]
        node = helper.make_node(kind, list(inputs), names, domain=domain, **attrs)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names


def layer_norm(g: Graph, x: str) -> str:
    centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[-1]))
    variance = g.op("ReduceMean", g.op("Pow", centred, g.const(2.0, np.float32)), axes=[-1])
    root = g.op("Sqrt", g.op("Add", variance, g.const(1e-6, np.float32)))
    scaled = g.op("Mul", g.op("Div", centred, root), g.weight(H, scale=1.0))
    return g.op("Add", scaled, g.weight(H))


def dense(g: Graph, x: str, width: int, out: int, how: str) -> str:
    if how == "int8":
        q, scale, zero = g.op("DynamicQuantizeLinear", x, outputs=3)
        product = g.op(
            "MatMulInteger", q, g.weight(width, out, dtype=np.int8), zero, g.const(0, np.int8)
        )
        product = g.op("Mul", g.op("Cast", product, to=TensorProto.FLOAT), scale)
        product = g.op("Mul", product, g.const(0.01, np.float32))
    elif how == "int4":
        blocks = width // 32
        product = g.op(
            "MatMulNBits",
            x,
            g.weight(out, blocks, 16, dtype=np.uint8),
            g.weight(out * blocks, scale=0.01),
            domain=MICROSOFT,
            K=width,
            N=out,
            bits=4,
            block_size=32,
        )
    else:
        product = g.op("MatMul", x, g.weight(width, out))
    return g.op("Add", product, g.weight(out))


def transformer_layer(g: Graph, x: str, how: str) -> str:
    normal = layer_norm(g, x)
    heads = []
    for _ in range(3):
        projected = dense(g, normal, H, H, how)
        split = g.op("Reshape", projected, g.const([0, 0, HEADS, H // HEADS]))
        heads.append(g.op("Transpose", split, perm=[0, 2, 1, 3]))
    scores = g.op("MatMul", heads[0], g.op("Transpose", heads[1], perm=[0, 1, 3, 2]))
    scores = g.op("Softmax", g.op("Mul", scores, g.const(0.25, np.float32)), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", scores, heads[2]), perm=[0, 2, 1, 3])
    x = g.op("Add", x, dense(g, g.op("Reshape", mixed, g.const([0, 0, H])), H, H, how))
    hidden = dense(g, layer_norm(g, x), H, FF, how)
    half = g.op("Mul", hidden, g.const(0.70710678, np.float32))
    gelu = g.op("Mul", hidden, g.op("Add", g.op("Erf", half), g.const(1.0, np.float32)))
    gated = g.op("Mul", gelu, g.op("Sigmoid", hidden))
    return g.op("Add", x, dense(g, gated, FF, H, how))


def convolutions(g: Graph, x: str) -> str:
    image = g.op("Unsqueeze", x, g.const([1]))  # (batch, 1, tokens, H)
    y = g.op("Conv", image, g.weight(CHANNELS, 1, 3, 3), g.weight(CHANNELS), pads=[1] * 4)
    y = g.op("HardSigmoid", g.op("Relu", y))
    y = g.op(
        "Conv", y, g.weight(CHANNELS, 1, 3, 3), g.weight(CHANNELS), pads=[1] * 4, group=CHANNELS
    )
    y = g.op("Conv", g.op("Tanh", y), g.weight(CHANNELS, CHANNELS, 1, 1), g.weight(CHANNELS))
    y = g.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = g.op("ConvTranspose", y, g.weight(CHANNELS, 1, 2, 2), g.weight(1), strides=[2, 2])
    return g.op("Add", x, g.op("Squeeze", y, g.const([1])))


def main(path: str) -> None:
    g = Graph()
    x = g.op("Gather", g.weight(256, H), "ids")
    for how in ("float32", "int8", "int4"):
        x = transformer_layer(g, x, how)
    x = convolutions(g, x)
    steps = g.op("Transpose", x, perm=[1, 0, 2])
    lstm, _, _ = g.op(
        "LSTM", steps, g.weight(1, 4 * 16, H), g.weight(1, 4 * 16, 16), outputs=3, hidden_size=16
    )
    tail = g.op("Transpose", g.op("Squeeze", lstm, g.const([1])), perm=[1, 0, 2])
    joined = g.op("Concat", x, tail, axis=-1)
    g.nodes.append(helper.make_node("Identity", [joined], ["y"]))
    graph = helper.make_graph(
        g.nodes,
        "warmup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", H + 16])],
        g.weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    Path(path).write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "actors/page/warmup.onnx")
