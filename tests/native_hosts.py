"""Browsers without browsers: stages in the native runtime that die, hang and lie on request.

Each host has every stage. Faults are scripted by count: `script(ref, when, fault)` strikes as the
host takes its `when`-th order from then on.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from recovery.errors import PageError
from recovery.failures import categorize_browser_failure
from recovery.kinds import Backend, BrowserType, Readiness
from recovery.records import HostRef, HostStatus, NumericId
from sharding.sequences.caches import SequenceCaches, StepOrder
from sharding.sequences.hosts import StepReply
from sharding.sequences.native_stages import NativeStage
from sharding.sequences.stages import StagePipeline

NUMERIC = NumericId("native", Backend.NATIVE)


class NativeHosts:
    """Hosts named a, b, c ... that share the sessions and have caches of their own."""

    chains_by_default = False  # whether steps may go from host to host by themselves

    def __init__(self, pipeline: StagePipeline, specs, count: int = 3) -> None:
        self._stages = {
            stage.model: NativeStage(stage, spec)
            for stage, spec in zip(pipeline.stages, specs, strict=True)
        }
        for stage in self._stages.values():
            stage.open()
        self._line = pipeline
        self.refs = [HostRef("abcdefgh"[n]) for n in range(count)]
        self.caches: dict[HostRef, dict[str, SequenceCaches]] = {}
        for ref in self.refs:
            self._begin(ref)
        self.orders: list[tuple[HostRef, str, StepOrder]] = []
        self.charged: list[HostRef] = []
        self._script: dict[str, dict[int, str]] = defaultdict(dict)
        self._count: dict[str, int] = defaultdict(int)
        self._changed = asyncio.Event()
        self.restart = True  # whether a host that dies comes back, as its next epoch
        self.frozen: set[HostRef] = set()
        self.late_seconds = math.inf
        self.chains = self.chains_by_default

    def _begin(self, ref: HostRef) -> None:
        self.caches[ref] = {
            stage.model: SequenceCaches(stage.caches) for stage in self._line.stages
        }

    def script(self, name: str, when: int, fault: str) -> None:
        self._script[name][self._count[name] + when] = fault

    def kill(self, ref: HostRef) -> None:
        self.refs.remove(ref)
        del self.caches[ref]
        if self.restart:
            again = replace(ref, epoch=ref.epoch + 1)
            self.refs.append(again)
            self._begin(again)
        self._changed.set()

    # -- what a pipeline sees ----------------------------------------------------------------------

    def hosts(self):
        models = dict.fromkeys(self._stages, NUMERIC)
        return [
            HostStatus(ref, BrowserType.CHROME, Readiness.READY, queue_max=16, models=models)
            for ref in self.refs
            if ref not in self.frozen
        ]

    async def take(self, ref, model, order, tensors: Mapping, seconds: float) -> StepReply:
        await asyncio.sleep(0)
        self.orders.append((ref, model, order))
        if ref not in self.caches:
            return self._fails("replaced", ref)
        if order.what == "forget":
            self.caches[ref][model].forget(order)
            return StepReply({})
        self._count[ref.browser_id] += 1
        fault = self._script[ref.browser_id].pop(self._count[ref.browser_id], "")
        if fault == "dies":
            self.kill(ref)
            return self._fails("process_ended", ref, "browser_exited")
        if fault == "lost before":
            return self._fails("socket_closed", ref)
        if fault == "hangs":
            await asyncio.sleep(seconds + 1)
        stage = self._stages[model]
        stage.caches = self.caches[ref][model]
        try:
            answer = stage.take(order, tensors)
        except PageError as error:
            return self._fails(error.fields["what"], ref)
        if fault == "lost after":
            return self._fails("socket_closed", ref)
        if fault == "dies after":
            self.kill(ref)
            return self._fails("browser_exited", ref)
        if fault == "lies":
            name = next(iter(answer))
            wrong = answer[name].copy()
            wrong.reshape(-1)[:1] += 1
            answer = {**answer, name: np.asarray(wrong)}
        return StepReply(answer)

    def _fails(self, what: str, ref: HostRef, other: str = "") -> StepReply:
        facts = {"what": other or what, "ref": ref}
        return StepReply(failure=categorize_browser_failure(what, facts))

    async def change(self, seconds: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def exclude(self, ref: HostRef) -> None:
        pass

    async def chain(self, sequence, places, *, copies, seconds):
        if not self.chains:
            return None
        return NativeChain(self, sequence, places, copies)

    def took(self, model: str, tokens: int, seconds: float) -> None:
        pass

    def late_after(self, model: str, tokens: int) -> float:
        return self.late_seconds

    def outvoted(self, ref: HostRef, failure) -> None:
        self.charged.append(ref)
        self.kill(ref)


class NativeChain:
    """A chain whose stages are asked one after the other, by the same rules and faults."""

    def __init__(self, hosts: NativeHosts, sequence: str, places, copies: bool) -> None:
        self._hosts, self._sequence = hosts, sequence
        self._places, self._copies = places, copies
        self.trouble = ("", None)

    async def step(self, position, tokens, tensors, seconds):
        answers, handed = [], {}
        for place in self._places:
            taken = {spec.name: tensors[spec.name] for spec in place.stage.shared}
            taken |= {spec.name: handed[spec.name] for spec in place.stage.receives}
            order = StepOrder(
                self._sequence, "step", place.fence, position, tokens, place.choice, place.deltas
            )
            try:
                async with asyncio.timeout(seconds):
                    reply = await self._hosts.take(
                        place.ref, place.stage.model, order, taken, seconds
                    )
            except TimeoutError:
                self.trouble = ("no answer in time", None)
                return None
            if reply.tensors is None:
                self.trouble = (str(reply.failure), reply.failure)
                return None
            handed = reply.tensors
            answers.append(handed if self._copies or place.stage.last else {})
        return answers, 0.0

    def leave(self) -> None:
        pass
