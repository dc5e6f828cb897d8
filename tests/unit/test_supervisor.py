import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from functools import reduce
from itertools import pairwise

import pytest

from actors.supervisor.supervisor import MemoryOrders, Supervisor, SupervisorConfig
from recovery.control import Event, ModelPhase, Phase, PoolState, apply
from recovery.errors import BadInput, BrowserMissing, InternalError, PoolClosed, SetupError
from recovery.failures import Category
from recovery.kinds import BrowserType, Level, Readiness
from recovery.log.segments import LogUnavailable
from recovery.plan import STRATEGIES
from recovery.records import HostRef
from recovery.resources import ResourceLimits
from recovery.supervision import RestartLimit
from tests.fakes import NUMERIC, FakeHosts, GatedLog, eventually, failure, in_virtual_time, order

CHROME = BrowserType.CHROME
LIMIT = RestartLimit(restarts_max=3, period_seconds=600.0, delay_first_seconds=1.0)


class Pool:
    """A supervisor over fake hosts, and what a test looks at."""

    def __init__(self, hosts: FakeHosts, *, persistent: bool = True, term: int = 1) -> None:
        self.hosts = hosts
        self.log = GatedLog()
        self.closed = 0
        self.orders = MemoryOrders()
        self.config = SupervisorConfig(
            "p",
            Level.MEDIUM,
            STRATEGIES["progressive"],
            LIMIT,
            15.0,
            persistent,
            creator="creator",
        )
        self.supervisor = self.made(term, PoolState())

    def made(self, term: int, state: PoolState) -> Supervisor:
        loop = asyncio.get_running_loop()
        return Supervisor(
            self.config,
            self.hosts,
            self._on_closed,
            self.log,
            loop.time,
            loop.time,
            term,
            state,
            self.orders,
        )

    def die(self) -> None:
        """The supervisor's process is killed: nothing it was doing goes on."""
        for task in list(self.supervisor._tasks):
            task.cancel()

    async def resume(self) -> None:
        """The next incarnation begins, with what the log holds."""
        state = reduce(apply, self.log.events, PoolState())
        self.supervisor = self.made(self.state.term + 1, state)
        await self.supervisor.resume(self.hosts.living)

    def _on_closed(self) -> None:
        self.closed += 1

    @property
    def state(self) -> PoolState:
        return self.supervisor._state

    def phase(self, browser_id: str) -> tuple[Phase, int]:
        record = self.state.browsers[browser_id]
        return record.phase, record.epoch

    async def until(self, browser_id: str, phase: Phase, epoch: int) -> None:
        await self.supervisor._until(lambda: self.phase(browser_id) == (phase, epoch))

    async def loaded(self, browser_id: str, epoch: int, model: str = "m") -> None:
        def holds() -> bool:
            record = self.state.browsers.get(browser_id)
            if record is None or record.epoch != epoch:
                return False
            return record.models.get(model) is ModelPhase.LOADED

        await self.supervisor._until(holds)


@contextlib.asynccontextmanager
async def opened(
    *browsers: str, hosts: FakeHosts | None = None, persistent: bool = True
) -> AsyncIterator[Pool]:
    """A pool of these browsers; at the end its log must replay to its state."""
    pool = Pool(hosts or FakeHosts(), persistent=persistent)
    await pool.supervisor.open(dict.fromkeys(browsers or ("b-0",), CHROME))
    yield pool
    assert reduce(apply, pool.log.events, PoolState()) == pool.state
    assert [event.seq for event in pool.log.events] == list(range(1, len(pool.log.events) + 1))
    for task in pool.supervisor._tasks:
        task.cancel()


@in_virtual_time
async def test_every_browser_comes_up():
    async with opened("b-0", "b-1", "b-2") as pool:
        for browser_id in ("b-0", "b-1", "b-2"):
            await pool.until(browser_id, Phase.READY, 0)
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert {str(route.status.ref) for route in table.routes} == {"b-0#0", "b-1#0", "b-2#0"}
        assert pool.supervisor.reports().keys() == {"b-0", "b-1", "b-2"}
        assert await pool.supervisor.memory() == dict.fromkeys(("b-0", "b-1", "b-2"), 1 << 20)


