"""Asks a browser for known answers: while it is idle, and as the probe of a half-open breaker.

Only an answer that is wrong says anything: a page that is gone or hangs is noticed otherwise. This
module must not judge an answer itself (`actors.browser.probes` does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from actors.browser.incarnation import Incarnation
from actors.browser.models import LoadedModels
from actors.browser.page import Page
from recovery.errors import PoolError
from recovery.failures import Failure
from recovery.records import HostRef
from sharding.models.frames import Frame


class Prober:
    """Probes the present incarnation. `idle(seconds)`: whether nobody used it for so long."""

    def __init__(
        self,
        incarnation: Incarnation,
        page: Page,
        models: LoadedModels,
        pause_seconds: float,
        idle: Callable[[float], bool],
    ) -> None:
        self._incarnation = incarnation
        self._page = page
        self._models = models
        self._pause = pause_seconds
        self._idle = idle
        self._task: asyncio.Task[None] | None = None

    def start(self, ref: HostRef) -> None:
        """Probe from time to time, if there is to be a pause between probes at all."""
        if self._pause:
            self._task = asyncio.create_task(self._loop(ref), name="probes")

    def stop(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = None

    async def probe(self, ref: HostRef, model: str) -> Failure | None:
        """Ask for a known answer; why this incarnation is over, if it is not given."""
        known = self._models.probes.of(model)
        if known is None:
            return None
        body = {"model": model}
        op_id = self._page.numbered("probe")
        frame = Frame("run", op_id, ref.epoch, body=body, tensors=known.question)
        try:
            reply = await self._page.request(frame)
        except PoolError:
            return None
        wrong = self._models.probes.judge(known, reply.tensors)
        if not wrong or not self._incarnation.is_ready(ref):
            return None
        failure = self._incarnation.failure(
            f"a known answer of {model} came out wrong: {wrong}",
            "wrong_answer",
            "",
            ref,
            **self._models.facts_of(model),
        )
        self._incarnation.end(failure)
        return failure

    async def _loop(self, ref: HostRef) -> None:
        """While nobody uses it, ask the browser what is known, one model after the other."""
        while self._incarnation.is_present(ref):
            await asyncio.sleep(self._pause)
            idle = not self._models.busy and self._idle(self._pause / 2)
            model = self._models.probes.next_model()
            if idle and model and self._incarnation.is_ready(ref):
                await self.probe(ref, model)
