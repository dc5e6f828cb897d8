"""What can be asked of a model: operations by name, each from the caller's inputs to the outputs.

An operation is two pure functions around one run of the graph: `prepare` makes the graph's
inputs, or refuses them before any browser is touched; `finish` makes the answer. This module
must not run a graph, and must not know which host does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from recovery.errors import BadInput, InternalError, UnknownOperation
from sharding.models.frames import Array
from sharding.models.inputs import check_inputs
from sharding.models.signature import TensorSpec

Prepare: TypeAlias = Callable[[ModelEntry, Mapping[str, Any], TextEncoder | None], dict[str, Array]]
Finish: TypeAlias = Callable[
    [ModelEntry, Mapping[str, Array], Mapping[str, Array]], dict[str, Array]
]

_TEXT = "text"
_TOKEN_VECTORS = "last_hidden_state"
_SENTENCE_VECTOR = "sentence_embedding"
# Scores over a vocabulary or over classes: of the right rank, and no embedding.
_NO_VECTORS = frozenset({"logits", "scores", "probabilities"})
_NORM_MIN = 1e-12  # a vector of zeros stays one


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


def prepare_embed(
    entry: ModelEntry, inputs: Mapping[str, Any], tokenizer: TextEncoder | None
) -> dict[str, Array]:
    """As `prepare_inference`; `BadInput` also if no output of the model can be an embedding."""
    _vector_output(entry)
    return prepare_inference(entry, inputs, tokenizer)


def finish_embed(
    entry: ModelEntry, prepared: Mapping[str, Array], outputs: Mapping[str, Array]
) -> dict[str, Array]:
    """`{"embedding": float32 (batch, hidden)}`, each row of length 1.

    Token vectors (batch, tokens, hidden) are averaged over the tokens that `attention_mask` of
    the inputs counts (over all of them without one); vectors (batch, hidden) are taken as they
    are. Raises `BadInput` if the output turns out to have another shape.
    """
    name = _vector_output(entry).name
    if name not in outputs:
        raise InternalError(
            f"Model {entry.name!r} answered without its output {name!r}.",
            expected=name,
            got=list(outputs),
        )
    vectors = outputs[name].astype(np.float32)
    if vectors.ndim == 3:
        mask = prepared.get("attention_mask", np.ones(vectors.shape[:2], np.float32))
        if mask.shape != vectors.shape[:2]:
            raise _no_embedding(entry, f"{name}: {vectors.shape} for a mask of {mask.shape}")
        weights = mask.astype(np.float32)[:, :, np.newaxis]  # (batch, tokens, 1)
        vectors = (vectors * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), _NORM_MIN)
    elif vectors.ndim != 2:
        raise _no_embedding(entry, f"{name}: {vectors.shape}")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return {"embedding": np.asarray(vectors / np.maximum(norms, _NORM_MIN), np.float32)}


def _vector_output(entry: ModelEntry) -> TensorSpec:
    """The output that embeddings are made from.

    The model's own sentence vector if it gives one, else token vectors to be averaged, else
    its only output if that is one vector per row.
    """
    outputs = [
        tensor
        for tensor in entry.spec.outputs
        if tensor.dtype.startswith("float") and tensor.name not in _NO_VECTORS
    ]
    for tensor in outputs:
        if tensor.name == _SENTENCE_VECTOR and tensor.rank in {2, None}:
            return tensor
    for tensor in outputs:
        if tensor.name == _TOKEN_VECTORS and tensor.rank in {3, None}:
            return tensor
    for tensor in outputs:
        if tensor.rank == 3:
            return tensor
    if len(entry.spec.outputs) == 1 and outputs and outputs[0].rank in {2, None}:
        return outputs[0]
    raise _no_embedding(
        entry, ", ".join(f"{tensor.name}: {tensor}" for tensor in entry.spec.outputs)
    )


def _no_embedding(entry: ModelEntry, got: str) -> BadInput:
    expected = "an output (batch, tokens, hidden) or (batch, hidden)"
    return BadInput(
        f"Model {entry.name!r} gives no embedding: expected {expected}, got {got}.",
        expected=expected,
        got=got,
    )


@dataclass(frozen=True)
class OperationSpec:
    """One operation.

    `prepare(entry, inputs, tokenizer)` returns the graph's inputs as `check_inputs` does and
    raises `BadInput`; `finish(entry, prepared, outputs)` returns the answer's arrays. Both must
    be pure: an operation that is run again, elsewhere, must come to the same answer.
    """

    name: str
    prepare: Prepare = prepare_inference
    finish: Finish = outputs_unchanged


INFERENCE = OperationSpec("inference")
EMBED = OperationSpec("embed", prepare_embed, finish_embed)


class OperationRegistry:
    """Operations by name; it begins with `inference` and `embed`."""

    def __init__(self) -> None:
        self._operations = {spec.name: spec for spec in (INFERENCE, EMBED)}

    def __repr__(self) -> str:
        return f"<OperationRegistry [{', '.join(self._operations)}]>"

    def register(self, spec: OperationSpec) -> OperationSpec:
        """Adds an operation and returns it. Raises `BadInput` if the name is empty or taken."""
        if not spec.name or spec.name in self._operations:
            raise BadInput(
                f"An operation cannot be called {spec.name!r}: expected a name other than "
                f"{', '.join(self._operations)}.",
                expected="a new name",
                got=spec.name,
            )
        self._operations[spec.name] = spec
        return spec

    def operation(
        self, name: str, *, prepare: Prepare = prepare_inference
    ) -> Callable[[Finish], Finish]:
        """Registers the decorated function as the `finish` of an operation.

        @operations.operation("classify")
        def classify(entry, prepared, outputs):
            return {"label": outputs["logits"].argmax(axis=-1)}
        """

        def register(finish: Finish) -> Finish:
            self.register(OperationSpec(name, prepare, finish))
            return finish

        return register

    def get(self, name: str) -> OperationSpec:
        """Raises `UnknownOperation`, naming the known ones."""
        try:
            return self._operations[name]
        except (KeyError, TypeError):
            known = list(self._operations)
            raise UnknownOperation(
                f"No operation {name!r} is registered; known: {', '.join(known)}.",
                expected=known,
                got=name,
            ) from None

    def names(self) -> tuple[str, ...]:
        return tuple(self._operations)
