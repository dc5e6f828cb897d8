import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

from actors.dataplane import DataServer
from actors.messages import RunReply, RunRequest
from actors.supervisor.records import Route, Table
from pool.routing import Routing
from recovery.control import PoolState
from recovery.errors import BrowserLost, PoolClosed
from recovery.kinds import BrowserType, Readiness
from recovery.records import HostRef, HostStatus
from tests.fakes import NUMERIC, FakeHost, eventually, order, until

X = {"x": np.zeros(3, np.float32)}
HERE = "node-1"


class FakeTables:
    """A table source that a test feeds."""

    def __init__(self) -> None:
        self._tables: asyncio.Queue[Table | PoolClosed] = asyncio.Queue()
        self.asked: list[tuple[str, int]] = []
        self._version = 0

    def put(self, *routes: Route, models=None) -> None:
        self._version += 1
        self._tables.put_nowait(Table(self._version, PoolState(), routes, models or {}))

    def close(self) -> None:
        self._tables.put_nowait(PoolClosed("the pool is closing"))

    async def watch(self, client: str, version: int, seconds: float) -> Table:
        self.asked.append((client, version))
        table = await self._tables.get()
        if isinstance(table, PoolClosed):
            raise table
        return table


def route(host: FakeHost, *, node: str = "", address: str = "", token: str = "") -> Route:
    """The supervisor's view of a host: it knows nothing of its queue."""
    ref = HostRef(host.ref.browser_id, host.ref.epoch, node, address)
    status = HostStatus(
        ref, BrowserType.CHROME, Readiness.READY, queue_max=1, models={"m": NUMERIC}
    )
    return Route(status, host, token)


def serving_host(browser_id: str = "a", epoch: int = 0) -> FakeHost:
    """A host that is ready and has model m."""
    host = FakeHost(browser_id)
    host.ref, host.readiness = HostRef(browser_id, epoch), Readiness.READY
    host.models = {"m": NUMERIC}
    host._browser_over = asyncio.get_running_loop().create_future()
    return host


@contextlib.asynccontextmanager
async def routed(*routes: Route) -> AsyncIterator[tuple[Routing, FakeTables]]:
    tables = FakeTables()
    tables.put(*routes)
    routing = Routing(tables, "client", 1.0, HERE, 1 << 20)
    await routing.start()
    yield routing, tables
    await routing.stop()


def request(ref: HostRef, op_id: str = "op", seconds: float = 10.0) -> RunRequest:
    return RunRequest(op_id, ref, "m", seconds)


async def table_taken(routing: Routing, version: int) -> None:
    await routing.until(lambda table: table.version >= version, 5.0)


async def test_first_table_is_there_when_it_has_started():
    host = serving_host()
    async with routed(route(host)) as (routing, tables):
        assert [status.ref for status in routing.candidates()] == [host.ref]
        await eventually(lambda: tables.asked == [("client", -1), ("client", 1)])


async def test_every_reply_refines_what_is_known_of_its_host():
    host = serving_host()
    async with routed(route(host)) as (routing, _):
        reply = await routing.run(host.ref, request(host.ref), X)
        await routing.learn(reply.status)
        (known,) = routing.candidates()
        assert (known.queue_max, known.served) == (host.queue_max, 1)


async def test_own_word_of_a_host_on_its_bound_outlives_the_next_table():
    host = serving_host()
    async with routed(route(host)) as (routing, tables):
        await routing.learn(host.status())
        tables.put(route(host))
        await table_taken(routing, 2)
        assert routing.candidates()[0].queue_max == host.queue_max


async def test_operations_under_way_count_as_queued():
    host = serving_host()
    host.run_gate.clear()
    async with routed(route(host)) as (routing, _):
        tasks = [
            asyncio.create_task(routing.run(host.ref, request(host.ref, f"op{n}"), X))
            for n in range(3)
        ]
        await eventually(lambda: len(host.in_flight) == 3)
        assert routing.candidates()[0].queue == 3
        host.run_gate.set()
        await asyncio.gather(*tasks)
        assert routing.candidates()[0].queue == 0


async def test_distrusted_host_is_not_a_candidate_that_can_take_anything():
    host = serving_host()
    async with routed(route(host)) as (routing, _):
        await routing.exclude(host.ref)
        assert not routing.candidates()[0].can_take("m")
        await routing.exclude(HostRef("unknown", 7))  # no error


async def test_host_that_left_the_table_is_dropped_and_its_successor_taken_in():
    old, new = serving_host("a", 0), serving_host("a", 1)
    async with routed(route(old)) as (routing, tables):
        tables.put(route(new))
        await table_taken(routing, 2)
        assert [status.ref for status in routing.candidates()] == [new.ref]
        assert await routing.run(old.ref, request(old.ref), X) is None


async def test_news_of_a_host_that_is_not_in_the_table_is_ignored():
    host = serving_host()
    async with routed(route(host)) as (routing, _):
        await routing.learn(serving_host("stranger").status())
        assert [status.ref for status in routing.candidates()] == [host.ref]


