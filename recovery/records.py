"""The small frozen records that every room speaks in. All are picklable.

This module must not hold behaviour beyond what a record derives from itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recovery.kinds import Backend, BrowserType, Readiness


@dataclass(frozen=True, order=True)
class HostRef:
    """One incarnation of one browser: a restarted browser has the next epoch.

    `node` and `address` (of its data plane) say where to find it, not which one it is.
    """

    browser_id: str
    epoch: int = 0
    node: str = field(default="", compare=False)
    address: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.browser_id}#{self.epoch}"


@dataclass(frozen=True)
class NumericId:
    """What decides the bits of an answer: hosts with equal ids that are `exact` agree in each."""

    ort_build: str
    backend: Backend
    threads: int = 1
    simd: bool = True
    adapter: str = ""

    @property
    def exact(self) -> bool:
        """Whether sums come out in one order: on one thread they do. GPUs need not, and an
        adapter's name does not tell its driver."""
        return self.backend in (Backend.WASM, Backend.NATIVE) and self.threads == 1


@dataclass(frozen=True)
class HostStatus:
    """What a host says of itself, sent with every reply.

    `browser` is None for the native runtime. `queue` counts operations that its page has not
    finished; `queue_max` is the bound that admission holds; `models` maps a loaded model to its
    numeric id; `served` counts answers.
    `blocked` holds, by model (the empty name stands for all), for how many seconds a circuit
    breaker goes on refusing; infinity until somebody switches it. `memory_bytes` is what its
    process tree had resident when last looked at, 0 if never.
    """

    ref: HostRef
    browser: BrowserType | None
    readiness: Readiness
    queue: int = 0
    queue_max: int = 0
    models: Mapping[str, NumericId] = field(default_factory=dict)
    served: int = 0
    term: int = 0
    blocked: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0

    def can_take(self, model: str) -> bool:
        blocked = "" in self.blocked or model in self.blocked
        return self.readiness is Readiness.READY and model in self.models and not blocked

    @property
    def full(self) -> bool:
        return self.queue >= self.queue_max


@dataclass(frozen=True)
class BrowserFacts:
    """What one launched browser really has, as its own page reported it."""

    product: str
    version: str
    driver: str = ""
    isolated: bool = False
    wasm_simd: bool = False
    wasm_threads: bool = False
    threads: int = 1
    webgpu: bool = False
    webgpu_adapter: str = ""
    webgpu_software: bool = False
    webgpu_features: tuple[str, ...] = ()
    webnn: bool = False
    webnn_note: str = ""
    user_agent: str = ""
