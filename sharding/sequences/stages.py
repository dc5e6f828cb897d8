"""A model as a line of stages: what each takes and hands on in one step of a sequence, and the
rules by which a host accepts a step.

A stage is one shard (or a whole decoder, the only one of its line). Its caches stay where it runs,
by sequence, and are fenced: a step says which rebuild of the stage it belongs to (`fence`) and how
many positions the caches must hold. What does not fit is refused, never computed. Plain data and
pure functions; `SequenceCaches` holds state for hosts in Python, as `actors/page/worker.js` does in
the page. This module must not run a graph.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from recovery.errors import BadInput, NotAModel, PageError
from recovery.kinds import ModelType
from sharding.cutting.layers import LayerMap, find_boundaries
from sharding.cutting.manifest import Cache, Manifest, Shard
from sharding.models.frames import Array
from sharding.models.signature import CacheSpec, ModelSpec, TensorSpec, read_signature
from sharding.sequences.decoding import highest

SEQUENCES_MAX = 64  # of one model on one host
IDLE_SECONDS = 60.0  # a sequence that nobody has asked for so long makes room for another
LOGITS = "logits"
DELTA = "delta/"  # + the name of a cache's `past`: the positions that a step added to it
CHOICE_IDS, CHOICE_SCORES = "choice/ids", "choice/scores"
STAGE_MARK = "@"  # between a model's name and the number of a stage

_IDS, _MASK, _POSITIONS, _TYPES = "input_ids", "attention_mask", "position_ids", "token_type_ids"
_MADE = frozenset({_IDS, _MASK, _POSITIONS, _TYPES})
_EXAMPLE_TOKENS = 4


def stage_name(model: str, index: int) -> str:
    """What a stage of a cut model is called where models are loaded."""
    return f"{model}{STAGE_MARK}{index}"


@dataclass(frozen=True)
class Stage:
    """One stage. `model` is its name where it is loaded; the rest as in `manifest.Shard`."""

    model: str
    receives: tuple[TensorSpec, ...]
    sends: tuple[TensorSpec, ...]
    shared: tuple[TensorSpec, ...]
    caches: tuple[CacheSpec, ...]

    @property
    def last(self) -> bool:
        return not self.sends

    @property
    def copyable(self) -> bool:
        """Whether its caches can be copied step by step: a ring's can't, it overwrites itself."""
        return all(cache.axis >= 0 for cache in self.caches)


@dataclass(frozen=True)
class Line:
    """All stages of a model, first to last, and the inputs and outputs of the uncut one."""

    model: str
    stages: tuple[Stage, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def decoder(self) -> bool:
        """Whether it keeps caches, and so goes step by step."""
        return any(stage.caches for stage in self.stages)

    def check_generates(self) -> None:
        """Raises `NotAModel` if no text can be made with it: no decoder, or no known inputs."""
        if not self.decoder:
            raise _no_decoder(self.model, "caches", "none")
        names = [spec.name for spec in self.inputs]
        if unknown := [name for name in names if name not in _MADE]:
            raise _no_decoder(self.model, f"inputs among {', '.join(sorted(_MADE))}", unknown)
        if _IDS not in names:
            raise _no_decoder(self.model, _IDS, names)
        if LOGITS not in [spec.name for spec in self.outputs]:
            raise _no_decoder(
                self.model, f"an output {LOGITS!r}", [spec.name for spec in self.outputs]
            )

    def inputs_of_step(self, ids: Sequence[int], position: int) -> dict[str, Array]:
        """The uncut model's inputs for `ids`, which follow `position` others: a batch of one."""
        return inputs_of_step(self.inputs, ids, position)


def inputs_of_step(
    inputs: Sequence[TensorSpec], ids: Sequence[int], position: int
) -> dict[str, Array]:
    """Token ids and what follows from their place: mask over all so far, positions, types 0."""
    count = len(ids)
    made = {
        _IDS: np.asarray(ids).reshape(1, count),
        _MASK: np.ones((1, position + count)),
        _POSITIONS: np.arange(position, position + count).reshape(1, count),
        _TYPES: np.zeros((1, count)),
    }
    return {
        spec.name: np.ascontiguousarray(made[spec.name].astype(np.dtype(spec.dtype)))
        for spec in inputs
    }


