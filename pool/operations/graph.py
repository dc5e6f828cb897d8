"""Operations around one run of a model's graph: inputs become arrays, outputs become the answer.

`inference` is the plainest of them. This module must not know where the graph is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from pool.execution.placed import PlacedModel
from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from pool.operations.base import Operation
from pool.results import Result
from recovery.errors import BadInput
from sharding.models.frames import Array
from sharding.models.inputs import check_inputs

Prepare: TypeAlias = Callable[[ModelEntry, Mapping[str, Any], TextEncoder | None], dict[str, Array]]
Finish: TypeAlias = Callable[[ModelEntry, Mapping[str, Array], Mapping[str, Array]], dict[str, Any]]

_TEXT = "text"


def prepare_inference(
    entry: ModelEntry, inputs: Mapping[str, Any], tokenizer: TextEncoder | None
) -> dict[str, Array]:
    """The graph's inputs, from arrays by name or from `{"text": str | list[str]}`.

    Text becomes the token inputs that the graph has, of shape (batch, tokens); other inputs of
    the graph can be given beside it. Raises `BadInput` as `check_inputs` and
    `TextEncoder.encode` do, and for text where the model has no tokenizer or no token inputs.
    """
    names = [tensor.name for tensor in entry.spec.inputs]
    if not isinstance(inputs, Mapping):
        raise BadInput(
            f"Inputs must be named, not {type(inputs).__name__}: expected a mapping with "
            f"{', '.join(names)}.",
            expected=names,
            got=type(inputs).__name__,
        )
    if _TEXT not in inputs or _TEXT in names:
        return check_inputs(entry.spec, inputs)
    if tokenizer is None:
        raise BadInput(
            f"Model {entry.name!r} has no tokenizer.json beside it, so it takes no text: "
            f"expected arrays {', '.join(names)}.",
            expected=names,
            got=[str(name) for name in inputs],
        )
    tokens = tokenizer.encode(inputs[_TEXT], entry.spec.inputs)
    if not tokens:
        raise BadInput(
            f"Model {entry.name!r} has no token inputs, so it takes no text: expected arrays "
            f"{', '.join(names)}.",
            expected=names,
            got=[str(name) for name in inputs],
        )
    others = {name: value for name, value in inputs.items() if name != _TEXT}
    if both := sorted(others.keys() & tokens.keys()):
        raise BadInput(
            f"Model {entry.name!r} was given text and also {', '.join(both)}: expected one of "
            "them.",
            expected="text, or token arrays",
            got=[str(name) for name in inputs],
        )
    return check_inputs(entry.spec, {**others, **tokens})


def outputs_unchanged(
    _entry: ModelEntry, _prepared: Mapping[str, Array], outputs: Mapping[str, Array]
) -> dict[str, Array]:
    """The graph's outputs as they are."""
    return dict(outputs)


class GraphOperation(Operation):
    """Two pure functions around one run of the graph, whole or cut.

    `prepare(entry, inputs, tokenizer)` returns the graph's inputs as `check_inputs` does and
    raises `BadInput`; `finish(entry, prepared, outputs)` returns the answer's arrays.
    """

    def __init__(
        self,
        name: str,
        prepare: Prepare = prepare_inference,
        finish: Finish = outputs_unchanged,
    ) -> None:
        self.name = name
        self._prepare = prepare
        self.finish = finish

    def prepare(
        self, entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
    ) -> dict[str, Array]:
        _check_form(self.name, entry)
        return self._prepare(entry, inputs, encoder)

    async def run(self, model: PlacedModel, prepared: dict[str, Array]) -> Result:
        model.check(prepared)
        result = await model.answer(model.outputs(prepared))
        if not result.success:
            return result
        return replace(result, values=self.finish(model.entry, prepared, result.values))


INFERENCE = GraphOperation("inference")


def _check_form(op: str, entry: ModelEntry) -> None:
    """Raises `BadInput` for a model that is no one graph, or whose graph needs caches."""
    if entry.components:
        raise BadInput(
            f"{entry.name} is {len(entry.parts)} models that work together, so it takes only "
            f"'read': for {op!r} ask one of {', '.join(entry.parts)}.",
            expected="read",
            got=op,
        )
    if entry.in_parts and entry.pipeline is not None and entry.pipeline.decoder:
        raise BadInput(
            f"{entry.name} is cut into {len(entry.parts)} shards with caches, so it takes only "
            "'generate': load it whole for other operations.",
            expected="generate",
            got=op,
        )
