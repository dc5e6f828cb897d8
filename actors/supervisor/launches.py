"""Carries out launches and reconnections of browsers on their hosts.

The outcome of an instruction is logged in the journal as an event. This module must not decide
whether to retry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from actors.messages import LaunchOrder
from actors.supervisor.hosts import Host, HostFactory, Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.watching import Watches
from recovery.adjustments import adjust
from recovery.control import (
    BrowserFailed,
    BrowserReady,
    BrowserReconnected,
    Launch,
    Phase,
    Reconnect,
)
from recovery.errors import BrowserLost, PoolError, SetupError, StaleTerm
from recovery.failures import categorize_browser_failure
from recovery.records import HostRef


class Launches:
    """Launches browsers, and creates their workers where there are none."""

    def __init__(
        self,
        factory: HostFactory,
        hosts: Hosts,
        watches: Watches,
        journal: Journal,
        term: int,
        wall: Callable[[], float],
    ) -> None:
        self._factory = factory
        self._hosts = hosts
        self._watches = watches
        self._journal = journal
        self._term = term
        self._wall = wall
        self._turns: dict[str, asyncio.Lock] = {}  # by node: one relaunch at a time

    async def launch(self, order: Launch) -> None:
        await asyncio.sleep(order.delay)
        if not self._is_starting(order):
            return  # stopped meanwhile
        if order.epoch == 0:
            await self._launch_now(order)
            return
        report = self._hosts.report(order.browser_id)
        # When many die, relaunch one at a time: all at once would starve each other of CPU time.
        turn = self._turns.setdefault(report.node if report else "", asyncio.Lock())
        async with turn:
            if self._is_starting(order):
                await self._launch_now(order)

    async def _launch_now(self, order: Launch) -> None:
        browser_id = order.browser_id
        host = self._hosts.get(browser_id)
        new = host is None
        try:
            if host is None:
                host = await self._factory(browser_id, order.kind, order.epoch)
                if not self._is_starting(order):
                    host.kill()  # stopped before its worker existed
                    return
                self._watches.take_on(browser_id, host)
            self._watches.begin(browser_id, host, new=new)  # a launch may take longer than a lease
            report = await host.launch(self._launch_order(order))
        except PoolError as error:
            if isinstance(error, StaleTerm):
                raise
            await self._launch_failed(order, host, error)
            return
        self._hosts.launched(browser_id, report)
        if self._journal.state.browsers[browser_id].epoch == order.epoch:
            await self._journal.happen(BrowserReady(browser_id, order.epoch, report.facts))

    def _launch_order(self, order: Launch) -> LaunchOrder:
        record = self._journal.state.browsers[order.browser_id]
        adjusted = order.adjusted and adjust(
            order.kind, order.adjusted.model_type, order.adjusted.category
        )
        return LaunchOrder(
            HostRef(order.browser_id, order.epoch),
            self._term,
            self._hosts.port(order.browser_id),
            adjusted.arguments if adjusted else (),
            adjusted.preferences if adjusted else {},
            adjusted.environment if adjusted else {},
            warm=order.epoch == 0 and not record.stands_in_for,
            breakers=record.breakers,
            death=self._hosts.death(order.browser_id),
            repair=_repair(order),
        )

    async def _launch_failed(self, order: Launch, host: Host | None, error: PoolError) -> None:
        browser_id, ref = order.browser_id, HostRef(order.browser_id, order.epoch)
        what = error.fields.get("what", "launch_failed")
        if what == "worker_exited" and self._hosts.get(browser_id) is host:
            self._watches.let_go(browser_id)
        context = {"what": what, "ref": ref, "at": self._wall(), "browser": str(order.kind)}
        failure = categorize_browser_failure(error, {**context, **error.fields})
        final = isinstance(error, SetupError)
        await self._journal.happen(BrowserFailed(browser_id, order.epoch, failure, final))

    def _is_starting(self, order: Launch) -> bool:
        record = self._journal.state.browsers[order.browser_id]
        starting = record.phase is Phase.STARTING and record.epoch == order.epoch
        return starting and not self._journal.state.closing

    async def reconnect(self, order: Reconnect) -> None:
        host = self._hosts.get(order.browser_id)
        ref = HostRef(order.browser_id, order.epoch)
        try:
            if host is None:
                raise BrowserLost(f"the worker of {order.browser_id} is gone", what="worker_exited")
            await host.reconnect(ref, self._term)
        except StaleTerm:
            raise
        except PoolError as error:
            record = self._journal.state.browsers[order.browser_id]
            if record.epoch == order.epoch and record.phase is Phase.RECONNECTING:
                context = {"ref": ref, "at": self._wall(), "browser": str(record.kind)}
                failure = categorize_browser_failure(error, {**context, **error.fields})
                await self._journal.happen(BrowserFailed(order.browser_id, order.epoch, failure))
            return
        await self._journal.happen(BrowserReconnected(order.browser_id, order.epoch))


def _repair(order: Launch) -> str:
    """The recovery action of a launch; empty if it is the first of its slot."""
    if order.epoch == 0:
        return ""
    return "adjusted restart" if order.adjusted else "restart"
