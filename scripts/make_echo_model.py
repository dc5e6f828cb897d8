"""Write benchmarks/models/echo.onnx: one Identity on a float32 tensor of any shape."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def main() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "echo",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    Path("benchmarks/models/echo.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
