"""Finds leaked processes, profiles and ports of launches that have ended.

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

_GONE_SECONDS = 5.0  # grace period for processes to end


class Traces:
    """Processes, profiles and ports of launches, to check once those have ended."""

    def __init__(self) -> None:
        # As `psutil.Process`, which detects reused pids.
        self._processes: dict[psutil.Process, str] = {}
        self._profiles: set[str] = set()
        self._ports: set[int] = set()

    def note(self, reports: Iterable[LaunchReport]) -> None:
        """Record the processes, profiles and ports of launches; call it while they run."""
        for report in reports:
            self._profiles.add(report.profile)
            if report.port:  # else it was one of a private network, which ends with its processes
                self._ports.add(report.port)
            for name, pid in report.pids.items():
                with contextlib.suppress(psutil.Error):
                    if pid:
                        self._processes[psutil.Process(pid)] = name

    async def left(self) -> list[str]:
        """What still exists after the grace period."""
        deadline = time.monotonic() + _GONE_SECONDS
        # Processes, files and ports: there is no single event to wait for.
        while (found := self._existing()) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return found

    def _existing(self) -> list[str]:
        found = [
            f"process {name} {process.pid}"
            for process, name in self._processes.items()
            if process.is_running()
        ]
        found += [f"profile {path}" for path in self._profiles if Path(path).exists()]
        return found + [f"port {port}" for port in self._ports if _listening(port)]


async def leaked(reports: Iterable[LaunchReport]) -> list[str]:
    """What of these launches still exists after the grace period."""
    traces = Traces()
    traces.note(reports)
    return await traces.left()


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
