"""The reaper process of one browser: creates the profile, starts the driver, kills them all.

A script of its own (standard library only, so that it starts in milliseconds). Its parent, the
browser actor, holds the other end of its standard input; when that end closes, for whatever
reason, the reaper kills every descendant and removes the profile directory. It becomes the
subreaper of its orphans (`PR_SET_CHILD_SUBREAPER`), so that processes which browsers detach
stay its descendants, and a session of its own, so that it gets no signal sent to the
actor's process group. It must not import anything of the project.

Input: one JSON line `{"driver": [argv], "xvfb": [argv] | null, "profile": directory to make,
"template": directory to copy into it | null, "environment": {}}`. Output: JSON lines
`{"started": pid, "what": "reaper" | "xvfb" | "driver"}`, `{"exited": pid, "status": n}`
(negative: the signal's number), `{"error": text}`, and at the end `{"done": true}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1
TEMPORARY = (
    "t"  # below the profile, for what browsers would leave in /tmp; short: sockets lie there
)
_KILL_SECONDS = 4.0  # give up on a process that the kernel will not end (state D) after this
_DISPLAY_SECONDS = 10.0
_DISPLAY_END_SECONDS = 1.0


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _begin_child() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A program that a shell runs in the background ignores it, and hands that on to all it starts.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def _say(**fields: Any) -> None:
    # The actor may be gone; the reaper continues.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(fields).encode() + b"\n")


def _parents() -> dict[int, int]:
    """Parent of every process, by pid, from /proc (empty where there is none)."""
    parents = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    # The command (field 2) may contain spaces and parentheses.
                    parents[int(name)] = int(stat.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it ended meanwhile
    return parents


def _descendants() -> list[int]:
    parents = _parents()
    found: list[int] = []
    layer = {os.getpid()}
    while layer:
        layer = {pid for pid, parent in parents.items() if parent in layer}
        found.extend(layer)
    return found


def _reap() -> bool:
    """Collect ended children; false when there are none left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        _say(exited=pid, status=os.waitstatus_to_exitcode(status))


def _kill_all(groups: list[int], display: int) -> None:
    """End every descendant. Xvfb (pid `display`, 0 if none) gets a moment to remove its socket."""
    begun = time.monotonic()
    for group in groups:  # the only way where there is no /proc
        if group != display:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
    while (passed := time.monotonic() - begun) < _KILL_SECONDS:
        for pid in _descendants():
            polite = pid == display and passed < _DISPLAY_END_SECONDS
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM if polite else signal.SIGKILL)
        if not _reap():
            return
        time.sleep(0.005)  # orphans are adopted one generation at a time


def _start_display(argv: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """Start Xvfb on a display that it chooses itself; returns it and the display's name."""
    read_end, write_end = os.pipe()
    xvfb = _spawn([*argv, "-displayfd", str(write_end)], dict(os.environ), (write_end,))
    os.close(write_end)
    # It writes the number and the newline separately, and exits if it can't write the second.
    number = ""
    while not number.endswith("\n") and select.select([read_end], [], [], _DISPLAY_SECONDS)[0]:
        piece = os.read(read_end, 16).decode()
        if not piece:
            break
        number += piece
    os.close(read_end)
    if not number.endswith("\n"):
        raise OSError(f"{argv[0]} started no display")
    return xvfb, f":{number.strip()}"


def _spawn(
    argv: list[str], environment: dict[str, str], fds: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        process_group=0,
        preexec_fn=_begin_child,  # one thread only, so this is safe here
    )


def _make_profile(profile: str) -> None:
    """Created here and not in the actor, so that it is removed even if the actor dies."""
    os.mkdir(profile, 0o700)
    os.mkdir(os.path.join(profile, TEMPORARY))


def _fill_profile(profile: str, template: str | None) -> None:
    if template:
        # Files that vanish meanwhile are no loss in a cache. Contents only: copying times and modes
        # would take 50 % longer.
        with contextlib.suppress(shutil.Error):
            shutil.copytree(
                template,
                profile,
                dirs_exist_ok=True,
                symlinks=True,
                copy_function=shutil.copyfile,
            )


def main() -> None:
    if os.fork():
        os._exit(0)  # Ray kills direct children of a worker that ends; the reaper must survive
    _say(started=os.getpid(), what="reaper")
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    order = json.loads(sys.stdin.buffer.readline() or b"{}")
    groups: list[int] = []
    display = 0
    try:
        if order:
            _make_profile(order["profile"])
            temporary = os.path.join(order["profile"], TEMPORARY)
            environment = {**os.environ, **order["environment"]}
            environment.update(dict.fromkeys(("TMPDIR", "TMP", "TEMP"), temporary))
            if order["xvfb"]:
                xvfb, environment["DISPLAY"] = _start_display(order["xvfb"])
                display = xvfb.pid
                groups.append(display)
                _say(started=display, what="xvfb")
            driver = _spawn(order["driver"], environment)
            groups.append(driver.pid)
            _fill_profile(order["profile"], order["template"])  # while the driver starts
            _say(started=driver.pid, what="driver")
            while True:
                ready, _, _ = select.select([0, wake_read], [], [])
                if wake_read in ready:
                    os.read(wake_read, 4096)
                    _reap()
                if 0 in ready and not os.read(0, 4096):
                    break  # the actor closed it, or has ended
    except OSError as error:
        _say(error=str(error))
    finally:
        _kill_all(groups, display)
        if order:
            shutil.rmtree(order["profile"], ignore_errors=True)
        _say(done=True)


if __name__ == "__main__":
    main()
