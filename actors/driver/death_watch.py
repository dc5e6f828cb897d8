"""Detects the end of processes, on Linux before they have fully exited.

A large process that is killed ends its threads within a millisecond, and then takes 20 to 200 ms
to free its memory; only then do its sockets close and its pidfd becomes readable. So one thread
besides the main one is watched as well: when it ends, the process's state says whether the whole
process is exiting. This module must not know what a process was for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from actors.driver.processes import wait_for_end

_PIDFD_THREAD = os.O_EXCL  # Linux 6.9 and later; before that only whole processes can be watched
_PF_EXITING = 0x4  # include/linux/sched.h
_THREADS_WATCHED_MAX = 8  # of one process, one after the other: some threads end early
_LOOK_SECONDS = (0.0, 0.001, 0.003, 0.01)  # checks: a thread may end just before the main one


@dataclass
class _Watched:
    on_death: Callable[[], None]
    fds: list[int] = field(default_factory=list)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    threads: int = 0


class DeathWatch:
    """Calls back once, on the event loop, as soon as a watched process ends."""

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}

    def add(self, pid: int, on_death: Callable[[], None]) -> None:
        """Watch `pid`. A process that has already ended is reported at once."""
        loop = asyncio.get_running_loop()
        if sys.platform != "linux":
            watched = self._watched[pid] = _Watched(on_death)
            waiting = loop.run_in_executor(None, wait_for_end, pid)
            waiting.add_done_callback(lambda _: self._died(pid, watched))
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            loop.call_soon(on_death)
            return
        self._drop(pid)
        watched = self._watched[pid] = _Watched(on_death)
        self._listen(watched, fd, lambda: self._died(pid, watched))
        self._watch_thread(pid, watched)

    def close(self) -> None:
        for pid in list(self._watched):
            self._drop(pid)

    def _watch_thread(self, pid: int, watched: _Watched) -> None:
        if watched.threads >= _THREADS_WATCHED_MAX:
            return
        watched.threads += 1
        with contextlib.suppress(OSError, IndexError):  # an older kernel, or it has ended
            # The kernel lists them in the order in which they were made; numbers may wrap.
            tasks = [tid for tid in map(int, os.listdir(f"/proc/{pid}/task")) if tid != pid]
            fd = os.pidfd_open(tasks[0], _PIDFD_THREAD)
            self._listen(watched, fd, lambda: self._thread_ended(pid, watched, fd))

    def _thread_ended(self, pid: int, watched: _Watched, fd: int) -> None:
        self._unlisten(watched, fd)
        loop = asyncio.get_running_loop()
        watched.timers = [
            loop.call_later(seconds, self._look, pid, watched) for seconds in _LOOK_SECONDS
        ]
        again = loop.call_later(2 * _LOOK_SECONDS[-1], self._watch_thread, pid, watched)
        watched.timers.append(again)

    def _look(self, pid: int, watched: _Watched) -> None:
        if is_ending(pid):
            self._died(pid, watched)

    def _died(self, pid: int, watched: _Watched) -> None:
        if self._watched.get(pid) is watched:
            self._drop(pid)
            watched.on_death()

    def _drop(self, pid: int) -> None:
        watched = self._watched.pop(pid, None)
        if watched is not None:
            for timer in watched.timers:
                timer.cancel()
            for fd in list(watched.fds):
                self._unlisten(watched, fd)

    def _listen(self, watched: _Watched, fd: int, callback: Callable[[], None]) -> None:
        watched.fds.append(fd)
        asyncio.get_running_loop().add_reader(fd, callback)

    def _unlisten(self, watched: _Watched, fd: int) -> None:
        watched.fds.remove(fd)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)


def is_ending(pid: int) -> bool:
    """Whether a process has ended or will not run again, though it may still hold its memory."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:  # e.g. too many open files: its pidfd will report it
        return False
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)
