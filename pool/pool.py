"""`BrowserPool`: the front door.

It checks what it is given, sends operations to browsers and, when one fails, does what
`recovery.answering` says. Browsers are the supervisor's business: nothing here starts, stops or
repairs one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from actors.messages import Examination, LaunchReport, RunReply, RunRequest
from actors.ray import connection as ray_actors
from actors.ray.handles import RayHistory, RayNative
from actors.ray.metrics import ClientMetrics
from actors.ray.supervisor_handle import RaySupervisor
from actors.supervisor.records import ModelOrder, SupervisorConfig, Table
from pool.answering import Rules, Simulate, Tensors
from pool.bundles import collect, write_bundle
from pool.composing import Asking, Composition
from pool.config import PoolConfig, backend_order
from pool.latency import Latencies
from pool.models.components import READ, prepare_read, run_stages
from pool.models.loading import Part, read_parts
from pool.models.registry import ModelEntry, ModelRegistry, entry_from_plain, entry_to_plain
from pool.models.tokens import TextEncoder, encoder_for
from pool.operations.generate import (
    GENERATE,
    GeneratedToken,
    Generating,
    RoutedStages,
    SequenceView,
    prepare_generate,
)
from pool.operations.registry import OperationRegistry
from pool.recorder import Recorder
from pool.results import Result
from pool.routing import Routing
from pool.state_folders import hold, new_folder, state_root
from pool.telemetry import telemetry
from recovery.control import (
    ALIVE,
    COMING,
    BrowserRecord,
    ModelPhase,
    Phase,
    PoolState,
    Repair,
)
from recovery.errors import (
    BadInput,
    CallerError,
    FaultRefused,
    LaunchFailed,
    LevelUnavailable,
    MessageTooLarge,
    PageError,
    PoolBusy,
    PoolClosed,
    PoolError,
    SetupError,
    UnknownModel,
)
from recovery.failures import Failure
from recovery.faults import FAULTS, Fault, FaultKind, Injected, Place
from recovery.kinds import Backend, BrowserType, Level, ModelType, RecoveryLevel, Strategy
from recovery.levels import BROWSERS_NEEDED, ORDER, held
from recovery.maintenance import first_names
from recovery.placement import Placing
from recovery.plan import strategy_order
from recovery.records import HostRef, HostStatus
from recovery.voting import Closeness
from sharding.models.inputs import check_inputs
from sharding.models.signature import ModelSpec
from sharding.sequences.pipeline import PipelineRules, Rendezvous
from sharding.sequences.stages import STAGE_MARK

_OP_ID_MAX = 128
_WATCH_SECONDS_MAX = 5.0
_CARE_SECONDS = 5.0  # between two looks of the supervisor at memory and wear
_SCALING_SECONDS = 0.5  # the same, where the number of browsers follows the load
_AUDITS_MAX = 64  # late answers waited for at `critical`, only to be compared


@dataclass(frozen=True)
class PoolView:
    """What `BrowserPool.state` shows."""

    name: str
    level: Level
    level_effective: Level
    degraded: bool
    control: PoolState
    hosts: tuple[HostStatus, ...]
    launches: Mapping[str, LaunchReport]
    memory_bytes: Mapping[str, int]
    dashboard_url: str
    operations: Mapping[str, int]
    log_trouble: str = ""  # why the control log can't be written, or what of it was lost
    faults: tuple[str, ...] = ()  # what the supervisor could not carry out, the last of it


class BrowserPool:
    """A pool of browsers that answers operations.

    Options are the fields of `PoolConfig`. Use it as an async context manager, or call `open`
    and `close`; `.blocking()` gives the same without `await`.
    """

    def __init__(self, browsers: Mapping[str, int] | None = None, **options: Any) -> None:
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
        self._config = config if config.name else replace(config, name=_made_up_name())
        self._level = self._config.level_effective
        self._client = secrets.token_hex(8)
        self._operations = OperationRegistry()
        self._registry = ModelRegistry()
        self._encoders: dict[str, TextEncoder | None] = {}
        self._loading: dict[str, int] = {}  # loads under way, by model
        self._rng = random.Random(self._client)
        self._supervisor: RaySupervisor | None = None
        self._routing: Routing | None = None
        self._ray: ray_actors.RaySession | None = None
        self._owner = True
        self._in_flight = 0
        self._recorder: Recorder | None = None
        self._history: RayHistory | None = None
        self._native: RayNative | None = None
        self._folder_lock: int | None = None
        self._log_folder: Path | None = None
        self._latencies = Latencies(self._config.hedge_quantile, self._config.hedge_seconds)
        self._audits: deque[asyncio.Task[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waking: dict[str, asyncio.Task[str]] = {}
        self._rendezvous: dict[str, Rendezvous] = {}  # of coordinated models
        counted = ("asked", "answered", "recovered", "simulated", "failed", "refused")
        self._counts = dict.fromkeys(counted, 0)

    @property
    def name(self) -> str:
        """What `BrowserPool.attach` takes."""
        return self._config.name

    @property
    def operations(self) -> OperationRegistry:
        """Where further operations are registered."""
        return self._operations

    def __repr__(self) -> str:
        phases: dict[str, int] = {}
        if self._routing is not None and self._routing.table is not None:
            for record in self._routing.table.state.browsers.values():
                phases[record.phase] = phases.get(record.phase, 0) + 1
        counted = ", ".join(f"{count} {phase}" for phase, count in phases.items()) or "not open"
        return f"<BrowserPool {self.name} [{counted}; {self._in_flight} in flight]>"

    # -- opening and closing ----------------------------------------------------------------------

    async def open(self) -> Self:
        """Start every browser, or (after `attach`) join the running pool.

        Raises `SetupError` (naming what to install) or `LaunchFailed` when, in a strict pool,
        any browser can't be started, or when none can.
        """
        if self._supervisor is not None:
            raise PoolClosed("this pool is open already")
        config = self._config
        self._ray = await asyncio.to_thread(ray_actors.connect, config.address, config.dashboard)
        try:
            if self._owner:
                supervisor = RaySupervisor.create(await self._supervisor_config(), config.hosts())
                self._supervisor = supervisor
                await supervisor.open(_browser_ids(config.kinds(), ()))
            else:
                self._supervisor = supervisor = RaySupervisor.find(config.name)
                self._config = config = await self._joined_config(supervisor)
            poll = min(config.lease / 3, _WATCH_SECONDS_MAX)
            self._routing = Routing(
                supervisor,
                self._client,
                poll,
                ray_actors.this_node(),
                config.message_bytes_max,
                config.queue_max,
            )
            await self._routing.start()
            await self._started()
            theirs, _ = await supervisor.config()
            if config.simulation:
                self._native = RayNative(theirs)
            await self._begin_recording(theirs)
        except BaseException:
            await self.close()
            raise
        return self

    async def _supervisor_config(self) -> SupervisorConfig:
        config, run = self._config, secrets.token_hex(2)
        root, folder = state_root(config.state_dir), ""
        logged = config.level_effective not in (Level.NONE, Level.LOW)
        if logged or config.history:
            try:
                made = await asyncio.to_thread(new_folder, root, config.name, run)
                folder, self._folder_lock = str(made), hold(made)
            except OSError as error:
                what = f"level {config.level} keeps a log" if logged else "history is kept"
                raise SetupError(
                    f"{what}, and {root} can't be written ({error}): pass state_dir= or set "
                    "TABPOOL_STATE to a folder that can."
                ) from error
        self._log_folder = Path(folder) / "log" if logged else None
        return SupervisorConfig(
            config.name,
            config.level_effective,
            strategy_order(config.strategy),
            config.restart_limit,
            config.lease,
            config.persistent,
            config.max_connections,
            creator=self._client,
            run=run,
            folder=folder if logged else "",
            checkpoint_seconds=config.checkpoint_interval,
            resources=config.resources,
            scaling=config.scaling(),
            care_seconds=_SCALING_SECONDS if config.adaptive_scaling else _CARE_SECONDS,
            history=str(root / "history.duckdb") if config.history else "",
            history_spare=str(Path(folder) / "history.duckdb") if config.history else "",
        )

    async def _begin_recording(self, theirs: SupervisorConfig) -> None:
        if theirs.history:
            with contextlib.suppress(PoolClosed):  # it could not be kept: the state says why
                self._history = RayHistory.find(theirs)
        self._recorder = Recorder(
            self.name,
            self._client,
            theirs.strategy.name,
            self._history,
            ClientMetrics(self.name),
            lambda: (self._in_flight, self._routing.candidates() if self._routing else ()),
        )
        await self._recorder.start()

    async def _joined_config(self, supervisor: RaySupervisor) -> PoolConfig:
        """This client's configuration with what the running pool has fixed."""
        theirs, hosts = await supervisor.config()
        self._level = theirs.level
        return replace(
            self._config,
            level=str(theirs.level),
            strategy=theirs.strategy.name,
            restart_limit=theirs.limit,
            lease=theirs.lease_seconds,
            message_bytes_max=hosts.message_bytes_max,
            queue_max=hosts.queue_max,
            launch_seconds=hosts.launch_seconds,
            load_seconds=hosts.load_seconds,
            hang_seconds=hosts.hang_seconds,
            max_connections=theirs.browsers_max,
        )

    async def _started(self) -> None:
        """Wait until every browser is ready or given up."""
        limit = self._config.restart_limit
        launches = limit.launches_failed_max
        patience = (self._config.launch_seconds + limit.delay_max_seconds) * launches
        table = await self._table_when(
            lambda table: all(
                record.phase not in COMING for record in table.state.browsers.values()
            ),
            patience,
        )
        lost = [r for r in table.state.browsers.values() if r.phase is Phase.GIVEN_UP]
        ready = [r for r in table.state.browsers.values() if r.phase is Phase.READY]
        if lost and (self._config.strict or not ready):
            raise _why_lost(lost[0])

    async def close(self) -> None:
        """Stop the pool; nothing of it is left behind. Leave it, if attached or `persistent`.

        Operations under way end as failed.
        """
        await self._leave(stop=self._owner and not self._config.persistent)

    async def shutdown(self) -> None:
        """Stop the pool for everybody, also from an attached client."""
        await self._leave(stop=True)

    async def _leave(self, *, stop: bool) -> None:
        for task in (*self._audits, *self._tasks):
            task.cancel()
        await asyncio.gather(*self._audits, *self._tasks, return_exceptions=True)
        self._audits.clear()
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            await recorder.stop()
        self._history = None
        routing, self._routing = self._routing, None
        if routing is not None:
            await routing.stop()
        lock, self._folder_lock = self._folder_lock, None
        if lock is not None:
            os.close(lock)
        supervisor, self._supervisor = self._supervisor, None
        native, self._native = self._native, None
        if supervisor is not None and stop:
            await supervisor.close()
            if native is not None:
                native.end()
        self._registry = ModelRegistry()
        self._encoders.clear()
        session, self._ray = self._ray, None
        if session is not None:
            await asyncio.to_thread(ray_actors.disconnect, session)

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
        pool = cls(name=name, address=address, **options)
        pool._owner = False
        return pool

    def blocking(self) -> Any:
        """The same pool without `await`: see `pool.blocking.BlockingPool`."""
        from pool.blocking import BlockingPool

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
        strategy: str = "layer_based",
    ) -> ModelEntry:
        """Load the model at `path` (a folder or an .onnx file) on every browser, as `name`.

        `type` overrides what is detected, `backend` the pool's. `example` are inputs that suit
        the model: it is warmed with them, and probes compare what it makes of them; without,
        inputs are made up. With `shards` the model is cut by layer as `strategy` says (see
        `sharding.cutting.partition`), and each browser loads a part; `path` may also be a folder
        that `tabpool shard` made. With `strategy="component_based"` it is a folder of several
        models that work together: each is loaded as `name@ITS_NAME` on a browser of its own, and
        can be asked by that name, too. Returns when every browser has what it should, warm. Raises
        `NotAModel` or `BadInput` before any browser is touched, `PageError` when no browser can
        load it, and `LevelUnavailable` when too few can.
        """
        self._require_open()
        backend = self._config.backend if backend is None else backend
        backends = backend_order(backend)
        entry, parts = await asyncio.to_thread(read_parts, name, path, type, shards, strategy)
        if example is not None:
            if entry.in_parts:
                raise BadInput("example: a model in parts takes none.", got="example")
            parts = (replace(parts[0], tried=check_inputs(entry.spec, example)),)
        self._adopt()
        known = name in self._registry.names()
        self._keep(entry)
        supervisor, routing = self._require_open()
        self._loading[name] = self._loading.get(name, 0) + 1
        try:
            orders = [await self._order(entry, part, backends) for part in parts]
            loads = asyncio.gather(*map(supervisor.load, orders))
            await routing.unless_gone(loads)
            table = await self._table_when(
                lambda table: all(_settled(table.state, part) for part in entry.parts),
                self._config.load_seconds,
            )
        except BaseException as error:
            if not known:
                self._forget(name)
                if not isinstance(error, CallerError):  # what was ordered is not wanted any more
                    with contextlib.suppress(PoolError):  # the first error is the one that matters
                        for part in entry.parts:
                            await routing.unless_gone(supervisor.unload(part))
            raise
        finally:
            self._loading[name] -= 1
            if not self._loading[name]:
                del self._loading[name]
        for part in entry.parts:
            why = self._too_few(table.state, part)
            if why is not None:
                if not known:
                    await self.unload(name)
                raise why
        return entry

    async def _order(
        self, entry: ModelEntry, part: Part, backends: tuple[Backend, ...]
    ) -> ModelOrder:
        answer = await asyncio.to_thread(part.known_answer) if self._probes else None
        placing = Placing(BROWSERS_NEEDED[self._level], entry.name) if entry.in_parts else None
        return ModelOrder(part.spec, backends, entry_to_plain(entry), answer, placing)

    def _too_few(self, state: PoolState, part: str) -> PoolError | None:
        """Why a model, or a part of one, is not on as many browsers as the level takes."""
        records = [r for r in state.browsers.values() if part in r.models]
        loaded = sum(r.models[part] is ModelPhase.LOADED for r in records)
        needed = BROWSERS_NEEDED[self._level] if self._config.strict else 1
        if loaded >= needed:
            return None
        why = "; ".join(
            f"{r.id}: {r.load_failures.get(part, r.phase)}"
            for r in records
            if r.models[part] is not ModelPhase.LOADED
        )
        if loaded:
            return LevelUnavailable(
                f"level {self._config.level} needs {part} on {needed} browsers, and {loaded} "
                f"could load it ({why}). Pass strict=False to run below that level.",
                level=self._config.level,
            )
        return PageError(
            f"no browser could load {part}: {why or 'none is running'}", what="load_failed"
        )

    async def order_again(self, name: str) -> None:
        """Have the supervisor see that a loaded model is where it should be; usually it is.

        Raises `UnknownModel`, and `PoolError` while the order can't be logged.
        """
        supervisor, routing = self._require_open()
        orders = [routing.models().get(part) for part in self._loaded(name).parts]
        known = [order for order in orders if order is not None]
        await routing.unless_gone(asyncio.gather(*map(supervisor.load, known)))

    async def unload(self, name: str) -> None:
        """Take a model out of every browser. Raises `UnknownModel`."""
        supervisor, _ = self._require_open()
        parts = self._loaded(name).parts
        self._forget(name)
        self._rendezvous.pop(name, None)
        for part in parts:
            await supervisor.unload(part)
        await self._table_when(
            lambda table: not table.models.keys() & set(parts), self._config.lease
        )

    def models(self) -> tuple[str, ...]:
        """The names of the loaded models."""
        self._adopt()
        return tuple(self._registry.names())

    def _adopt(self) -> None:
        """Know the models that clients of this pool have loaded, and forget what they unloaded."""
        if self._routing is None or self._routing.table is None:
            return
        plain = {
            str(order.entry["spec"]["name"]): order for order in self._routing.models().values()
        }
        for name in self._registry.names():
            known = self._registry.get(name).spec.digest
            if name not in self._loading and (
                name not in plain or plain[name].entry["spec"]["digest"] != known
            ):
                self._forget(name)
        for name, order in plain.items():
            if name not in self._registry.names():
                self._keep(entry_from_plain(order.entry))

    def _keep(self, entry: ModelEntry) -> None:
        self._registry.add(entry)
        for one in (entry, *entry.component_entries()):
            self._encoders[one.name] = encoder_for(one)

    def _forget(self, name: str) -> None:
        entry = self._registry.remove(name)
        for one in (entry, *entry.component_entries()):
            self._encoders.pop(one.name, None)

    @property
    def _probes(self) -> bool:
        """Whether browsers are asked known answers: from level medium on, unless told not to."""
        level = self._level
        return ORDER.index(level) >= ORDER.index(Level.MEDIUM) and self._config.probe_seconds > 0

    def _loaded(self, name: str) -> ModelEntry:
        try:
            return self._registry.get(name)
        except UnknownModel:
            self._adopt()
            return self._registry.get(name)

    def _entry(self, name: str) -> ModelEntry:
        """The model that can be asked by this name: a loaded one, or a component of one."""
        whole, mark, _ = str(name).partition(STAGE_MARK)
        if not mark:
            return self._loaded(name)
        components = {one.name: one for one in self._loaded(whole).component_entries()}
        if name not in components:
            raise UnknownModel(
                f"{whole} has no component {name!r}; it has {', '.join(components) or 'none'}.",
                expected=list(components),
                got=name,
            )
        return components[name]

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
        self._require_open()
        seconds = self._config.deadline if deadline is None else deadline
        if not seconds > 0:
            raise BadInput(f"deadline: expected seconds over 0, got {seconds!r}.", got=seconds)
        self._check_op_id(op_id)
        wanted = self._level_of_call(level)
        if simulation and not self._config.simulation:
            raise BadInput(
                "simulation: this pool forbids native answers; make it with simulation=True.",
                got=simulation,
            )
        entry = self._entry(model)
        if op == GENERATE:
            generating = self._generating(entry, inputs, op_id, wanted)
            with self._counted():
                result = await generating.run(deadline)
            self._told(result, entry)
            return result
        op_id, asking = op_id or secrets.token_hex(8), self._asking(wanted, simulation)
        if entry.components:
            result = await self._read(asking, entry, op, inputs, op_id, seconds)
            self._told(result, entry)
            return result
        spec = self._operations.get(op)
        line = entry.line if entry.in_parts else None
        if line is not None and line.decoder:
            raise BadInput(
                f"{model} is cut into {len(entry.parts)} shards with caches, so it takes only "
                f"{GENERATE!r}: load it whole for other operations.",
                expected=GENERATE,
                got=op,
            )
        tensors = spec.prepare(entry, inputs, self._encoders.get(model))
        asking.check_size(model, tensors)
        specs = [self._part_spec(stage.model) for stage in line.stages] if line else []
        with self._counted():
            if line is not None:
                composition = Composition(asking, op_id, entry, op, seconds)
                result = await composition.answer(run_stages(composition, line, specs, tensors))
            else:
                result = await asking.ask(op_id, op, entry.spec, tensors, seconds)
        if result.success:
            result = replace(result, values=spec.finish(entry, tensors, result.values))
        self._told(result, entry)
        return result

    async def _read(
        self,
        asking: Asking,
        entry: ModelEntry,
        op: str,
        inputs: Mapping[str, Any],
        op_id: str,
        seconds: float,
    ) -> Result:
        if op != READ:
            raise BadInput(
                f"{entry.name} is {len(entry.parts)} models that work together, so it takes only "
                f"{READ!r}: for other operations ask one of {', '.join(entry.parts)}.",
                expected=READ,
                got=op,
            )
        reading = prepare_read(entry, inputs)
        with self._counted():
            composition = Composition(asking, op_id, entry, op, seconds)
            return await composition.answer(reading.run(composition))

    def _asking(self, level: Level, simulation: bool | None) -> Asking:
        _, routing = self._require_open()
        config = self._config
        return Asking(
            routing,
            self._latencies,
            self._rng,
            self._client,
            level,
            Rules(config.max_recovery_attempts, config.when_full == "wait", config.strict),
            config.message_bytes_max,
            on_wrong=self._charge,
            on_audit=self._keep_audit,
            on_stuck=self._wake,
            simulation=self._simulation if simulation is not False else lambda spec: None,
        )

    def _part_spec(self, part: str) -> ModelSpec:
        _, routing = self._require_open()
        order = routing.models().get(part)
        if order is None:  # another client has unloaded it, or is about to
            raise UnknownModel(f"{part} is not loaded any more.", got=part)
        return order.spec

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count an operation as in flight. Raises `PoolBusy` for one too many."""
        if self._in_flight >= self._config.waiting_max:
            self._counts["refused"] += 1
            raise PoolBusy(
                f"{self._in_flight} operations are in flight in this client, its limit "
                "(waiting_max). Await some of them first, or raise the limit."
            )
        self._in_flight += 1
        self._counts["asked"] += 1
        try:
            yield
        except (PoolBusy, MessageTooLarge):
            self._counts["refused"] += 1
            raise
        finally:
            self._in_flight -= 1

    def _told(self, result: Result, entry: ModelEntry) -> None:
        self._count(result)
        if self._recorder is not None:
            self._recorder.note(result, entry)

    # -- sequences --------------------------------------------------------------------------------

    async def stream(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        op_id: str | None = None,
        level: str | None = None,
        on_result: Callable[[Result], None] | None = None,
        on_begin: Callable[[Callable[[], SequenceView]], None] | None = None,
    ) -> AsyncGenerator[GeneratedToken]:
        """The tokens of `generate`, each as soon as there is one, whatever fails on the way.

        `inputs` as for `run_with_recovery(model, "generate", inputs)`: `text` or `input_ids`, and
        any of max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos, logits. Stop the
        iteration (`aclose`, or leave an `async with aclosing(...)`) to cancel. `on_result` gets
        the account of it when it ends, `on_begin` a function that tells how it is. Raises
        `SequenceLost` if it can't go on; it can be resumed with the prompt's tokens and those that
        came as `input_ids`, and the same seed.
        """
        self._check_op_id(op_id)
        entry = self._entry(model)
        generating = self._generating(entry, inputs, op_id, self._level_of_call(level))
        if on_begin is not None:
            on_begin(generating.view)
        with self._counted():
            try:
                async with contextlib.aclosing(generating.stream()) as tokens:
                    async for token in tokens:
                        yield token
            finally:
                result = generating.result()
                self._told(result, entry)
                if on_result is not None:
                    on_result(result)

    def _generating(
        self, entry: ModelEntry, inputs: Mapping[str, Any], op_id: str | None, level: Level
    ) -> Generating:
        _, routing = self._require_open()
        encoder = self._encoders.get(entry.name)
        prompt = prepare_generate(entry, inputs, encoder)
        orders, tolerance = routing.models(), entry.spec.tolerance
        stages = RoutedStages(
            routing,
            self._latencies,
            self._client,
            {part: orders[part].spec.digest for part in entry.parts if part in orders},
            on_wrong=self._charge,
            on_stuck=self._wake,
        )
        rules = PipelineRules(
            level,
            self._config.max_recovery_attempts,
            self._config.deadline,
            closeness=Closeness(tolerance.rtol, tolerance.atol),
            strict=self._config.strict,
        )
        together = None
        if self._config.strategy == Strategy.COORDINATED:
            together = self._rendezvous.setdefault(entry.name, Rendezvous())
        return Generating(
            op_id or secrets.token_hex(8), entry, prompt, stages, rules, encoder, together
        )

    def _wake(self, model: str) -> str:
        """If a model is parked, have it loaded again. Returns why that failed, if it did."""
        table = self._routing.table if self._routing else None
        if table is None or model not in table.state.parked:
            return ""
        waking = self._waking.get(model)
        if waking is not None and waking.done():
            del self._waking[model]
            return waking.result()
        if waking is None:
            waking = self._waking[model] = asyncio.create_task(self._ask_to_wake(model))
            self._tasks.add(waking)
            waking.add_done_callback(self._tasks.discard)
        return ""

    async def _ask_to_wake(self, model: str) -> str:
        why = ""
        try:
            supervisor, routing = self._require_open()
            await routing.unless_gone(supervisor.wake(model))
        except PoolError as error:
            why = str(error)
        if self._routing is not None:
            await self._routing.announce()
        return why

    def _simulation(self, spec: ModelSpec) -> Simulate | None:
        native = self._native
        if native is None:
            return None

        async def simulate(tensors: Tensors, left: float) -> RunReply:
            request = RunRequest("native", HostRef("native"), spec.name, left)
            reply = await native.run(request, spec, tensors)
            if reply.failure is not None:
                raise PageError(reply.failure.message)
            return reply

        return simulate

    def _check_op_id(self, op_id: Any) -> None:
        if op_id is not None and not (isinstance(op_id, str) and 0 < len(op_id) <= _OP_ID_MAX):
            raise BadInput(
                f"op_id: expected text of 1 to {_OP_ID_MAX} characters, got {op_id!r}.", got=op_id
            )

    def _level_of_call(self, level: str | None) -> Level:
        pools = self._level
        if level is None:
            return pools
        if level not in ORDER or ORDER.index(Level(level)) > ORDER.index(pools):
            lower = ", ".join(ORDER[: ORDER.index(pools) + 1])
            raise BadInput(
                f"level: expected one that this pool holds ({lower}), got {level!r}.", got=level
            )
        return Level(level)

    def _charge(self, ref: HostRef, failure: Failure) -> None:
        """A browser was outvoted: leave it alone, and have it replaced."""
        if self._routing is not None:
            self._routing.shun(ref)
        self._background(self._replace_liar(ref, failure))

    async def _replace_liar(self, ref: HostRef, failure: Failure) -> None:
        with contextlib.suppress(PoolError):  # it is gone already, or so is the pool
            supervisor, routing = self._require_open()
            try:
                await routing.unless_gone(supervisor.repair(ref.browser_id, failure, None))
            finally:
                routing.pardon(ref)  # if it is still there, nobody could replace it

    def _keep_audit(self, audit: asyncio.Task[None]) -> None:
        """Let a late answer be compared, the oldest ones only as long as they are not too many."""
        self._audits.append(audit)
        while self._audits and (self._audits[0].done() or len(self._audits) > _AUDITS_MAX):
            self._audits.popleft().cancel()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="charge")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _count(self, result: Result) -> None:
        if result.simulated:
            self._counts["simulated"] += 1
            return
        self._counts["answered" if result.success else "failed"] += 1
        self._counts["recovered"] += result.recovered

    # -- the pool itself --------------------------------------------------------------------------

    async def state(self) -> PoolView:
        """Browsers, models, repairs, queues and memory, as they are now."""
        supervisor, _ = self._require_open()
        launches, memory = await asyncio.gather(supervisor.reports(), supervisor.memory())
        table = await supervisor.table(self._client)
        alive = [r for r in table.state.browsers.values() if r.phase is Phase.READY]
        wanted = [
            record
            for record in table.state.browsers.values()
            if record.phase is not Phase.STOPPED
            and not record.replaced_by
            and not record.stands_in_for
        ]
        effective = held(self._level, len(alive))
        return PoolView(
            self.name,
            Level(self._config.level),
            effective,
            degraded=len(alive) < len(wanted)
            or effective is not Level(self._config.level)
            or bool(table.log_trouble),
            control=table.state,
            hosts=self.hosts(),
            launches=launches,
            memory_bytes=memory,
            dashboard_url=self._ray.dashboard_url if self._ray else "",
            operations=dict(self._counts),
            log_trouble=table.log_trouble,
            faults=table.faults,
        )

    async def get_recovery_statistics(self, since: float | None = None) -> dict[str, Any]:
        """What the history holds: operations and recovery steps, by strategy, rung, category.

        `since` is wall time in seconds. Simulation is counted apart. Raises `PoolClosed` if this
        pool keeps no history.
        """
        statistics: dict[str, Any] = await self.history("statistics", since=since)
        return statistics

    async def history(self, question: str, **options: Any) -> Any:
        """Ask `recovery.history.tracker.PerformanceHistoryTracker`, by the name of its method."""
        self._require_open()
        if self._history is None:
            raise PoolClosed("this pool keeps no history (history=False, or it could not start)")
        return await self._history.ask(question, **options)

    async def export_telemetry(self) -> dict[str, Any]:
        """Everything known of the pool now, as plain JSON: for a monitor, or a bug report.

        Browsers with their circuits and memory, models, repairs, this client's counts, the
        machine, and (where there is one) the history's statistics.
        """
        view = await self.state()
        found = telemetry(view, self.models())
        if self._history is not None:
            with contextlib.suppress(PoolError):
                found["statistics"] = await self.get_recovery_statistics()
        return found

    def hosts(self) -> tuple[HostStatus, ...]:
        """What this client knows of each browser, without asking anybody."""
        _, routing = self._require_open()
        return tuple(routing.candidates())

    async def changed(self, seconds: float = _WATCH_SECONDS_MAX) -> None:
        """Return when something about the pool has changed, or after `seconds`."""
        _, routing = self._require_open()
        await routing.change(seconds)

    async def drain(self, browser_id: str) -> None:
        """Take a browser out of service: it finishes what it has and is stopped."""
        supervisor, routing = self._require_open()
        table = routing.table
        if table is None or browser_id not in table.state.browsers:
            known = list(table.state.browsers) if table else []
            raise BadInput(
                f"no browser {browser_id!r} in this pool; it has {', '.join(known)}.",
                expected=known,
                got=browser_id,
            )
        await routing.unless_gone(supervisor.drain(browser_id))

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
            entry=self._entry(result.model),
            config=self._config,
            why=why,
            with_data=with_data,
            chaos=chaos,
        )
        return await asyncio.to_thread(write_bundle, found, Path(path))

    async def control_pids(self) -> Mapping[str, int]:
        """The processes of the pool's supervisor and history, on the head node."""
        supervisor, _ = self._require_open()
        return await supervisor.pids()

    @property
    def log_folder(self) -> Path | None:
        """Where the control log is, if this client made the pool and it keeps one."""
        return self._log_folder

    async def inject(self, browser_id: str, fault: Mapping[str, Any]) -> None:
        """Have a browser's page fail in an exact way (see `actors.faults`), if `faults=True`.

        Raises `BadInput` for a browser that is not in service, `PageError` if it may not.
        """
        _, routing = self._require_open()
        await routing.inject(self._serving(browser_id), fault)

    async def inject_fault(self, fault: Fault, *, gated: bool = True) -> Injected:
        """Break a browser or the supervisor on purpose, if this pool was made with `faults=True`.

        What each fault does, and what this pool's level promises of it, is in `recovery.faults`.
        A target that has been replaced stands for its stand-in. `gated`: leave a browser alone
        whose circuit is open. Raises `FaultRefused`, or `BadInput` for a target not in service.
        """
        supervisor, routing = self._require_open()
        if FAULTS[fault.kind].place is Place.SUPERVISOR:
            return await supervisor.inject(fault)
        ref = self._serving(fault.target)
        if fault.kind is FaultKind.NODE_DEATH:
            ours = (ray_actors.this_node(), await supervisor.node())
            if ref.node in ours:
                raise FaultRefused(
                    f"{fault}: {ref} is on the node of this client or of the supervisor, and no "
                    "pool outlives that. Give the pool more nodes.",
                    what="impossible",
                )
        made = await routing.inject(ref, fault, gated=gated)
        assert made is not None
        return made

    async def examine(self, browser_id: str, *, screenshot: bool = True) -> Examination:
        """What is known of a browser's page: console, last frames' headers, a screenshot.

        Raises `BadInput` for a browser that is not in service, `BrowserLost` for one that is gone.
        """
        _, routing = self._require_open()
        return await routing.examine(self._serving(browser_id), screenshot=screenshot)

    def _serving(self, browser_id: str) -> HostRef:
        """The incarnation that serves in this slot now, or in its place. Raises `BadInput`."""
        _, routing = self._require_open()
        refs = {status.ref.browser_id: status.ref for status in routing.candidates()}
        records = routing.table.state.browsers if routing.table else {}
        name = browser_id
        while name not in refs and name in records and records[name].replaced_by:
            name = records[name].replaced_by
        if name not in refs:
            raise BadInput(f"browser {browser_id!r} is not in service.", got=browser_id)
        return refs[name]

    async def control(self) -> PoolState:
        """The supervisor's state as it is now: browsers, repairs under way and done, tallies."""
        supervisor, _ = self._require_open()
        return (await supervisor.table(self._client)).state

    async def repair(
        self, browser_id: str, failure: Failure, *, start: RecoveryLevel | None = None
    ) -> Repair:
        """Recover a browser from a failure that only the caller knows of; see `recover_browser`.

        `start` is the rung to begin with, if not the usual one. Returns the repair as it ended.
        Raises `BadInput` if the browser is not in service.
        """
        supervisor, routing = self._require_open()
        if failure.ref is None:  # which incarnation is meant, should the call be repeated
            refs = {status.ref.browser_id: status.ref for status in routing.candidates()}
            failure = replace(failure, ref=refs.get(browser_id))
        return await routing.unless_gone(supervisor.repair(browser_id, failure, start))

    async def scale(self, browsers: Mapping[str, int]) -> None:
        """Have this many of each type named: start what is missing, drain what is too many.

        Types that are not named stay as they are. Returns when it is so.
        """
        supervisor, routing = self._require_open()
        counts = replace(self._config, browsers=dict(browsers)).kinds()
        table = await supervisor.table(self._client)
        living = [
            record
            for record in table.state.browsers.values()
            if record.phase in (Phase.READY, *COMING) and not record.stands_in_for
        ]
        untouched = sum(record.kind not in counts for record in living)
        total = untouched + sum(counts.values())
        if not 1 <= total <= self._config.max_connections:
            raise BadInput(
                f"browsers: expected 1 to {self._config.max_connections} (max_connections) in "
                f"all, got {total}.",
                expected=self._config.max_connections,
                got=total,
            )
        missing = {}
        for kind, count in counts.items():
            have = [record for record in living if record.kind is kind]
            drains = [supervisor.drain(record.id) for record in have[count:]]
            await routing.unless_gone(asyncio.gather(*drains))
            missing[kind] = max(count - len(have), 0)
        taken = [record.id for record in table.state.browsers.values() if record.phase in ALIVE]
        fresh = _browser_ids(missing, tuple(taken))
        await supervisor.want(fresh)
        await self._table_when(
            lambda table: (
                all(
                    table.state.browsers[name].phase not in COMING
                    and ModelPhase.LOADING not in table.state.browsers[name].models.values()
                    for name in fresh
                    if name in table.state.browsers
                )
                and fresh.keys() <= table.state.browsers.keys()
            ),
            self._config.launch_seconds + self._config.load_seconds,
        )
        for browser_id in fresh:
            table = await supervisor.table(self._client)
            if table.state.browsers[browser_id].phase is Phase.GIVEN_UP and self._config.strict:
                raise _why_lost(table.state.browsers[browser_id])

    async def _table_when(self, condition: Any, seconds: float) -> Table:
        _, routing = self._require_open()
        try:
            return await routing.until(condition, seconds)
        except TimeoutError as error:
            raise LaunchFailed(
                f"the pool was not in order within {seconds:.0f} s: {self!r}. The machine may be "
                "overloaded; `tabpool doctor` shows what it has."
            ) from error

    def _require_open(self) -> tuple[RaySupervisor, Routing]:
        if self._supervisor is None or self._routing is None:
            raise PoolClosed(
                "this pool is not open: use `async with BrowserPool(...)`, or call open()"
            )
        if self._routing.gone is not None:
            raise self._routing.gone
        return self._supervisor, self._routing


def _browser_ids(
    kinds: Mapping[BrowserType, int], taken: tuple[str, ...]
) -> dict[str, BrowserType]:
    """Names for new slots: the type and the first numbers that no living slot has."""
    return {name: kind for kind, count in kinds.items() for name in first_names(kind, count, taken)}


def _settled(state: PoolState, model: str) -> bool:
    return model in state.models and not any(
        record.phase in COMING or record.models.get(model) is ModelPhase.LOADING
        for record in state.browsers.values()
    )


def _why_lost(record: BrowserRecord) -> Exception:
    """The error that the failure of a browser which can't be started was made from."""
    from recovery import errors

    failure = record.failure
    message = failure.message if failure else f"{record.id} could not be started"
    name = failure.evidence.get("error_type", "") if failure else ""
    kind = getattr(errors, str(name), LaunchFailed)
    return kind(message, browser=record.id, failure=failure)


def _made_up_name() -> str:
    return f"pool-{secrets.token_hex(3)}"
