"""Fault injection for tests and demonstrations, from outside, into a browser of this machine.

This module must not signal processes other than those below a pool's reaper. For faults by kind
and intensity, on any node, see `actors.injection`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Sequence

import psutil

from actors.bridge import Bridge
from actors.driver.processes import BrowserProcesses
from actors.messages import LaunchReport
from recovery.errors import BadInput
from recovery.kinds import BrowserType


def kill_process(report: LaunchReport, which: str) -> int:
    """SIGKILL the "browser", "driver" or "worker" of a launch; returns its pid.

    Raises `BadInput` if that process is not (or no longer) what the launch started.
    """
    pid = report.pids.get(which, 0)
    ours = {process.pid for process in _tree(report)} | {report.pids.get("worker", 0)}
    if not pid or pid not in ours:
        raise BadInput(f"{which}: process {pid} does not belong to this browser", got=pid)
    os.kill(pid, signal.SIGKILL)
    return pid


def crash_tab(report: LaunchReport, kind: BrowserType) -> Sequence[int]:
    """SIGKILL the page's processes, but not the browser; returns their pids.

    Raises `BadInput` if there are none.
    """
    _tree(report)
    killed = []
    for process in processes_of(report, kind).pages():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            killed.append(process.pid)
    if not killed:
        raise BadInput(f"no page process of {kind} below reaper {report.pids['reaper']}")
    return killed


def kill_network(report: LaunchReport) -> int:
    """SIGKILL Chromium's network process, which it replaces; every connection breaks.

    Returns its pid. Raises `BadInput` if there is none.
    """
    for process in processes_of(report, BrowserType.CHROME).network():
        with contextlib.suppress(psutil.Error):
            process.kill()
            return process.pid
    raise BadInput(f"no network process below reaper {report.pids['reaper']}")


def wrong_answers(
    times: int = 1, *, bit: int = 30, element: int = 0, model: str = ""
) -> dict[str, object]:
    """A fault for `inject`: the page flips one bit of its next answers, of all or one model.

    `bit` counts from the lowest of one number: 30 is the top of a float32's exponent. The pool
    must have been made with `faults=True`.
    """
    return {"what": "lie", "times": times, "bit": bit, "element": element, "model": model}


def drop_sockets(bridge: Bridge, names: Iterable[str] = ("control", "data")) -> None:
    """Break the connections between a page and its server; the page may reconnect."""
    bridge.drop(names)


def processes_of(report: LaunchReport, kind: BrowserType) -> BrowserProcesses:
    """The processes of a launch: all that are below its reaper."""
    return BrowserProcesses(kind, report.pids, report.pids.get("reaper", 0))


def _tree(report: LaunchReport) -> list[psutil.Process]:
    """The processes below the launch's reaper, the reaper itself left out."""
    try:
        return psutil.Process(report.pids["reaper"]).children(recursive=True)
    except psutil.NoSuchProcess as error:
        raise BadInput("this browser is gone already") from error
