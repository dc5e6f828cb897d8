"""One simulated pool: its parts, put together.

This module must not do what a part can do: it only tells them of each other.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

from actors.messages import LaunchOrder, RunRequest
from actors.supervisor.records import SupervisorConfig
from recovery.kinds import BrowserType, Level
from recovery.plan import strategy_order
from recovery.supervision import RestartLimit
from tests.simulator.checks import StateChecks
from tests.simulator.clocks import Clocks
from tests.simulator.faults import Faults
from tests.simulator.hosts import SimHost
from tests.simulator.judging import Judge
from tests.simulator.log import Store
from tests.simulator.plans import FaultPlan, Kind, slots
from tests.simulator.process import SupervisorProcess
from tests.simulator.verdict import Verdict

LIMIT = RestartLimit()
LEASE = 15.0


class World:
    """What a worker has around it (`hosts.Surroundings`), and all that a story needs."""

    def __init__(
        self,
        plan: FaultPlan,
        browsers: Mapping[str, int],
        level: Level,
        strategy: str,
        limit: RestartLimit = LIMIT,
    ) -> None:
        loop = asyncio.get_running_loop()
        config = SupervisorConfig(
            "sim", level, strategy_order(strategy), limit, LEASE, False, creator="client-0"
        )
        self.plan = plan
        self.level = level
        self.slots = slots(browsers)
        self.hosts: dict[str, list[SimHost]] = {}
        self.store = Store()
        self.clocks = Clocks(loop)
        self.verdict = Verdict(loop)
        self.judge = Judge(level, self.clocks, self.verdict)
        self.faults = Faults(plan, self.hosts, self.store, self.clocks, loop, self._kill_supervisor)
        self._checks = StateChecks(
            self.slots, self.hosts, self.store, self.clocks, self.judge, self.verdict
        )
        self.process = SupervisorProcess(
            config,
            self.store,
            self.clocks,
            loop,
            self._checks,
            self.verdict,
            self.make_host,
            self.find_hosts,
            self.faults.supervisor_dies_at,
        )
        loop.set_exception_handler(self.verdict.unseen)

    @property
    def now(self) -> float:
        return self.clocks.now

    # -- workers ----------------------------------------------------------------------------------

    async def make_host(self, browser_id: str, kind: BrowserType, epoch: int) -> SimHost:
        """As with Ray, a worker that was asked for comes to be, whatever becomes of who asked."""
        hosts = self.hosts.setdefault(browser_id, [])
        rng = random.Random(f"{self.plan.seed} {browser_id} {len(hosts)}")
        host = SimHost(self, browser_id, kind, rng)
        hosts.append(host)
        await asyncio.sleep(host.rng.uniform(0.01, 0.3))
        return host

    async def find_hosts(self) -> dict[str, list[SimHost]]:
        return {name: [h for h in hosts if h.lives] for name, hosts in self.hosts.items()}

    # -- what workers tell and ask ----------------------------------------------------------------

    def takes(self, kind: Kind, browser_id: str) -> bool:
        return self.faults.takes(kind, browser_id)

    def launching(self, host: SimHost, order: LaunchOrder) -> None:
        self._checks.launching(host, order)

    def operation_began(self, host: SimHost, request: RunRequest) -> None:
        self.faults.operation_began(host, request)

    def stalled(self, request: RunRequest, seconds: float) -> None:
        self.judge.stalled(request, seconds)

    def hangs(self, request: RunRequest) -> None:
        self.judge.hangs(request)

    def _kill_supervisor(self, seconds: float) -> bool:
        return self.process.kill(seconds)