@in_virtual_time
async def test_model_is_loaded_on_every_browser_before_load_returns():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert [route.status.models for route in table.routes] == [{"m": NUMERIC}] * 2
        assert table.models["m"].entry == {"config": {"of": "m"}}


@in_virtual_time
async def test_browser_that_crashes_comes_back_as_the_next_epoch_with_its_models():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.hosts["b-0"].crash()
        await pool.loaded("b-0", epoch=1)
        host = pool.hosts["b-0"]
        assert [str(launch.ref) for launch in host.launches] == ["b-0#0", "b-0#1"]
        assert host.loads == [(HostRef("b-0", 0), "m"), (HostRef("b-0", 1), "m")]
        assert len(pool.hosts.made["b-0"]) == 1  # its worker lives on
        (repair,) = pool.state.repairs
        assert repair.failure.category is Category.CRASH
        assert repair.ready is not None


@in_virtual_time
async def test_slot_keeps_its_port_over_a_restart():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        pool.hosts["b-0"].crash()
        await pool.until("b-0", Phase.READY, 1)
        assert [launch.port for launch in pool.hosts["b-0"].launches] == [0, 4000]


@in_virtual_time
async def test_worker_that_dies_is_replaced_by_a_new_one():
    async with opened() as pool:
        await pool.supervisor.load(order())
        dead = pool.hosts["b-0"]
        dead.die()
        await pool.loaded("b-0", epoch=1)
        assert pool.hosts["b-0"] is not dead
        assert pool.state.browsers["b-0"].failure.evidence["what"] == "worker_exited"


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
async def test_one_crash_disturbs_no_other_browser():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        pool.hosts["b-0"].crash()
        await pool.loaded("b-0", epoch=1)
        assert pool.phase("b-1") == (Phase.READY, 0)
        assert len(pool.hosts["b-1"].launches) == len(pool.hosts["b-1"].loads) == 1


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
async def test_model_that_one_browser_cannot_load_is_served_by_the_other():
    async with opened("b-0", "b-1", hosts=FakeHosts(b_0=[{"fail_load": {0, 1}}])) as pool:
        await pool.supervisor.load(order())
        assert pool.state.browsers["b-0"].models == {"m": ModelPhase.FAILED}
        assert pool.state.browsers["b-0"].load_failures["m"].category is Category.API_ERROR
        assert pool.state.browsers["b-1"].models == {"m": ModelPhase.LOADED}


@in_virtual_time
async def test_load_that_fails_by_a_fault_of_ours_does_not_hang():
    script = {"fail_load": {0, 1}, "load_error": InternalError("a broken promise")}
    async with opened(hosts=FakeHosts(b_0=[script])) as pool:
        await pool.supervisor.load(order())
        assert pool.state.browsers["b-0"].models == {"m": ModelPhase.FAILED}


@in_virtual_time
async def test_crash_while_a_model_loads_loads_it_in_the_next_epoch():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        host = pool.hosts["b-0"]
        host.load_gate.clear()
        loading = asyncio.create_task(pool.supervisor.load(order()))
        await eventually(lambda: len(host.loads) == 1)
        host.crash()
        await eventually(lambda: len(host.loads) == 2)
        host.load_gate.set()
        await loading
        await pool.loaded("b-0", epoch=1)


@in_virtual_time
async def test_unload_takes_the_model_out_of_the_table():
    async with opened() as pool:
        await pool.supervisor.load(order())
        await pool.supervisor.unload("m")
        await eventually(lambda: pool.hosts["b-0"].unloads == [(HostRef("b-0", 0), "m")])
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert table.models == {}
        assert [route.status.models for route in table.routes] == [{}]


@in_virtual_time
async def test_drain_waits_for_what_is_in_flight():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        host = pool.hosts["b-0"]
        host.run_gate.clear()
        drained = asyncio.create_task(pool.supervisor.drain("b-0"))
        await eventually(lambda: host.drained)
        table = await pool.supervisor.watch("client", -1, 0.0)
        readiness = {r.status.ref.browser_id: r.status.readiness for r in table.routes}
        assert readiness == {"b-0": Readiness.DRAINING, "b-1": Readiness.READY}
        assert not host.stopped
        host.run_gate.set()
        await drained
        assert pool.phase("b-0") == (Phase.STOPPED, 0)
        assert host.stopped
        assert host.killed


