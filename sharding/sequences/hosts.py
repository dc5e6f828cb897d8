"""The interface between a sequence and the browsers: orders and replies.

Protocols and plain data. This module must not know how a browser is reached (implementations of
`StageHosts` do), nor what a reply is used for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from recovery.failures import Failure
from recovery.records import HostRef, HostStatus
from sharding.models.frames import Array
from sharding.sequences.caches import StepOrder
from sharding.sequences.stages import Stage


@dataclass(frozen=True)
class StepReply:
    """A host's answer to an order: tensors, or why there are none. `busy`: retry."""

    tensors: Mapping[str, Array] | None = None
    failure: Failure | None = None
    busy: bool = False
    in_page_ms: float = 0.0


@dataclass(frozen=True)
class StagePlacement:
    """Where a stage is, for a chain: the fields of its `StepOrder`, except the position."""

    stage: Stage
    ref: HostRef
    fence: int
    choice: int | None
    deltas: bool


class Chain(Protocol):
    """A route through all stages, along which a step passes from browser to browser."""

    async def step(
        self, position: int, tokens: int, tensors: Mapping[str, Array], seconds: float
    ) -> tuple[list[Mapping[str, Array]], float] | None:
        """What each stage answered, and the milliseconds in all pages. None: see `trouble`."""

    @property
    def trouble(self) -> tuple[str, Failure | None]:
        """Why the last step was not answered, in words, and the failure if there was one."""

    def leave(self) -> None:
        """Release it: it is not used any more."""


class StageHosts(Protocol):
    """The browsers, as a sequence sees them."""

    def hosts(self) -> Sequence[HostStatus]:
        """All known hosts."""

    async def take(
        self,
        ref: HostRef,
        model: str,
        order: StepOrder,
        tensors: Mapping[str, Array],
        seconds: float,
    ) -> StepReply:
        """Have `ref` carry out an order on its stage `model`. Raises no `BrowserError`."""

    async def change(self, seconds: float) -> None:
        """Return when something about the hosts may have changed, or after `seconds`."""

    async def exclude(self, ref: HostRef) -> None:
        """This incarnation failed: don't choose it again until it is replaced."""

    def outvoted(self, ref: HostRef, failure: Failure) -> None:
        """This incarnation gave a wrong answer."""

    async def chain(
        self, sequence: str, placements: Sequence[StagePlacement], *, copies: bool, seconds: float
    ) -> Chain | None:
        """A chain through these places; None if there is none. `copies`: return all answers."""

    def took(self, model: str, tokens: int, seconds: float) -> None:
        """Record that a host took `seconds` for a step of so many tokens."""

    def late_after(self, model: str, tokens: int) -> float:
        """Seconds after which a step of so many tokens is hedged on another browser."""
