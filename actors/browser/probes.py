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

from recovery.records import HostRef, NumericId
from recovery.voting import Ballot, Tolerance, agree, describe_spread
from sharding.models.signature import ModelSpec

_Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, eq=False)
class Known:
    """A question, and what was answered to it."""

    model: str
    question: _Arrays
    answer: _Arrays
    numeric: NumericId
    tolerance: Tolerance


class Probes:
    """Known answers by model."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._turn = 0

    def learn(
        self, spec: ModelSpec, numeric: NumericId, question: _Arrays, answer: _Arrays
    ) -> None:
        """What the model has just answered, once that was found to be right."""
        if not answer:
            self._known.pop(spec.name, None)
            return
        copies = {name: np.array(array) for name, array in answer.items()}  # not views of a frame
        self._known[spec.name] = Known(spec.name, question, copies, numeric, spec.tolerance)

    def forget(self, model: str) -> None:
        self._known.pop(model, None)

    def clear(self) -> None:
        self._known.clear()

    def of(self, model: str) -> Known | None:
        """What to ask, if an answer is known."""
        return self._known.get(model)

    def next_model(self) -> str:
        """The model whose turn it is; empty if nothing is known."""
        names = sorted(self._known)
        if not names:
            return ""
        self._turn += 1
        return names[self._turn % len(names)]

    def judge(self, known: Known, answer: _Arrays) -> str:
        """What is wrong with an answer, in words; empty if it is as it was.

        Empty, too, if the model has been loaded anew since it was asked: nothing can be said.
        """
        if self._known.get(known.model) is not known:
            return ""
        before = Ballot(HostRef("before"), known.numeric, known.answer)
        now = Ballot(HostRef("now"), known.numeric, answer)
        return "" if agree(before, now, known.tolerance) else describe_spread([before, now])
