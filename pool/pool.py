"""`BrowserPool`: the public API, which delegates to its parts.

The parts are the connection, the model catalog, the operation runner, the browsers, the breakers
and the diagnosis. This module must not start, stop or repair a browser: the supervisor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from actors.messages import PageDiagnostics
from pool.background import BackgroundTasks
from pool.blocking import BlockingPool
from pool.breakers import Breakers
from pool.browsers import Browsers
from pool.bundles import collect, write_bundle
from pool.config import SECONDS_MAX, PoolConfig
from pool.connection import Connection
from pool.diagnosis import Diagnosis
from pool.execution.runner import OperationRunner
from pool.execution.sequence import GeneratedToken, SequenceView
from pool.models.catalog import ModelCatalog
from pool.models.registry import ModelEntry
from pool.operations.registry import OperationRegistry
from pool.results import Result
from pool.telemetry import telemetry
from pool.view import PoolView, view_of
from recovery import checks
from recovery.control import PoolState, Repair
from recovery.errors import BadInput, PoolClosed, PoolError
from recovery.failures import Failure
from recovery.faults import Fault, Injected
from recovery.history.questions import checked_options
from recovery.kinds import Level, ModelType, RecoveryLevel
from recovery.records import HostStatus

_CHANGE_SECONDS_MAX = 5.0
_WHY_MAX = 2000  # characters


class BrowserPool:
    """A pool of browsers that runs operations.

    Options are the fields of `PoolConfig`. Use it as an async context manager, or call `open`
    and `close`; `.blocking()` gives the same without `await`.
    """

    def __init__(self, browsers: Mapping[str, int] | None = None, **options: Any) -> None:
        owner = options.pop("_owner", True)
        known = {f.name for f in fields(PoolConfig)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise BadInput(
                f"BrowserPool has no option {', '.join(unknown)}; expected any of "
                f"{', '.join(sorted(known))}.",
                expected=sorted(known),
                got=unknown,
            )
        if browsers is not None:
            mapping = isinstance(browsers, Mapping)
            options["browsers"] = dict(browsers) if mapping else browsers
        config = PoolConfig(**options).checked()
        config = config if config.name else replace(config, name=f"pool-{secrets.token_hex(3)}")
        self.operations = OperationRegistry()  # where further operations are registered
        self._tasks = BackgroundTasks()
        self._connection = Connection(config, secrets.token_hex(8), owner=owner)
        self._catalog = ModelCatalog(self._connection)
        self._runner = OperationRunner(
            self._connection, self._catalog, self.operations, self._tasks
        )
        self._browsers = Browsers(self._connection)
        self._breakers = Breakers(self._connection, self._browsers)
        self._diagnosis = Diagnosis(self._connection, self._browsers)

    @property
    def name(self) -> str:
        """The pool's name, as `BrowserPool.attach` takes it."""
        return self._connection.config.name

    @property
    def config(self) -> PoolConfig:
        """The pool's configuration; after `attach`, with the settings that its creator fixed."""
        return self._connection.config

    def __repr__(self) -> str:
        phases = self._connection.phases().items()
        counted = ", ".join(f"{count} {phase}" for phase, count in phases) or "not open"
        return f"<BrowserPool {self.name} [{counted}; {self._runner.in_flight} in flight]>"

    # -- opening and closing ----------------------------------------------------------------------

    async def open(self) -> Self:
        """Start every browser, or (after `attach`) join the running pool.

        Raises `SetupError` (naming what to install) or `LaunchFailed` when, in a strict pool,
        any browser can't be started, or when none can.
        """
        if self._connection.is_open:
            raise PoolClosed("this pool is already open")
        try:
            await self._connection.open()
            await self._runner.start_recording(await self._connection.open_stores())
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Stop the pool and all its processes. If attached or `persistent`, only disconnect.

        Operations in flight end as failed.
        """
        await self._leave(stop=self._connection.ends_the_pool)

    async def shutdown(self) -> None:
        """Stop the pool for all clients, also from an attached one."""
        await self._leave(stop=True)

    async def _leave(self, *, stop: bool) -> None:
        await self._tasks.cancel()
        await self._runner.stop_recording()
        self._catalog.clear()
        await self._connection.leave(stop=stop)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @classmethod
    def attach(cls, name: str, *, address: str = "auto", **options: Any) -> BrowserPool:
        """A pool that another process created as `name` on the Ray cluster at `address`.

        Open it as usual. Closing it leaves the pool running. The pool's models can be used.
        """
        checks.text("name", name, 48, "the name of a pool")
        checks.text("address", address, 256, "the address of a Ray cluster")
        return cls(name=name, address=address, _owner=False, **options)

    def blocking(self) -> BlockingPool:
        """The same pool without `await`: see `pool.blocking.BlockingPool`."""
        return BlockingPool(self)

    # -- models -----------------------------------------------------------------------------------

    async def load(
        self,
        name: str,
        path: str | Path,
        *,
        type: str | ModelType | None = None,  # noqa: A002
        backend: str | None = None,
        example: Mapping[str, Any] | None = None,
        shards: int | None = None,
        strategy: str | None = None,
    ) -> ModelEntry:
        """Load the model at `path` (a folder or an .onnx file) on every browser, as `name`.

        `type` overrides the detected type, `backend` the pool's. `example` are valid inputs of
        the model, used for warm-up and for probes; without, inputs are generated. With `shards`
        the model is cut by layer as `strategy` says (by default `layer_based`, see
        `sharding.cutting.partition`), and each browser loads a part; `path` may also be a folder
        that `tabpool shard` wrote. With `strategy="component_based"` it is a folder of several
        models that work together: each is loaded as `name@ITS_NAME` on a browser of its own, and
        can also be called by that name. Returns when every browser has loaded and warmed up its
        models. Raises `NotAModel` or `BadInput` before any browser is used, `PageError` when no
        browser can load it, and `LevelUnavailable` when too few can.
        """
        return await self._catalog.load(
            name,
            path,
            type=type,
            backend=backend,
            example=example,
            shards=shards,
            strategy=strategy,
        )

    async def order_again(self, name: str) -> None:
        """Repeat the order to load a model; changes nothing where it is loaded.

        Raises `UnknownModel`, and `PoolError` while the order can't be logged.
        """
        await self._catalog.order_again(name)

    async def unload(self, name: str) -> None:
        """Unload a model from every browser. Raises `UnknownModel`."""
        await self._catalog.unload(name)

    def models(self) -> tuple[str, ...]:
        """The names of the loaded models."""
        return self._catalog.names()

    # -- operations -------------------------------------------------------------------------------

    async def run_with_recovery(
        self,
        model: str,
        op: str,
        inputs: Mapping[str, Any],
        *,
        deadline: float | None = None,
        op_id: str | None = None,
        level: str | None = None,
        simulation: bool | None = None,
    ) -> Result:
        """Run one operation and return its result, recovering from failures.

        `deadline` is in seconds from now. `op_id` names the operation in logs and results; by
        default it is generated. `level` is that of the pool or a lower one; `simulation`
        False forbids a native answer where the pool allows one. Bad input raises a `CallerError`
        before any browser is touched, a pool that is full `PoolBusy`; every other failure is a
        `Result` with `success=False`, whose `outputs` raise `OperationFailed`.
        """
        return await self._runner.run(
            model, op, inputs, deadline=deadline, op_id=op_id, level=level, simulation=simulation
        )

    async def stream(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        op: str = "generate",
        op_id: str | None = None,
        level: str | None = None,
        on_result: Callable[[Result], None] | None = None,
        on_begin: Callable[[Callable[[], SequenceView]], None] | None = None,
    ) -> AsyncGenerator[GeneratedToken]:
        """The tokens of `generate` as they are generated, recovering from failures.

        `inputs` as for `run_with_recovery(model, "generate", inputs)`: `text` or `input_ids`, and
        any of max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos, logits. Stop the
        iteration (`aclose`, or leave an `async with aclosing(...)`) to cancel. `on_result` gets
        the result at the end, `on_begin` a function that returns the current `SequenceView`. `op`
        names another streaming operation. Raises `SequenceLost` if it can't continue; resume it
        with the prompt's and the received tokens as `input_ids`, and the same seed.
        """
        sequence = self._runner.stream(
            model,
            op,
            inputs,
            op_id=op_id,
            level=level,
            on_result=on_result,
            on_begin=on_begin,
        )
        async with contextlib.aclosing(sequence) as tokens:
            async for token in tokens:
                yield token

    # -- browsers ---------------------------------------------------------------------------------

    def hosts(self) -> tuple[HostStatus, ...]:
        """The last known status of each browser; sends no request."""
        return self._browsers.hosts()

    async def changed(self, seconds: float = _CHANGE_SECONDS_MAX) -> None:
        """Return when the pool's state has changed, or after `seconds`."""
        seconds = checks.seconds("seconds", seconds, 0, SECONDS_MAX)
        await self._connection.routing.change(seconds)

    async def drain(self, browser_id: str) -> None:
        """Take a browser out of service: it finishes its operations and is stopped."""
        await self._browsers.drain(browser_id)

    async def scale(self, browsers: Mapping[str, int]) -> None:
        """Scale each named type to this many browsers: start missing ones, drain surplus ones.

        Types that are not named stay as they are. Returns when done.
        """
        await self._browsers.scale(browsers)

    async def repair(
        self, browser_id: str, failure: Failure, *, start: RecoveryLevel | None = None
    ) -> Repair:
        """Recover a browser from a failure that the caller detected; see `recover_browser`.

        `start` is the first rung, if not the usual one. Returns the completed repair.
        Raises `BadInput` if the browser is not in service.
        """
        return await self._browsers.repair(browser_id, failure, start)

    # -- circuit breakers -------------------------------------------------------------------------

    async def breakers(self) -> dict[str, Any]:
        """Metrics of the circuit breakers: totals, and those of each breaker.

        `circuits` holds, for each browser and each model on it, what
        `recovery.breaker.CircuitBreaker.get_metrics` returns; its `recovery_history` names what
        ended each outage. A browser that is being replaced is left out.
        """
        return await self._breakers.metrics()

    async def switch_breaker(self, browser_id: str, to: str, *, model: str = "") -> None:
        """Set a browser's circuit breaker by hand, or that of `model` on it.

        `to`: "force_open" (refuse everything), "disable" (admit everything, still counting), or
        "reset" (close it and clear its counts). The setting survives restarts of the browser.
        Raises `BadInput` for another word, a browser not in service, a model it does not have.
        """
        await self._breakers.switch(browser_id, to, model)

    # -- state and history ------------------------------------------------------------------------

    async def state(self) -> PoolView:
        """Browsers, models, repairs, queues and memory, as they are now."""
        connection = self._connection
        supervisor = connection.supervisor
        launches, memory = await asyncio.gather(supervisor.reports(), supervisor.memory())
        return view_of(
            await supervisor.table(connection.client),
            name=self.name,
            wanted_level=Level(connection.config.level),
            level=connection.level,
            hosts=self.hosts(),
            launches=launches,
            memory=memory,
            dashboard_url=connection.dashboard_url,
            operations=self._runner.counts,
        )

    async def control(self) -> PoolState:
        """The supervisor's state as it is now: browsers, repairs, success counts of the rungs."""
        return await self._browsers.control()

    async def get_recovery_statistics(self, since: float | None = None) -> dict[str, Any]:
        """Statistics of operations and recovery steps, by strategy, rung and category.

        `since` is wall time in seconds. Simulation is counted separately. Raises `PoolClosed` if
        this pool keeps no history.
        """
        statistics: dict[str, Any] = await self.history("statistics", since=since)
        return statistics

    async def history(self, question: str, **options: Any) -> Any:
        """Query the history: a method of `recovery.history.tracker.PerformanceHistoryTracker`, or
        a view, whose rows are returned.

        The views (`recovery_performance`, `strategy_scores`, `adaptive_timeouts`,
        `progressive_recovery`) take `limit=` and columns that must equal a value:
        `await pool.history("strategy_scores", error_type="crash")`. Raises `BadInput` for
        an unknown question or option, `PoolClosed` if this pool keeps no history.
        """
        options = checked_options(question, options)
        self._connection.require()
        if self._connection.history is None:
            raise PoolClosed("this pool keeps no history (history=False, or it could not start)")
        return await self._connection.history.ask(question, **options)

    async def export_telemetry(self) -> dict[str, Any]:
        """A snapshot of the pool as plain JSON, for monitoring or a bug report.

        Browsers with their circuits and memory, models, repairs, this client's counts, the
        machine, and (where there is one) the history's statistics.
        """
        found = telemetry(await self.state(), self.models())
        if self._connection.history is not None:
            with contextlib.suppress(PoolError):
                found["statistics"] = await self.get_recovery_statistics()
        return found

    @property
    def log_folder(self) -> Path | None:
        """The folder of the control log, if this client created the pool and it keeps one."""
        return self._connection.log_folder

    # -- diagnosis and fault injection ------------------------------------------------------------

    async def bundle(
        self,
        result: Result,
        inputs: Mapping[str, Any],
        path: str | Path,
        *,
        with_data: bool = False,
        why: str = "failed",
        chaos: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a failure bundle of an operation to one file, for `tabpool replay`.

        `inputs` are those of the operation: only names, shapes and hashes are kept, unless
        `with_data`. What is no longer available (a dead page's screenshot) is left out. Raises
        `UnknownModel`, and `OSError` if the file can't be written.
        """
        checks.instance("result", result, Result, "a Result of this pool")
        inputs = checks.mapping("inputs", inputs, "the operation's inputs by name")
        target = Path(checks.path("path", path))
        chosen: Any = {
            "why": checks.text("why", why, _WHY_MAX),
            "with_data": checks.flag("with_data", with_data),
            "chaos": checks.optional(checks.mapping, "chaos", chaos, "a mapping, or None"),
        }
        entry = self._catalog.entry(result.model)
        found = await collect(self, result, inputs, entry=entry, config=self.config, **chosen)
        return await asyncio.to_thread(write_bundle, found, target)

    async def diagnose(self, browser_id: str, *, screenshot: bool = True) -> PageDiagnostics:
        """Diagnostics of a browser's page: console, last frames' headers, a screenshot.

        Raises `BadInput` for a browser that is not in service, `BrowserLost` for one that died.
        """
        return await self._diagnosis.diagnose(browser_id, screenshot=screenshot)

    async def control_pids(self) -> Mapping[str, int]:
        """Process ids of the pool's supervisor and history, on the head node."""
        return await self._diagnosis.control_pids()

    async def inject(self, browser_id: str, fault: Mapping[str, Any]) -> None:
        """Inject a fault into a browser's page (see `actors.faults`), if `faults=True`.

        Raises `BadInput` for a browser that is not in service, `PageError` without `faults=True`.
        """
        await self._diagnosis.inject(browser_id, fault)

    async def inject_fault(self, fault: Fault, *, gated: bool = True) -> Injected:
        """Inject a fault into a browser or the supervisor, if the pool has `faults=True`.

        `recovery.faults` says what each fault does, and which level survives it. For a target that
        has been replaced, its replacement is hit. `gated`: refuse a browser whose circuit breaker
        is open. Raises `FaultRefused`, or `BadInput` for a target not in service.
        """
        return await self._diagnosis.inject_fault(fault, gated=gated)
