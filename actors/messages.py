"""What passes between supervisor, browsers and clients: frozen, picklable records.

This module must not do anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.driver.arguments import Gpu
from recovery.breaker import BreakerConfig, RegistryConfig, Snapshot
from recovery.failures import Failure
from recovery.kinds import Backend, Readiness
from recovery.records import BrowserFacts, HostRef, HostStatus, NumericId
from recovery.resources import BrowserLoad, NodeLoad
from sharding.sequences.caches import StepOrder


@dataclass(frozen=True)
class HostConfig:
    """What every browser of a pool is set to."""

    headless: bool = True
    gpu: Gpu = Gpu.OFF
    threads: int = 1  # wasm threads of a session
    queue_max: int = 16  # operations admitted and not yet answered
    message_bytes_max: int = 256 << 20
    launch_seconds: float = 60.0  # from the order to a page that is ready
    load_seconds: float = 120.0  # one model, warm-up included
    hang_seconds: float = 30.0  # a page that works on one operation for longer hangs
    ping_seconds: float = 20.0  # a main thread that is silent for longer is hung
    ping_interval_seconds: float = 2.0
    lease_seconds: float = 15.0  # without its supervisor for longer, the browser ends itself
    reconnect_seconds: float = 2.0  # that a page whose sockets closed has to open them again
    breaker: BreakerConfig = field(default_factory=BreakerConfig)  # of the browser
    model_breaker: BreakerConfig | None = None  # of each model on it; None: as the browser's
    circuits: RegistryConfig = field(default_factory=RegistryConfig)  # how many may be open
    answers_kept_max: int = 64  # answered operations remembered, so that a repeat is not run again
    answers_kept_bytes_max: int = 64 << 20
    probe_seconds: float = 60.0  # an idle browser is asked a known answer so often; 0: never
    faults: bool = False  # whether faults may be injected into the page, for tests
    warm_runs: int = 5  # of each model as it is loaded, within
    warm_ms: float = 1500.0


@dataclass(frozen=True)
class LaunchOrder:
    """Start, or start again, as this incarnation. `port`: the slot's, 0 for any.

    `warm`: touch the runtime before the browser counts as ready. A repair leaves that out: its
    profile holds compiled code, and somebody may be waiting. `breakers`: where the circuit
    breakers of the slot (by model; the empty name is the browser's own) were when another worker
    had it, and `death`, what ended that worker: the breakers have not heard of it yet. `repair`
    names what this launch is to repair the browser by, for their metrics; empty: nothing is broken.
    """

    ref: HostRef
    term: int
    port: int = 0
    arguments: tuple[str, ...] = ()
    preferences: Mapping[str, bool | int | str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    warm: bool = True
    breakers: Mapping[str, Snapshot] = field(default_factory=dict)
    death: Failure | None = None
    repair: str = ""


@dataclass(frozen=True)
class LaunchReport:
    facts: BrowserFacts
    port: int
    seconds: Mapping[str, float]  # by phase, for the timeline
    pids: Mapping[str, int]  # "driver", "browser", "reaper", "worker"
    profile: str
    node: str = ""
    address: str = ""  # of the data plane, for clients on the same node
    data_token: str = field(default="", repr=False)
    driver_url: str = ""  # the WebDriver session, for diagnosis and benchmarks
    session_id: str = field(default="", repr=False)


@dataclass(frozen=True)
class RunRequest:
    """One operation for one incarnation. `seconds` is what is left until its deadline."""

    op_id: str
    ref: HostRef
    model: str
    seconds: float
    digest: str = ""  # of the model that is meant; empty: whichever has the name
    last: bool = False  # the caller will not try again: should this fail, the operation has
    stage: StepOrder | None = None  # a step of a sequence; None: one run without caches


@dataclass(frozen=True)
class RunReply:
    """The answer, or why there is none. Exactly one of `answered`, `failure`, `busy` is set.

    `outputs` are the answer's arrays by name; None if there is no answer.
    """

    status: HostStatus
    outputs: Any = None
    answered: bool = False
    failure: Failure | None = None
    busy: bool = False
    backend: Backend | None = None
    in_page_ms: float = 0.0
    host_ms: float = 0.0  # from admission to the page's reply
    queued: int = 0  # operations that were ahead at admission
    repeated: bool = False  # answered from the cache of answered operations

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in (self.outputs or {}).values())


@dataclass(frozen=True)
class Usage:
    """What a host and its machine carry, for the decisions of `recovery.resources`."""

    browser: BrowserLoad
    node: NodeLoad


@dataclass(frozen=True)
class HostEvent:
    """News from a host: an incarnation failed, or circuit breakers moved. Exactly one is set.

    A connection failure whose scope is the page leaves the incarnation alive (it can be told to
    `reconnect`); every other failure ends it. `seq` numbers a worker's events from 1 on.
    """

    ref: HostRef
    seq: int
    failure: Failure | None = None
    breakers: Mapping[str, Snapshot] | None = None


@dataclass(frozen=True)
class PageDiagnostics:
    """What a worker knows of its page, for whoever looks into a failure. `screenshot` is a PNG,
    empty if the page can't be seen any more; `frames` are headers, `actors.bridge.FrameSeen`."""

    ref: HostRef
    readiness: Readiness
    visibility: str = ""
    console: tuple[str, ...] = ()
    frames: tuple[tuple[Any, ...], ...] = ()
    cause: Failure | None = None
    screenshot: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class HostReport:
    """What a worker has, for a supervisor that has just begun its term.

    `digests` are those of the loaded models. `launch` is set while the incarnation is ready,
    `cause` when it is over or its page out of touch. Events up to `seq` are included.
    """

    ref: HostRef
    readiness: Readiness
    seq: int = 0
    launch: LaunchReport | None = None
    models: Mapping[str, NumericId] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    cause: Failure | None = None
    breakers: Mapping[str, Snapshot] = field(default_factory=dict)
