"""`embed`: one vector of length 1 for each text, from the model's own or from its tokens' vectors.

This module must not run a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from pool.operations.graph import GraphOperation, prepare_inference
from recovery.errors import BadInput, InternalError
from sharding.models.frames import Array
from sharding.models.signature import TensorSpec

_TOKEN_VECTORS = "last_hidden_state"
_SENTENCE_VECTOR = "sentence_embedding"
# Scores over a vocabulary or over classes: of the right rank, and no embedding.
_NO_VECTORS = frozenset({"logits", "scores", "probabilities"})
_NORM_MIN = 1e-12  # a vector of zeros stays one


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


EMBED = GraphOperation("embed", prepare_embed, finish_embed)
