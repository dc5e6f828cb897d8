"""The current incarnation of a browser: its epoch, readiness, and why it ended.

All parts of a host share this record. It must not start or end a process: its owner is called
once at the end of an incarnation, and does the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from actors.messages import LaunchReport
from recovery.errors import BrowserLost, StaleTerm
from recovery.failures import Category, Failure, categorize_browser_failure
from recovery.kinds import BrowserType, Readiness
from recovery.records import BrowserFacts, HostRef


class Incarnation:
    """The current one of a slot. `on_end` is called with the failure that ended it; `context`
    returns facts to include in that failure."""

    def __init__(
        self,
        browser_id: str,
        kind: BrowserType,
        clock: Callable[[], float],
        wall: Callable[[], float],
        *,
        on_end: Callable[[Failure], None],
        context: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.ref = HostRef(browser_id, -1)
        self.kind = kind
        self.readiness = Readiness.STARTING
        self.facts: BrowserFacts | None = None  # of the latest launch
        self.report: LaunchReport | None = None  # while the incarnation is ready
        self.ready_at = clock()
        self.cause: Failure | None = None  # why it ended
        self.ended_by: Category | None = None  # of the previous incarnation
        self.over = asyncio.Event()  # set once there is a cause
        self._clock = clock
        self._wall = wall
        self._on_end = on_end
        self._context = context

    def begin(self, ref: HostRef) -> None:
        """Begin another one. Raises `StaleTerm` if it is no newer than the current one."""
        self.check_newer(ref)
        self.ended_by = self.cause.category if self.cause else None
        self.ref, self.cause, self.over = ref, None, asyncio.Event()
        self.readiness = Readiness.STARTING

    def check_newer(self, ref: HostRef) -> None:
        if ref.epoch <= self.ref.epoch:
            raise StaleTerm(f"{ref} was ordered, but {self.ref} is at least as new")

    def ready(self, report: LaunchReport) -> None:
        self.readiness, self.report, self.ready_at = Readiness.READY, report, self._clock()

    def retire(self) -> None:
        """Mark it as no longer in use."""
        self.readiness, self.report = Readiness.DEAD, None

    def is_present(self, ref: HostRef) -> bool:
        """Whether `ref` is the current incarnation, and has not ended."""
        return ref == self.ref and self.readiness is not Readiness.DEAD

    def is_ready(self, ref: HostRef) -> bool:
        return ref == self.ref and self.readiness is Readiness.READY

    def require(self, ref: HostRef) -> None:
        """Raises `BrowserLost` for an incarnation that is not the current one, or has ended."""
        if not self.is_present(ref):
            raise BrowserLost(f"{ref} is not current; {self.ref} is {self.readiness}")

    def lost(self, ref: HostRef, what: str, message: str = "", **evidence: Any) -> None:
        """`ref` has ended. Only the first cause counts; later ones are its consequences."""
        if ref != self.ref or self.cause is not None:
            return
        message = message or what.replace("_", " ")
        known = {**self._context(), **evidence}
        self.end(self.failure(message, what, "", ref, **known))

    def end(self, failure: Failure) -> None:
        """The current incarnation has ended because of `failure`, unless it had ended before."""
        if failure.ref != self.ref or self.cause is not None:
            return
        self.cause = failure
        self.over.set()
        self._on_end(failure)

    def failure(
        self, message: str, what: str, op_id: str, ref: HostRef | None = None, **evidence: Any
    ) -> Failure:
        """A failure of `ref`, or of the current incarnation, with its category."""
        context = {
            **evidence,
            "what": what,
            "ref": ref or self.ref,
            "op_id": op_id,
            "at": self._wall(),
            "browser": str(self.kind),
            "version": self.facts.version if self.facts else "",
        }
        return categorize_browser_failure(message, context)
