"""The private network of a browser, for real: who reaches what, and what is done without one."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.bridge import Bridge, PageConfig
from actors.browser.process import PAGE_PORT
from actors.driver import reaper as reaper_script
from actors.driver.door import driver_connection, page_listener
from actors.driver.processes import ProcessReaper, ReaperOrder
from tests.fakes import until
from tests.served import LIMIT

_WHY_NOT = "--why-no-private-network"
# Answers "driver" on its port, and writes what it sees of the network.
_DRIVER = """
import errno, json, pathlib, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
interfaces = [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]
with socket.socket() as out:
    outside = out.connect_ex(("192.0.2.1", 80))
with socket.socket() as page:
    page.settimeout(20)
    page.connect(("127.0.0.1", 80))
    page.sendall(b"GET / HTTP/1.1\\r\\nHost: elsewhere\\r\\n\\r\\n")
    answer = page.recv(100).decode()
seen = {"interfaces": interfaces, "outside": outside, "page": answer.splitlines()[0]}
pathlib.Path(sys.argv[2]).write_text(json.dumps(seen))
while True:
    with server.accept()[0] as visitor:
        visitor.sendall(b"driver")
"""
# Starts a reaper of its own, says whether there is a private network, and ends it.
_HOLDER = """
import asyncio, json, sys
from actors.driver.processes import ProcessReaper, ReaperOrder
async def main():
    reaper = ProcessReaper()
    order = ReaperOrder(["sleep", "60"], None, sys.argv[1], None, {}, 9, 80)
    await reaper.start(order, lambda *_: None)
    print(json.dumps([reaper.private_network, reaper.why_shared]))
    await reaper.end()
