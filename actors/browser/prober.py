"""Probes a browser with known answers: while idle, and for a half-open breaker.

Only a wrong answer counts: a page that ended or hangs is detected elsewhere. This module must not
compare answers itself (`actors.browser.probes` does).
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
    """Probes the current incarnation. `idle(seconds)`: whether it was unused for so long."""

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
        """Probe periodically, unless `pause_seconds` is 0."""
        if self._pause:
            self._task = asyncio.create_task(self._loop(ref), name="probes")

    def stop(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = None

    async def probe(self, ref: HostRef, model: str) -> Failure | None:
        """Run a known-answer probe; returns the failure that ends this incarnation if it fails."""
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
            f"known-answer probe of {model} failed: {wrong}",
            "wrong_answer",
            "",
            ref,
            **self._models.facts_of(model),
        )
        self._incarnation.end(failure)
        return failure

    async def _loop(self, ref: HostRef) -> None:
        """While the browser is idle, probe one model after the other."""
        while self._incarnation.is_present(ref):
            await asyncio.sleep(self._pause)
            idle = not self._models.busy and self._idle(self._pause / 2)
            model = self._models.probes.next_model()
            if idle and model and self._incarnation.is_ready(ref):
                await self.probe(ref, model)
