"""The routing table."""

from actors.supervisor.models import Models
from actors.supervisor.orders import MemoryOrders
from actors.supervisor.tables import Tables
from recovery.control import BrowserFailed, BrowserUnwanted
from recovery.errors import BrowserLost
from recovery.failures import categorize_browser_failure
from recovery.kinds import Readiness
from recovery.records import HostRef
from tests.fakes import failure, in_virtual_time, order
from tests.supervised import Parts


def tables(parts: Parts) -> Tables:
    async def admit(order: object) -> None:
        """There is room."""

    models = Models(MemoryOrders(), parts.journal, parts.changes, parts.tasks, lambda: None, admit)
    return Tables(parts.hosts, parts.journal, models, parts.tasks, parts.changes, parts.term)


@in_virtual_time
async def test_who_serves_or_may_soon_again_is_routed_and_nobody_else():
    parts = Parts()
    await parts.open("starts", "serves", "away", "drains", "dies")
    for name in ("serves", "away", "drains", "dies"):
        await parts.serve(name)
    lost = {"what": "socket_closed", "ref": HostRef("away", 0)}
    await parts.happen(
        BrowserFailed("away", 0, categorize_browser_failure("out of touch", lost)),
        BrowserUnwanted("drains"),
        BrowserFailed("dies", 0, failure()),
    )
    table = tables(parts).table()
    assert {r.status.ref.browser_id: r.status.readiness for r in table.routes} == {
        "serves": Readiness.READY,
        "away": Readiness.STARTING,
        "drains": Readiness.DRAINING,
    }
    assert all(route.status.term == 1 for route in table.routes)


@in_virtual_time
async def test_browser_without_a_worker_has_no_route():
    parts = Parts()
    await parts.open("b-0")
    await parts.serve("b-0")
    parts.watches.let_go("b-0")
    assert tables(parts).table().routes == ()


@in_virtual_time
async def test_table_says_what_is_wrong():
    parts = Parts()
    await parts.open()
    parts.journal.lost("events 3 to 5 are lost")
    for number in range(10):
        parts.tasks.report(f"launch {number}", BrowserLost("gone"))
    table = tables(parts).table()
    assert table.log_trouble == "events 3 to 5 are lost"
    assert [fault.split(":")[0] for fault in table.faults] == [f"launch {n}" for n in range(2, 10)]
    assert table.version == parts.changes.version
    assert table.state is parts.journal.state


@in_virtual_time
async def test_table_has_every_model_and_does_not_change_with_it():
    parts = Parts()
    await parts.open()

    async def admit(order: object) -> None:
        """There is room."""

    models = Models(MemoryOrders(), parts.journal, parts.changes, parts.tasks, lambda: None, admit)
    ours = Tables(parts.hosts, parts.journal, models, parts.tasks, parts.changes, parts.term)
    await models.load(order())
    table = ours.table()
    await models.unload("m")
    assert table.models == {"m": order()}
    assert ours.table().models == {}
