"""The circuit breakers of a pool's browsers: their metrics, and switching them by hand.

They are in the browsers' workers, which this module queries. This module must not decide when a
circuit opens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from pool.browsers import Browsers
from pool.connection import Connection
from recovery import checks
from recovery.breaker import BreakerSwitch, registry_metrics
from recovery.errors import BadInput, BrowserLost

_NAME_MAX = 256


class Breakers:
    """The breakers of one pool."""

    def __init__(self, connection: Connection, browsers: Browsers) -> None:
        self._connection = connection
        self._browsers = browsers

    async def metrics(self) -> dict[str, Any]:
        """See `BrowserPool.breakers`."""
        routing = self._connection.routing
        refs = [status.ref for status in self._browsers.hosts()]
        found = await asyncio.gather(
            *(routing.breaker_metrics(ref) for ref in refs), return_exceptions=True
        )
        circuits: dict[str, Mapping[str, Any]] = {}
        for ref, each in zip(refs, found, strict=True):
            if isinstance(each, BrowserLost):
                continue  # it is being replaced
            if isinstance(each, BaseException):
                raise each
            for model, metrics in each.items():
                name = f"{model} on {ref.browser_id}" if model else ref.browser_id
                circuits[name] = {"browser": ref.browser_id, "model": model, **metrics}
        return registry_metrics(circuits)

    async def switch(self, browser_id: str, to: str, model: str) -> None:
        """See `BrowserPool.switch_breaker`."""
        wanted = BreakerSwitch(checks.word("to", to, BreakerSwitch))
        if model != "":
            checks.text("model", model, _NAME_MAX)
        ref = self._browsers.serving(browser_id)
        status = next(status for status in self._browsers.hosts() if status.ref == ref)
        if model and model not in status.models:
            raise BadInput(
                f"{browser_id} has no model {model!r}, only {', '.join(status.models) or 'none'}.",
                expected=list(status.models),
                got=model,
            )
        await self._connection.routing.switch_breaker(ref, model, wanted)
