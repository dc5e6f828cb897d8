"""Faults of the page: its device, its memory, its answers, its messages, its window.

The page's own part is in `actors/page/worker.js`, and works only in pools made with `faults=True`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import psutil

from actors.injection.target import Hit, Injection
from recovery.faults import Intensity

_FLOOD_EXTRA_BYTES = 2 << 20  # above the message size limit, overhead included
_HOLD_BYTES, _HOLD_SECONDS = 512 << 20, 2.0
_GROWTH_BYTES = 64 << 20  # growth allowed under a memory limit
_LIMIT_SECONDS = 10.0  # after which the memory limit is lifted, unless permanent
_FOR_EVER = 1 << 30
_HIDDEN_SECONDS = {Intensity.MILD: 1.0, Intensity.MODERATE: 5.0}
_CORRUPTIONS = {  # the bit that is flipped, and in how many answers
    Intensity.MILD: (0, 1),
    Intensity.MODERATE: (22, 3),
    Intensity.SEVERE: (30, _FOR_EVER),
}


async def corrupt_answers(it: Injection) -> Hit:
    bit, times = _CORRUPTIONS[it.intensity]
    await it.target.ask({"what": "lie", "times": times, "bit": bit, "element": 0})
    return Hit()


async def lose_device(it: Injection) -> Hit:
    if not it.target.device:
        raise it.impossible("no model is on a WebGPU device")
    at_once = it.intensity is Intensity.MILD
    if it.intensity is Intensity.SEVERE:
        it.next_launches.destroy_next_device()
    await it.target.ask({"what": "destroy", "times": 0 if at_once else 1})
    return Hit()


async def exhaust_memory(it: Injection) -> Hit:
    target = it.target
    if it.intensity is Intensity.MILD:
        await target.ask({"what": "hold", "bytes": _HOLD_BYTES, "seconds": _HOLD_SECONDS})
        return Hit(seconds=_HOLD_SECONDS)
    if sys.platform != "linux":
        raise it.impossible("only Linux can forbid a process to grow")
    pages = target.processes.pages()
    before = {page.pid: page.rlimit(psutil.RLIMIT_DATA) for page in pages}
    try:
        for page in pages:
            most = page.memory_info().data + _GROWTH_BYTES
            page.rlimit(psutil.RLIMIT_DATA, (most, before[page.pid][1]))
    except psutil.AccessDenied as error:
        raise it.impossible("only root may forbid this browser to grow") from error
    await target.ask({"what": "exhaust", "times": 1})
    if it.intensity is Intensity.SEVERE:
        return Hit(list(before))

    async def lift() -> None:
        await asyncio.sleep(_LIMIT_SECONDS)
        for page in pages:
            with contextlib.suppress(psutil.Error):
                page.rlimit(psutil.RLIMIT_DATA, before[page.pid])

    it.later(lift())
    return Hit(list(before), _LIMIT_SECONDS)


async def refresh_page(it: Injection) -> Hit:
    match it.intensity:
        case Intensity.MILD:
            await it.target.server.tell({"kind": "fault", "what": "reload"})
        case Intensity.MODERATE:
            await it.target.driver.reload()
        case Intensity.SEVERE:
            await it.target.driver.leave()
    return Hit()


async def hide_tab(it: Injection) -> Hit:
    await it.target.driver.hide()
    seconds = _HIDDEN_SECONDS.get(it.intensity)
    if seconds is None:
        return Hit()

    async def show() -> None:
        await asyncio.sleep(seconds)
        await it.target.driver.show()

    it.later(show())
    return Hit(seconds=seconds)


async def send_too_much(it: Injection) -> Hit:
    size = it.target.bytes_max + _FLOOD_EXTRA_BYTES
    if it.intensity is Intensity.MILD:
        await it.target.ask({"what": "tooLarge", "times": 1})
        return Hit()
    await it.target.ask({"what": "flood", "bytes": size})
    if it.intensity is Intensity.SEVERE:
        await it.target.server.tell({"kind": "fault", "what": "flood", "bytes": 1 << 20})
    return Hit()
