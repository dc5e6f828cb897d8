"""Carries out loads and unloads of models on hosts.

The outcome of a load is logged in the journal as an event. This module must not decide whether to
retry, nor store orders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from actors.supervisor.hosts import Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.records import ModelOrder
from recovery.control import Load, ModelFailed, ModelLoaded, Unload
from recovery.errors import BrowserLost, PoolError, StaleTerm
from recovery.failures import categorize_browser_failure
from recovery.records import HostRef


class Loads:
    """Loads and unloads models on hosts; `order_of` returns the order of a model's name."""

    def __init__(
        self,
        order_of: Callable[[str], ModelOrder | None],
        hosts: Hosts,
        journal: Journal,
        term: int,
        wall: Callable[[], float],
    ) -> None:
        self._order_of = order_of
        self._hosts = hosts
        self._journal = journal
        self._term = term
        self._wall = wall

    async def load(self, order: Load) -> None:
        await asyncio.sleep(order.delay)
        host, model = self._hosts.get(order.browser_id), self._order_of(order.model)
        if host is None or model is None:
            return
        ref = HostRef(order.browser_id, order.epoch)
        try:
            numeric = await host.load(ref, self._term, model.spec, model.backends, model.known)
        except StaleTerm:
            raise
        except PoolError as error:
            if isinstance(error, BrowserLost) and error.fields.get("what") != "socket_closed":
                return  # its death is a separate event; a lost order is not
            failure = categorize_browser_failure(
                error, {"what": "load_failed", **error.fields, "ref": ref, "at": self._wall()}
            )
            await self._journal.happen(ModelFailed(ref.browser_id, ref.epoch, order.model, failure))
            return
        await self._journal.happen(ModelLoaded(ref.browser_id, ref.epoch, order.model, numeric))

    async def unload(self, order: Unload) -> None:
        host = self._hosts.get(order.browser_id)
        if host is not None:
            await host.unload(HostRef(order.browser_id, order.epoch), self._term, order.model)
