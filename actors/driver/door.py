"""Sockets into the private network of one browser, as its reaper hands them out.

The other side is `actors.driver.reaper`; both are for Linux. This module must not know what is
said over a socket.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from actors.driver.reaper import DOOR

Connect = Callable[[float], socket.socket]  # a connection to the driver, within these seconds


def page_listener(profile: Path, seconds: float) -> socket.socket:
    """The socket at which the page's server must listen. Raises `OSError`."""
    return _ask(profile, b"page", seconds)


def driver_connection(profile: Path, port: int) -> Connect:
    """How to connect to the driver of a profile: through its door, or on the shared loopback.

    The connections raise `OSError`.
    """
    if (profile / DOOR).exists():
        return lambda seconds: _ask(profile, b"driver", seconds)
    return lambda seconds: socket.create_connection(("127.0.0.1", port), seconds)


def _ask(profile: Path, what: bytes, seconds: float) -> socket.socket:
    folder = os.open(profile, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(seconds)
            # By descriptor: a socket's path must not have more than 107 characters.
            door.connect(f"/proc/self/fd/{folder}/{DOOR}")
            door.send(what)
            answer, descriptors, _, _ = socket.recv_fds(door, 16, 1)
    finally:
        os.close(folder)
    if not descriptors:
        number = int(answer or b"0")
        raise OSError(number, os.strerror(number) if number else "the reaper is gone")
    return socket.socket(fileno=descriptors[0])
