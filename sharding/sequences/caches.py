"""The order for one step of a sequence, and the rules by which a host executes it.

A stage's caches stay where it runs, by sequence, and are fenced: a step says which rebuild of the
stage it belongs to (`fence`) and how many positions the caches must hold. A step that does not
match is refused, not computed. `SequenceCaches` is this state for hosts in Python, as
`actors/page/worker.js` is in the page. This module must not run a graph.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recovery.errors import PageError
from sharding.models.frames import Array
from sharding.models.signature import CacheSpec
from sharding.sequences.decoding import highest

SEQUENCES_MAX = 64  # of one model on one host
IDLE_SECONDS = 60.0  # after this long without a step, a sequence may be evicted
LOGITS = "logits"
DELTA = "delta/"  # + the name of a cache's `past`: the positions that a step added to it
CHOICE_IDS, CHOICE_SCORES = "choice/ids", "choice/scores"


@dataclass(frozen=True)
class StepOrder:
    """What a host is to do with the tensors sent along.

    `step` runs the graph on them and the sequence's caches, which must hold `position` positions.
    `restore` replaces the caches by the tensors, of `position` positions. `forget` drops the
    sequence. A `fence` counts how often the stage was rebuilt: an older one is refused, a newer one
    begins with empty caches. `choice`: of the last stage, how many of the highest scores to answer
    with (0: all). `deltas`: answer with what was added to the caches, too.
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
    at: float = 0.0  # time of the last step


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
        """The caches to run on, and the answer if this step was already executed.

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
        """Keep a step's new caches; returns its answer (`sends`: outputs for the next stage)."""
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
        """Take copied caches. Raises as `begin`, and if one is missing or has another shape."""
        kept = self._fenced(order)
        if kept is not None and order.fence == kept.fence:
            if kept.position == order.position and kept.last is None:
                return  # a repeat: the reply was lost
            raise _out_of_step(order, kept.position)
        for cache in self._caches:
            got = tensors.get(cache.past)
            expected = restored_shape(cache, order.position)
            if got is None or got.shape != expected:
                found = "none" if got is None else got.shape
                raise PageError(
                    f"{cache.past}: expected a cache of shape {expected}, got {found}",
                    what="out_of_step",
                    expected=0,
                )
        restored = {cache.past: tensors[cache.past] for cache in self._caches}
        self._keep(order.sequence, _Kept(order.fence, order.position, restored))

    def forget(self, order: StepOrder) -> None:
        """Drop a sequence, unless it has been rebuilt here since. Unknown sequences are ignored."""
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
            if self._clock() - idle.at > IDLE_SECONDS:  # its caller has ended, or can rebuild it
                del self._kept[oldest]
                return kept
            raise PageError(
                f"this host already keeps {self._sequences_max} sequences, its limit",
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
