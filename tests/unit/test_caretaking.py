"""What the caretaker makes of what hosts report."""

import pytest

from recovery.control import (
    BrowserRecord,
    BrowserRecycled,
    BrowserUnwanted,
    BrowserWanted,
    ModelParked,
    Phase,
    PoolState,
)
from recovery.kinds import BrowserType
from recovery.maintenance import Caretaker, free_names
from recovery.resources import BrowserLoad, NodeLoad, ResourceLimits
from recovery.scaling import ScalingLimits

CHROME = BrowserType.CHROME
ROOMY = (NodeLoad("n", 100, 80),)
SHORT = (NodeLoad("n", 100, 5),)
SCALING = {CHROME: ScalingLimits(1, 3, up_seconds=2.0, down_seconds=10.0, settle_seconds=5.0)}


def pool(count: int = 2, **phases: Phase) -> PoolState:
    records = [
        BrowserRecord(f"chrome-{n}", CHROME, 0, phases.get(f"b{n}", Phase.READY), float(n))
        for n in range(count)
    ]
    return PoolState(browsers={r.id: r for r in records}, models={"m": "d"})


def load(number: int, *, queue: int = 0, idle: float = 0.0, served: int = 0) -> BrowserLoad:
    return BrowserLoad(
        f"chrome-{number}", 0, "n", 60.0, served, 1 << 30, queue, idle, True, {"m": idle}
    )


def test_nothing_is_done_while_all_is_well():
    caretaker = Caretaker(ResourceLimits(), {})
    assert caretaker.look(pool(), [load(0), load(1)], ROOMY, 0.0) == ()


def test_idle_model_is_parked_when_memory_is_short():
    caretaker = Caretaker(ResourceLimits(), {})
    (event,) = caretaker.look(pool(), [load(0, idle=99), load(1, idle=50)], SHORT, 0.0)
    assert isinstance(event, ModelParked)
    assert event.model == "m"


def test_worn_browser_is_recycled_one_at_a_time():
    caretaker = Caretaker(ResourceLimits(recycle_operations=10), {})
    worn = [load(0, served=50), load(1, served=20)]
    (event,) = caretaker.look(pool(), worn, ROOMY, 0.0)
    assert isinstance(event, BrowserRecycled)
    assert event.browser_id == "chrome-0"
    assert caretaker.look(pool(b0=Phase.STARTING), worn[1:], ROOMY, 1.0) == ()


def test_busy_browser_is_not_recycled():
    caretaker = Caretaker(ResourceLimits(recycle_operations=10), {})
    assert caretaker.look(pool(1), [load(0, served=50, queue=1)], ROOMY, 0.0) == ()


def test_pool_grows_under_a_lasting_queue_and_shrinks_when_it_is_idle():
    caretaker = Caretaker(ResourceLimits(), SCALING)
    state, now, seen = pool(1), 0.0, []
    for _ in range(8):
        seen += caretaker.look(state, [load(0, queue=9)], ROOMY, now)
        now += 0.5
    assert seen == [BrowserWanted("chrome-1", CHROME)]
    assert "operations" in caretaker.why or caretaker.why
    state, seen = pool(2), []
    for _ in range(60):
        seen += caretaker.look(state, [load(0), load(1)], ROOMY, now)
        now += 0.5
    assert seen[0] == BrowserUnwanted("chrome-1")  # the one that came last


def test_pool_below_its_least_is_filled_at_once():
    caretaker = Caretaker(ResourceLimits(), {CHROME: ScalingLimits(3, 3)})
    events = caretaker.look(pool(1), [load(0)], ROOMY, 0.0)
    assert events == (BrowserWanted("chrome-1", CHROME), BrowserWanted("chrome-2", CHROME))


def test_pool_that_closes_is_left_alone():
    caretaker = Caretaker(ResourceLimits(), {CHROME: ScalingLimits(3, 3)})
    state = PoolState(browsers=pool(1).browsers, closing=True)
    assert caretaker.look(state, [load(0)], ROOMY, 0.0) == ()


@pytest.mark.parametrize(("count", "names"), [(1, ["chrome-2"]), (2, ["chrome-2", "chrome-3"])])
def test_names_of_the_living_are_not_given_again(count, names):
    assert free_names(pool(2), CHROME, count) == names
    gone = pool(2, b0=Phase.STOPPED)
    assert free_names(gone, CHROME, 1) == ["chrome-0"]


def test_browser_that_was_given_up_is_not_started_over_and_over():
    caretaker = Caretaker(ResourceLimits(), {CHROME: ScalingLimits(2, 3)})
    state = pool(2, b1=Phase.GIVEN_UP)
    for n in range(50):
        assert caretaker.look(state, [load(0)], ROOMY, float(n)) == ()
    assert free_names(state, CHROME, 1) == ["chrome-2"]


def test_kind_that_is_not_installed_is_left_alone():
    caretaker = Caretaker(ResourceLimits(), {CHROME: ScalingLimits(2, 3)})
    state = PoolState(browsers=pool(1).browsers, missing=(CHROME,))
    assert caretaker.look(state, [load(0)], ROOMY, 0.0) == ()
