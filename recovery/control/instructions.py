"""What is to be done about a pool: the instructions that a decision gives, as frozen data.

Whoever carries them out may be told twice. This module must not carry anything out.
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
    """Get back in touch with the page of an incarnation that lives."""

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
