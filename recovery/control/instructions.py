"""The instructions of a decision, as frozen data.

Each may be delivered twice, so carrying it out must be idempotent. This module must not carry out
anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from recovery.control.records import Adjusted, PoolState
from recovery.kinds import BrowserType


@dataclass(frozen=True)
class Launch:
    """Start incarnation `epoch`, after `delay` seconds."""

    browser_id: str
    kind: BrowserType
    epoch: int
    delay: float = 0.0
    adjusted: Adjusted | None = None


@dataclass(frozen=True)
class Reconnect:
    """Reconnect to the page of an incarnation whose processes are alive."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class Load:
    """Load a model, after `delay` seconds."""

    browser_id: str
    epoch: int
    model: str
    delay: float = 0.0


@dataclass(frozen=True)
class Unload:
    browser_id: str
    epoch: int
    model: str


@dataclass(frozen=True)
class Drain:
    """Admit nothing more, answer what is in flight, then stop."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class Stop:
    browser_id: str
    epoch: int


Instruction = Launch | Reconnect | Load | Unload | Drain | Stop
Decision = tuple[PoolState, tuple[Instruction, ...]]
