"""Launches and reconnections, and what a pool makes of those that fail."""

import asyncio

from actors.supervisor.launches import Launches
from recovery.control import (
    BrowserFailed,
    BrowserReady,
    Launch,
    Phase,
    Reconnect,
)
from recovery.errors import (
    BrowserMissing,
)
from recovery.failures import categorize_browser_failure
from recovery.kinds import Readiness
from recovery.records import HostRef
from tests.fakes import (
    FACTS,
    FakeHosts,
    eventually,
    in_virtual_time,
    order,
)
from tests.supervised import CHROME, LIMIT, Parts, opened


@in_virtual_time
async def test_slot_keeps_its_port_over_a_restart():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        pool.hosts["b-0"].crash()
        await pool.until("b-0", Phase.READY, 1)
        assert [launch.port for launch in pool.hosts["b-0"].launches] == [0, 4000]


@in_virtual_time
async def test_worker_that_dies_during_a_launch_is_replaced_once():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        host = pool.hosts["b-0"]
        host.launch_gate.clear()
        host.crash()
        await eventually(lambda: len(host.launches) == 2)
        host.die()  # both the launch and the watch hear of it
        await pool.until("b-0", Phase.READY, 2)
        assert len(pool.hosts.made["b-0"]) == 2
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert [route.host for route in table.routes] == [pool.hosts["b-0"]]


@in_virtual_time
async def test_launch_that_fails_is_tried_again_after_a_while():
    hosts = FakeHosts(b_0=[{"fail_launch": {0, 1}}])
    async with opened(hosts=hosts) as pool:
        begun = asyncio.get_running_loop().time()
        await pool.until("b-0", Phase.READY, 2)
        assert asyncio.get_running_loop().time() - begun == 1.0 + 2.0


@in_virtual_time
async def test_browser_that_never_starts_is_given_up_and_its_worker_ended():
    hosts = FakeHosts(b_0=[{"fail_launch": range(100)}])
    async with opened("b-0", "b-1", hosts=hosts) as pool:
        await pool.until("b-0", Phase.GIVEN_UP, LIMIT.launches_failed_max - 1)
        assert len(hosts["b-0"].launches) == LIMIT.launches_failed_max
        await eventually(lambda: hosts["b-0"].killed)
        assert hosts["b-0"].stopped
        assert pool.phase("b-1") == (Phase.READY, 0)


@in_virtual_time
async def test_what_is_not_installed_is_not_tried_again():
    hosts = FakeHosts(b_0=[{"fail_launch": {0}, "launch_error": BrowserMissing("no chrome")}])
    async with opened(hosts=hosts) as pool:
        await pool.until("b-0", Phase.GIVEN_UP, 0)
        assert pool.state.browsers["b-0"].failure.message == "no chrome"
        assert len(hosts["b-0"].launches) == 1


@in_virtual_time
async def test_browser_that_crashes_again_and_again_is_given_up():
    async with opened() as pool:
        for epoch in range(LIMIT.restarts_max + 1):
            await pool.until("b-0", Phase.READY, epoch)
            pool.hosts["b-0"].crash()
        await pool.until("b-0", Phase.GIVEN_UP, LIMIT.restarts_max)
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert table.routes == ()


@in_virtual_time
async def test_browser_drained_before_it_was_made_leaves_no_worker_behind():
    hosts = FakeHosts()
    async with opened("b-0", "b-1", hosts=hosts) as pool:
        await pool.until("b-1", Phase.READY, 0)
        hosts.gate.clear()
        await pool.supervisor.want({"late": CHROME})
        await eventually(lambda: "late" in hosts.asked_for)
        await pool.supervisor.drain("late")
        hosts.gate.set()
        await eventually(lambda: "late" in hosts.made)
        await eventually(lambda: hosts["late"].killed)
        assert hosts["late"].launches == []
        assert "late" not in pool.supervisor._hosts


@in_virtual_time
async def test_page_that_lost_its_sockets_is_asked_back():
    async with opened() as pool:
        await pool.supervisor.load(order())
        host = pool.hosts["b-0"]
        host.drop_sockets()
        await pool.until("b-0", Phase.RECONNECTING, 0)
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert [route.status.readiness for route in table.routes] == [Readiness.STARTING]
        host.in_touch.set()
        await pool.until("b-0", Phase.READY, 0)
        assert len(host.launches) == len(host.loads) == 1
        assert pool.state.repairs[0].outcome == "reconnected"


