"""The options of a pool, and their validation. Validation has no side effects."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from actors.driver.arguments import Gpu, PrivateNetwork
from actors.messages import HostConfig
from recovery import checks
from recovery.breaker import BreakerConfig, RegistryConfig
from recovery.errors import LevelUnavailable
from recovery.history.config import HistoryConfig
from recovery.kinds import Backend, BrowserType, Level, detect_browser_type
from recovery.levels import BROWSERS_NEEDED, effective_level
from recovery.plan import strategy_order
from recovery.resources import ResourceLimits
from recovery.scaling import ScalingLimits
from recovery.supervision import RestartLimit

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_ADDRESS_MAX = 256
_BROWSERS_MAX = 10_000  # of one type; `max_connections` bounds the sum
_WHOLE_NUMBERS = {
    "max_connections": (1, 10_000),
    "max_recovery_attempts": (1, 100),
    "threads": (1, 64),
    "queue_max": (1, 10_000),
    "waiting_max": (1, 1_000_000),
    "message_bytes_max": (1024, 2 << 30),
}
SECONDS_MAX = 86_400
DEADLINE_MIN = 0.001
_SECONDS: Mapping[str, tuple[float, float]] = {
    "deadline": (DEADLINE_MIN, SECONDS_MAX),
    "launch_seconds": (0.1, SECONDS_MAX),
    "load_seconds": (0.1, SECONDS_MAX),
    "hang_seconds": (0.1, SECONDS_MAX),
    "lease": (1, 3600),
    "checkpoint_interval": (1, SECONDS_MAX),
    "reconnect_seconds": (0.1, 600),
    "hedge_seconds": (0.001, SECONDS_MAX),
    "probe_seconds": (0, SECONDS_MAX),
}
_FLAGS = (
    "strict",
    "headless",
    "simulation",
    "faults",
    "history",
    "persistent",
    "dashboard",
)
_RECORDS: Mapping[str, type] = {
    "breaker": BreakerConfig,
    "model_breaker": BreakerConfig,
    "circuits": RegistryConfig,
    "resources": ResourceLimits,
    "history_limits": HistoryConfig,
    "restart_limit": RestartLimit,
}
_OPTIONAL = ("model_breaker",)
# Of records that anybody may make, and that don't check themselves: the pool's own log makes some.
_COUNT_MAX = 10**9
_BYTES_MAX = 1 << 62
_FIELDS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "restart_limit": {
        "restarts_max": (0, _COUNT_MAX),
        "period_seconds": (0.0, SECONDS_MAX),
        "delay_first_seconds": (0.0, SECONDS_MAX),
        "delay_max_seconds": (0.0, SECONDS_MAX),
        "launches_failed_max": (1, _COUNT_MAX),
    },
    "resources": {
        "memory_low": (0.0, 1.0),
        "memory_min": (0.0, 1.0),
        "idle_seconds": (0.0, SECONDS_MAX),
        "recycle_seconds": (0.0, 365 * SECONDS_MAX),
        "recycle_operations": (0, _COUNT_MAX),
        "recycle_bytes": (0, _BYTES_MAX),
    },
}
BACKENDS = ("auto", "wasm", "webgpu", "webnn")
_WORDS: Mapping[str, Sequence[str]] = {
    "level": [str(level) for level in Level],
    "backend": BACKENDS,
    "when_full": ["wait", "error"],
    "private_network": [str(choice) for choice in PrivateNetwork],
}
_BROWSERS = 'a mapping such as {"chrome": 2, "firefox": 1}'
_SCALING = 'a mapping such as {"chrome": (1, 4)}'


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
        """This configuration with numbers as Python has them, if it is valid.

        Raises `BadInput` or `LevelUnavailable`.
        """
        plain = {**self._numbers(), **self._words(), **self._records()}
        changed = {name: value for name, value in plain.items() if value is not getattr(self, name)}
        if changed:
            return replace(self, **changed).checked()
        self._check_together()
        return self

    def _numbers(self) -> dict[str, Any]:
        wholes = {
            name: checks.whole(name, getattr(self, name), low, high)
            for name, (low, high) in _WHOLE_NUMBERS.items()
        }
        durations = {
            name: checks.seconds(name, getattr(self, name), least, most)
            for name, (least, most) in _SECONDS.items()
        }
        quantile = checks.number("hedge_quantile", self.hedge_quantile, 0.5, 1, below=True)
        return {**wholes, **durations, "hedge_quantile": quantile}

    def _words(self) -> dict[str, Any]:
        name = _unless_empty(checks.text, "name", self.name, 48)
        if name and not _NAME.fullmatch(name):
            raise checks.refusal("name", "1 to 48 letters, digits, '.', '_' or '-'", name)
        strategy_order(self.strategy)
        return {
            "name": name,
            "strategy": str(self.strategy),
            "state_dir": _unless_empty(checks.path, "state_dir", self.state_dir),
            "address": checks.optional(checks.text, "address", self.address, _ADDRESS_MAX),
            **{
                name: checks.word(name, getattr(self, name), words)
                for name, words in _WORDS.items()
            },
            **{name: checks.flag(name, getattr(self, name)) for name in _FLAGS},
        }

    def _records(self) -> dict[str, Any]:
        found = {}
        for name, kind in _RECORDS.items():
            value: Any = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                checks.instance(name, value, kind, f"a pool.{kind.__name__}")
            for field_name, (least, most) in _FIELDS.get(name, {}).items():
                known, whole = getattr(value, field_name), isinstance(least, int)
                check: Any = checks.whole if whole else checks.number
                plain = check(f"{name}.{field_name}", known, least, most)
                if plain is not known:
                    value = replace(value, **{field_name: plain})
            found[name] = value
        return found

    def _check_together(self) -> None:
        """What one option allows may depend on others."""
        least, most = self._bounds()
        needed = BROWSERS_NEEDED[self.level_effective]
        if self.adaptive_scaling and not (needed <= least and most <= self.max_connections):
            all_in_all = (
                f"{needed} (for level {self.level_effective}) to {self.max_connections} "
                "(max_connections) browsers in all"
            )
            raise checks.refusal("adaptive_scaling", all_in_all, (least, most))
        if self.persistent and self.address is None:
            why = "an `address`: Ray started here ends with this process"
            raise checks.refusal("persistent", why, True)
        total = sum(self.kinds().values())
        if not 1 <= total <= self.max_connections:
            raise checks.refusal(
                "browsers", f"1 to {self.max_connections} (max_connections)", total
            )
        if self.strict and self.level_effective is not Level(self.level):
            needed = BROWSERS_NEEDED[Level(self.level)]
            raise LevelUnavailable(
                f"level {self.level!r} needs at least {needed} browsers, got browsers= with "
                f"{total}. Add browsers, choose level {self.level_effective!s}, or pass "
                "strict=False to run at that level (results report it as level_effective).",
                level=self.level,
            )

    def kinds(self) -> dict[BrowserType, int]:
        """Number of browsers by type. Raises `BadInput`."""
        found: dict[BrowserType, int] = {}
        for name, given in checks.mapping("browsers", self.browsers, _BROWSERS).items():
            count = checks.whole(f"browsers[{name!r}]", given, 0, _BROWSERS_MAX)
            kind = detect_browser_type(str(name))
            found[kind] = found.get(kind, 0) + count
        return found

    def scaling(self) -> dict[BrowserType, ScalingLimits]:
        """Minimum and maximum by type for adaptive scaling. Raises `BadInput`."""
        found: dict[BrowserType, ScalingLimits] = {}
        wanted = checks.mapping("adaptive_scaling", self.adaptive_scaling, _SCALING)
        for name, bounds in wanted.items():
            option = f"adaptive_scaling[{name!r}]"
            if not isinstance(bounds, tuple | list) or len(bounds) != 2:
                raise checks.refusal(option, "(least, most)", bounds)
            least = checks.whole(f"{option}, the least", bounds[0], 1, _BROWSERS_MAX)
            most = checks.whole(f"{option}, the most", bounds[1], least, _BROWSERS_MAX)
            found[detect_browser_type(str(name))] = ScalingLimits(least, most)
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


def _unless_empty(check: Callable[..., str], name: str, value: Any, *more: Any) -> str:
    empty = isinstance(value, str) and not value
    return "" if empty else check(name, value, *more)


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU that browsers can use (macOS: always)."""
    return sys.platform == "darwin" or bool(glob.glob("/dev/dri/renderD*"))


def backend_order(wanted: str) -> tuple[Backend, ...]:
    """The back ends to try for a model: the forced one, or all, of which the fastest is used.

    Raises `BadInput` for an unknown back end.
    """
    wanted = checks.word("backend", wanted, BACKENDS)
    if wanted != "auto":
        return (Backend(wanted),)
    return (Backend.WEBNN, Backend.WEBGPU, Backend.WASM)
