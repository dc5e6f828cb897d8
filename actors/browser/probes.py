"""Known answers of one browser, for probes.

Its first answer was compared with the native one when the model was loaded; later answers must
equal that one: bit for bit on deterministic back ends. This module must not send requests.
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
    """Inputs, and the answer to them."""

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
        """Store the model's answer at load, after it was verified."""
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
        """The known answer of a model, if there is one."""
        return self._known.get(model)

    def next_model(self) -> str:
        """The next model to probe; empty if there is none."""
        names = sorted(self._known)
        if not names:
            return ""
        self._turn += 1
        return names[self._turn % len(names)]

    def judge(self, known: Known, answer: _Arrays) -> str:
        """How an answer differs from the known one, in words; empty if it does not.

        Also empty if the model has been reloaded since the probe was sent.
        """
        if self._known.get(known.model) is not known:
            return ""
        before = Ballot(HostRef("before"), known.numeric, known.answer)
        now = Ballot(HostRef("now"), known.numeric, answer)
        return "" if agree(before, now, known.tolerance) else describe_spread([before, now])
