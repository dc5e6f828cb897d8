"""The story of a pool: it opens, clients ask it while things break, it comes to rest, it closes.

This module must not break anything (`tests.simulator.faults` does).
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pool.execution.answering import Answering, Question, Rules
from pool.results import Result
from pool.routing import Routing
from recovery.control import ALIVE, COMING, BrowserRecord, ModelPhase, Phase, PoolState
from recovery.kinds import Readiness
from recovery.voting import quorum
from tests.fakes import order
from tests.simulator.hosts import SimHost
from tests.simulator.invariants import SETTLE_SECONDS, any_left, why_given_up
from tests.simulator.judging import DEADLINE
from tests.simulator.world import LEASE, World


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation. `log` holds the events as they are on disk."""

    results: tuple[tuple[str, bool, str, int, int, str], ...]  # id, success, browser, attempts...
    log: tuple[bytes, ...]
    state: PoolState
    seconds: float
    terms: int
    applied: Mapping[str, int]  # faults that found something to break, by kind
    given_up: Mapping[str, str]  # slot -> why
    recovered: int

    @property
    def failed(self) -> int:
        return sum(not success for _, success, *_ in self.results)


class Story:
    """What happens in one world, from its opening to its end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._process, self._faults = world.process, world.faults
        self._slots, self._hosts = world.slots, world.hosts
        self._judge = world.judge
        self._violated, self._require = world.verdict.violated, world.verdict.require
        self._results: list[Result] = []

    @property
    def _state(self) -> PoolState:
        return self._process.state

    async def tell(self, operations: int, concurrency: int, rng: random.Random) -> Outcome:
        first = self._process.begin()
        await first.supervisor.open(self._slots)
        first.open = True
        await first.supervisor.load(order())
        clients = [
            Routing(self._process, f"client-{n}", LEASE / 3, "node", 1 << 20, 4) for n in range(3)
        ]
        for client in clients:
            await client.start()
        self._faults.active = True
        chores = [
            asyncio.create_task(self._faults.strike_in_time(), name="faults"),
            asyncio.create_task(self._sample_outages(), name="samples"),
        ]
        numbers = iter(range(operations))
        pause = self._world.plan.seconds * concurrency / max(operations, 1)
        await asyncio.gather(
            *(
                self._worker(clients[n % len(clients)], n % len(clients), numbers, pause, rng)
                for n in range(concurrency)
            )
        )
        await chores[0]
        self._faults.active = False
        await self._settle()
        self._check_strength()
        await self._ask(clients[-1], 0, "last", rng)
        for chore in chores:
            chore.cancel()
        for client in clients:
            self._require(client.gone is None, f"a client gave the pool up: {client.gone}")
        answered = Counter(result.op_id for result in self._results)
        ids = {*(f"op-{n}" for n in range(operations)), "last"}
        self._require(answered == dict.fromkeys(ids, 1), f"results: {answered - Counter(ids)}")
        await self._close(clients)
        return self._outcome()

    async def _worker(
        self,
        routing: Routing,
        client: int,
        numbers: Any,
        pause: float,
        rng: random.Random,
    ) -> None:
        for number in numbers:  # shared by all workers
            await asyncio.sleep(rng.uniform(0.0, 2 * pause))
            await self._ask(routing, client, f"op-{number}", rng)

    async def _ask(self, routing: Routing, client: int, op_id: str, rng: random.Random) -> None:
        question = Question(op_id, "m", "inference", self._world.level, client=f"client-{client}")
        answering = Answering(
            question, Rules(), routing, random.Random(f"{self._world.plan.seed} {op_id}")
        )
        x = np.asarray([rng.random()], np.float32)
        began = self._world.now
        result, reply = await answering.run({"x": x}, DEADLINE)
        ended = self._world.now
        self._results.append(result)
        if result.success:
            right = reply is not None and np.array_equal(reply.outputs["x"], x + 1)
            self._require(right, f"a wrong answer: {result}")
        late = self._world.now - began - DEADLINE
        self._require(late <= 1.0, f"an operation ended {late:.1f} s after its deadline: {result}")
        self._judge.judge(result, began, ended)

    async def _sample_outages(self) -> None:
        while True:
            serving = [h for hosts in self._hosts.values() for h in hosts if h.serves]
            able = sum(self._is_in_service(host) for host in serving)
            needed = quorum(self._world.level)
            self._judge.sample(outage=able < needed)
            if not any_left(self._state):
                self._judge.none_is_left()
            await asyncio.sleep(0.25)

    def _is_in_service(self, host: SimHost) -> bool:
        record = self._state.browsers.get(host.ref.browser_id)
        ready = record is not None and record.phase is Phase.READY
        return ready and record.epoch == host.ref.epoch and "m" in record.numeric

    async def _settle(self) -> None:
        end = max(self._world.now, self._faults.last_fault) + SETTLE_SECONDS
        quiet = 0
        while quiet < 20:  # for ten seconds
            await asyncio.sleep(0.5)
            quiet = quiet + 1 if self._is_settled() else 0
            if self._world.now > end:
                records = [str(record) for record in self._state.browsers.values()]
                self._violated("the pool does not come to rest:\n  " + "\n  ".join(records))
                await asyncio.sleep(math.inf)

    def _is_settled(self) -> bool:
        incarnation = self._process.incarnation
        assert incarnation is not None
        return (
            incarnation.open
            and incarnation.lives
            and not self._world.store.full
            and self._world.now > self._faults.last_fault
            and all(
                record.phase not in (*COMING, Phase.DRAINING)
                and ModelPhase.LOADING not in record.models.values()
                for record in self._state.browsers.values()
            )
            # A worker that is silent is found out within a lease.
            and not any(
                host.silent for hosts in self._hosts.values() for host in hosts if host.lives
            )
        )

    def _check_strength(self) -> None:
        """The pool has what it was asked for, or says why not; and nothing else lives."""
        records = self._state.browsers.values()
        serving = [record.id for record in records if record.phase is Phase.READY]
        missed = {r.id: self._why(r) for r in records if _is_missed(r)}
        full = len(serving) + len(missed) == len(self._slots)
        self._require(full, f"of {list(self._slots)}, {serving} serve, and {missed} are missed")
        self._require(all(missed.values()), f"nobody says why some are missed: {missed}")
        for name, hosts in self._hosts.items():
            living = [host for host in hosts if host.lives]
            record = self._state.browsers.get(name)
            if record is None or record.phase is not Phase.READY:
                self._require(not living, f"left over: {[str(host.ref) for host in living]}")
                continue
            loaded = {m for m, phase in record.models.items() if phase is ModelPhase.LOADED}
            has = [(host.ref.epoch, host.readiness, set(host.models)) for host in living]
            want = [(record.epoch, Readiness.READY, loaded)]
            self._require(has == want, f"{name} is {has}, where the state says {want}: {record}")
            for model in record.models.keys() - loaded:
                tried = record.loads_failed.get(model, 0)
                self._require(
                    tried >= 2, f"{name} is without {model} after {tried} loads: {record}"
                )

    def _why(self, record: BrowserRecord) -> str:
        return why_given_up(self._state, record, record.since)

    async def _close(self, clients: Sequence[Routing]) -> None:
        await self._process.close()
        for client in clients:
            await client.stop()
        await asyncio.sleep(2 * DEADLINE)
        living = [str(h.ref) for hosts in self._hosts.values() for h in hosts if h.lives]
        self._require(not living, f"a closed pool leaves {living} behind")
        alive = [record.id for record in self._state.browsers.values() if record.phase in ALIVE]
        self._require(not alive, f"a closed pool still has {alive}")
        own = asyncio.current_task()
        tasks = [t for t in asyncio.all_tasks() if t is not own and t.get_name() != "simulation"]
        self._require(not tasks, f"tasks are left: {tasks}")

    def _outcome(self) -> Outcome:
        rows = tuple(
            (
                result.op_id,
                result.success,
                result.browser_id,
                result.epoch,
                int(result.metrics["attempts"]),
                result.error,
            )
            for result in self._results
        )
        given_up = {r.id: self._why(r) for r in self._state.browsers.values() if _is_missed(r)}
        return Outcome(
            rows,
            tuple(self._world.store.lines),
            self._state,
            self._world.now,
            self._process.terms,
            dict(self._faults.applied),
            given_up,
            sum(result.recovered for result in self._results),
        )


def _is_missed(record: BrowserRecord) -> bool:
    return record.phase is Phase.GIVEN_UP and not record.replaced_by
