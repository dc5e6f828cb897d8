"""Decoding: the choice of the next token, greedy or sampled, from the last position's scores.

The same scores, options and position always give the same token, so that a resumed sequence
continues unchanged: the random number depends on seed and position only. Pure; this module must not
know where scores come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from recovery import checks
from recovery.errors import BadInput, PageError
from sharding.models.frames import Array

NEW_TOKENS_MAX = 32_768
TOP_K_MAX = 1024  # most candidates that a page sends; for more it sends all scores
_SEED_MAX = 2**64 - 1
_TOKEN_MAX = 2**31 - 1


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
        """This with numbers as Python has them, if each is in its range. Raises `BadInput`."""
        return Decoding(
            checks.whole("max_new_tokens", self.max_new_tokens, 1, NEW_TOKENS_MAX),
            checks.number("temperature", self.temperature, 0, 100),
            checks.whole("top_k", self.top_k, 0, _TOKEN_MAX),
            checks.number("top_p", self.top_p, 0, 1, above=True),
            checks.whole("seed", self.seed, 0, _SEED_MAX),
            _tokens(self.stop),
            checks.flag("ignore_eos", self.ignore_eos),
            checks.flag("logits", self.logits),
        )


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
    several = isinstance(stop, list | tuple | set | frozenset | np.ndarray)
    flat = stop.reshape(-1) if isinstance(stop, np.ndarray) else stop
    ids = _tokens(flat if several else (stop,))
    return Decoding(**{**given, "stop": ids}).checked()


def _tokens(ids: Iterable[Any]) -> frozenset[int]:
    return frozenset(checks.whole("stop", token, 0, _TOKEN_MAX, "token ids") for token in ids)


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