def line_of_manifest(model: str, manifest: Manifest) -> Line:
    """The stages of a cut model that is loaded as `model`."""
    stages = tuple(
        _stage(stage_name(model, index), shard) for index, shard in enumerate(manifest.shards)
    )
    outputs = tuple(spec for shard in manifest.shards for spec in shard.outputs)
    return Line(model, stages, manifest.inputs, outputs)


def line_of_map(model: str, layers: LayerMap) -> Line:
    """An uncut model as its own only stage."""
    caches = tuple(_cache(cache) for layer in layers.layers for cache in layer.caches)
    stage = Stage(model, (), (), layers.inputs, caches)
    return Line(model, (stage,), layers.inputs, layers.outputs)


def _no_decoder(model: str, expected: str, got: Any) -> NotAModel:
    return NotAModel(
        f"{model} can't generate: expected {expected}, got {got}. Export it as a decoder with a "
        "cache (onnxruntime-genai's builder, or Optimum's text-generation-with-past).",
        expected=expected,
        got=got,
    )


def _stage(name: str, shard: Shard) -> Stage:
    caches = tuple(_cache(cache) for cache in shard.caches)
    return Stage(name, shard.receives, shard.sends, shard.shared, caches)


def _cache(cache: Cache) -> CacheSpec:
    shape = cache.past.shape
    if shape is None:
        raise _no_decoder(cache.past.name, "a cache of known rank", "none")
    # The first dimension is the batch; of the others the one that is not fixed grows.
    growing = [axis for axis, dim in enumerate(shape) if axis and not isinstance(dim, int)]
    if len(growing) != 1:
        raise _no_decoder(cache.past.name, "a cache that grows along one dimension", shape)
    begin = tuple(
        1 if axis == 0 else dim if isinstance(dim, int) else cache.window
        for axis, dim in enumerate(shape)
    )
    axis = -1 if cache.window else growing[0]
    return CacheSpec(cache.past.name, cache.present.name, cache.past.dtype, begin, axis)


def stage_specs(model: str, folder: Path, manifest: Manifest) -> tuple[ModelSpec, ...]:
    """The spec of each shard in `folder`, by which it is loaded. Reads the files once."""
    line = line_of_manifest(model, manifest)
    return tuple(
        replace(
            read_signature(folder / shard.graph_file, name=stage.model, type=ModelType.TEXT),
            span=shard.span,
            caches=stage.caches,
        )
        for stage, shard in zip(line.stages, manifest.shards, strict=True)
    )


def decoder_line(model: str, path: str | Path) -> Line | None:
    """The ONNX file at `path` as a line of one stage; None if nothing can be made with it."""
    try:
        line = line_of_map(model, find_boundaries(path))
        line.check_generates()
    except NotAModel:
        return None
    return line


def example(stage: Stage) -> dict[str, Array]:
    """Inputs that a stage can be tried with: a few tokens after an empty cache, not all zeros."""
    chance = np.random.default_rng(_EXAMPLE_TOKENS)
    tensors = inputs_of_step(stage.shared, range(1, _EXAMPLE_TOKENS + 1), 0)
    for spec in stage.receives:
        shape = [
            dim if isinstance(dim, int) else 1 if axis == 0 else _EXAMPLE_TOKENS
            for axis, dim in enumerate(spec.shape or ())
        ]
        tensors[spec.name] = chance.standard_normal(shape).astype(spec.dtype)
    return {**tensors, **{cache.past: np.zeros(cache.shape, cache.dtype) for cache in stage.caches}}


# -- one step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepOrder:
    """What a host is to do with the tensors that come with it.

    `step` runs the graph on them and the sequence's caches, which must hold `position` positions.
    `restore` makes the tensors the caches, of `position` positions. `forget` drops the sequence.
    A `fence` counts how often the stage was rebuilt: an older one is refused, a newer one begins
    anew. `choice`: of the last stage, how many of the highest scores to answer with (0: all).
    `deltas`: answer with what was added to the caches, too.
    """

    sequence: str
    what: str = "step"
    fence: int = 0
    position: int = 0
    tokens: int = 0
    choice: int | None = None
    deltas: bool = False


