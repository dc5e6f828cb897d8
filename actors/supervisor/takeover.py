"""The first step of a new supervisor: takes over the running workers.

`recovery.control.reconcile` compares the logged state with the workers; the resulting events and
orders are carried out. This module must not launch anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.messages import HostReport
from actors.supervisor.hosts import Host, HostFinder, Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.tasks import Tasks
from actors.supervisor.watching import Watches
from recovery.control import Instruction, Seen, reconcile
from recovery.errors import PoolError

_HELLO_SECONDS = 5.0  # a worker that does not answer within this is killed


class Takeover:
    """Takes over the workers of the previous supervisor."""

    def __init__(
        self,
        hosts: Hosts,
        watches: Watches,
        journal: Journal,
        tasks: Tasks,
        term: int,
        wall: Callable[[], float],
        carry_out: Callable[[Instruction], None],
    ) -> None:
        self._hosts = hosts
        self._watches = watches
        self._journal = journal
        self._tasks = tasks
        self._term = term
        self._wall = wall
        self._carry_out = carry_out

    async def run(self, find: HostFinder) -> None:
        """Reconcile the state with the hosts that `find` returns."""
        found = await find()
        greetings = [self._greet(name, host) for name, hosts in found.items() for host in hosts]
        seen = self._adopt([greeting for greeting in await asyncio.gather(*greetings) if greeting])
        todo = reconcile(self._journal.state, seen, self._wall())
        for event in todo.events:
            await self._journal.happen(event)
        for instruction in todo.orders:
            self._carry_out(instruction)

    async def _greet(self, browser_id: str, host: Host) -> tuple[str, Host, HostReport] | None:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                return browser_id, host, await host.hello(self._term)
        except (PoolError, TimeoutError) as error:
            self._tasks.report(f"hello to {browser_id}", error)
            host.kill()
            return None

    def _adopt(self, greetings: Sequence[tuple[str, Host, HostReport]]) -> dict[str, Seen]:
        """Take over the newest worker of each slot; kill all others of this pool."""
        seen: dict[str, Seen] = {}
        for browser_id, host, report in sorted(greetings, key=lambda each: -each[2].ref.epoch):
            if browser_id in self._hosts or browser_id not in self._journal.state.browsers:
                host.kill()
                continue
            self._watches.take_on(browser_id, host, report.seq)
            launch = report.launch
            if launch is not None:
                self._hosts.launched(browser_id, launch)
            seen[browser_id] = Seen(
                report.ref.epoch,
                report.readiness,
                launch.facts if launch is not None else None,
                report.digests,
                report.models,
                report.cause,
                report.breakers,
            )
            self._watches.begin(browser_id, host)
        return seen
