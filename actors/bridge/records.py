"""What a bridge is told, and what it reports. Frozen data; nothing here acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PROTOCOL = "tabpool.v1"


@dataclass(frozen=True)
class PageConfig:
    """What the page is told. `probe`: look for WebGPU and WebNN too (costs some 100 ms).

    `faults`: it may be told to answer wrong on purpose.
    """

    threads: int
    message_bytes_max: int
    probe: bool
    faults: bool = False


@dataclass(frozen=True)
class BridgeEvent:
    """Something seen on a socket: `what` is one of hello, closed, console, worker_failed,
    visibility; `epoch` is the page's. After `closed` the page may open that socket again."""

    what: str
    epoch: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class FrameSeen(NamedTuple):
    """The header of a frame to or from the page: no numbers of anybody's. `at` is wall time in
    seconds, `tensors` are name, dtype and shape of each."""

    at: float
    way: str  # "to" or "from" the page
    kind: str
    op_id: str
    epoch: int
    step: int
    position: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
