"""Faults that are made on purpose, each really happening to a real process.

Only processes below a pool's own warden can be touched: anything else is refused. Nothing here
runs unless it is called.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import psutil

from actors.messages import LaunchReport
from recovery.errors import BadInput
from recovery.kinds import BrowserType

# How each engine's page processes can be told from its others, by their command lines.
_PAGE_MARKS = {
    BrowserType.CHROME: "--type=renderer",
    BrowserType.EDGE: "--type=renderer",
    BrowserType.FIREFOX: "-contentproc",
    BrowserType.SAFARI: "WebKitWebProcess",
}


def kill_process(report: LaunchReport, which: str) -> int:
    """SIGKILL the "browser", "driver" or "worker" of a launch; returns its pid.

    Raises `BadInput` if that process is not (or no longer) what the launch started.
    """
    pid = report.pids.get(which, 0)
    ours = {process.pid for process in _tree(report)} | {report.pids.get("worker", 0)}
    if not pid or pid not in ours:
        raise BadInput(f"{which}: process {pid} is not one of this browser's", got=pid)
    os.kill(pid, signal.SIGKILL)
    return pid


def crash_tab(report: LaunchReport, kind: BrowserType) -> Sequence[int]:
    """SIGKILL the page's processes while the browser itself lives; returns their pids.

    Raises `BadInput` if there are none.
    """
    killed = []
    for process in _tree(report):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if _PAGE_MARKS[kind] in line and process.pid != report.pids["browser"]:
            process.kill()
            killed.append(process.pid)
    if not killed:
        raise BadInput(f"no page process of {kind} below warden {report.pids['warden']}")
    return killed


def _tree(report: LaunchReport) -> list[psutil.Process]:
    """The processes below the launch's warden, the warden itself left out."""
    try:
        return psutil.Process(report.pids["warden"]).children(recursive=True)
    except psutil.NoSuchProcess as error:
        raise BadInput("this browser is gone already") from error
