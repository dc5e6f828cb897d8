"""States of processes on this machine by the kernel: running, stopped, or limited.

This module must not signal or limit a process.
"""

from __future__ import annotations

import psutil

from pool.chaos.evidence import GONE, STOPPED
from recovery.faults import FaultKind, Injected


def states(injected: Injected) -> dict[int, str]:
    """The states of the processes that a fault hit. They must be on this machine."""
    return {pid: _state(pid, injected) for pid in injected.pids}


def _state(pid: int, injected: Injected) -> str:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE or process.create_time() > injected.at + 1.0:
            return GONE
        if process.status() == psutil.STATUS_STOPPED:
            return STOPPED
        if injected.fault.kind is FaultKind.FULL_DISK:
            return "mute" if process.rlimit(psutil.RLIMIT_FSIZE)[0] == 0 else "there"
        if injected.fault.kind is FaultKind.MEMORY_EXHAUSTION:
            limited = process.rlimit(psutil.RLIMIT_DATA)[0] != psutil.RLIM_INFINITY
            return "limited" if limited else "there"
    except psutil.NoSuchProcess:
        return GONE
    except psutil.AccessDenied:
        return "there"
    return "there"


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 for pid 0 or a process that has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0