@in_virtual_time
async def test_page_that_does_not_come_back_is_restarted():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.hosts["b-0"].drop_sockets()
        await pool.loaded("b-0", epoch=1)
        assert [step.worked for step in pool.state.repairs[0].steps] == [None, 2]


@in_virtual_time
async def test_aggressive_restart_changes_the_launch():
    async with opened("chrome-0") as pool:
        await pool.until("chrome-0", Phase.READY, 0)
        host = pool.hosts["chrome-0"]
        host.fail_launch = {1}
        host.crash()
        await pool.until("chrome-0", Phase.READY, 2)
        plain, adjusted = host.launches[1:]
        assert plain.arguments == ()
        assert adjusted.arguments


@in_virtual_time
async def test_fallback_puts_another_kind_in_its_place():
    async with opened("chrome-0") as pool:
        await pool.supervisor.load(order())
        pool.hosts["chrome-0"].fail_launch = {1, 2}
        pool.hosts["chrome-0"].crash()
        await pool.loaded("edge-r1", epoch=0)
        assert pool.state.browsers["chrome-0"].replaced_by == "edge-r1"
        await eventually(lambda: pool.hosts["chrome-0"].killed)


@in_virtual_time
async def test_when_many_die_they_are_rebuilt_one_at_a_time():
    names = [f"b-{n}" for n in range(4)]
    async with opened(*names) as pool:
        for name in names:
            await pool.until(name, Phase.READY, 0)
        hosts = [pool.hosts[name] for name in names]
        for host in hosts:
            host.launch_gate.clear()
            host.crash()
        await asyncio.sleep(1)
        assert sum(len(host.launches) == 2 for host in hosts) == 1
        for host in hosts:
            host.launch_gate.set()
        for name in names:
            await pool.until(name, Phase.READY, 1)


def launches(parts: Parts, hosts: FakeHosts) -> Launches:
    return Launches(hosts, parts.hosts, parts.watches, parts.journal, parts.term, parts.wall)


@in_virtual_time
async def test_launch_makes_a_worker_and_reports_the_browser_ready():
    parts, made = Parts(), FakeHosts()
    await parts.open("b-0")
    await launches(parts, made).launch(Launch("b-0", CHROME, 0))
    assert parts.hosts.get("b-0") is made["b-0"]
    assert parts.logged[-1] == BrowserReady("b-0", 0, FACTS)
    (order,) = made["b-0"].launches
    assert (order.ref, order.term, order.warm) == (HostRef("b-0", 0), 1, True)
    parts.end()


@in_virtual_time
async def test_launch_of_what_is_not_starting_makes_nothing():
    parts, made = Parts(), FakeHosts()
    await parts.open("b-0")
    await launches(parts, made).launch(Launch("b-0", CHROME, 5))
    assert made.asked_for == []


@in_virtual_time
async def test_launch_that_fails_for_want_of_a_browser_is_final():
    missing = BrowserMissing("no chrome")
    parts = Parts()
    made = FakeHosts(b_0=[{"fail_launch": {0}, "launch_error": missing}])
    await parts.open("b-0")
    await launches(parts, made).launch(Launch("b-0", CHROME, 0))
    assert isinstance(parts.logged[-1], BrowserFailed)
    assert parts.logged[-1].final
    parts.end()


@in_virtual_time
async def test_reconnection_without_a_worker_is_a_failure_of_the_worker():
    parts = Parts()
    await parts.open("b-0")
    lost = categorize_browser_failure(
        "out of touch", {"what": "socket_closed", "ref": HostRef("b-0", 0)}
    )
    await parts.happen(BrowserReady("b-0", 0, FACTS), BrowserFailed("b-0", 0, lost))
    assert parts.journal.state.browsers["b-0"].phase is Phase.RECONNECTING
    await launches(parts, FakeHosts()).reconnect(Reconnect("b-0", 0))
    failed = parts.logged[-1]
    assert isinstance(failed, BrowserFailed)
    assert failed.failure.evidence["what"] == "worker_exited"
