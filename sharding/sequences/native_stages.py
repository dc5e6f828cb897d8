"""Stages in the native runtime: the reference for stages in browsers, and a host for tests.

Executes the same orders by the same rules. Blocks while a graph runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from sharding.models.frames import Array
from sharding.models.native import NativeSession
from sharding.models.signature import ModelSpec
from sharding.sequences.caches import SequenceCaches, StepOrder
from sharding.sequences.stages import Stage


class NativeStage:
    """One stage. Call `open`, `take` any number of times, then `close`."""

    def __init__(self, stage: Stage, spec: ModelSpec) -> None:
        self._stage = stage
        self._session = NativeSession(spec.files[0].path)
        self.caches = SequenceCaches(stage.caches)

    def open(self) -> None:
        """Raises `NotAModel`."""
        self._session.open()

    def close(self) -> None:
        self._session.close()

    def take(self, order: StepOrder, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Carry out an order; the answer is empty for all but a step. Raises `PageError`."""
        if order.what == "forget":
            self.caches.forget(order)
            return {}
        if order.what == "restore":
            self.caches.restore(order, tensors)
            return {}
        past, answer = self.caches.begin(order)
        if answer is None:
            outputs = self._session.run({**tensors, **past})
            answer = self.caches.commit(order, outputs, [spec.name for spec in self._stage.sends])
        return answer
