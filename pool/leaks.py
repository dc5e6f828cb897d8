"""What pools left behind: processes, profiles and ports of launches that are over.

This module must not end or remove anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from actors.messages import LaunchReport

_GONE_SECONDS = 5.0  # the promise: nothing outlives its owner by more


class Traces:
    """Launches that were seen, to be looked for when they are over."""

    def __init__(self) -> None:
        # Processes as they were: in a long run another may get the number of one that is gone.
        self._processes: dict[psutil.Process, str] = {}
        self._profiles: set[str] = set()
        self._ports: set[int] = set()

    def note(self, reports: Iterable[LaunchReport]) -> None:
        """Remember what these launches have. To be called while they live."""
        for report in reports:
            self._profiles.add(report.profile)
            self._ports.add(report.port)
            for name, pid in report.pids.items():
                with contextlib.suppress(psutil.Error):
                    if pid:
                        self._processes[psutil.Process(pid)] = name

    async def left(self) -> list[str]:
        """What of them is still there although it had time to go."""
        deadline = time.monotonic() + _GONE_SECONDS
        # Processes, files and ports of several kinds: there is no one event to wait for.
        while (found := self._there()) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return found

    def _there(self) -> list[str]:
        found = [
            f"process {name} {process.pid}"
            for process, name in self._processes.items()
            if process.is_running()
        ]
        found += [f"profile {path}" for path in self._profiles if Path(path).exists()]
        return found + [f"port {port}" for port in self._ports if _listening(port)]


async def leaked(reports: Iterable[LaunchReport]) -> list[str]:
    """What of these launches is still there although it had time to go."""
    traces = Traces()
    traces.note(reports)
    return await traces.left()


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
