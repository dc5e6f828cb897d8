"""Decoding: the choice of the next token, greedy or sampled, from the last position's scores.

The same scores, options and position always give the same token, so that a resumed sequence
continues unchanged: the random number depends on seed and position only. Pure; this module must not
know where scores come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from recovery.errors import BadInput, PageError
from sharding.models.frames import Array

NEW_TOKENS_MAX = 32_768
TOP_K_MAX = 1024  # most candidates that a page sends; for more it sends all scores
_SEED_MAX = 2**64 - 1


@dataclass(frozen=True)
class Decoding:
    """How a sequence is continued.

    `temperature` 0 is greedy: the highest score, of equals the lowest id. Above it, scores are
    divided by it, the `top_k` highest kept (0: all), of these the fewest whose probabilities sum
    to `top_p`, and one drawn: the order in which Hugging Face's warpers work. `stop` are ids
    after which the sequence ends (they are part of it), including the model's end of sequence
    unless `ignore_eos`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    stop: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logits: bool = False  # whether each step's scores are wanted, too

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def candidates(self) -> int:
        """How many of the highest scores the choice needs; 0: all."""
        if self.logits:
            return 0
        if self.greedy:
            return 1
        return self.top_k if 0 < self.top_k <= TOP_K_MAX else 0

    def checked(self) -> Decoding:
        """This, if every value is in its range. Raises `BadInput`."""
        _whole("max_new_tokens", self.max_new_tokens, 1, NEW_TOKENS_MAX)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _whole("seed", self.seed, 0, _SEED_MAX)
        for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0)):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float | np.integer | np.floating)
                or not low <= value <= high  # refuses NaN, too
                or (name == "top_p" and value == 0)
            ):
                raise BadInput(
                    f"{name}: expected a number from {low:g} to {high:g}, got {value!r}.", got=value
                )
        for name in ("ignore_eos", "logits"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(
                    f"{name}: expected True or False, got {getattr(self, name)!r}.",
                    got=getattr(self, name),
                )
        return self


OPTIONS = tuple(field.name for field in fields(Decoding))


def decoding_from(options: Mapping[str, Any]) -> Decoding:
    """The options that a caller gave by name; `stop` may be one id or several.

    Raises `BadInput` for a value out of range.
    """
    given = dict(options)
    if unknown := sorted(given.keys() - set(OPTIONS)):
        raise BadInput(
            f"unknown options {', '.join(map(str, unknown))}: expected {', '.join(OPTIONS)}.",
            expected=list(OPTIONS),
            got=unknown,
        )
    stop = given.get("stop", ())
    ids = [stop] if isinstance(stop, int | np.integer) else stop
    if not isinstance(ids, list | tuple | set | frozenset) or not all(
        isinstance(token, int | np.integer) and not isinstance(token, bool) for token in ids
    ):
        raise BadInput(f"stop: expected token ids, got {stop!r}.", got=stop)
    return Decoding(**{**given, "stop": frozenset(int(token) for token in ids)}).checked()


def _whole(name: str, value: Any, low: int, high: int) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise BadInput(
            f"{name}: expected a whole number from {low} to {high}, got {value!r}.", got=value
        )


def choose(ids: Array, scores: Array, decoding: Decoding, position: int) -> int:
    """The next token, for `position` of the sequence.

    `ids` (n,) and `scores` (n,) are the candidates: all of them, or at least the
    `decoding.candidates` highest.
    """
    order = np.lexsort((ids, -scores.astype(np.float64)))  # highest first; of equals, lowest id
    order = order[~np.isnan(scores[order])] if np.isnan(scores).any() else order
    if not order.size:
        raise PageError("every score of the next token is NaN", what="wrong_answer")
    if decoding.greedy:
        return int(ids[order[0]])
    kept = order[: decoding.top_k] if decoding.top_k else order
    values = scores[kept].astype(np.float64)
    weights = np.exp((values - values[0]) / decoding.temperature)
    probabilities = weights / weights.sum()
    if decoding.top_p < 1:
        # A token stays while those before it sum to less than top_p, so the first always does.
        before = np.cumsum(probabilities) - probabilities
        probabilities = probabilities[: int(np.count_nonzero(before < decoding.top_p))]
        probabilities = probabilities / probabilities.sum()
    drawn = draw(decoding.seed, position)
    place = int(np.searchsorted(np.cumsum(probabilities), drawn, side="right"))
    return int(ids[kept[min(place, len(probabilities) - 1)]])


def draw(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position only (Philox, a counter generator)."""
    key = np.array([seed, position], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    return float(generator.random())


def highest(row: Array, count: int) -> tuple[Array, Array]:
    """The ids and scores of the `count` highest of `row` (n,); of all if `count` is 0."""
    order = np.lexsort((np.arange(row.size), -row.astype(np.float64)))
    kept = order[:count] if count else order
    return kept.astype(np.int32), row[kept]
