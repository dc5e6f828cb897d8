"""Small frozen records shared by all packages. All are picklable.

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
    """What determines the bits of an answer: hosts with equal, `exact` ids agree bit for bit."""

    ort_build: str
    backend: Backend
    threads: int = 1
    simd: bool = True
    adapter: str = ""

    @property
    def exact(self) -> bool:
        """Whether sums are computed in a fixed order: true on one thread. GPUs need not do so, and
        an adapter's name does not identify its driver."""
        return self.backend in (Backend.WASM, Backend.NATIVE) and self.threads == 1


@dataclass(frozen=True)
class HostStatus:
    """The state that a host reports, sent with every reply.

    `browser` is None for the native runtime. `queue` counts operations that its page has not
    finished; `queue_max` is the limit of admission; `models` maps a loaded model to its
    numeric id; `served` counts answers.
    `blocked` holds, by model (the empty name stands for all), for how many more seconds
    a circuit breaker refuses; infinity if it was switched by hand. `memory_bytes` is the resident
    memory of its process tree when last measured, 0 if never.
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
        """Whether it serves the model, and no circuit breaker refuses."""
        return self.serves(model) and "" not in self.blocked and model not in self.blocked

    def serves(self, model: str) -> bool:
        """Whether it is ready and has the model loaded."""
        return self.readiness is Readiness.READY and model in self.models

    @property
    def full(self) -> bool:
        return self.queue >= self.queue_max


@dataclass(frozen=True)
class BrowserFacts:
    """The capabilities of one launched browser, as its own page reported them."""

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
    private_network: bool = False  # nothing but loopback, and out of reach of other processes
    network_note: str = ""  # why there is none
