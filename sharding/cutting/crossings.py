"""The tensors that cross a cut: those that are live there, with their types and shapes.

This module must not choose the place (`sharding.cutting.places` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharding.cutting.derived import FLOATS
from sharding.cutting.graph import Graph, Node
from sharding.cutting.liveness import Live
from sharding.models.frames import SUPPORTED_DTYPES
from sharding.models.signature import TensorSpec


@dataclass(frozen=True)
class Cut:
    """A place to cut: before node `before`, where `tensors` are all that is live.

    Everything that `before` and what follows it needs besides these can be recomputed.
    """

    before: str
    tensors: tuple[TensorSpec, ...]


def check_cut(graph: Graph, live: Live, owner: Mapping[int, int], cut: Cut, layer: int) -> None:
    """Raise `NotAModel` if other live tensors cross into `layer` or those after it."""
    maker = {name: owner[node.index] for node in live.nodes for name in node.outputs}
    allowed = {spec.name for spec in cut.tensors}
    for node in live.nodes:
        if owner[node.index] < layer:
            continue
        passing = [
            name for name in live.inputs(node) if maker.get(name, 0) < layer and name not in allowed
        ]
        if passing:
            raise graph.refuse(
                f"{', '.join(passing)} used by {node} too",
                f"only {', '.join(allowed)} to pass from layer {layer - 1} to {layer}",
                "It can be run whole in one browser.",
            )


def cut_tensors(
    graph: Graph, live: Live, joint: Node, names: Sequence[str]
) -> tuple[TensorSpec, ...]:
    """The specs of `names`, which meet at `joint`.

    Unknown dtypes and dimensions are taken from the embedding: the residual sum has the same ones
    everywhere.
    """
    models = [graph.specs[n] for n in (*names, *joint.outputs) if n in graph.specs]
    for node in live.embeddings:
        models += [graph.specs[n] for n in node.outputs if n in graph.specs]
    models += [graph.inputs[n] for n in live.seeds if n in graph.inputs]
    dtypes = [spec.dtype for spec in models if spec.dtype in FLOATS]
    found = []
    for name in names:
        spec = graph.specs.get(name) or TensorSpec(name, "", None)
        dtype = spec.dtype or next(iter(dtypes), "")
        if dtype not in SUPPORTED_DTYPES:
            raise graph.refuse(
                f"{name!r} of {dtype or 'unknown type'} before {joint}",
                f"one of {', '.join(sorted(SUPPORTED_DTYPES))} to pass between layers",
                "Export it in float16 or float32, with the types of its tensors.",
            )
        shape = spec.shape
        for other in models:
            if shape is None or (other.rank == len(shape) and None in shape):
                shape = _completed(shape, other.shape)
        found.append(TensorSpec(name, dtype, shape))
    return tuple(found)


def _completed(
    shape: tuple[int | str | None, ...] | None, other: tuple[int | str | None, ...] | None
) -> tuple[int | str | None, ...] | None:
    """`shape` with its unknown dimensions from `other`, unless their last ones differ."""
    if shape is None or other is None:
        return shape or other
    if len(shape) != len(other) or (shape[-1] or other[-1]) != other[-1]:
        return shape
    return tuple(mine if mine is not None else its for mine, its in zip(shape, other, strict=True))