@dataclass
class _Kept:
    fence: int
    position: int = 0
    caches: dict[str, Array] = field(default_factory=dict)
    last: tuple[int, dict[str, Array]] | None = None  # position and answer of the last step
    at: float = 0.0  # when it was last asked


class SequenceCaches:
    """The caches of one model's sequences on one host, and the rules by which steps are taken."""

    def __init__(
        self,
        caches: Sequence[CacheSpec],
        sequences_max: int = SEQUENCES_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._caches = tuple(caches)
        self._sequences_max = sequences_max
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, order: StepOrder) -> tuple[dict[str, Array], dict[str, Array] | None]:
        """The caches to run on, and the answer if this very step was taken already.

        Raises `PageError`, whose `what` is `stale_step` (an older fence), `out_of_step` (the
        caches hold another number of positions), or `too_many_sequences`.
        """
        kept = self._fenced(order)
        if kept is None or order.fence > kept.fence:
            if order.position:
                raise _out_of_step(order, 0)
            return {c.past: np.zeros(c.shape, c.dtype) for c in self._caches}, None
        done = order.position + order.tokens == kept.position
        if done and kept.last is not None and kept.last[0] == order.position:
            return {}, kept.last[1]
        if order.position != kept.position:
            raise _out_of_step(order, kept.position)
        return kept.caches, None

    def commit(
        self, order: StepOrder, outputs: Mapping[str, Array], sends: Sequence[str]
    ) -> dict[str, Array]:
        """Keep what a step made of the caches; returns its answer (`sends` are what to hand on)."""
        presents = {cache.past: outputs[cache.present] for cache in self._caches}
        answer = {name: outputs[name] for name in sends}
        if order.choice is not None:
            row = outputs[LOGITS][0, -1]
            answer[CHOICE_IDS], answer[CHOICE_SCORES] = highest(row, order.choice)
        if order.deltas:
            for cache in self._caches:
                answer[DELTA + cache.past] = added(cache, presents[cache.past], order.position)
        position = order.position + order.tokens
        self._keep(order.sequence, _Kept(order.fence, position, presents, (order.position, answer)))
        return answer

    def restore(self, order: StepOrder, tensors: Mapping[str, Array]) -> None:
        """Take caches from elsewhere. Raises as `begin`, and if they are not whole."""
        kept = self._fenced(order)
        if kept is not None and order.fence == kept.fence:
            if kept.position == order.position and kept.last is None:
                return  # these very ones: the answer was lost
            raise _out_of_step(order, kept.position)
        for cache in self._caches:
            got = tensors.get(cache.past)
            if got is None or got.shape != restored_shape(cache, order.position):
                raise PageError(f"{cache.past} is not whole", what="out_of_step", expected=0)
        whole = {cache.past: tensors[cache.past] for cache in self._caches}
        self._keep(order.sequence, _Kept(order.fence, order.position, whole))

    def forget(self, order: StepOrder) -> None:
        """Drop a sequence, unless it was rebuilt here since. An unknown one is no error."""
        kept = self._kept.get(order.sequence)
        if kept is not None and order.fence >= kept.fence:
            del self._kept[order.sequence]

    def _keep(self, sequence: str, kept: _Kept) -> None:
        kept.at = self._clock()
        self._kept[sequence] = kept
        self._kept.move_to_end(sequence)

    def _fenced(self, order: StepOrder) -> _Kept | None:
        kept = self._kept.get(order.sequence)
        if kept is not None and order.fence < kept.fence:
            raise PageError(
                f"{order.sequence}: fence {order.fence} is older than {kept.fence}",
                what="stale_step",
            )
        if kept is None and len(self._kept) >= self._sequences_max:
            oldest, idle = next(iter(self._kept.items()))
            if self._clock() - idle.at > IDLE_SECONDS:  # its caller is gone, or can build it again
                del self._kept[oldest]
                return kept
            raise PageError(
                f"{self._sequences_max} sequences are kept here already",
                what="too_many_sequences",
            )
        return kept


