"""What one browser is known to answer, so that it can be asked again and judged.

Its own first answer was compared with the native one when the model was loaded; from then on
it must repeat itself: bit for bit where its back end computes the same way each time. This
module must not ask anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recovery.kinds import Backend
from recovery.records import HostRef, NumericId
from recovery.voting import Ballot, Closeness, agree, describe_spread
from sharding.signature import ModelSpec

_Arrays = Mapping[str, np.ndarray[Any, Any]]
# One thread on WASM sums in one order. GPUs and thread pools need not.
_EXACT = frozenset({Backend.WASM, Backend.NATIVE})


@dataclass(frozen=True)
class _Known:
    asked: _Arrays
    answer: _Arrays
    exact: bool
    closeness: Closeness


class Probes:
    """Known answers by model."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._turn = 0

    def learn(self, spec: ModelSpec, numeric: NumericId, asked: _Arrays, answer: _Arrays) -> None:
        """What the model has just answered, once that was found to be right."""
        if not answer:
            self._known.pop(spec.name, None)
            return
        exact = numeric.backend in _EXACT and numeric.threads == 1
        closeness = Closeness(spec.tolerance.rtol, spec.tolerance.atol)
        copies = {name: np.array(array) for name, array in answer.items()}  # not views of a frame
        self._known[spec.name] = _Known(asked, copies, exact, closeness)

    def forget(self, model: str) -> None:
        self._known.pop(model, None)

    def clear(self) -> None:
        self._known.clear()

    def question(self, model: str) -> _Arrays | None:
        """What to ask, if an answer is known."""
        known = self._known.get(model)
        return known.asked if known else None

    def next_model(self) -> str:
        """The model whose turn it is; empty if nothing is known."""
        names = sorted(self._known)
        if not names:
            return ""
        self._turn += 1
        return names[self._turn % len(names)]

    def judge(self, model: str, answer: _Arrays) -> str:
        """What is wrong with an answer, in words; empty if it is as it was."""
        known = self._known.get(model)
        if known is None:
            return ""
        numeric = NumericId("", Backend.WASM)
        other = numeric if known.exact else NumericId("", Backend.WEBGPU)
        before = Ballot(HostRef("before"), numeric, known.answer)
        now = Ballot(HostRef("now"), other, answer)
        return "" if agree(before, now, known.closeness) else describe_spread([before, now])
