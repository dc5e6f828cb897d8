"""Operations on one browser: admits, runs, answers and caches them, each once.

The queue is bounded here, breakers refuse here, and every failure becomes part of a reply. This
module must not launch or end a browser: it reports why the current incarnation ended.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from actors.browser.answers import AnswerCache, fingerprint
from actors.browser.breakers import Admission, HostBreakers
from actors.browser.incarnation import Incarnation
from actors.browser.models import LoadedModels
from actors.browser.page import Page
from actors.messages import HostConfig, RunReply, RunRequest
from recovery.errors import CallerError, PageError, PoolError
from recovery.failures import Failure, Scope
from recovery.records import HostRef, HostStatus
from recovery.sequences import MISADDRESSED
from sharding.models.frames import Frame


class OperationServer:
    """The operations of one browser, by operation id.

    `judged(ref)` returns when a connection error has been classified, `probe` runs a known-answer
    probe, `on_used` is called after each operation, `status` returns the browser's status.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        page: Page,
        models: LoadedModels,
        breakers: HostBreakers,
        config: HostConfig,
        clock: Callable[[], float],
        *,
        judged: Callable[[HostRef], Awaitable[None]],
        probe: Callable[[HostRef, str], Awaitable[Failure | None]],
        on_used: Callable[[], None],
        status: Callable[[], HostStatus],
    ) -> None:
        self.served = 0
        self.used_at = -math.inf  # when an operation was last sent here
        self._incarnation = incarnation
        self._page = page
        self._models = models
        self._breakers = breakers
        self._config = config
        self._clock = clock
        self._judged = judged
        self._probe = probe
        self._on_used = on_used
        self._status = status
        self._in_flight: dict[str, asyncio.Future[Any]] = {}  # operations, and steps of sequences
        self._answers = AnswerCache(config.answers_kept_max, config.answers_kept_bytes_max)

    def queued(self) -> int:
        """Unanswered operations, and abandoned ones that the page still computes."""
        return max(len(self._in_flight), self._page.outstanding)

    def idle(self, seconds: float) -> bool:
        """Whether nothing is in flight, nor was for so long."""
        return not self._in_flight and self._clock() - self.used_at >= seconds

    async def finished(self) -> None:
        """Return when all operations now in flight are answered."""
        if self._in_flight:
            await asyncio.wait(self._in_flight.values())

    async def run(
        self, request: RunRequest, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> RunReply:
        """Run one operation, once; see `BrowserHost.run`."""
        if request.stage is not None:
            return await self._take_step(request, tensors)
        spec = self._models.specs.get(request.model)
        digest = request.digest or (spec.digest if spec else "")
        key = f"run:{request.op_id}:{digest[:16]}:{request.model}:{fingerprint(tensors):08x}"
        answered = self._answers.get(key)
        if answered is not None:
            return replace(answered, status=self._status(), repeated=True)
        running: asyncio.Future[RunReply] | None = self._in_flight.get(key)
        if running is None:
            refusal = self._refusal(request)
            if refusal is not None:
                return refusal
            admission = self._breakers.admit(request.model)
            if admission is None:
                return RunReply(self._status(), busy=True)  # `status.blocked` says by what
            running = asyncio.create_task(self._run(key, request, tensors, admission), name=key)
            self._in_flight[key] = running
            running.add_done_callback(lambda _: self._ended(key, request.model))
        return replace(await asyncio.shield(running), status=self._status())

    async def _take_step(
        self, request: RunRequest, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> RunReply:
        """A step of a sequence. The page, which has the KV caches, knows whether it was taken
        before: so its answer is not cached here, and each request has a unique name."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        admission = self._breakers.admit(request.model)
        if admission is None:
            return RunReply(self._status(), busy=True)
        key = self._page.numbered(f"step:{request.op_id}")
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = taken
        try:
            return await self._run(key, request, tensors, admission)
        finally:
            self._ended(key, request.model)
            taken.set_result(None)

    def _ended(self, key: str, model: str) -> None:
        self._in_flight.pop(key, None)
        self.used_at = self._clock()
        self._models.used(model)
        self._on_used()

    def _refusal(self, request: RunRequest) -> RunReply | None:
        incarnation = self._incarnation
        if not incarnation.is_ready(request.ref):
            failure = incarnation.failure(
                f"{request.ref} is not current; {incarnation.ref} is {incarnation.readiness}",
                "replaced",
                request.op_id,
            )
            return RunReply(self._status(), failure=failure)
        spec = self._models.specs.get(request.model)
        if spec is None or (request.digest and request.digest != spec.digest):
            failure = incarnation.failure(
                f"{request.model} is not loaded", "not_loaded", request.op_id
            )
            return RunReply(self._status(), failure=failure)
        full = self.queued() >= self._config.queue_max
        return RunReply(self._status(), busy=True) if full else None

    async def _run(
        self,
        key: str,
        request: RunRequest,
        tensors: Mapping[str, np.ndarray[Any, Any]],
        admission: Admission,
    ) -> RunReply:
        ref, begun, queued = self._incarnation.ref, self._clock(), self.queued()
        if admission.on_trial and (wrong := await self._probe(ref, request.model)) is not None:
            admission.failed(wrong, retried=not request.last)
            return RunReply(self._status(), failure=replace(wrong, op_id=request.op_id))
        stage = request.stage
        body = {"model": request.model, **({"stage": asdict(stage)} if stage else {})}
        position = stage.position if stage else 0
        frame = Frame("run", key, ref.epoch, position=position, body=body, tensors=tensors)
        try:
            async with asyncio.timeout(request.seconds):
                answer = await self._page.request(frame)
        except TimeoutError:
            return RunReply(self._status(), failure=self._late(ref, request, admission))
        except PageError as error:
            return RunReply(self._status(), failure=self._page_failed(error, request, admission))
        except BaseException as error:
            admission.abandoned()
            if isinstance(error, PoolError) and not isinstance(error, CallerError):
                return RunReply(self._status(), failure=await self._failure_of(error, ref, request))
            raise
        admission.succeeded()
        self.served += 1
        numeric = self._models.numeric.get(request.model)
        reply = RunReply(
            self._status(),
            outputs=answer.tensors,
            answered=True,
            backend=numeric.backend if numeric else None,
            in_page_ms=float(answer.body.get("inPageMs", 0.0)),
            host_ms=(self._clock() - begun) * 1e3,
            queued=queued,
        )
        if request.stage is None:
            self._answers.put(key, reply)
        return reply

    def _late(self, ref: HostRef, request: RunRequest, admission: Admission) -> Failure:
        failure = self._incarnation.failure(
            f"no answer within {request.seconds:.1f} s",
            "deadline_passed",
            request.op_id,
            ref,
            **self._models.facts_of(request.model),
        )
        if self._page.connected:
            admission.failed(failure, retried=not request.last)
        else:
            admission.abandoned()  # not the model's fault while the page is disconnected
        return failure

    def _page_failed(self, error: PageError, request: RunRequest, admission: Admission) -> Failure:
        what = str(error.fields.get("what", "run_failed"))
        facts = {**error.fields, **self._models.facts_of(request.model)}
        facts.pop("what", None)
        failure = self._incarnation.failure(str(error), what, request.op_id, request.ref, **facts)
        if what in MISADDRESSED:  # e.g. it was unloaded meanwhile: no failure
            admission.abandoned()
        else:
            admission.failed(failure, retried=not request.last)
        if failure.scope is Scope.PAGE:
            self._incarnation.end(failure)  # e.g. out of memory, which fails all operations
        return failure

    async def _failure_of(self, error: PoolError, ref: HostRef, request: RunRequest) -> Failure:
        # The page or only its socket is gone; which of them is known a moment later.
        await self._judged(ref)
        cause = self._incarnation.cause
        if cause is not None and cause.ref == ref:
            return replace(cause, op_id=request.op_id)
        what = str(error.fields.get("what", "page_closed"))
        return self._incarnation.failure(str(error), what, request.op_id, ref)
