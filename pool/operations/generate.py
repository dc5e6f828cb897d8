"""`generate`: text from a decoder, whole or cut, as it is written or when it is done.

What callers ask is checked here and becomes a prompt. This module must not choose a browser or a
token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pool.execution.placed import PlacedModel
from pool.execution.sequence import Generating, Prompt
from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from pool.operations.base import Operation
from pool.results import Result
from recovery import checks
from recovery.errors import BadInput
from sharding.sequences.decoding import OPTIONS, decoding_from
from sharding.sequences.stages import check_length


class Generate(Operation):
    """Text or token ids in; `tokens`, `text` (with a tokenizer) and, when asked, `logits` out."""

    name = "generate"

    def prepare(
        self, entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
    ) -> Prompt:
        return prepare_generate(entry, inputs, encoder)

    async def run(self, model: PlacedModel, prepared: Prompt) -> Result:
        return await self.stream(model, prepared).run(model.deadline)

    def stream(self, model: PlacedModel, prepared: Prompt) -> Generating:
        return model.sequence(prepared)


def prepare_generate(
    entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
) -> Prompt:
    """The sequence that a caller asks for. Raises `BadInput` or `NotAModel`.

    `inputs` holds `text` or `input_ids`, and any of `sharding.sequences.decoding.Decoding`'s
    options.
    """
    if entry.pipeline is None:
        raise BadInput(
            f"Model {entry.name!r} can't generate: it is no decoder with a cache.",
            expected="a decoder with a cache",
            got=str(entry.spec.type),
        )
    entry.pipeline.check_generates()
    if not isinstance(inputs, Mapping):
        raise BadInput("Inputs must be named: text or input_ids.", got=type(inputs).__name__)
    known = ("text", "input_ids", *OPTIONS)
    if unknown := [str(name) for name in inputs if name not in known]:
        raise BadInput(
            f"generate takes no {', '.join(unknown)}: expected {', '.join(known)}.",
            expected=list(known),
            got=unknown,
        )
    if ("text" in inputs) == ("input_ids" in inputs):
        raise BadInput(
            "generate takes either text or input_ids.",
            expected="text, or input_ids",
            got=[str(name) for name in inputs],
        )
    options = {name: value for name, value in inputs.items() if name in OPTIONS}
    decoding = decoding_from(options)
    if not decoding.ignore_eos:
        ends = frozenset(_ends(entry.config))
        decoding = decoding_from({**options, "stop": sorted(decoding.stop | ends)})
    ids = _ids_of(entry, inputs, encoder)
    check_length(len(ids), decoding.max_new_tokens, entry.positions_max)
    return Prompt(entry.pipeline, ids, decoding)


def _ids_of(
    entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
) -> tuple[int, ...]:
    vocabulary = entry.config.get("vocab_size")
    if "text" in inputs:
        if encoder is None:
            raise BadInput(
                f"Model {entry.name!r} has no tokenizer.json beside it, so it takes no text: pass "
                "input_ids.",
                expected="input_ids",
                got="text",
            )
        if not isinstance(inputs["text"], str):
            raise BadInput(
                "text: expected one string; several sequences are several calls.",
                expected="a string",
                got=type(inputs["text"]).__name__,
            )
        ids = encoder.ids(inputs["text"])
        begin = entry.config.get("bos_token_id")
        if isinstance(begin, int) and (not ids or ids[0] != begin):
            ids = [begin, *ids]
        return tuple(ids)
    try:
        array = np.asarray(inputs["input_ids"])
    except ValueError:  # lists of different lengths
        raise checks.refusal("input_ids", "whole numbers", inputs["input_ids"]) from None
    if not array.size:
        return ()
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size != array.shape[-1]:
        raise BadInput(
            f"input_ids: expected whole numbers of shape (tokens,) or (1, tokens), got "
            f"{array.dtype}{list(array.shape)}.",
            expected="int (tokens,)",
            got=f"{array.dtype}{list(array.shape)}",
        )
    ids = [int(token) for token in array.reshape(-1)]
    most = vocabulary if isinstance(vocabulary, int) else 2**31
    if any(not 0 <= token < most for token in ids):
        raise BadInput(
            f"input_ids: expected ids from 0 to {most - 1}, got {min(ids)} to {max(ids)}.",
            expected=f"0 to {most - 1}",
            got=[min(ids), max(ids)],
        )
    return tuple(ids)


def _ends(config: Mapping[str, Any]) -> Sequence[int]:
    ends = config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return [token for token in listed if type(token) is int and token >= 0]
