"""Runs launch orders: each once, with a time limit, however often it is repeated.

A launch continues if its caller is cancelled; repeating the order joins it. This module must not
know how a browser is launched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from actors.browser.incarnation import Incarnation
from actors.messages import LaunchOrder, LaunchReport
from recovery.errors import BrowserError, BrowserLost, LaunchFailed, PoolError, SetupError
from recovery.kinds import Readiness
from recovery.records import HostRef


class Launcher:
    """`work` does a launch, `retire` ends the current browser, `on_begin` is called with each order
    and whether it is the first in this worker, `console` returns the page's console."""

    def __init__(
        self,
        incarnation: Incarnation,
        seconds: float,
        *,
        work: Callable[[LaunchOrder], Coroutine[Any, Any, LaunchReport]],
        retire: Callable[[], None],
        on_begin: Callable[[LaunchOrder, bool], None],
        console: Callable[[], tuple[str, ...]],
    ) -> None:
        self._incarnation = incarnation
        self._seconds = seconds
        self._work = work
        self._retire = retire
        self._on_begin = on_begin
        self._console = console
        self._launching: asyncio.Task[LaunchReport] | None = None
        self._launched: asyncio.Task[LaunchReport] | None = (
            None  # the same, with its errors converted
        )

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        """Launch the incarnation `order.ref`; see `BrowserHost.launch`."""
        incarnation = self._incarnation
        if order.ref != incarnation.ref or self._launched is None:
            self._begin(order)
        assert self._launched is not None
        report = await asyncio.shield(self._launched)
        if order.ref != incarnation.ref or incarnation.report is None:
            raise self._why_ended(order.ref)
        return report

    def cancel(self) -> None:
        """Cancel the launch in progress, if any."""
        if self._launching is not None:
            self._launching.cancel()

    async def settled(self) -> None:
        """Return when no launch is in progress."""
        if self._launched is not None:
            await asyncio.wait({self._launched})

    def _begin(self, order: LaunchOrder) -> None:
        self._incarnation.check_newer(order.ref)
        first = self._launched is None
        self._retire()
        self._incarnation.begin(order.ref)
        self._on_begin(order, first)
        self._launching = asyncio.create_task(self._work(order), name=f"launch {order.ref}")
        self._launched = asyncio.create_task(
            self._in_time(order.ref, self._launching), name="launched"
        )
        self._launched.add_done_callback(_note_error)

    async def _in_time(self, ref: HostRef, launching: asyncio.Task[LaunchReport]) -> LaunchReport:
        incarnation = self._incarnation
        try:
            async with asyncio.timeout(self._seconds):
                report = await launching
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._retire_if(ref)
                raise  # the event loop ends
            raise self._why_not_launched(ref) from None
        except TimeoutError as error:
            self._retire_if(ref)
            raise LaunchFailed(
                f"{incarnation.kind} was not ready within {self._seconds:g} s. "
                "The machine may be overloaded: raise `launch_seconds`, or see `tabpool doctor`.",
                console=self._console(),
            ) from error
        except OSError as error:
            self._retire_if(ref)
            raise SetupError(
                f"{incarnation.kind} could not be launched: {error}. Check that the cache "
                "directory (TABPOOL_CACHE) and the temporary directory can be written and have "
                "space."
            ) from error
        except PoolError as error:
            self._retire_if(ref)
            if isinstance(error, BrowserLost):  # lost while launching is not launched
                raise LaunchFailed(str(error), console=self._console()) from error
            raise
        if incarnation.ref != ref or incarnation.readiness is not Readiness.STARTING:
            raise self._why_not_launched(ref)  # it ended just as it became ready
        incarnation.ready(report)
        return report

    def _retire_if(self, ref: HostRef) -> None:
        if ref == self._incarnation.ref:  # else another was launched meanwhile
            self._retire()

    def _why_not_launched(self, ref: HostRef) -> BrowserError:
        cause = self._incarnation.cause
        if cause is not None and cause.ref == ref:
            return LaunchFailed(f"{ref} ended during its launch: {cause.message}")
        return BrowserLost(f"{ref} was stopped during its launch")

    def _why_ended(self, ref: HostRef) -> BrowserError:
        cause = self._incarnation.cause
        if cause is not None and cause.ref == ref:
            what = cause.evidence.get("what", "page_closed")
            return BrowserLost(f"{ref} was launched, and has ended: {cause.message}", what=what)
        return BrowserLost(f"{ref} was launched, and was stopped", what="replaced")


def _note_error(task: asyncio.Task[LaunchReport]) -> None:
    if not task.cancelled():
        task.exception()  # its caller may be gone: mark the error as retrieved
