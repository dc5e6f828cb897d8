import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from actors.driver.death_watch import DeathWatch, is_ending
from tests.fakes import until


def _threads_can_be_watched() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid(), os.O_EXCL))
    except (AttributeError, OSError):
        return False
    return True


linux = pytest.mark.skipif(
    not _threads_can_be_watched(), reason="watching threads takes Linux 6.9 or later"
)
# Two threads beside the main one: the older ends with the first line of input, the other never.
# With an argument the main one ends first: a process that is being killed looks like that.
_THREADS = """
import ctypes, sys, threading, time
threading.Thread(target=sys.stdin.readline).start()
threading.Thread(target=time.sleep, args=(300,)).start()
print("ready", flush=True)
if sys.argv[1:]:
    ctypes.CDLL(None).pthread_exit(None)
time.sleep(300)
"""


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", _THREADS, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def sleeper() -> subprocess.Popen:
    return subprocess.Popen(["sleep", "300"])


def end_oldest_thread(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def threads(process: subprocess.Popen) -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


async def test_death_watch_tells_of_each_death_once():
    watch = DeathWatch()
    process = sleeper()
    deaths: list[str] = []
    try:
        watch.add(process.pid, lambda: deaths.append("watched"))
        await asyncio.sleep(0)
        assert deaths == []
        process.kill()
        await until(lambda: deaths == ["watched"])
    finally:
        process.kill()
        process.wait()
    watch.add(process.pid, lambda: deaths.append("gone before"))
    await until(lambda: deaths == ["watched", "gone before"])
    watch.close()


async def test_closed_death_watch_tells_nothing():
    watch = DeathWatch()
    process = sleeper()
    deaths: list[int] = []
    watch.add(process.pid, lambda: deaths.append(1))
    watch.close()
    process.kill()
    process.wait()
    await asyncio.sleep(0.02)
    assert deaths == []


@linux
async def test_process_whose_main_thread_has_ended_is_over_though_it_is_not_gone():
    watch, deaths = DeathWatch(), []
    with child("main thread ends") as process:
        watch.add(process.pid, lambda: deaths.append(1))
        await until(lambda: is_ending(process.pid))
        end_oldest_thread(process)
        await until(lambda: deaths == [1])
        assert process.poll() is None  # one thread is left
        assert threads(process) == 2
    watch.close()


@linux
async def test_thread_that_ends_is_no_death_and_the_next_one_is_watched():
    watch, deaths = DeathWatch(), []
    with child() as process:
        watch.add(process.pid, lambda: deaths.append(1))
        end_oldest_thread(process)
        await until(lambda: threads(process) == 2)
        await until(lambda: watch._watched[process.pid].threads == 2)
        assert deaths == []
        assert len(watch._watched[process.pid].fds) == 2  # the process, and the thread that is left
        process.kill()
        await until(lambda: deaths == [1])
    watch.close()
    assert watch._watched == {}


@linux
async def test_kernel_that_can_not_watch_threads_still_tells_of_processes(monkeypatch):
    real = os.pidfd_open

    def old_kernel(pid: int, flags: int = 0) -> int:
        if flags:
            raise OSError(22, "Invalid argument")
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", old_kernel)
    watch, deaths = DeathWatch(), []
    with child() as process:
        watch.add(process.pid, lambda: deaths.append(1))
        process.kill()
        await until(lambda: deaths == [1])
    watch.close()


@linux
def test_ending_is_told_from_living():
    assert not is_ending(os.getpid())
    process = sleeper()
    process.kill()
    process.wait()
    assert is_ending(process.pid)


@linux
def test_process_that_can_not_be_looked_at_is_not_taken_for_dead(monkeypatch):
    def no_more_files(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("pathlib.Path.read_bytes", no_more_files)
    assert not is_ending(os.getpid())
