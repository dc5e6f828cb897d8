"""Diagnostics of pages, and fault injection.

This module must not repair anything, nor choose faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.messages import PageDiagnostics
from actors.ray.connection import this_node
from pool.browsers import Browsers, check_browser_id
from pool.connection import Connection
from recovery import checks
from recovery.errors import FaultRefused
from recovery.faults import FAULTS, Fault, FaultKind, FaultSite, Injected


class Diagnosis:
    """Diagnostics and fault injection of one pool."""

    def __init__(self, connection: Connection, browsers: Browsers) -> None:
        self._connection = connection
        self._browsers = browsers

    async def diagnose(self, browser_id: str, *, screenshot: bool) -> PageDiagnostics:
        """See `BrowserPool.diagnose`."""
        check_browser_id(browser_id)
        screenshot = checks.flag("screenshot", screenshot)
        routing = self._connection.routing
        return await routing.diagnose(self._browsers.serving(browser_id), screenshot=screenshot)

    async def control_pids(self) -> Mapping[str, int]:
        """The processes of the pool's supervisor and history, on the head node."""
        return await self._connection.supervisor.pids()

    async def inject(self, browser_id: str, fault: Mapping[str, Any]) -> None:
        """See `BrowserPool.inject`."""
        check_browser_id(browser_id)
        fault = checks.mapping("fault", fault, 'a mapping such as {"what": "lie", "times": 1}')
        await self._connection.routing.inject(self._browsers.serving(browser_id), fault)

    async def inject_fault(self, fault: Fault, *, gated: bool) -> Injected:
        """See `BrowserPool.inject_fault`."""
        checks.instance("fault", fault, Fault, "a recovery.faults.Fault")
        gated = checks.flag("gated", gated)
        supervisor, routing = self._connection.require()
        if FAULTS[fault.kind].place is FaultSite.SUPERVISOR:
            return await supervisor.inject(fault)
        ref = self._browsers.serving(fault.target)
        if fault.kind is FaultKind.NODE_DEATH:
            ours = (this_node(), await supervisor.node())
            if ref.node in ours:
                raise FaultRefused(
                    f"{fault}: {ref} is on the node of this client or of the supervisor, which the "
                    "pool would not survive. Add nodes to the Ray cluster.",
                    what="impossible",
                )
        made = await routing.inject(ref, fault, gated=gated)
        assert made is not None
        return made
