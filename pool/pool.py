"""`BrowserPool`: the front door, a face that delegates.

What it is given is checked and done by its parts: the connection, the model catalog, the runner of
operations, the browsers, the diagnosis. Nothing here starts, stops or repairs a browser: that is
the supervisor's business.
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
from pool.config import PoolConfig
from pool.connection import Connection
from pool.diagnosis import Diagnosis
from pool.models.catalog import ModelCatalog
from pool.models.registry import ModelEntry
from pool.operations.registry import OperationRegistry
from pool.results import Result
from pool.running import OperationRunner
from pool.sequence import GeneratedToken, SequenceView
from pool.telemetry import telemetry
from pool.view import PoolView, view_of
from recovery.control import PoolState, Repair
from recovery.errors import BadInput, PoolClosed, PoolError
from recovery.failures import Failure
from recovery.faults import Fault, Injected
from recovery.kinds import Level, ModelType, RecoveryLevel
from recovery.records import HostStatus

_CHANGE_SECONDS_MAX = 5.0


class BrowserPool:
    """A pool of browsers that answers operations.

    Options are the fields of `PoolConfig`. Use it as an async context manager, or call `open`
    and `close`; `.blocking()` gives the same without `await`.
    """

    def __init__(self, browsers: Mapping[str, int] | None = None, **options: Any) -> None:
        owner = options.pop("_owner", True)
        known = {f.name for f in fields(PoolConfig)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise BadInput(
                f"BrowserPool has no option {', '.join(unknown)}; it has "
                f"{', '.join(sorted(known))}.",
                expected=sorted(known),
                got=unknown,
            )
        if browsers is not None:
            options["browsers"] = dict(browsers)
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
        """What `BrowserPool.attach` takes."""
        return self._connection.config.name

    @property
    def config(self) -> PoolConfig:
        """What the pool is set to; of one that was joined, with what its maker has fixed."""
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
            raise PoolClosed("this pool is open already")
        try:
            await self._connection.open()
            await self._runner.start_recording(await self._connection.open_stores())
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Stop the pool; nothing of it is left behind. Leave it, if attached or `persistent`.

        Operations under way end as failed.
        """
        await self._leave(stop=self._connection.ends_the_pool)

    async def shutdown(self) -> None:
        """Stop the pool for everybody, also from an attached client."""
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
        """A pool that another process made under `name` on the Ray cluster at `address`.

        Open it as usual. Closing it leaves the pool running; its models are known here.
        """
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

        `type` overrides what is detected, `backend` the pool's. `example` are inputs that suit
        the model: it is warmed with them, and probes compare what it makes of them; without,
        inputs are made up. With `shards` the model is cut by layer as `strategy` says (by default
        `layer_based`, see `sharding.cutting.partition`), and each browser loads a part; `path` may
        also be a folder that `tabpool shard` made. With `strategy="component_based"` it is a
        folder of several models that work together: each is loaded as `name@ITS_NAME` on a
        browser of its own, and can be asked by that name, too. Returns when every browser has
        what it should, warm. Raises `NotAModel` or `BadInput` before any browser is touched,
        `PageError` when no browser can load it, and `LevelUnavailable` when too few can.
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
        """Have the supervisor see that a loaded model is where it should be; usually it is.

        Raises `UnknownModel`, and `PoolError` while the order can't be logged.
        """
        await self._catalog.order_again(name)

    async def unload(self, name: str) -> None:
        """Take a model out of every browser. Raises `UnknownModel`."""
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
        """Run one operation and return its one answer, whatever fails on the way.

        `deadline` is in seconds from now. `op_id` names the operation in logs and results; one
        is made up if it is not given. `level` is that of the pool or a lower one; `simulation`
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
        """The tokens of `generate`, each as soon as there is one, whatever fails on the way.

        `inputs` as for `run_with_recovery(model, "generate", inputs)`: `text` or `input_ids`, and
        any of max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos, logits. Stop the
        iteration (`aclose`, or leave an `async with aclosing(...)`) to cancel. `on_result` gets
        the result when it ends, `on_begin` a function that tells how it is. `op` names another
        operation that streams. Raises `SequenceLost` if it can't go on; it can be resumed with the
        prompt's tokens and those that came as `input_ids`, and the same seed.
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
        """What this client knows of each browser, without asking anybody."""
        return self._browsers.hosts()

    async def changed(self, seconds: float = _CHANGE_SECONDS_MAX) -> None:
        """Return when something about the pool has changed, or after `seconds`."""
        await self._connection.routing.change(seconds)

    async def drain(self, browser_id: str) -> None:
        """Take a browser out of service: it finishes what it has and is stopped."""
        await self._browsers.drain(browser_id)

    async def scale(self, browsers: Mapping[str, int]) -> None:
        """Have this many of each type named: start what is missing, drain what is too many.

        Types that are not named stay as they are. Returns when it is so.
        """
        await self._browsers.scale(browsers)

    async def repair(
        self, browser_id: str, failure: Failure, *, start: RecoveryLevel | None = None
    ) -> Repair:
        """Recover a browser from a failure that only the caller knows of; see `recover_browser`.

        `start` is the rung to begin with, if not the usual one. Returns the repair as it ended.
        Raises `BadInput` if the browser is not in service.
        """
        return await self._browsers.repair(browser_id, failure, start)

    # -- circuit breakers -------------------------------------------------------------------------

    async def breakers(self) -> dict[str, Any]:
        """What the circuit breakers have counted: sums over all, and each one's own figures.

        `circuits` holds, for each browser and each model on it, what
        `recovery.breaker.CircuitBreaker.get_metrics` says; `recovery_history` there names what
        each outage was ended by. A browser that is being replaced is left out.
        """
        return await self._breakers.metrics()

    async def switch_breaker(self, browser_id: str, to: str, *, model: str = "") -> None:
        """Set a browser's circuit breaker by hand, or that of `model` on it.

        `to`: "force_open" (refuse everything), "disable" (admit everything, still counting), or
        "reset" (close it, and start afresh). It stays so over restarts of the browser. Raises
        `BadInput` for another word, a browser that is not in service, a model it does not have.
        """
        await self._breakers.switch(browser_id, to, model)

    # -- what is known of it ----------------------------------------------------------------------

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
        """The supervisor's state as it is now: browsers, repairs under way and done, tallies."""
        return await self._browsers.control()

    async def get_recovery_statistics(self, since: float | None = None) -> dict[str, Any]:
        """What the history holds: operations and recovery steps, by strategy, rung, category.

        `since` is wall time in seconds. Simulation is counted apart. Raises `PoolClosed` if this
        pool keeps no history.
        """
        statistics: dict[str, Any] = await self.history("statistics", since=since)
        return statistics

    async def history(self, question: str, **options: Any) -> Any:
        """Ask the history, by a method of `recovery.history.tracker.PerformanceHistoryTracker`, or
        for the rows of a view.

        The views (`recovery_performance`, `strategy_scores`, `adaptive_timeouts`,
        `progressive_recovery`) take `limit=` and columns that must equal a value:
        `await pool.history("strategy_scores", error_type="crash")`. Raises `BadInput` for a
        question or an option that there is not, `PoolClosed` if this pool keeps no history.
        """
        self._connection.require()
        if self._connection.history is None:
            raise PoolClosed("this pool keeps no history (history=False, or it could not start)")
        return await self._connection.history.ask(question, **options)

    async def export_telemetry(self) -> dict[str, Any]:
        """Everything known of the pool now, as plain JSON: for a monitor, or a bug report.

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
        """Where the control log is, if this client made the pool and it keeps one."""
        return self._connection.log_folder

    # -- looking into it, and breaking it ---------------------------------------------------------

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
        """Write all that is known about an operation now to one file, for `tabpool replay`.

        `inputs` are what was asked: of them only names, shapes and hashes are kept, unless
        `with_data`. What can't be had any more (a dead page's screenshot) is left out. Raises
        `UnknownModel`, and `OSError` if the file can't be written.
        """
        found = await collect(
            self,
            result,
            inputs,
            entry=self._catalog.entry(result.model),
            config=self.config,
            why=why,
            with_data=with_data,
            chaos=chaos,
        )
        return await asyncio.to_thread(write_bundle, found, Path(path))

    async def diagnose(self, browser_id: str, *, screenshot: bool = True) -> PageDiagnostics:
        """What is known of a browser's page: console, last frames' headers, a screenshot.

        Raises `BadInput` for a browser that is not in service, `BrowserLost` for one that is gone.
        """
        return await self._diagnosis.diagnose(browser_id, screenshot=screenshot)

    async def control_pids(self) -> Mapping[str, int]:
        """The processes of the pool's supervisor and history, on the head node."""
        return await self._diagnosis.control_pids()

    async def inject(self, browser_id: str, fault: Mapping[str, Any]) -> None:
        """Have a browser's page fail in an exact way (see `actors.faults`), if `faults=True`.

        Raises `BadInput` for a browser that is not in service, `PageError` if it may not.
        """
        await self._diagnosis.inject(browser_id, fault)

    async def inject_fault(self, fault: Fault, *, gated: bool = True) -> Injected:
        """Break a browser or the supervisor on purpose, if this pool was made with `faults=True`.

        What each fault does, and what this pool's level promises of it, is in `recovery.faults`.
        A target that has been replaced stands for its stand-in. `gated`: leave a browser alone
        whose circuit is open. Raises `FaultRefused`, or `BadInput` for a target not in service.
        """
        return await self._diagnosis.inject_fault(fault, gated=gated)