@in_virtual_time
async def test_drain_of_a_browser_that_dies_meanwhile_returns():
    async with opened("b-0", "b-1") as pool:
        await pool.until("b-0", Phase.READY, 0)
        pool.hosts["b-0"].run_gate.clear()
        drained = asyncio.create_task(pool.supervisor.drain("b-0"))
        await eventually(lambda: pool.hosts["b-0"].drained)
        pool.hosts["b-0"].die()
        await drained
        assert pool.phase("b-0") == (Phase.STOPPED, 0)
        assert len(pool.hosts.made["b-0"]) == 1


@in_virtual_time
async def test_drained_browser_that_is_wanted_again_is_a_new_worker():
    async with opened("b-0", "b-1") as pool:
        await pool.until("b-0", Phase.READY, 0)
        await pool.supervisor.drain("b-0")
        await pool.supervisor.want({"b-0": CHROME})
        await pool.until("b-0", Phase.READY, 1)
        assert [host.killed for host in pool.hosts.made["b-0"]] == [True, False]


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
async def test_close_stops_every_browser_and_then_refuses_orders():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        await pool.supervisor.close()
        assert all(host.stopped and host.killed for host in pool.hosts.all)
        await pool.supervisor.close()  # again is no error
        for refused in (
            pool.supervisor.want({"b-2": CHROME}),
            pool.supervisor.load(order("n")),
            pool.supervisor.unload("m"),
            pool.supervisor.drain("b-0"),
        ):
            with pytest.raises(PoolClosed):
                await refused
        assert pool.hosts["b-0"].launches[1:] == []


@in_virtual_time
async def test_close_in_the_middle_of_launches_leaves_nothing_behind():
    hosts = FakeHosts(b_1=[{"fail_launch": {0}}])
    async with opened("b-0", "b-1", hosts=hosts) as pool:
        await pool.until("b-0", Phase.READY, 0)
        await pool.until("b-1", Phase.STARTING, 1)  # waits before it tries again
        hosts.gate.clear()
        await pool.supervisor.want({"b-2": CHROME})
        await eventually(lambda: "b-2" in hosts.asked_for)
        await pool.supervisor.close()
        hosts.gate.set()
        await asyncio.sleep(60)
        assert all(host.killed for host in hosts.all)
        assert len(hosts["b-1"].launches) == 1
        assert all(record.phase is Phase.STOPPED for record in pool.state.browsers.values())


@in_virtual_time
async def test_close_waits_until_a_browser_that_died_meanwhile_is_gone_too():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        host = pool.hosts["b-0"]
        host.launch_gate.clear()
        host.crash()
        await eventually(lambda: len(host.launches) == 2)
        closing = asyncio.create_task(pool.supervisor.close())
        host.fail_launch = {1}
        host.launch_gate.set()
        await closing
        assert host.killed


@in_virtual_time
async def test_pool_whose_creator_is_gone_closes_itself():
    async with opened(persistent=False) as pool:
        loop = asyncio.get_running_loop()
        await pool.until("b-0", Phase.READY, 0)
        for _ in range(4):  # as long as its creator asks, it lives
            await asyncio.sleep(10)
            await pool.supervisor.watch("creator", -1, 0.0)
        assert pool.closed == 0
        await pool.supervisor.watch("somebody else", -1, 0.0)
        await asyncio.sleep(15.1)
        assert pool.closed == 1
        assert pool.hosts["b-0"].killed
        assert loop.time() < 60


@in_virtual_time
async def test_persistent_pool_outlives_its_creator():
    async with opened(persistent=True) as pool:
        await asyncio.sleep(3600)
        assert pool.closed == 0
        assert pool.phase("b-0") == (Phase.READY, 0)


