"""Faults of a browser's processes: signals to them, suspension, a launch that fails.

Only processes below the browser's own reaper are touched.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

import psutil

from actors.injection.signals import SIGNALS, send_signal
from actors.injection.target import Hit, Injection
from recovery.faults import Intensity

_STOPPED_SECONDS = {Intensity.MILD: 0.5, Intensity.MODERATE: 3.0, Intensity.SEVERE: 30.0}
_PAUSE_SECONDS = 1.0  # of a page that is only late
# Scripts that replace the browser for one failing launch.
_ENDS = "#!/bin/sh\nexit 1\n"
_HANGS = "#!/bin/sh\nexec sleep 600\n"


async def fail_launch(it: Injection) -> Hit:
    failing = [_HANGS] if it.intensity is Intensity.SEVERE else [_ENDS]
    it.next_launches.fail_launches(failing * (2 if it.intensity is Intensity.MODERATE else 1))
    return it.send(it.target.processes.named("browser"), signal.SIGKILL)


async def crash_tab(it: Injection) -> Hit:
    return it.send(it.target.processes.pages(), SIGNALS[it.intensity])


async def crash_browser(it: Injection) -> Hit:
    return it.send(it.target.processes.named("browser"), SIGNALS[it.intensity])


async def kill_driver(it: Injection) -> Hit:
    return it.send(it.target.processes.named("driver"), SIGNALS[it.intensity])


async def crash_gpu_process(it: Injection) -> Hit:
    return it.send(it.target.processes.gpu(), SIGNALS[it.intensity])


async def hang(it: Injection) -> Hit:
    """The page pauses; its worker loops; every process stops."""
    match it.intensity:
        case Intensity.MILD:
            return _suspend(it, it.target.processes.pages(), _PAUSE_SECONDS)
        case Intensity.MODERATE:
            await it.target.ask({"what": "loop"})
            return Hit()
        case Intensity.SEVERE:
            return it.send(it.target.processes.tree(), signal.SIGSTOP)


async def suspend_machine(it: Injection) -> Hit:
    return _suspend(it, it.target.processes.tree(), _STOPPED_SECONDS[it.intensity])


def _suspend(it: Injection, processes: Sequence[psutil.Process], seconds: float) -> Hit:
    at = it.wall()
    stopped = [process for process in processes if send_signal(process, signal.SIGSTOP)]
    if not stopped:
        raise it.impossible("it has no such process")

    async def resume() -> None:
        await asyncio.sleep(seconds)
        for process in stopped:
            send_signal(process, signal.SIGCONT)

    it.later(resume())
    return Hit([process.pid for process in stopped], seconds, at)
