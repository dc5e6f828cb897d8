"""The operations of one client: checked, counted, run on a placed model, recorded.

`inputs` go down this way once, and the answer comes up once. This module must not know what an
operation means (`pool.operations`) nor how a model's parts are asked (`pool.execution.placed`).
"""

from __future__ import annotations

import contextlib
import random
import secrets
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.messages import RunReply, RunRequest
from actors.ray.metrics import ClientMetrics
from actors.supervisor.records import SupervisorConfig
from pool.background import BackgroundTasks
from pool.config import DEADLINE_MIN, SECONDS_MAX
from pool.connection import Connection
from pool.execution.answering import Rules, Simulate, Tensors
from pool.execution.follow_up import FaultyBrowsers, ParkedModels
from pool.execution.latency import Latencies
from pool.execution.placed import Call, place
from pool.execution.requests import PartRequests
from pool.execution.routed_stages import RoutedStages
from pool.execution.sequence import GeneratedToken, Generating, Prompt, SequenceView
from pool.models.catalog import ModelCatalog
from pool.models.registry import ModelEntry
from pool.operations.registry import OperationRegistry
from pool.recorder import Recorder
from pool.results import Result
from recovery import checks
from recovery.errors import MessageTooLarge, PageError, PoolBusy
from recovery.kinds import Level, Strategy
from recovery.levels import LEVELS_ASCENDING
from recovery.records import HostRef
from sharding.models.signature import ModelSpec
from sharding.sequences.barrier import Barrier
from sharding.sequences.rules import PipelineRules

_OP_ID_MAX = 128
_COUNTED = ("requested", "answered", "recovered", "simulated", "failed", "refused")


@dataclass(frozen=True)
class CallOptions:
    """What a caller may set for one call, as it applies. `deadline`: seconds, if any were given.

    `simulation`: whether native answers are not forbidden.
    """

    deadline: float | None
    op_id: str
    level: Level
    simulation: bool


