"""Hosts of one stage on paper: what they answer is scripted, what they are asked is noted."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque

import numpy as np

from recovery.failures import Failure, categorize_browser_failure
from recovery.kinds import Backend, BrowserType, Level, Readiness
from recovery.records import HostRef, HostStatus, NumericId
from sharding.models.signature import CacheSpec, TensorSpec
from sharding.sequences.caches import DELTA, StepOrder
from sharding.sequences.context import StageContext
from sharding.sequences.events import Events, SequenceStatistics
from sharding.sequences.hosts import StepReply
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import Stage

NUMERIC = NumericId("native", Backend.NATIVE)
KEYS = CacheSpec("past.k", "present.k", "float32", (1, 1, 0, 2), 2)
HIDDEN = TensorSpec("hidden", "float32", (1, "s", 2))
SENT = TensorSpec("sent", "float32", (1, "s", 2))
STAGE = Stage("m@0", (HIDDEN,), (SENT,), (), (KEYS,))
A, B, C = (HostRef(name) for name in "abc")


class PaperHosts:
    """`replies` are given out first, by host; then every step is answered with `sent`."""

    def __init__(self, *refs: HostRef) -> None:
        self.refs = list(refs)
        self.replies: dict[HostRef, deque[StepReply]] = defaultdict(deque)
        self.orders: list[tuple[HostRef, StepOrder, dict[str, np.ndarray]]] = []
        self.silent: set[HostRef] = set()  # these never answer
        self.excluded: list[HostRef] = []
        self.charged: list[HostRef] = []
        self.timed: list[str] = []
        self.late_seconds = math.inf
        self.chains: list = []  # to be laid, the next first
        self.laid: list = []

    def hosts(self) -> list[HostStatus]:
        models = {STAGE.model: NUMERIC}
        return [
            HostStatus(ref, BrowserType.CHROME, Readiness.READY, queue_max=16, models=models)
            for ref in self.refs
        ]

    async def take(self, ref, model, order, tensors, seconds) -> StepReply:
        await asyncio.sleep(0)
        self.orders.append((ref, order, dict(tensors)))
        if ref in self.silent and order.what != "forget":
            await asyncio.sleep(60)
        if self.replies[ref]:
            return self.replies[ref].popleft()
        return StepReply(answer(order) if order.what == "step" else {}, in_page_ms=1.0)

    def asked(self, what: str) -> list[tuple[HostRef, int, int]]:
        """Host, fence and position of these orders."""
        return [(ref, o.fence, o.position) for ref, o, _ in self.orders if o.what == what]

    async def change(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def exclude(self, ref: HostRef) -> None:
        self.excluded.append(ref)

    def outvoted(self, ref: HostRef, failure: Failure) -> None:
        self.charged.append(ref)

    async def chain(self, sequence, places, *, copies, seconds):
        self.laid.append((places, copies))
        return self.chains.pop(0) if self.chains else None

    def took(self, model: str, tokens: int, seconds: float) -> None:
        self.timed.append(model)

    def late_after(self, model: str, tokens: int) -> float:
        return self.late_seconds


def answer(order: StepOrder, number: float = 1.0) -> dict[str, np.ndarray]:
    made = {"sent": np.full((1, order.tokens, 2), number, np.float32)}
    if order.deltas:
        made[DELTA + KEYS.past] = np.full((1, 1, order.tokens, 2), number, np.float32)
    return made


def fails(what: str, ref: HostRef = A) -> StepReply:
    return StepReply(failure=categorize_browser_failure(what, {"what": what, "ref": ref}))


def context_of(hosts: PaperHosts, level: Level = Level.MEDIUM, **options) -> StageContext:
    clock = asyncio.get_running_loop().time
    rules = PipelineRules(level, **{"step_seconds": 1.0, **options})
    return StageContext("s", 0, STAGE, hosts, rules, Events(SequenceStatistics(), clock))
