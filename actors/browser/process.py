"""The processes of the current incarnation: driver and browser below a reaper, and the session.

They are started on a fresh profile, detached and ended together. This module must not wait for
the page, nor decide when to end a browser.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.browser.incarnation import Incarnation
from actors.driver.arguments import LaunchSettings, PrivateNetwork
from actors.driver.binaries import Binaries
from actors.driver.door import page_listener
from actors.driver.environment import browser_environment
from actors.driver.processes import BrowserProcesses, ProcessReaper, ReaperOrder
from actors.driver.profiles import new_profile_path
from actors.driver.session import Session, driver_command, free_port
from actors.injection.injector import BrowserFailureInjector
from recovery.errors import BrowserLost, LaunchFailed, SetupError
from recovery.records import HostRef

_XVFB_ARGUMENTS = ("-screen", "0", "1024x768x24", "-nolisten", "tcp", "-noreset")

PAGE_PORT = 80  # in a private network every page has the same port, and so the same origin
_DOOR_SECONDS = 5.0


@dataclass(frozen=True)
class Detached:
    """A browser that is no longer used and not yet ended."""

    session: Session | None
    reaper: ProcessReaper | None
    survivors: tuple[int, ...]  # to kill by pid if the reaper is dead


class BrowserProcess:
    """Driver, browser and session. `pids` are those that run, by name."""

    def __init__(
        self,
        incarnation: Incarnation,
        injector: BrowserFailureInjector,
        watch: Callable[[int, Callable[[], None]], None],
        private: PrivateNetwork,
    ) -> None:
        self.binaries: Binaries | None = None
        self.session: Session | None = None
        self.pids: dict[str, int] = {}
        self._incarnation = incarnation
        self._injector = injector
        self._watch = watch
        self._private = private
        self._reaper: ProcessReaper | None = None
        self._profile = Path()
        self._driver_port = 0
        self._endings: set[asyncio.Task[None]] = set()

    async def start_driver(
        self,
        binaries: Binaries,
        settings: LaunchSettings,
        template: Path | None,
    ) -> socket.socket | None:
        """Start the driver on a new profile, and watch it.

        Returns the socket at which the page's server must listen, if the browser has a private
        network; else None. Raises `LaunchFailed`, or `SetupError` if it must have one and can't.
        """
        ref = self._incarnation.ref
        reaper = self._reaper = ProcessReaper()
        profile, port = Path(new_profile_path()), free_port()
        order = ReaperOrder(
            driver_command(binaries, port),
            [binaries.xvfb, *_XVFB_ARGUMENTS] if binaries.xvfb else None,
            str(profile),
            str(template) if template else None,
            browser_environment(
                os.environ, profile, settings.environment, headless=settings.headless
            ),
            port,
            None if self._private is PrivateNetwork.OFF else PAGE_PORT,
        )
        await reaper.start(order, self._on_exit(ref, reaper))
        self.pids = {"driver": reaper.driver_pid}  # so that a driver that ends at once is detected
        self._profile, self._driver_port = profile, port
        if not reaper.private_network:
            if self._private is PrivateNetwork.REQUIRED:
                raise SetupError(
                    f"this system allows no private network ({reaper.why_shared}), and "
                    "private_network='required': allow user namespaces, or choose 'auto'; "
                    "docs/security.md says what that means"
                )
            return None
        asked = asyncio.ensure_future(asyncio.to_thread(page_listener, profile, _DOOR_SECONDS))
        try:
            return await asyncio.shield(asked)
        except OSError as error:
            raise LaunchFailed(f"the reaper of {ref} gave no socket: {error}") from error
        except asyncio.CancelledError:
            asked.add_done_callback(_close)
            raise

    async def start_browser(self, binaries: Binaries, settings: LaunchSettings) -> str:
        """Start the browser of the running driver, and watch it. Returns the profile's path.

        Raises `LaunchFailed`.
        """
        ref, reaper, profile = self._incarnation.ref, self._reaper, self._profile
        if reaper is None:
            raise LaunchFailed(f"the driver of {ref} has ended")
        started = self._injector.launched_with(binaries, profile)
        session = self.session = Session(settings, started, profile)
        await session.start(self._driver_port)
        self.pids = {
            "driver": reaper.driver_pid,
            "browser": session.browser_pid or _only_child(reaper),
            "reaper": reaper.pid,
            "worker": os.getpid(),
        }
        for name in ("driver", "browser"):
            if self.pids[name]:
                self._watch(self.pids[name], self._ended(ref, f"{name}_exited"))
        return str(profile)

    @property
    def private_network(self) -> bool:
        """Whether driver and browser have a network of their own, with nothing but loopback."""
        return self._reaper is not None and self._reaper.private_network

    @property
    def network_note(self) -> str:
        """Why they have none."""
        if self._private is PrivateNetwork.OFF:
            return "private_network='off'"
        return self._reaper.why_shared if self._reaper is not None else ""

    def _ended(self, ref: HostRef, what: str) -> Callable[[], None]:
        return lambda: self._incarnation.lost(ref, what)

    def _on_exit(self, ref: HostRef, reaper: ProcessReaper) -> Callable[[int, int], None]:
        def on_exit(pid: int, status: int) -> None:
            if pid == reaper.driver_pid and reaper is self._reaper:  # else it was detached
                ended = f"the driver ended with {status}"
                self._incarnation.lost(ref, "driver_exited", ended, status=status)

        return on_exit

    def detach(self) -> Detached:
        """Detach the browser: it still runs, but causes no more events."""
        survivors = tuple(self.pids[name] for name in ("driver", "browser") if self.pids.get(name))
        session, self.session = self.session, None
        reaper, self._reaper = self._reaper, None
        self.pids = {}
        return Detached(session, reaper, survivors)

    def end(self, detached: Detached) -> None:
        """End a browser in the background. Does not wait."""
        if detached.session is not None:
            detached.session.close()
        if detached.reaper is not None:
            task = asyncio.ensure_future(detached.reaper.end(detached.survivors))
            self._endings.add(task)
            task.add_done_callback(self._endings.discard)

    async def all_ended(self) -> None:
        """Return when all detached browsers have ended."""
        while self._endings:
            await asyncio.gather(*self._endings)

    def page_pids(self) -> list[int]:
        """The processes that may serve the page. Reads the process table: not on the event loop."""
        own = self.pids.values()
        return [process.pid for process in self.tree().pages() if process.pid not in own]

    def tree(self) -> BrowserProcesses:
        """The processes, for diagnosis and fault injection."""
        return BrowserProcesses(self._incarnation.kind, dict(self.pids), self.pids.get("reaper", 0))

    async def memory_bytes(self) -> int:
        """Resident bytes of the whole process tree."""
        reaper = self._reaper
        return await asyncio.to_thread(reaper.memory_bytes) if reaper else 0

    def require_session(self) -> Session:
        if self.session is None:
            raise BrowserLost(f"{self._incarnation.ref} is not running")
        return self.session


def _close(asked: asyncio.Future[socket.socket]) -> None:
    """Close a socket that came too late."""
    if not asked.cancelled() and asked.exception() is None:
        asked.result().close()


def _only_child(reaper: ProcessReaper) -> int:
    """The browser's pid if its driver does not report it: the driver's first child."""
    children = [p for p in reaper.tree() if p.ppid() == reaper.driver_pid]
    return children[0].pid if children else 0