@in_virtual_time
async def test_host_is_asked_for_news_also_while_it_launches():
    """By asking, the supervisor renews the host's lease, which may be shorter than a launch."""
    hosts = FakeHosts()
    hosts.gate.clear()
    async with opened(hosts=hosts) as pool:
        await asyncio.sleep(1)
        hosts.gate.set()
        await eventually(lambda: "b-0" in hosts.made)
        host = hosts["b-0"]
        asked: list[float] = []
        inner = host.next_event

        async def next_event(*asking):
            asked.append(asyncio.get_running_loop().time())
            return await inner(*asking)

        host.next_event = next_event
        host.launch_gate.clear()
        host.crash()
        await asyncio.sleep(60)
        assert pool.phase("b-0") == (Phase.STARTING, 1)
        assert max(b - a for a, b in pairwise(asked)) <= 5.0
        assert len(asked) >= 10


@in_virtual_time
async def test_superseded_supervisor_gives_no_orders():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        host = pool.hosts["b-0"]
        host.term = 2  # it has met a newer one
        host.crash()
        faults = pool.supervisor.faults
        await eventually(lambda: any(f.startswith("launch b-0: StaleTerm") for f in faults))
        assert len(host.launches) == 1
        assert not host.killed


@in_virtual_time
async def test_event_is_in_the_log_before_its_instructions_run():
    pool = Pool(FakeHosts())
    pool.log.gate.clear()
    opening = asyncio.create_task(pool.supervisor.open({"b-0": CHROME}))
    await asyncio.sleep(5)
    assert pool.state == PoolState()
    assert pool.hosts.made == {}
    pool.log.gate.set()
    await opening
    await pool.until("b-0", Phase.READY, 0)
    pool.log.gate.clear()
    host = pool.hosts["b-0"]
    host.crash()
    await asyncio.sleep(5)
    assert len(host.launches) == 1
    pool.log.gate.set()
    await pool.until("b-0", Phase.READY, 1)
    for task in pool.supervisor._tasks:
        task.cancel()


@in_virtual_time
async def test_event_whose_asker_is_cancelled_on_its_way_to_the_disk_is_whole():
    async with opened("b-0", "b-1") as pool:
        for browser_id in ("b-0", "b-1"):
            await pool.until(browser_id, Phase.READY, 0)
        pool.log.gate.clear()
        asked = asyncio.create_task(pool.supervisor.drain("b-1"))
        await eventually(lambda: pool.supervisor._order.locked())
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert pool.phase("b-1") == (Phase.READY, 0)  # not before it is on disk
        pool.log.gate.set()
        await pool.until("b-1", Phase.STOPPED, 0)
        assert pool.log.last_seq == pool.supervisor._seq
        await pool.supervisor.load(order())


@in_virtual_time
async def test_load_and_unload_of_one_name_at_once_leave_nothing_half_done():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        await pool.supervisor.load(order())
        pool.log.gate.clear()
        unloading = asyncio.create_task(pool.supervisor.unload("m"))
        await eventually(lambda: pool.supervisor._order.locked())
        loading = asyncio.create_task(pool.supervisor.load(order()))
        await asyncio.sleep(0.1)
        pool.log.gate.set()
        await asyncio.gather(unloading, loading)
        assert "m" in pool.state.models
        assert await pool.orders.load("m", order().spec.digest) is not None


@in_virtual_time
async def test_reporter_that_raises_disturbs_nothing():
    raised = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    async with opened() as pool:
        pool.supervisor._on_repair = lambda record, repair: 1 / 0
        await pool.until("b-0", Phase.READY, 0)
        pool.hosts["b-0"].crash()
        await pool.until("b-0", Phase.READY, 1)
        await eventually(lambda: bool(raised))
    assert isinstance(raised[0]["exception"], ZeroDivisionError)


@in_virtual_time
async def test_watch_answers_at_once_when_there_is_news_and_in_time_when_there_is_none():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        loop = asyncio.get_running_loop()
        table = await pool.supervisor.watch("client", -1, 0.0)
        begun = loop.time()
        same = await pool.supervisor.watch("client", table.version, 4.0)
        assert same.version == table.version
        assert loop.time() - begun == 4.0
        waiting = asyncio.create_task(pool.supervisor.watch("client", table.version, 30.0))
        await eventually(lambda: not waiting.done())
        pool.hosts["b-0"].crash()
        newer = await waiting
        assert newer.version > table.version
        assert loop.time() - begun == 4.0


