"""Handles to the actors of `actors.ray.workers`: browsers, the native runtime, the history.

A handle has the methods of its actor's class and converts Ray's errors to the project's own. This
module must not decide anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.messages import (
    HostEvent,
    HostReport,
    LaunchOrder,
    LaunchReport,
    PageDiagnostics,
    RunReply,
    RunRequest,
    Usage,
)
from actors.ray.connection import NAMESPACE, this_node
from actors.ray.starting import history_name, on_this_node, start_actor
from actors.ray.workers import History, Native
from actors.supervisor.records import SupervisorConfig
from recovery.breaker import BreakerKey, BreakerSwitch, CircuitState
from recovery.errors import BrowserLost, InternalError, PoolClosed, PoolError, SetupError
from recovery.faults import Fault, Injected
from recovery.history.samples import Sample
from recovery.kinds import Backend
from recovery.records import HostRef, NumericId
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec

_HISTORY_CLOSE_SECONDS = 10.0


async def result(reference: Any, whose: str) -> Any:
    """Await a call. Raises the callee's error, or `BrowserLost` for a dead worker."""
    try:
        return await reference
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PoolError):
            raise cause from None
        raise InternalError(f"{whose} failed: {error}") from error
    except ActorUnavailableError as error:  # it may come back: the lease decides
        raise BrowserLost(f"{whose} can't be reached now", what="socket_closed") from error
    except RayActorError as error:
        raise BrowserLost(f"the worker of {whose} is gone", what="worker_exited") from error
    except RayError as error:
        raise BrowserLost(f"{whose} could not be reached: {error}", what="socket_closed") from error


@dataclass(frozen=True)
class RayHost:
    """A handle to a `Browser`. Picklable: clients get it from the supervisor's table."""

    actor: Any

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        report: LaunchReport = await result(self.actor.launch.remote(order), str(order.ref))
        return report

    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId:
        call = self.actor.load.remote(ref, term, spec, backends, known)
        numeric: NumericId = await result(call, str(ref))
        return numeric

    async def unload(self, ref: HostRef, term: int, model: str) -> None:
        await result(self.actor.unload.remote(ref, term, model), str(ref))

    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
        call = self.actor.run.remote(request, tensors)
        reply: RunReply = await result(call, str(request.ref))
        return reply

    async def next_event(
        self, term: int, seconds: float, after: int, peers: Mapping[BreakerKey, CircuitState]
    ) -> HostEvent | None:
        call = self.actor.next_event.remote(term, seconds, after, peers)
        event: HostEvent | None = await result(call, "a browser")
        return event

    async def hello(self, term: int) -> HostReport:
        report: HostReport = await result(self.actor.hello.remote(term), "a browser")
        return report

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None:
        """Inject a fault; see `BrowserHost.inject`."""
        made: Injected | None = await result(self.actor.inject.remote(ref, fault, gated), str(ref))
        return made

    async def diagnose(self, *, screenshot: bool = True) -> PageDiagnostics:
        found: PageDiagnostics = await result(self.actor.diagnose.remote(screenshot), "a browser")
        return found

    async def breaker_metrics(self) -> Mapping[str, Mapping[str, Any]]:
        call = self.actor.breaker_metrics.remote()
        found: Mapping[str, Mapping[str, Any]] = await result(call, "a browser")
        return found

    async def switch_breaker(self, model: str, to: BreakerSwitch) -> None:
        await result(self.actor.switch_breaker.remote(model, to), "a browser")

    async def reconnect(self, ref: HostRef, term: int) -> None:
        await result(self.actor.reconnect.remote(ref, term), str(ref))

    async def usage(self) -> Usage:
        usage: Usage = await result(self.actor.usage.remote(), "a browser")
        return usage

    async def drain(self, term: int) -> None:
        await result(self.actor.drain.remote(term), "a browser")

    async def memory_bytes(self) -> int:
        return int(await result(self.actor.memory_bytes.remote(), "a browser"))

    async def stop(self) -> None:
        await result(self.actor.stop.remote(), "a browser")

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self.actor)


class RayNative:
    """The pool's native runtime on this node, started on first use."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._name = f"{config.name}: native on {this_node()[:8]} ({config.run})"
        self._lease_seconds = config.lease_seconds

    async def run(
        self, request: RunRequest, spec: ModelSpec, tensors: Mapping[str, Any]
    ) -> RunReply:
        """As `NativeHost.run`. Raises `BrowserLost` if its worker is unavailable."""
        try:
            actor = await asyncio.to_thread(
                start_actor,
                Native,
                self._name,
                self._lease_seconds,
                get_if_exists=True,
                **on_this_node(),
            )
        except (RayError, ValueError) as error:
            raise BrowserLost(f"Ray could not start the native runtime: {error}") from error
        reply: RunReply = await result(
            actor.run.remote(request, spec, tensors), "the native runtime"
        )
        return reply

    def end(self) -> None:
        """End it, if it was started here or by another client of the pool."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))


@dataclass(frozen=True)
class RayHistory:
    """A handle to a pool's `History`."""

    actor: Any

    @classmethod
    async def create(cls, config: SupervisorConfig) -> RayHistory:
        """Start it, or find the one that an earlier supervisor has started. Raises `PoolError`."""
        with contextlib.suppress(PoolClosed):
            return cls.find(config)
        try:
            name = history_name(config)
            actor = start_actor(History, name, config, max_restarts=-1, **on_this_node())
        except (RayError, ValueError) as error:
            raise SetupError(f"Ray could not start a worker for the history: {error}") from error
        await result(actor.open.remote(), "the history")
        return cls(actor)

    @classmethod
    def find(cls, config: SupervisorConfig) -> RayHistory:
        try:
            return cls(ray.get_actor(history_name(config), namespace=NAMESPACE))
        except ValueError as error:
            raise PoolClosed(f"pool {config.name} keeps no history") from error

    async def add(self, samples: Sequence[Sample]) -> None:
        await result(self.actor.add.remote(samples), "the history")

    def tell(self, samples: Sequence[Sample]) -> None:
        """As `add`, without waiting for a result."""
        self.actor.add.remote(samples)

    def renew(self) -> None:
        self.actor.renew.remote()

    async def ask(self, question: str, **options: Any) -> Any:
        return await result(self.actor.ask.remote(question, options), "the history")

    async def pid(self) -> int:
        return int(await result(self.actor.pid.remote(), "the history"))

    async def query(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = await result(
            self.actor.query.remote(sql, params), "the history"
        )
        return rows

    async def close(self) -> None:
        with contextlib.suppress(PoolError, TimeoutError):
            async with asyncio.timeout(_HISTORY_CLOSE_SECONDS):
                await result(self.actor.close.remote(), "the history")
        with contextlib.suppress(RayError):
            ray.kill(self.actor)
