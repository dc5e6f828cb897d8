"""The reaper process of one browser: creates the profile, starts the driver, kills them all.

A script of its own (standard library only, so that it starts in milliseconds). Its parent, the
browser actor, holds the other end of its standard input; when that end closes, for whatever
reason, the reaper kills every descendant and removes the profile directory. It becomes the
subreaper of its orphans (`PR_SET_CHILD_SUBREAPER`), so that processes which browsers detach
stay its descendants, and a session of its own, so that it gets no signal sent to the
actor's process group. It must not import anything of the project.

Where the system allows it, all of them live in a network namespace of their own that has nothing
but a loopback interface: no other process reaches the driver or a debugging port, and the page
reaches no network. Sockets that lead into it are handed out at `DOOR`, a Unix socket in the
profile, which only its owner may enter: "page" (a listening socket, for the page's server) or
"driver" (a connection to the driver).

Input: one JSON line `{"driver": [argv], "driver_port": port, "xvfb": [argv] | null, "profile":
directory to make, "template": directory to copy into it | null, "environment": all variables of
the processes, "page_port": port | null (no namespace)}`. Output: JSON lines
`{"started": pid, "what": "reaper" | "xvfb" | "driver"}`, `{"private_network": bool, "why": text}`,
`{"exited": pid, "status": n}` (negative: the signal's number), `{"error": text}`, and at the end
`{"done": true}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1
TEMPORARY = (
    "t"  # below the profile, for what browsers would leave in /tmp; short: sockets lie there
)
DOOR = f"{TEMPORARY}/door"  # in the profile: hands out sockets of the namespace
_DOOR_SECONDS = 1.0  # for a visitor to say what it wants
_VISITORS_MAX = 16  # waiting at the door
_BACKLOG = 64  # connections of the page that wait to be accepted
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
_INTERFACE = "16sH14x"  # struct ifreq: name and flags
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


# --- A network of its own --------------------------------------------------


def enter_private_network() -> None:
    """Move this process, and all that it starts, to a new network namespace with loopback only.

    For a user who is not root, a user namespace owns it, in which that user's id stays the same.
    Raises OSError where the system forbids it; the process may then have no network at all.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        _unshare(_CLONE_NEWNET)
    except PermissionError:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack(_INTERFACE, b"lo", 0))
        up = struct.unpack(_INTERFACE, flags)[1] | _IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack(_INTERFACE, b"lo", up))


def _unshare(flags: int) -> None:
    if sys.platform != "linux":
        raise OSError("this system has no network namespaces")
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def why_no_private_network() -> str:
    """Why the system forbids one, tried in a child; empty if it does not."""
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        try:
            enter_private_network()
        except OSError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as report:
        why = report.read()
    os.waitpid(child, 0)
    return why


class _Door:
    """Hands out sockets of this process's network to those who may enter the profile."""

    def __init__(self, listening: socket.socket, page: socket.socket, driver_port: int) -> None:
        self.listening = listening
        self._page = page
        self._driver_port = driver_port

    def serve_one(self) -> None:
        """Answer one visitor: a socket, or the error number of the attempt to make one."""
        with contextlib.suppress(OSError):  # a visitor may leave at any time
            visitor, _ = self.listening.accept()
            with visitor:
                visitor.settimeout(_DOOR_SECONDS)
                wanted = visitor.recv(16)
                if wanted == b"page":
                    socket.send_fds(visitor, [b"0"], [self._page.fileno()])
                elif wanted == b"driver":
                    self._send_driver(visitor)

    def _send_driver(self, visitor: socket.socket) -> None:
        try:
            driver = socket.create_connection(("127.0.0.1", self._driver_port), _DOOR_SECONDS)
        except OSError as error:
            visitor.send(str(error.errno or 1).encode())
            return
        with driver:
            socket.send_fds(visitor, [b"0"], [driver.fileno()])


def _open_door(order: dict[str, Any]) -> _Door | None:
    """A private network and the door to it, if the order wants one and the system allows it."""
    if order["page_port"] is None:
        return None
    if why := why_no_private_network():
        _say(private_network=False, why=why)
        return None
    enter_private_network()
    page = socket.create_server(("127.0.0.1", order["page_port"]), backlog=_BACKLOG)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(DOOR)  # a relative path: it must not have more than 107 characters
    listening.listen(_VISITORS_MAX)
    _say(private_network=True, why="")
    return _Door(listening, page, order["driver_port"])


# --- Processes -------------------------------------------------------------


def _start_display(
    argv: list[str], environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], str]:
    """Start Xvfb on a display that it chooses itself; returns it and the display's name.

    It serves only those who can read a secret in the profile.
    """
    secret = os.path.abspath(f"{TEMPORARY}/xauthority")
    with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(_authority(os.urandom(16)))
    environment["XAUTHORITY"] = secret
    read_end, write_end = os.pipe()
    argv = [*argv, "-displayfd", str(write_end), "-auth", secret]
    xvfb = _spawn(argv, environment, (write_end,))
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


def _authority(cookie: bytes) -> bytes:
    """An entry of an Xauthority file that is valid for every display (family "wild")."""
    parts = (b"", b"", b"MIT-MAGIC-COOKIE-1", cookie)
    return struct.pack(">H", 0xFFFF) + b"".join(
        struct.pack(">H", len(part)) + part for part in parts
    )


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
    os.chdir(profile)  # also for the processes: the actor's directory may vanish
    os.mkdir(TEMPORARY, 0o700)


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
    if sys.argv[1:] == ["--why-no-private-network"]:
        _say(why=why_no_private_network())
        return
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

    os.umask(0o077)
    order = json.loads(sys.stdin.buffer.readline() or b"{}")
    groups: list[int] = []
    display = 0
    try:
        if order:
            _make_profile(order["profile"])
            environment = dict(order["environment"])
            door = _open_door(order)
            if order["xvfb"]:
                xvfb, environment["DISPLAY"] = _start_display(order["xvfb"], environment)
                display = xvfb.pid
                groups.append(display)
                _say(started=display, what="xvfb")
            driver = _spawn(order["driver"], environment)
            groups.append(driver.pid)
            _fill_profile(order["profile"], order["template"])  # while the driver starts
            _say(started=driver.pid, what="driver")
            heard = [0, wake_read, *((door.listening,) if door else ())]
            while True:
                ready, _, _ = select.select(heard, [], [])
                if wake_read in ready:
                    os.read(wake_read, 4096)
                    _reap()
                if door is not None and door.listening in ready:
                    door.serve_one()
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