class OperationRunner:
    """Runs what one client asks for. `counts` says what became of it so far."""

    def __init__(
        self,
        connection: Connection,
        catalog: ModelCatalog,
        operations: OperationRegistry,
        tasks: BackgroundTasks,
    ) -> None:
        self.in_flight = 0
        self.counts = dict.fromkeys(_COUNTED, 0)
        self._connection = connection
        self._catalog = catalog
        self._operations = operations
        self._tasks = tasks
        self._faulty = FaultyBrowsers(connection, tasks)
        self._parked = ParkedModels(connection, tasks)
        self._rng = random.Random(connection.client)
        config = connection.config
        self._latencies = Latencies(config.hedge_quantile, config.hedge_seconds)
        # Of coordinated models, by name and digest: one for as long as a sequence of it goes on.
        self._barriers: weakref.WeakValueDictionary[tuple[str, str], Barrier] = (
            weakref.WeakValueDictionary()
        )
        self._recorder: Recorder | None = None

    async def start_recording(self, theirs: SupervisorConfig) -> None:
        """Hand on samples from now on, to the history (if there is one) and to the metrics."""
        connection = self._connection
        self._recorder = Recorder(
            connection.config.name,
            connection.client,
            theirs.strategy.name,
            connection.history,
            ClientMetrics(connection.config.name),
            self._now,
        )
        await self._recorder.start()

    def _now(self) -> tuple[int, Any]:
        routing = self._connection.known_routing
        return self.in_flight, routing.candidates() if routing else ()

    async def stop_recording(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            await recorder.stop()

    async def run(
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
        """See `BrowserPool.run_with_recovery`."""
        options = self._options(deadline, op_id, level, simulation)
        self._connection.require()
        entry, operation = self._catalog.entry(model), self._operations.get(op)
        call = self._call(entry, op, options)
        prepared = operation.prepare(entry, inputs, self._catalog.encoder(entry.name))
        placed = place(entry, call, lambda: self._catalog.part_specs(entry))
        with self._counted():
            result = await operation.run(placed, prepared)
        self._record(result, entry)
        return result

    async def stream(
        self,
        model: str,
        op: str,
        inputs: Mapping[str, Any],
        *,
        op_id: str | None = None,
        level: str | None = None,
        on_result: Callable[[Result], None] | None = None,
        on_begin: Callable[[Callable[[], SequenceView]], None] | None = None,
    ) -> AsyncGenerator[GeneratedToken]:
        """See `BrowserPool.stream`."""
        options = self._options(None, op_id, level, None)
        checks.function("on_result", on_result)
        checks.function("on_begin", on_begin)
        self._connection.require()
        entry, operation = self._catalog.entry(model), self._operations.get(op)
        call = self._call(entry, op, options)
        prepared = operation.prepare(entry, inputs, self._catalog.encoder(entry.name))
        placed = place(entry, call, lambda: self._catalog.part_specs(entry))
        sequence = operation.stream(placed, prepared)
        if on_begin is not None:
            on_begin(sequence.view)
        with self._counted():
            try:
                async with contextlib.aclosing(sequence.stream()) as tokens:
                    async for token in tokens:
                        yield token
            finally:
                result = sequence.result()
                self._record(result, entry)
                if on_result is not None:
                    on_result(result)

    def _options(self, deadline: Any, op_id: Any, level: Any, simulation: Any) -> CallOptions:
        """The options of one call. Raises `BadInput`, also while the pool is not open."""
        config, pools = self._connection.config, self._connection.level
        held = LEVELS_ASCENDING[: LEVELS_ASCENDING.index(pools) + 1]
        if level is not None and not (isinstance(level, str) and level in held):
            expected = f"one that this pool holds ({', '.join(held)})"
            raise checks.refusal("level", expected, level)
        if checks.optional(checks.flag, "simulation", simulation) and not config.simulation:
            expected = "None or False (this pool was not made with simulation=True)"
            raise checks.refusal("simulation", expected, simulation)
        return CallOptions(
            checks.optional(checks.seconds, "deadline", deadline, DEADLINE_MIN, SECONDS_MAX),
            checks.optional(checks.text, "op_id", op_id, _OP_ID_MAX) or secrets.token_hex(8),
            pools if level is None else Level(level),
            simulation is None or bool(simulation),
        )

    def _call(self, entry: ModelEntry, op: str, options: CallOptions) -> Call:
        config = self._connection.config
        requests = PartRequests(
            self._connection.routing,
            self._latencies,
            self._rng,
            self._connection.client,
            options.level,
            Rules(config.max_recovery_attempts, config.when_full == "wait", config.strict),
            config.message_bytes_max,
            on_wrong=self._faulty.charge,
            on_audit=self._tasks.keep_audit,
            on_stuck=self._parked.reload,
            simulation=self._simulation if options.simulation else lambda spec: None,
        )
        begin = partial(self._begin_sequence, entry, options.op_id, op, options.level)
        seconds = config.deadline if options.deadline is None else options.deadline
        return Call(options.op_id, op, options.deadline, seconds, requests, begin)

    def _begin_sequence(
        self, entry: ModelEntry, op_id: str, op: str, level: Level, prompt: Prompt
    ) -> Generating:
        connection, config = self._connection, self._connection.config
        orders = connection.routing.models()
        stages = RoutedStages(
            connection.routing,
            self._latencies,
            connection.client,
            {part: orders[part].spec.digest for part in entry.parts if part in orders},
            on_wrong=self._faulty.charge,
            on_stuck=self._parked.reload,
        )
        rules = PipelineRules(
            level,
            config.max_recovery_attempts,
            config.deadline,
            tolerance=entry.spec.tolerance,
            strict=config.strict,
        )
        barrier = None
        if config.strategy == Strategy.COORDINATED:
            barrier = self._barriers.setdefault((entry.name, entry.spec.digest), Barrier())
        encoder = self._catalog.encoder(entry.name)
        return Generating(op_id, op, entry, prompt, stages, rules, encoder, barrier)

    def _simulation(self, spec: ModelSpec) -> Simulate | None:
        native = self._connection.native
        if native is None:
            return None

        async def simulate(tensors: Tensors, left: float) -> RunReply:
            request = RunRequest("native", HostRef("native"), spec.name, left)
            reply = await native.run(request, spec, tensors)
            if reply.failure is not None:
                raise PageError(reply.failure.message)
            return reply

        return simulate

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count an operation as in flight. Raises `PoolBusy` for one too many."""
        if self.in_flight >= self._connection.config.waiting_max:
            self.counts["refused"] += 1
            raise PoolBusy(
                f"{self.in_flight} operations are in flight in this client, its limit "
                "(waiting_max). Await some of them first, or raise the limit."
            )
        self.in_flight += 1
        self.counts["requested"] += 1
        try:
            yield
        except (PoolBusy, MessageTooLarge):
            self.counts["refused"] += 1
            raise
        finally:
            self.in_flight -= 1

    def _record(self, result: Result, entry: ModelEntry) -> None:
        if result.simulated:
            self.counts["simulated"] += 1
        else:
            self.counts["answered" if result.success else "failed"] += 1
            self.counts["recovered"] += result.recovered
        if self._recorder is not None:
            self._recorder.note(result, entry)
