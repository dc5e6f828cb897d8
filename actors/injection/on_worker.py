"""Faults of the Ray worker that a browser belongs to, and of the node below it.

They end the very process that injects them, a moment after its answer has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import psutil

from actors.injection.signals import SIGNALS, end_self, ignored_by, send_signal
from actors.injection.target import SELF_SECONDS, Hit, Injection
from recovery.errors import FaultRefused


async def end_worker(it: Injection) -> Hit:
    asyncio.get_running_loop().call_later(SELF_SECONDS, end_self, SIGNALS[it.intensity])
    return Hit((os.getpid(),), at=it.wall() + SELF_SECONDS)


async def end_node(it: Injection) -> Hit:
    raylet, number = _raylet(it), SIGNALS[it.intensity]
    if number in ignored_by(raylet):
        raise it.impossible(f"the raylet ignores {number.name}")
    asyncio.get_running_loop().call_later(SELF_SECONDS, _end_node, raylet, number)
    return Hit((raylet,), at=it.wall() + SELF_SECONDS)


def _raylet(it: Injection) -> int:
    pid = it.raylet()
    with contextlib.suppress(psutil.Error):
        if psutil.Process(pid).name() == "raylet":
            return pid
    raise FaultRefused(f"{it.fault}: refused, since process {pid} is not a raylet", what="not_ours")


def _end_node(raylet: int, number: signal.Signals) -> None:
    """Kill the raylet and its descendants, which would outlive it by seconds; this process last."""
    with contextlib.suppress(psutil.Error):
        node = psutil.Process(raylet)
        below = [process for process in node.children(recursive=True) if process.pid != os.getpid()]
        node.send_signal(number)
        for process in below:
            send_signal(process, signal.SIGKILL)
    end_self(signal.SIGKILL)
