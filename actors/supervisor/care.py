"""Periodic maintenance: checks memory, usage and pool size, and orders what is due.

`recovery.maintenance` decides; this module collects the hosts' loads and logs the decisions in the
journal. It must not act on a browser itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from actors.supervisor.hosts import Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.records import ModelOrder, SupervisorConfig
from actors.supervisor.tasks import Tasks
from recovery.control import Phase
from recovery.errors import PoolError, SetupError
from recovery.maintenance import Caretaker
from recovery.resources import BrowserLoad, NodeLoad, refuse_load

_T = TypeVar("_T")
_ASK_SECONDS = 2.0


class Care:
    """Collects the loads of the hosts, and runs the maintenance loop."""

    def __init__(
        self,
        config: SupervisorConfig,
        hosts: Hosts,
        journal: Journal,
        tasks: Tasks,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._hosts = hosts
        self._journal = journal
        self._tasks = tasks
        self._clock = clock

    async def run(self) -> None:
        """Maintain the pool until it closes."""
        caretaker = Caretaker(self._config.resources, self._config.scaling)
        while not self._journal.state.closing:
            await asyncio.sleep(self._config.care_seconds)
            loads, nodes = await self.loads()
            for body in caretaker.look(self._journal.state, loads, nodes, self._clock()):
                try:
                    await self._journal.happen(body, ordered=True)
                except PoolError as error:  # e.g. the log is full: retried next time
                    self._tasks.report("care", error)

    async def loads(self) -> tuple[list[BrowserLoad], list[NodeLoad]]:
        """The loads of the hosts in service, and of their nodes. Omits hosts that do not answer."""
        serving = {
            browser_id: host.usage()
            for browser_id, host in self._hosts.items()
            if self._journal.state.browsers[browser_id].phase is Phase.READY
        }
        answers = await _answers(serving)
        found = sorted(answers.values(), key=lambda usage: usage.browser.browser_id)
        nodes = {usage.node.node: usage.node for usage in found}
        return [usage.browser for usage in found], list(nodes.values())

    async def refuse_if_full(self, order: ModelOrder) -> None:
        """Raises `SetupError` if a machine has too little memory to load a model."""
        loads, nodes = await self.loads()
        why = refuse_load(self._config.resources, nodes, loads, order.spec.load_peak_bytes)
        if why:
            raise SetupError(f"{order.spec.name} is not loaded: {why}")

    async def memory(self) -> Mapping[str, int]:
        """Resident bytes of each browser's process tree."""
        return await _answers({name: host.memory_bytes() for name, host in self._hosts.items()})


async def _answers(calls: Mapping[str, Awaitable[_T]]) -> dict[str, _T]:
    """What each browser's host answers in time; those that do not are left out."""
    found: dict[str, _T] = {}

    async def ask(browser_id: str, call: Awaitable[_T]) -> None:
        with contextlib.suppress(PoolError, TimeoutError):
            async with asyncio.timeout(_ASK_SECONDS):
                found[browser_id] = await call

    await asyncio.gather(*(ask(*each) for each in calls.items()))
    return found
