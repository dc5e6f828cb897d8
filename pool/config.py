"""The options of a pool, and their validation. Validation has no side effects."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.driver.arguments import Gpu, PrivateNetwork
from actors.messages import HostConfig
from recovery.breaker import BreakerConfig, RegistryConfig
from recovery.errors import BadInput, LevelUnavailable
from recovery.history.config import HistoryConfig
from recovery.kinds import Backend, BrowserType, Level, detect_browser_type
from recovery.levels import BROWSERS_NEEDED, effective_level
from recovery.plan import strategy_order
from recovery.resources import ResourceLimits
from recovery.scaling import ScalingLimits
from recovery.supervision import RestartLimit

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_WHOLE_NUMBERS = {
    "max_connections": (1, 10_000),
    "max_recovery_attempts": (1, 100),
    "threads": (1, 64),
    "queue_max": (1, 10_000),
    "waiting_max": (1, 1_000_000),
    "message_bytes_max": (1024, 2 << 30),
}
_SECONDS: Mapping[str, tuple[float, float]] = {
    "deadline": (0.001, 86_400),
    "launch_seconds": (0.1, 86_400),
    "load_seconds": (0.1, 86_400),
    "hang_seconds": (0.1, 86_400),
    "lease": (1, 3600),
    "checkpoint_interval": (1, 86_400),
    "reconnect_seconds": (0.1, 600),
    "hedge_seconds": (0.001, 86_400),
    "probe_seconds": (0, 86_400),
}
_RECORDS: Mapping[str, type] = {
    "breaker": BreakerConfig,
    "model_breaker": BreakerConfig,
    "circuits": RegistryConfig,
    "resources": ResourceLimits,
    "history_limits": HistoryConfig,
    "restart_limit": RestartLimit,
}
_OPTIONAL = ("model_breaker",)
BACKENDS = ("auto", "wasm", "webgpu", "webnn")
_WORDS: Mapping[str, Sequence[str]] = {
    "level": [str(level) for level in Level],
    "backend": BACKENDS,
    "when_full": ["wait", "error"],
    "private_network": [str(choice) for choice in PrivateNetwork],
}


@dataclass(frozen=True)
class PoolConfig:
    """Every option of `BrowserPool`. Durations are seconds unless the name says otherwise."""

    browsers: Mapping[str, int] = field(default_factory=lambda: {"chrome": 1})
    name: str = ""  # "": generated; set one to `attach` to the pool
    level: str = "medium"  # recovery level: none, low, medium, high, critical
    strategy: str = "progressive"  # the order of recovery actions, see `recovery.plan`
    strict: bool = True  # refuse to start if `level` can't be met
    max_connections: int = 32  # maximum number of browsers, over all types
    max_recovery_attempts: int = 3  # per operation; 4 times that for lost connections and workers
    headless: bool = True  # False shows the browsers' windows
    # A network of their own for driver and browser: "auto" (where the system allows it), "off" (so
    # that other programs of this machine can reach them), "required" (else they are not launched).
    private_network: Literal["auto", "off", "required"] = "auto"
    backend: str = "auto"  # or "wasm", "webgpu", "webnn", forced for every model
    threads: int = 1  # wasm threads per session; more helps with few browsers on many cores
    deadline: float = 60.0  # default deadline of an operation
    queue_max: int = 16  # operations queued or running in one browser
    when_full: Literal["wait", "error"] = (
        "wait"  # what happens to an operation when all queues are full
    )
    waiting_max: int = 1024  # operations in flight per client; beyond, `PoolBusy` is raised
    message_bytes_max: int = 256 << 20  # of one request or answer
    launch_seconds: float = 60.0  # one browser, until its page is ready
    load_seconds: float = 120.0  # one model on one browser
    hang_seconds: float = 30.0  # a browser that takes longer for one operation is replaced
    hedge_quantile: float = 0.95  # of recent durations, then a second browser is asked (`high`)
    hedge_seconds: float = 1.0  # used instead, until 20 operations of a kind are done
    simulation: bool = False  # whether native onnxruntime may answer when no browser can
    probe_seconds: float = 60.0  # interval of known-answer probes of idle browsers; 0: never
    faults: bool = False  # whether faults may be injected; for tests only
    reconnect_seconds: float = 2.0  # within which a disconnected page must reconnect
    breaker: BreakerConfig = field(default_factory=BreakerConfig)  # of each browser
    model_breaker: BreakerConfig | None = None  # of each model on a browser; None: as `breaker`
    circuits: RegistryConfig = field(
        default_factory=RegistryConfig
    )  # limits on breakers open at once
    adaptive_scaling: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # (min, max)
    resources: ResourceLimits = field(default_factory=ResourceLimits)  # memory and recycling
    checkpoint_interval: float = 60.0  # between checkpoints of the control log
    history: bool = True  # keep a sample of each operation and recovery step
    history_limits: HistoryConfig = field(default_factory=HistoryConfig)  # rows, buffer, queries
    state_dir: str = ""  # for log and history; "": $TABPOOL_STATE, or the user's state directory
    lease: float = 15.0  # a client, worker or supervisor silent for longer is given up
    persistent: bool = False  # outlive the process that created the pool
    address: str | None = None  # a Ray cluster to join ("auto"); None starts one here
    dashboard: bool = True  # start Ray's dashboard, if Ray is started here
    restart_limit: RestartLimit = field(default_factory=RestartLimit)

    def checked(self) -> PoolConfig:
        """This configuration, if it is valid. Raises `BadInput` or `LevelUnavailable`."""
        own_name: Any = self.name
        if not isinstance(own_name, str) or (own_name and not _NAME.fullmatch(own_name)):
            raise _bad("name", "1 to 48 letters, digits, '.', '_' or '-'", own_name)
        for name, (low, high) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise _bad(name, f"a whole number from {low} to {high}", value)
        for name, (least, most) in _SECONDS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not least <= value <= most:
                raise _bad(name, f"seconds from {least} to {most}", value)
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise _bad(name, f"one of {', '.join(words)}", getattr(self, name))
        strategy_order(self.strategy)
        least, most = self._bounds()
        needed = BROWSERS_NEEDED[self.level_effective]
        if self.adaptive_scaling and not (needed <= least and most <= self.max_connections):
            all_in_all = (
                f"{needed} (for level {self.level_effective}) to {self.max_connections} "
                "(max_connections) browsers in all"
            )
            raise _bad("adaptive_scaling", all_in_all, (least, most))
        for name, kind in _RECORDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name in _OPTIONAL and value is None):
                raise _bad(name, f"a pool.{kind.__name__}", value)
        if self.persistent and self.address is None:
            raise _bad("persistent", "an `address`: Ray started here ends with this process", True)
        quantile: Any = self.hedge_quantile
        if not isinstance(quantile, float) or not 0.5 <= quantile < 1:
            raise _bad("hedge_quantile", "a number from 0.5 to below 1", quantile)
        for name in ("simulation", "faults"):
            flag: Any = getattr(self, name)
            if not isinstance(flag, bool):
                raise _bad(name, "True or False", flag)
        total = sum(self.kinds().values())
        if not 1 <= total <= self.max_connections:
            raise _bad("browsers", f"1 to {self.max_connections} (max_connections)", total)
        if self.strict and self.level_effective is not Level(self.level):
            needed = BROWSERS_NEEDED[Level(self.level)]
            raise LevelUnavailable(
                f"level {self.level!r} needs at least {needed} browsers, got browsers= with "
                f"{total}. Add browsers, choose level {self.level_effective!s}, or pass "
                "strict=False to run at that level (results report it as level_effective).",
                level=self.level,
            )
        return self

    def kinds(self) -> dict[BrowserType, int]:
        """Number of browsers by type. Raises `BadInput`."""
        found: dict[BrowserType, int] = {}
        wanted: Any = self.browsers
        if not isinstance(wanted, Mapping):
            raise _bad("browsers", 'a mapping such as {"chrome": 2, "firefox": 1}', wanted)
        for name, count in wanted.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise _bad(f"browsers[{name!r}]", "a whole number of browsers", count)
            kind = detect_browser_type(str(name))
            found[kind] = found.get(kind, 0) + count
        return found

    def scaling(self) -> dict[BrowserType, ScalingLimits]:
        """Minimum and maximum by type for adaptive scaling. Raises `BadInput`."""
        found: dict[BrowserType, ScalingLimits] = {}
        wanted: Any = self.adaptive_scaling
        if not isinstance(wanted, Mapping):
            raise _bad("adaptive_scaling", 'a mapping such as {"chrome": (1, 4)}', wanted)
        for name, bounds in wanted.items():
            whole = isinstance(bounds, tuple | list) and all(type(n) is int for n in bounds)
            if not whole or len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise _bad(f"adaptive_scaling[{name!r}]", "(least, most) with 1 <= least", bounds)
            found[detect_browser_type(str(name))] = ScalingLimits(*bounds)
        return found

    def _bounds(self) -> tuple[int, int]:
        """Minimum and maximum total number of browsers."""
        kinds, scaled = self.kinds(), self.scaling()
        least = most = 0
        for kind in kinds.keys() | scaled.keys():
            count = kinds.get(kind, 0)
            least += scaled[kind].minimum if kind in scaled else count
            most += max(count, scaled[kind].maximum) if kind in scaled else count
        return least, most

    @property
    def level_effective(self) -> Level:
        """The highest level, up to `level`, that this many browsers allow."""
        return effective_level(Level(self.level), sum(self.kinds().values()))

    def hosts(self) -> HostConfig:
        """The configuration of every browser."""
        gpu = Gpu.OFF if self.backend == "wasm" else Gpu.AUTO
        if self.backend in ("webgpu", "webnn") and not has_gpu():
            gpu = Gpu.SOFTWARE  # slow, but requested
        return HostConfig(
            headless=self.headless,
            private_network=PrivateNetwork(self.private_network),
            gpu=gpu,
            threads=self.threads,
            queue_max=self.queue_max,
            message_bytes_max=self.message_bytes_max,
            launch_seconds=self.launch_seconds,
            load_seconds=self.load_seconds,
            hang_seconds=self.hang_seconds,
            lease_seconds=self.lease,
            reconnect_seconds=self.reconnect_seconds,
            probe_seconds=self.probe_seconds,
            faults=self.faults,
            breaker=self.breaker,
            model_breaker=self.model_breaker,
            circuits=self.circuits,
        )


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU that browsers can use (macOS: always)."""
    return sys.platform == "darwin" or bool(glob.glob("/dev/dri/renderD*"))


def backend_order(wanted: str) -> tuple[Backend, ...]:
    """The back ends to try for a model: the forced one, or all, of which the fastest is used.

    Raises `BadInput` for an unknown back end.
    """
    if wanted not in BACKENDS:
        raise _bad("backend", f"one of {', '.join(BACKENDS)}", wanted)
    if wanted != "auto":
        return (Backend(wanted),)
    return (Backend.WEBNN, Backend.WEBGPU, Backend.WASM)


def _bad(option: str, expected: str, got: object) -> BadInput:
    return BadInput(f"{option}: expected {expected}, got {got!r}.", expected=expected, got=got)
