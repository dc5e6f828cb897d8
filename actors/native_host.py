"""The native runtime in the place of a browser: the last rung, labelled as what it is.

It answers operations as a browser host does and loads a model when it is first asked for it. A
bounded number of models stays open, the least used goes. A plain class, wrapped as a Ray actor in
`actors.ray.workers`. It must never be taken for a browser: its answers say `native`.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from actors.messages import RunReply, RunRequest
from recovery.errors import PoolError
from recovery.failures import categorize_browser_failure
from recovery.kinds import Backend, Readiness
from recovery.records import HostRef, HostStatus
from sharding.models.native import NativeSession
from sharding.models.signature import ModelSpec

_MODELS_MAX = 4
_NAME = "native"


class NativeHost:
    """Native onnxruntime, one operation at a time."""

    def __init__(
        self,
        node: str = "",
        *,
        models_max: int = _MODELS_MAX,
        make: Callable[[str], NativeSession] = NativeSession,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._ref = HostRef(_NAME, 0, node)
        self._models_max = models_max
        self._make = make
        self._wall = wall
        self._sessions: OrderedDict[str, NativeSession] = OrderedDict()  # by digest
        self._opening: dict[str, asyncio.Task[NativeSession]] = {}
        self._turn = asyncio.Lock()
        self._queue = 0
        self._served = 0

    async def run(
        self, request: RunRequest, spec: ModelSpec, tensors: Mapping[str, Any]
    ) -> RunReply:
        """Answer one operation on the model `spec`. Never raises for what the runtime does."""
        began = time.monotonic()
        self._queue += 1
        try:
            async with asyncio.timeout(request.seconds), self._turn:
                session = await self._session(spec)
                asked = time.monotonic()
                outputs = await asyncio.to_thread(session.run, tensors)
        except (PoolError, TimeoutError) as error:
            failure = categorize_browser_failure(
                error, {"ref": self._ref, "op_id": request.op_id, "at": self._wall()}
            )
            return RunReply(self.status(), failure=failure)
        finally:
            self._queue -= 1
        self._served += 1
        now = time.monotonic()
        return RunReply(
            self.status(),
            outputs=outputs,
            answered=True,
            backend=Backend.NATIVE,
            in_page_ms=(now - asked) * 1e3,  # in the runtime: there is no page
            host_ms=(now - began) * 1e3,
        )

    def status(self) -> HostStatus:
        return HostStatus(self._ref, None, Readiness.READY, self._queue, served=self._served)

    async def _session(self, spec: ModelSpec) -> NativeSession:
        """The model, opened once: who can't wait for that leaves it to the next."""
        session = self._sessions.get(spec.digest)
        if session is None:
            opening = self._opening.get(spec.digest)
            if opening is None:
                opening = asyncio.create_task(self._open(spec), name="open")
                self._opening[spec.digest] = opening
                opening.add_done_callback(lambda _: self._opening.pop(spec.digest, None))
            session = await asyncio.shield(opening)
        self._sessions.move_to_end(spec.digest)
        return session

    async def _open(self, spec: ModelSpec) -> NativeSession:
        session = self._make(spec.files[0].path)
        await asyncio.to_thread(session.open)
        self._sessions[spec.digest] = session
        while len(self._sessions) > self._models_max:
            self._sessions.popitem(last=False)[1].close()
        return session
