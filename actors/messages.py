"""What passes between supervisor, browsers and clients: frozen, picklable records.

This module must not do anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.driver.arguments import Gpu, PrivateNetwork
from recovery.breaker import BreakerConfig, RegistryConfig, Snapshot
from recovery.failures import Failure
from recovery.kinds import Backend, Readiness
from recovery.records import BrowserFacts, HostRef, HostStatus, NumericId
from recovery.resources import BrowserLoad, NodeLoad
from sharding.sequences.caches import StepOrder


@dataclass(frozen=True)
class HostConfig:
    """The configuration of every browser of a pool."""

    headless: bool = True
    private_network: PrivateNetwork = PrivateNetwork.AUTO
    gpu: Gpu = Gpu.OFF
    threads: int = 1  # wasm threads of a session
    queue_max: int = 16  # operations queued or running
    message_bytes_max: int = 256 << 20
    launch_seconds: float = 60.0  # from the order to a page that is ready
    load_seconds: float = 120.0  # one model, warm-up included
    hang_seconds: float = 30.0  # a page that takes longer for one operation counts as hung
    ping_seconds: float = 20.0  # a main thread that does not answer for longer counts as hung
    ping_interval_seconds: float = 2.0
    lease_seconds: float = 15.0  # a browser not contacted by its supervisor for longer ends itself
    reconnect_seconds: float = 2.0  # within which a page must reopen closed sockets
    breaker: BreakerConfig = field(default_factory=BreakerConfig)  # of the browser
    model_breaker: BreakerConfig | None = None  # of each model on it; None: as the browser's
    circuits: RegistryConfig = field(default_factory=RegistryConfig)  # limits on open breakers
    answers_kept_max: int = 64  # cached answers, returned for repeated operation ids
    answers_kept_bytes_max: int = 64 << 20
    probe_seconds: float = 60.0  # interval of known-answer probes of an idle browser; 0: never
    faults: bool = False  # whether faults may be injected into the page, for tests
    warm_runs: int = 5  # at each load of a model, at most, within
    warm_ms: float = 1500.0


@dataclass(frozen=True)
class LaunchOrder:
    """Start or restart as this incarnation. `port`: the slot's, 0 for any.

    `warm`: warm up the runtime before the browser counts as ready. Repairs skip that: their
    profile holds compiled code. `breakers`: the state of the slot's circuit breakers (by model; the
    empty name is the browser's own) in the previous worker, and `death`, the failure that ended
    that worker, which the breakers have not counted yet. `repair` names the recovery action of this
    launch, for their metrics; empty: it is no repair.
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
    """One operation for one incarnation. `seconds` is the time left until its deadline."""

    op_id: str
    ref: HostRef
    model: str
    seconds: float
    digest: str = ""  # of the model; empty: any model of that name
    last: bool = False  # the last attempt: if it fails, the operation fails
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
    """Load of a host and its machine, for the decisions of `recovery.resources`."""

    browser: BrowserLoad
    node: NodeLoad


@dataclass(frozen=True)
class HostEvent:
    """An event of a host: an incarnation failed, or circuit breakers changed state. Exactly one is
    set.

    A connection failure whose scope is the page leaves the incarnation running (it may
    `reconnect`); every other failure ends it. `seq` numbers a worker's events from 1 on.
    """

    ref: HostRef
    seq: int
    failure: Failure | None = None
    breakers: Mapping[str, Snapshot] | None = None


@dataclass(frozen=True)
class PageDiagnostics:
    """Diagnostics of a worker's page. `screenshot` is a PNG, empty if none can be
    taken; `frames` are headers, `actors.bridge.FrameSeen`."""

    ref: HostRef
    readiness: Readiness
    visibility: str = ""
    console: tuple[str, ...] = ()
    frames: tuple[tuple[Any, ...], ...] = ()
    cause: Failure | None = None
    screenshot: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class HostReport:
    """The state of a worker, for a supervisor at the start of its term.

    `digests` are those of the loaded models. `launch` is set while the incarnation is ready,
    `cause` when it has ended or its page is disconnected. Events up to `seq` are included.
    """

    ref: HostRef
    readiness: Readiness
    seq: int = 0
    launch: LaunchReport | None = None
    models: Mapping[str, NumericId] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    cause: Failure | None = None
    breakers: Mapping[str, Snapshot] = field(default_factory=dict)