@in_virtual_time
async def test_crash_storm_over_many_browsers_ends_in_order():
    names = [f"b-{n}" for n in range(20)]
    async with opened(*names) as pool:
        await pool.supervisor.load(order())
        for number, name in enumerate(names):
            if number % 2:
                pool.hosts[name].crash()
            elif number % 4:
                pool.hosts[name].die()
        for number, name in enumerate(names):
            await pool.loaded(name, epoch=1 if number % 4 else 0)
        assert list(pool.supervisor.faults) == []


# -- recovery by other rungs ----------------------------------------------------------------------


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
async def test_repair_on_request_says_what_came_of_it():
    async with opened() as pool:
        await pool.supervisor.load(order())
        seen = failure(Category.GPU_ERROR)
        repair = await pool.supervisor.repair("b-0", seen)
        assert (repair.outcome, repair.failure.category) == ("restarted", Category.GPU_ERROR)
        with pytest.raises(BadInput):
            await pool.supervisor.repair("nobody", seen)


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


# -- a log that cannot be written -----------------------------------------------------------------


@in_virtual_time
async def test_full_disk_refuses_orders_but_repairs_go_on_and_are_logged_later():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.log.full = True
        with pytest.raises(LogUnavailable):
            await pool.supervisor.load(order("n"))
        pool.hosts["b-0"].crash()
        await pool.loaded("b-0", epoch=1)
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert "disk is full" in table.log_trouble
        logged = len(pool.log.events)
        pool.log.full = False
        await pool.supervisor.load(order("n"))
        assert len(pool.log.events) > logged + 2
        assert (await pool.supervisor.watch("client", -1, 0.0)).log_trouble == ""


# -- the death of the supervisor ------------------------------------------------------------------


@in_virtual_time
async def test_new_supervisor_takes_over_what_lives():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        known = await pool.supervisor.watch("client", -1, 0.0)
        pool.die()
        await pool.resume()
        assert pool.state.term == 2
        table = await pool.supervisor.watch("client", known.version, 30.0)
        assert table.version > known.version, "a client must not take it for an older one"
        assert [route.status.models for route in table.routes] == [{"m": NUMERIC}] * 2
        assert table.models["m"] == order()
        assert [len(host.launches) for host in pool.hosts.all] == [1, 1]
        pool.hosts["b-0"].crash()  # and it goes on watching
        await pool.loaded("b-0", epoch=1)


@in_virtual_time
async def test_browser_that_died_while_nobody_watched_is_repaired():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.die()
        pool.hosts["b-0"].crash()
        await pool.resume()
        await pool.loaded("b-0", epoch=1)
        assert pool.state.repairs[0].failure.evidence["what"] == "browser_exited"


@in_virtual_time
async def test_worker_that_died_while_nobody_watched_is_replaced():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.die()
        pool.hosts["b-0"].die()
        await pool.resume()
        await pool.loaded("b-0", epoch=1)


@in_virtual_time
async def test_model_whose_order_is_lost_is_unloaded():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.die()
        await pool.orders.remove("m")
        await pool.resume()
        await eventually(lambda: pool.hosts["b-0"].models == {})
        assert pool.state.models == {}


@in_virtual_time
async def test_pool_that_was_closing_is_closed():
    async with opened("b-0", "b-1") as pool:
        await pool.until("b-0", Phase.READY, 0)
        closing = asyncio.create_task(pool.supervisor.close())
        await eventually(lambda: pool.state.closing)
        closing.cancel()
        pool.die()
        await pool.resume()
        await asyncio.sleep(30)
        assert pool.closed == 1
        assert all(host.killed for host in pool.hosts.all)


class Killed(Exception):
    """The supervisor's process ends at this event."""