async def test_table_that_is_no_newer_changes_nothing():
    host = serving_host()
    async with routed(route(host)) as (routing, _):
        await routing.exclude(host.ref)
        await routing._take(Table(1, PoolState(), (route(host),)))
        assert routing.candidates()[0].readiness is Readiness.DEAD


async def test_models_of_the_pool_are_known():
    async with routed() as (routing, tables):
        tables.put(models={"m": order("m")})
        await table_taken(routing, 2)
        assert routing.models() == {"m": order()}


async def test_pool_that_closed_is_gone_and_wakes_whoever_waits():
    async with routed() as (routing, tables):
        changed = asyncio.create_task(routing.change(60.0))
        waiting = asyncio.create_task(routing.until(lambda _: False, 60.0))
        await asyncio.sleep(0)
        tables.close()
        await changed
        with pytest.raises(PoolClosed, match="closing"):
            await waiting
        assert isinstance(routing.gone, PoolClosed)


async def test_waiting_for_a_change_ends_with_a_new_table_or_a_reply():
    host = serving_host()
    async with routed(route(host)) as (routing, tables):
        for news in (lambda: tables.put(route(host)), None):
            changed = asyncio.create_task(routing.change(60.0))
            await asyncio.sleep(0)
            if news is None:
                await routing.learn(host.status())
            else:
                news()
            await changed


async def test_waiting_for_a_change_ends_in_time():
    async with routed() as (routing, _):
        await routing.change(0.01)
        await routing.change(-1.0)
        with pytest.raises(TimeoutError):
            await routing.until(lambda _: False, 0.01)


# -- over the data plane ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def worker(host: FakeHost) -> AsyncIterator[tuple[DataServer, Route]]:
    """A host with a data plane on this node."""
    server = DataServer(host.run, 1 << 20)
    await server.start()
    yield server, route(host, node=HERE, address=server.address, token=server.token)
    await server.stop()


async def test_host_on_this_node_is_asked_over_its_data_plane_again_and_again():
    host = serving_host()
    calls = 0

    async def run(request, tensors) -> RunReply:
        nonlocal calls
        calls += 1
        return await FakeHost.run(host, request, tensors)

    async with worker(host) as (server, at):
        server._run = run
        host.run = None  # the way by Ray
        async with routed(at) as (routing, _):
            for number in range(3):
                (status,) = routing.candidates()
                reply = await routing.run(status.ref, request(status.ref, f"op{number}"), X)
                np.testing.assert_array_equal(reply.outputs["x"], X["x"] + 1)
                await routing.learn(reply.status)
    assert calls == 3


async def test_host_on_another_node_is_asked_by_ray():
    host = serving_host()
    async with routed(route(host, node="node-2", address="127.0.0.1:1", token="t")) as (routing, _):
        (status,) = routing.candidates()
        assert (await routing.run(status.ref, request(status.ref), X)).answered


async def test_operations_that_begin_together_share_one_connection():
    host = serving_host()
    host.queue_max = 50
    async with worker(host) as (server, at), routed(at) as (routing, _):
        (status,) = routing.candidates()
        replies = await asyncio.gather(
            *(routing.run(status.ref, request(status.ref, f"op{n}"), X) for n in range(20))
        )
        assert all(reply.answered for reply in replies)
        assert len(server._writers) == 1


async def test_death_of_a_worker_is_told_to_its_operations_at_once():
    host = serving_host()
    host.run_gate.clear()
    async with worker(host) as (server, at), routed(at) as (routing, _):
        (status,) = routing.candidates()
        asked = asyncio.create_task(routing.run(status.ref, request(status.ref), X))
        await until(lambda: host.in_flight != [])
        await server.stop()
        with pytest.raises(BrowserLost):
            await asked
        with pytest.raises(BrowserLost):
            await routing.run(status.ref, request(status.ref), X)
        assert routing.candidates()[0].queue == 0


async def test_link_is_let_go_when_its_host_left_the_table():
    host = serving_host()
    async with worker(host) as (_, at), routed(at) as (routing, tables):
        (status,) = routing.candidates()
        await routing.run(status.ref, request(status.ref), X)
        assert routing._links.open_now().keys() == routing._tokens.keys() == {status.ref.address}
        tables.put()
        await table_taken(routing, 2)
        assert routing._links.open_now() == routing._tokens == {}


async def test_who_has_left_asks_nobody_any_more():
    host = serving_host()
    async with worker(host) as (_, at), routed(at) as (routing, _):
        (status,) = routing.candidates()
        await routing.stop()
        assert await routing.run(status.ref, request(status.ref), X) is None
    assert host.runs == 0


async def test_long_order_ends_when_the_supervisor_is_given_up():
    async with routed() as (routing, tables):
        never = asyncio.create_task(routing.unless_gone(asyncio.Event().wait()))
        await asyncio.sleep(0)
        tables.close()
        with pytest.raises(PoolClosed, match="closing"):
            await never


async def test_long_order_comes_to_what_it_comes_to():
    async with routed() as (routing, _):
        assert await routing.unless_gone(asyncio.sleep(0, "done")) == "done"
        with pytest.raises(ZeroDivisionError):
            await routing.unless_gone(_fails())


async def _fails() -> None:
    raise ZeroDivisionError