def added(cache: CacheSpec, present: Array, position: int) -> Array:
    """What a step added to a cache that held `position` positions."""
    place: list[slice] = [slice(None)] * present.ndim
    place[cache.axis] = slice(position, None)
    return np.ascontiguousarray(present[tuple(place)])


def restored_shape(cache: CacheSpec, position: int) -> tuple[int, ...]:
    """The shape of a growing cache that holds `position` positions."""
    return tuple(position if axis == cache.axis else dim for axis, dim in enumerate(cache.shape))


def _out_of_step(order: StepOrder, expected: int) -> PageError:
    return PageError(
        f"{order.sequence}: the caches hold {expected} positions, not {order.position}",
        what="out_of_step",
        expected=expected,
    )


# -- what a caller keeps of a stage ----------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """One step as it was taken: the same inputs again, in the same steps, give the same caches."""

    position: int
    tokens: int
    tensors: Mapping[str, Array]


class StageMemory:
    """What a caller keeps of one sequence's stage, to make its caches again: inputs and copies.

    Copies are of the caches themselves, put together from what each step added; they stand for
    the steps that they cover, whose inputs are then let go. Without copies (or once they would be
    larger than `copy_bytes_max`) the inputs of all steps are kept.
    """

    def __init__(self, stage: Stage, *, copies: bool, copy_bytes_max: int) -> None:
        self._stage = stage
        self._steps: list[Taken] = []
        self._deltas: list[Mapping[str, Array]] = []
        self._copying = copies and stage.copyable
        self._copy_bytes_max = copy_bytes_max
        self.covered = 0  # positions that the copies hold
        self.copy_bytes = 0
        self.step_bytes = 0

    @property
    def copying(self) -> bool:
        """Whether the next step should answer with what it adds to the caches."""
        return self._copying

    def note(self, step: Taken) -> None:
        """Keep a step's inputs, before it is sent anywhere."""
        if not self._steps or self._steps[-1].position != step.position:
            self._steps.append(step)
            self.step_bytes += _bytes(step.tensors)

    def copy(self, answer: Mapping[str, Array]) -> None:
        """Keep what the last noted step added to the caches, in place of its inputs."""
        if not self._copying or not self._steps:
            return
        step = self._steps[-1]
        deltas = {
            # Copied: it is a view of the whole message, which would live as long.
            cache.past: np.array(answer[DELTA + cache.past])
            for cache in self._stage.caches
            if DELTA + cache.past in answer
        }
        complete = len(deltas) == len(self._stage.caches) and step.position == self.covered
        if not complete or self.copy_bytes + _bytes(deltas) > self._copy_bytes_max:
            self._copying = False
            return
        self._deltas.append(deltas)
        self.copy_bytes += _bytes(deltas)
        self.covered = step.position + step.tokens
        self.step_bytes -= _bytes(self._steps.pop().tensors)

    def caches(self) -> dict[str, Array]:
        """The copied caches, of `covered` positions."""
        if len(self._deltas) > 1:
            joined = {
                cache.past: np.concatenate([d[cache.past] for d in self._deltas], axis=cache.axis)
                for cache in self._stage.caches
            }
            self._deltas = [joined]
        return dict(self._deltas[0]) if self._deltas else {}

    def rest(self, position: int) -> list[Taken]:
        """The steps that lead from `covered` to `position`."""
        return [step for step in self._steps if step.position < position]


def _bytes(tensors: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in tensors.values())


def check_length(prompt: int, new: int, limit: int | None) -> None:
    """Raises `BadInput` if prompt and new tokens are more than the model has positions for."""
    if prompt < 1:
        raise BadInput("The prompt holds no token.", expected="at least one token", got=prompt)
    if limit is not None and prompt + new > limit:
        fewer = f"max_new_tokens={limit - prompt} or less, or " if prompt < limit else ""
        raise BadInput(
            f"{prompt} tokens of prompt and {new} new ones are more than the model's {limit} "
            f"positions: pass {fewer}a shorter prompt.",
            expected=f"at most {limit} positions",
            got=prompt + new,
        )
