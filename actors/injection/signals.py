"""Signals as faults: which one for which intensity, and ending one's own process by one.

This module must not decide whom to hit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

import psutil

from recovery.faults import Intensity

SIGNALS = {
    Intensity.MILD: signal.SIGABRT,
    Intensity.MODERATE: signal.SIGQUIT,
    Intensity.SEVERE: signal.SIGKILL,
}


def send_signal(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether the process was still there to get it."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def end_self(number: signal.Signals) -> None:
    """End this process by a signal, even if whoever started it has it ignored.

    A program that a shell runs in the background ignores SIGQUIT, and Ray's workers inherit that.
    """
    ctypes.CDLL(None).signal(int(number), None)  # the default; Python's is for main threads only
    os.kill(os.getpid(), number)


def ignored_by(pid: int) -> set[int]:
    """The signals that a process ignores, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                mask = int(line.split()[1], 16)
                return {number for number in range(1, 65) if mask >> (number - 1) & 1}
    return set()
