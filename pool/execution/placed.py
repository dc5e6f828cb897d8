"""A loaded model as one call asks it, wherever its parts are: whole, cut by layer, or components.

How the parts of a model are asked is the model's business and stands here; what they are asked is
an operation's (`pool.operations`). This module must not know an operation's meaning, and chooses
no browser.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pool.execution.composition import Composition, PartFailed
from pool.execution.requests import PartRequests
from pool.execution.sequence import Generating, Prompt
from pool.models.registry import ModelEntry
from pool.results import Result
from recovery.errors import BadInput, InternalError
from sharding.models.frames import Array
from sharding.models.signature import ModelSpec
from sharding.sequences.stages import StagePipeline, inputs_of_stage


@dataclass(frozen=True)
class Call:
    """One call of an operation: its names and limits, and how requests of it are sent.

    `deadline`: seconds that the caller gave, if any; `seconds`: those, or the pool's own.
    `begin_sequence` starts a text on the model.
    """

    op_id: str
    op: str
    deadline: float | None
    seconds: float
    requests: PartRequests
    begin_sequence: Callable[[Prompt], Generating]


class PlacedModel:
    """What an operation may do with a model. A form of model refuses what it can't do.

    Every request goes through the answering loop: an operation never hears of a failure that was
    recovered from.
    """

    def __init__(self, entry: ModelEntry, call: Call) -> None:
        self.entry = entry
        self.call = call

    @property
    def deadline(self) -> float | None:
        """The seconds that the caller gave, if any."""
        return self.call.deadline

    def check(self, tensors: Mapping[str, Array]) -> None:
        """Raises `MessageTooLarge` for inputs of the graph that no browser may be sent."""
        self.call.requests.check_size(self.entry.name, tensors)

    async def outputs(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        """The outputs of the model's graph, also of one that is cut. Only within `answer`."""
        raise self._refused("is no one graph that takes arrays")

    async def ask(self, spec: ModelSpec, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        """The outputs of one of the model's components. Only within `answer`."""
        raise self._refused("has no components")

    async def answer(self, work: Awaitable[Mapping[str, Any]]) -> Result:
        """The one result of `work`, which asks the model; a part that has no answer ends it.

        Raises `PoolBusy`, and a `CallerError` as long as nothing was asked.
        """
        raise NotImplementedError

    def sequence(self, prompt: Prompt) -> Generating:
        """A text that begins with `prompt`."""
        return self.call.begin_sequence(prompt)

    def _refused(self, why: str) -> BadInput:
        return BadInput(f"{self.call.op}: {self.entry.name} {why}.", got=self.call.op)


class WholeModel(PlacedModel):
    """A model that each browser has all of: one request answers."""

    _result: Result | None = None

    async def outputs(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._result is not None:
            raise InternalError(f"{self.call.op} asked {self.entry.name} twice in one call")
        call = self.call
        self._result = await call.requests.request(
            call.op_id, call.op, self.entry.spec, tensors, call.seconds
        )
        if not self._result.success:
            raise PartFailed(self._result.error)
        return self._result.values

    async def answer(self, work: Awaitable[Mapping[str, Any]]) -> Result:
        try:
            values = await work
        except PartFailed:
            assert self._result is not None
            return self._result
        if self._result is None:
            raise InternalError(f"{self.call.op} never asked {self.entry.name}")
        return replace(self._result, values=values)


class _InParts(PlacedModel):
    """A model whose parts are asked one after the other, or several at once."""

    def __init__(self, entry: ModelEntry, call: Call) -> None:
        super().__init__(entry, call)
        self._composition = Composition(call.requests, call.op_id, entry, call.op, call.seconds)

    async def answer(self, work: Awaitable[Mapping[str, Any]]) -> Result:
        return await self._composition.answer(work)


class CutModel(_InParts):
    """A model that was cut by layer, without caches: its stages are asked in order."""

    def __init__(
        self, entry: ModelEntry, call: Call, pipeline: StagePipeline, specs: Sequence[ModelSpec]
    ) -> None:
        super().__init__(entry, call)
        self._pipeline = pipeline
        self._specs = specs

    async def outputs(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        return await run_stages(self._composition, self._pipeline, self._specs, tensors)


class ComponentModel(_InParts):
    """Several models that work together."""

    async def ask(self, spec: ModelSpec, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        return await self._composition.ask(spec, tensors)


class SequenceModel(PlacedModel):
    """A decoder that was cut: its stages hold caches, so only texts go through it."""

    async def answer(self, work: Awaitable[Mapping[str, Any]]) -> Result:
        await work  # which refuses whatever it asks
        raise InternalError(f"{self.call.op} got an answer from a model that gives none")


def place(entry: ModelEntry, call: Call, specs: Callable[[], Sequence[ModelSpec]]) -> PlacedModel:
    """The model as `call` asks it. `specs` gives what browsers have loaded of its stages."""
    if entry.components:
        return ComponentModel(entry, call)
    if entry.pipeline is None or not entry.in_parts:
        return WholeModel(entry, call)
    if entry.pipeline.decoder:
        return SequenceModel(entry, call)
    return CutModel(entry, call, entry.pipeline, specs())


async def run_stages(
    composition: Composition,
    pipeline: StagePipeline,
    specs: Sequence[ModelSpec],
    tensors: Mapping[str, Array],
) -> dict[str, Array]:
    """The uncut encoder's outputs: each stage gets its inputs and what the one before it sends."""
    found: dict[str, Array] = {}
    for stage, spec in zip(pipeline.stages, specs, strict=True):
        found |= await composition.ask(spec, inputs_of_stage(stage, tensors, found))
    return {output.name: found[output.name] for output in pipeline.outputs}
