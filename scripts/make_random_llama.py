"""Write a llama of any size with random weights, as onnxruntime-genai's builder would (fp32).

For benchmarks (a model of about 100 million parameters, which nobody should have to ship) and for
tests over many small shapes. The graph has the builder's nodes: packed QKV, GroupQueryAttention
with rotary inside, SkipSimplifiedLayerNormalization. Weights lie in an external file, written
one at a time. The numbers are drawn from a fixed seed.

    .venv/bin/python scripts/make_random_llama.py OUT.onnx --layers 12 --hidden 768
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
_INLINE_BYTES_MAX = 1024
_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64


@dataclass(frozen=True)
class Sizes:
    """107 million parameters by default."""

    layers: int = 12
    hidden: int = 768
    ffn: int = 2048
    heads: int = 12
    kv_heads: int = 4
    vocabulary: int = 32_000
    positions: int = 1024
    tied: bool = False

    @property
    def head(self) -> int:
        return self.hidden // self.heads


class _Graph:
    def __init__(self, data: BinaryIO, location: str, seed: int) -> None:
        self._data = data
        self._location = location
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: object) -> str:
        domain = MICROSOFT if "GroupQuery" in kind or kind.startswith("Skip") else ""
        self.nodes.append(
            helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes)
        )
        return outputs[0]

    def constant(self, name: str, values: np.ndarray) -> str:
        if values.nbytes <= _INLINE_BYTES_MAX:
            self.weights.append(numpy_helper.from_array(values, name))
            return name
        tensor = TensorProto(
            name=name,
            dims=values.shape,
            data_type=_FLOAT,
            data_location=TensorProto.EXTERNAL,
        )
        facts = {"location": self._location, "offset": self._data.tell(), "length": values.nbytes}
        for key, value in facts.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(values.tobytes())
        self.weights.append(tensor)
        return name

    def weight(self, name: str, *shape: int) -> str:
        values = self.rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
        return self.constant(name, values)

    def norm(self, name: str, width: int) -> str:
        values = 1 + 0.1 * self.rng.standard_normal(width, np.float32)
        return self.constant(name, values.astype(np.float32))


def make(path: Path, sizes: Sizes, seed: int = 0) -> None:
    """Write `path` and, beside it, its weights in `path.data`."""
    location = f"{path.name}.data"
    with path.with_name(location).open("wb") as data:
        graph = _Graph(data, location, seed)
        _nodes(graph, sizes)
    cache = ["batch_size", sizes.kv_heads, "past_sequence_length", sizes.head]
    present = ["batch_size", sizes.kv_heads, "total_sequence_length", sizes.head]
    ends = [(f"{n}.{kind}") for n in range(sizes.layers) for kind in ("key", "value")]
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "random llama",
            [
                value("input_ids", _INT64, ["batch_size", "sequence_length"]),
                value("attention_mask", _INT64, ["batch_size", "total_sequence_length"]),
                *(value(f"past_key_values.{end}", _FLOAT, cache) for end in ends),
            ],
            [
                value("logits", _FLOAT, ["batch_size", "sequence_length", sizes.vocabulary]),
                *(value(f"present.{end}", _FLOAT, present) for end in ends),
            ],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", 22), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
        producer_name="tabpool",
    )
    path.write_bytes(model.SerializeToString())


def _nodes(graph: _Graph, sizes: Sizes) -> None:
    mask = "attention_mask"
    one, index = graph.constant("one", np.array([1])), graph.constant("index", np.array(1))
    total = graph.node("ReduceSum", [mask, one], ["mask/sum"], keepdims=0)
    before = graph.node("Sub", [total, one], ["mask/before"])
    lengths = graph.node("Cast", [before], ["mask/lengths"], to=TensorProto.INT32)
    shape = graph.node("Shape", [mask], ["mask/shape"])
    width = graph.node("Gather", [shape, index], ["mask/width"], axis=0)
    longest = graph.node("Cast", [width], ["mask/longest"], to=TensorProto.INT32)
    angles = np.outer(
        np.arange(sizes.positions), 1e4 ** (-np.arange(0, sizes.head, 2) / sizes.head)
    ).astype(np.float32)
    cos, sin = graph.constant("cos", np.cos(angles)), graph.constant("sin", np.sin(angles))
    if sizes.tied:
        head = graph.weight("head", sizes.hidden, sizes.vocabulary)
        table = graph.node("Transpose", [head], ["embed/table"], perm=[1, 0])
    else:
        table = graph.weight("embed", sizes.vocabulary, sizes.hidden)
        head = graph.weight("head", sizes.hidden, sizes.vocabulary)
    stream = graph.node("Gather", [table, "input_ids"], ["embed/out"])
    normed = graph.node(
        "SimplifiedLayerNormalization",
        [stream, graph.norm("first.norm", sizes.hidden)],
        ["first/normed"],
        epsilon=1e-6,
        axis=-1,
        stash_type=1,
    )
    packed = (sizes.heads + 2 * sizes.kv_heads) * sizes.head
    for n in range(sizes.layers):
        at = f"layers.{n}"
        qkv = graph.node(
            "MatMul", [normed, graph.weight(f"{at}.qkv", sizes.hidden, packed)], [f"{at}/qkv"]
        )
        past = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
        attended = graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *past, lengths, longest, cos, sin, "", "", ""],
            [f"{at}/attended", f"present.{n}.key", f"present.{n}.value"],
            num_heads=sizes.heads,
            kv_num_heads=sizes.kv_heads,
            scale=float(sizes.head**-0.5),
            local_window_size=-1,
            softcap=0.0,
            do_rotary=1,
            rotary_interleaved=0,
        )
        out = graph.node(
            "MatMul",
            [attended, graph.weight(f"{at}.o", sizes.heads * sizes.head, sizes.hidden)],
            [f"{at}/o"],
        )
        normed, stream = _add_and_norm(graph, sizes, stream, out, f"{at}.mid")
        gate = graph.node(
            "MatMul", [normed, graph.weight(f"{at}.gate", sizes.hidden, sizes.ffn)], [f"{at}/gate"]
        )
        up = graph.node(
            "MatMul", [normed, graph.weight(f"{at}.up", sizes.hidden, sizes.ffn)], [f"{at}/up"]
        )
        sigmoid = graph.node("Sigmoid", [gate], [f"{at}/sigmoid"])
        silu = graph.node("Mul", [gate, sigmoid], [f"{at}/silu"])
        inner = graph.node("Mul", [silu, up], [f"{at}/inner"])
        down = graph.node(
            "MatMul", [inner, graph.weight(f"{at}.down", sizes.ffn, sizes.hidden)], [f"{at}/down"]
        )
        last = n == sizes.layers - 1
        normed, stream = _add_and_norm(graph, sizes, stream, down, f"{at}.end", last=last)
    graph.node("MatMul", [normed, head], ["logits"])


def _add_and_norm(
    graph: _Graph, sizes: Sizes, stream: str, more: str, name: str, *, last: bool = False
) -> tuple[str, str]:
    outputs = [f"{name}/normed", *([] if last else ["", "", f"{name}/sum"])]
    inputs = [stream, more, graph.norm(f"{name}.norm", sizes.hidden)]
    graph.node("SkipSimplifiedLayerNormalization", inputs, outputs, epsilon=1e-6)
    return outputs[0], outputs[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    defaults = Sizes()
    for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocabulary", "positions"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(defaults, name))
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    out, seed = options.pop("out"), options.pop("seed")
    make(out, Sizes(**options), seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
