"""What a graph computes from weights alone, or from what is given."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from sharding.cutting.derived import (
    constant_tensors,
    folded_weights,
    table_shape,
    value_dependent,
)
from sharding.cutting.graph import Graph, read_graph
from tests import models


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    """A table that is turned before it is looked up in, and the length of what was looked up."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["table"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Shape", ["ids"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["length"], to=TensorProto.FLOAT),
        helper.make_node("Neg", ["rows"], ["y"]),
        helper.make_node("Neg", ["length"], ["z"]),
    ]
    weights = [numpy_helper.from_array(np.ones((2, 5), np.float32), "w")]
    inputs = [models.value("ids", TensorProto.INT64, ("n",))]
    outputs = [models.value(name, TensorProto.FLOAT, None) for name in "yz"]
    return read_graph(models.save(tmp_path / "model.onnx", nodes, inputs, outputs, weights))


def test_what_is_made_of_weights_alone_is_constant(graph):
    assert constant_tensors(graph) == {"w", "table"}
    assert folded_weights(graph) == {"table": {"w"}}


def test_shape_of_a_weight_that_was_turned_is_turned(graph):
    assert table_shape(graph, "w") == (2, 5)
    assert table_shape(graph, "table") == (5, 2)


def test_what_needs_the_shape_of_an_input_only_does_not_depend_on_its_elements(graph):
    assert value_dependent(graph) == {"ids", "rows", "y"}
