"""Connections to workers by address: one to each, opened once however many ask at a time.

This module must not know what is said over them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Mapping
from typing import Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from recovery.errors import BrowserLost


class Link(Protocol):
    """A connection to a worker (`actors.dataplane.DataLink`)."""

    @property
    def closed(self) -> bool: ...
    @property
    def busy(self) -> bool: ...
    async def open(self) -> None: ...
    async def close(self) -> None: ...


_L = TypeVar("_L", bound=Link)


class Links(Generic[_L]):
    """The connections of one process. One that has closed is opened anew when it is asked for."""

    def __init__(self) -> None:
        self._links: dict[str, _L] = {}
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._over = False

    async def get(self, address: str, make: Callable[[], _L]) -> _L:
        """The connection to `address`, made by `make` if there is none. Raises `BrowserLost`."""
        link = self._links.get(address)
        if link is not None and not link.closed:
            return link
        async with self._opening.setdefault(address, asyncio.Lock()):
            link = self._links.get(address)
            if link is None or link.closed:
                link = make()
                await link.open()
                if self._over:
                    await link.close()
                    raise BrowserLost("this end of the connection has closed")
                self._links = {a: known for a, known in self._links.items() if not known.closed}
                self._links[address] = link
            return link

    async def keep(self, addresses: Container[str]) -> None:
        """Close all others, but for those in use: whoever waits there hears of their end."""
        for address in [a for a in self._links if a not in addresses]:
            if not self._links[address].busy:
                await self._links.pop(address).close()

    async def close(self) -> None:
        """Close all, and open no more."""
        self._over = True
        for link in list(self._links.values()):
            await link.close()
        self._links.clear()

    def open_now(self) -> Mapping[str, _L]:
        """Those there are, by address."""
        return dict(self._links)
