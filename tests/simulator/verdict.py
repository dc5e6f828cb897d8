"""What was found to be wrong in a simulation, if anything: the first finding counts.

This module must not look for anything itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from recovery.errors import BrowserLost, LaunchFailed


class SimulationFailed(AssertionError):
    """Something that must always hold did not."""


class Verdict:
    """`failed` is done as soon as something that must always hold does not."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.failed: asyncio.Future[str] = loop.create_future()

    def violated(self, what: str) -> None:
        if not self.failed.done():
            self.failed.set_result(what)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violated(what)

    def unseen(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        """The loop's exception handler: an error that nobody took."""
        error = context.get("exception")
        if not isinstance(error, BrowserLost | LaunchFailed):  # a launch whose orderer is dead
            self.violated(f"{context.get('message')}: {error!r}")