@pytest.mark.parametrize("acknowledged", [True, False], ids=["logged", "not-logged"])
@pytest.mark.parametrize("fault", ["crash", "die", "drop_sockets", "no restart"])
def test_supervisor_killed_at_every_step_of_a_repair_finishes_or_repeats_it(fault, acknowledged):
    """Exhaustively: at each event, before or after it is on disk, until no step is left."""

    async def story(at_event: int) -> bool:
        pool = Pool(FakeHosts())
        await pool.supervisor.open({"chrome-0": CHROME, "chrome-1": CHROME})
        await pool.supervisor.load(order())
        base = len(pool.log.events)
        append, dead = pool.log.append, asyncio.Event()

        async def append_and_die(event: Event) -> None:
            if event.seq == base + at_event and not dead.is_set():
                if acknowledged:
                    await append(event)
                dead.set()
                raise Killed
            await append(event)

        pool.log.append = append_and_die  # type: ignore[method-assign]
        host = pool.hosts["chrome-0"]
        if fault == "no restart":
            host.fail_launch = {1, 2}
            host.crash()
        else:
            getattr(host, fault)()

        def repaired() -> bool:
            records = [r for r in pool.state.browsers.values() if r.phase is not Phase.STOPPED]
            serving = [r for r in records if r.phase is Phase.READY]
            return (
                len(serving) == 2
                and all(r.models == {"m": ModelPhase.LOADED} for r in serving)
                and all(r.repair is None for r in records)
                and len(pool.state.repairs) >= 1
            )

        async def kill_when_due() -> None:
            await dead.wait()
            pool.die()
            await pool.resume()

        killer = asyncio.create_task(kill_when_due())
        async with asyncio.timeout(300):
            while not repaired():  # noqa: ASYNC110  # whoever is asked may die meanwhile
                await asyncio.sleep(0.25)
        await asyncio.sleep(60)
        assert repaired()
        killer.cancel()
        serving = {r.id: r.epoch for r in pool.state.browsers.values() if r.phase is Phase.READY}
        living = {h.ref.browser_id: h.ref.epoch for h in pool.hosts.all if not h.killed}
        assert living.items() >= serving.items()
        assert set(living) == set(serving) | ({"chrome-0"} & set(living)), "nothing is left over"
        ready = [h for h in pool.hosts.all if h.readiness is Readiness.READY]
        assert {h.ref.browser_id for h in ready} == set(serving)
        assert reduce(apply, pool.log.events, PoolState()) == pool.state
        pool.die()
        return dead.is_set()

    reached = 0
    while in_virtual_time(story)(reached + 1):
        reached += 1
    assert reached >= 3


@in_virtual_time
async def test_worn_browser_is_drained_and_started_anew_with_its_models():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        config = dataclasses.replace(
            pool.config, resources=ResourceLimits(recycle_operations=5), care_seconds=1.0
        )
        pool.supervisor._config = config
        caring = asyncio.create_task(pool.supervisor._care_loop())
        pool.hosts["b-0"].worn = {"served": 9}
        await pool.loaded("b-0", epoch=1)
        caring.cancel()
        assert len(pool.hosts.made["b-0"]) == 2  # in a worker of its own
        assert pool.phase("b-1") == (Phase.READY, 0)
        assert pool.state.repairs == ()


@in_virtual_time
async def test_parked_model_is_loaded_again_when_somebody_asks():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.supervisor._config = dataclasses.replace(pool.config, care_seconds=1.0)
        caring = asyncio.create_task(pool.supervisor._care_loop())
        host = pool.hosts["b-0"]
        host.worn, host.available_bytes = {"models": {"m": 99.0}}, 1 << 28
        await pool.supervisor._until(lambda: "m" in pool.state.parked)
        caring.cancel()
        assert (await pool.supervisor.watch("client", -1, 0.0)).models.keys() == {"m"}
        host.available_bytes = 1 << 33
        big = dataclasses.replace(order().spec, load_peak_bytes=1 << 40)
        pool.supervisor._models["m"] = dataclasses.replace(order(), spec=big)
        with pytest.raises(SetupError, match="is not loaded"):
            await pool.supervisor.wake("m")
        pool.supervisor._models["m"] = order()
        await pool.supervisor.wake("m")
        assert pool.state.parked == {}
        await pool.loaded("b-0", epoch=0)


@in_virtual_time
async def test_load_that_memory_does_not_allow_is_refused_before_any_browser_is_touched():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        big = order()
        big = dataclasses.replace(big, spec=dataclasses.replace(big.spec, load_peak_bytes=1 << 40))
        with pytest.raises(SetupError, match="is not loaded"):
            await pool.supervisor.load(big)
        assert pool.hosts["b-0"].loads == []
        assert pool.state.models == {}