asyncio.run(main())
"""


def why_not(*prefix: str) -> str:
    """Why there is no private network here, or for a process that is started by `prefix`."""
    command = [*prefix, sys.executable, "-I", "-S", reaper_script.__file__, _WHY_NOT]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return str(json.loads(done.stdout)["why"])


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if sys.platform != "linux" or why_not():
        pytest.skip("this system allows no private network")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Private:
    """A driver of a private network."""

    def __init__(self, profile: Path, seen: Path) -> None:
        self.profile, self._seen = profile, seen
        self.port = free_port()
        self.reaper = ProcessReaper()

    async def start(self) -> None:
        driver = [sys.executable, "-I", "-S", "-c", _DRIVER, str(self.port), str(self._seen)]
        order = ReaperOrder(driver, None, str(self.profile), None, {}, self.port, PAGE_PORT)
        await self.reaper.start(order, lambda *_: None)

    async def seen(self) -> dict[str, object]:
        await until(lambda: self._seen.exists() and self._seen.stat().st_size > 0, seconds=30.0)
        found: dict[str, object] = json.loads(self._seen.read_text())
        return found


@pytest.fixture
async def private(tmp_path) -> AsyncIterator[Private]:
    made = Private(tmp_path / ("long-" * 30) / "profile", tmp_path / "seen")
    made.profile.parent.mkdir()
    await made.start()
    yield made
    await made.reaper.end()


async def test_page_is_served_in_the_private_network_and_nothing_else_is_in_reach(private):
    assert private.reaper.private_network
    bridge = Bridge(PageConfig(1, LIMIT, probe=False), lambda _: None)
    await bridge.listen(await asyncio.to_thread(page_listener, private.profile, 5.0))
    seen = await private.seen()
    assert seen == {
        "interfaces": ["lo"],
        "outside": errno.ENETUNREACH,
        "page": "HTTP/1.1 403 Forbidden",  # by the bridge, which expects no page
    }
    assert bridge.port == 0  # on the machine's loopback it does not listen
    await bridge.stop()


async def test_driver_is_reached_through_the_door_only(private):
    page = await asyncio.to_thread(page_listener, private.profile, 5.0)
    served = asyncio.to_thread(_answer_once, page)
    await asyncio.gather(served, private.seen())
    with socket.socket() as stranger:
        assert stranger.connect_ex(("127.0.0.1", private.port)) == errno.ECONNREFUSED
    connect = driver_connection(private.profile, private.port)
    with await asyncio.to_thread(connect, 5.0) as driver:
        driver.settimeout(5.0)
        assert await asyncio.to_thread(driver.recv, 10) == b"driver"


def _answer_once(listener: socket.socket) -> None:
    with listener, listener.accept()[0] as visitor:
        visitor.sendall(b"HTTP/1.1 200 OK\r\n\r\n")


async def test_driver_that_does_not_listen_refuses_as_a_port_does(tmp_path):
    reaper, profile = ProcessReaper(), tmp_path / "profile"
    order = ReaperOrder(["sleep", "60"], None, str(profile), None, {}, 9, PAGE_PORT)
    await reaper.start(order, lambda *_: None)
    with pytest.raises(ConnectionError, match="Connection refused"):
        await asyncio.to_thread(driver_connection(profile, 9), 5.0)
    await reaper.end()
    with pytest.raises(OSError):  # noqa: PT011  # gone, or refused: nobody is there
        await asyncio.to_thread(page_listener, profile, 5.0)


async def test_visitor_who_says_nothing_or_nonsense_holds_nobody_up(tmp_path):
    reaper, profile = ProcessReaper(), tmp_path / "profile"
    order = ReaperOrder(["sleep", "60"], None, str(profile), None, {}, 9, PAGE_PORT)
    await reaper.start(order, lambda *_: None)
    with contextlib.ExitStack() as visitors:
        for said in (b"", b"tea"):
            visitor = visitors.enter_context(socket.socket(socket.AF_UNIX))
            visitor.connect(str(profile / reaper_script.DOOR))
            visitor.send(said)
        (await asyncio.to_thread(page_listener, profile, 10.0)).close()
    await reaper.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
async def test_another_user_may_not_enter_the_door(private, tmp_path):
    for folder in [private.profile.parent, tmp_path, *list(tmp_path.parents)[:-2]]:
        folder.chmod(0o755)  # so that only the profile itself is closed
    script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    link = tmp_path / "p"  # a short path
    link.symlink_to(private.profile)
    command = [sys.executable, "-I", "-S", "-c", script, str(link / reaper_script.DOOR)]
    nobody = [shutil.which("setpriv") or "setpriv", "--reuid=65534", "--clear-groups", *command]
    theirs = await asyncio.to_thread(subprocess.run, nobody, capture_output=True, text=True)
    assert "PermissionError" in theirs.stderr
    await asyncio.to_thread(subprocess.run, command, check=True)  # the owner may


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_user_who_is_not_root_gets_one_too():
    # Neither this Python nor this checkout need be within that user's reach.
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if python is None:
        pytest.skip("no Python that every user can run")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        os.chown(folder, 65534, -1)
        script = shutil.copy(reaper_script.__file__, folder)
        Path(script).chmod(0o644)
        order = ReaperOrder(["sleep", "60"], None, f"{folder}/profile", None, {}, 9, PAGE_PORT)
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--clear-groups", python, "-I", "-S", script],
            input=order.line(),  # and then it ends: so does the reaper
            capture_output=True,
            check=True,
            timeout=60,
        )
        told = [json.loads(line) for line in done.stdout.splitlines()]
    if not told[1]["private_network"] and "Operation not permitted" in told[1]["why"]:
        pytest.skip("this system allows user namespaces to root only")
    assert told[1] == {"private_network": True, "why": ""}
    assert told[-1] == {"done": True}
    assert not any("error" in line for line in told)


def test_system_that_forbids_it_is_named_and_the_machine_s_network_is_used(tmp_path):
    """A user namespace in which no network namespace can be made, as in some containers."""
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    prefix = ("unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh")
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system allows no user namespaces")
    assert why_not(*prefix) == f"[Errno {errno.ENOSPC}] No space left on device"
    private, why = _held(tmp_path / "profile", *prefix)
    assert not private
    assert "No space left" in str(why)


def _held(profile: Path, *prefix: str) -> list[object]:
    command = [*prefix, sys.executable, "-c", _HOLDER, str(profile)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    found: list[object] = json.loads(done.stdout)
    return found
