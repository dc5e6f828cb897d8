"""Configuration and events of a bridge: frozen data. This module must not act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PROTOCOL = "tabpool.v1"


@dataclass(frozen=True)
class PageConfig:
    """Configuration of the page. `probe`: detect WebGPU and WebNN too (takes some 100 ms).

    `faults`: whether faults may be injected into it.
    """

    threads: int
    message_bytes_max: int
    probe: bool
    faults: bool = False


@dataclass(frozen=True)
class BridgeEvent:
    """An event of a socket: `what` is one of hello, closed, console, worker_failed,
    visibility; `epoch` is the page's. After `closed` the page may reopen that socket."""

    what: str
    epoch: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class FrameSeen(NamedTuple):
    """The header of a frame to or from the page, without data. `at` is wall time in
    seconds, `tensors` are name, dtype and shape of each."""

    at: float
    way: str  # "to" or "from" the page
    kind: str
    op_id: str
    epoch: int
    step: int
    position: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
