import asyncio
import pickle
import threading
from dataclasses import replace
from functools import partial

import pytest
from pydantic import TypeAdapter

from recovery.breaker import (
    Abandoned,
    Asked,
    Change,
    CircuitOpenError,
    Failed,
    Permit,
    Repaired,
    Snapshot,
    Succeeded,
    Switched,
    Ticked,
)
from recovery.errors import (
    BadInput,
    BrowserError,
    BrowserLost,
    OperationFailed,
    PageError,
    PoolBusy,
)
from recovery.failures import Scope
from tests.circuits import (
    CLOSED,
    CRASH,
    DISABLED,
    EVERYTHING,
    HALF_OPEN,
    MILD,
    MODERATE,
    OPEN,
    SEVERE,
    TIMEOUT,
    Shell,
    answer_later,
    crash,
)
from tests.fakes import failure


@pytest.fixture
def shell() -> Shell:
    return Shell()


async def crash_later() -> None:
    await asyncio.sleep(0)
    raise BrowserLost("gone")


class AsyncCallable:
    async def __call__(self) -> int:
        return 42


def test_execute_calls_and_returns(shell):
    assert shell.execute(divmod, 7, 2) == (3, 1)
    assert shell.get_metrics()["successes"] == 1


@pytest.mark.parametrize(
    "fn",
    [answer_later, AsyncCallable(), partial(answer_later), lambda: answer_later()],
    ids=["function", "callable", "partial", "lambda"],
)
async def test_execute_awaits_whatever_is_async(shell, fn):
    assert await shell.execute(fn) == 42
    assert shell.get_metrics()["successes"] == 1


async def test_execute_of_an_async_function_asks_when_it_is_awaited(shell):
    call = shell.execute(answer_later)
    shell.trip()
    with pytest.raises(CircuitOpenError):
        await call


def test_errors_pass_through_execute_and_open_the_breaker(shell):
    for _ in range(3):
        with pytest.raises(BrowserLost, match="gone"):
            shell.execute(crash)
    with pytest.raises(CircuitOpenError):
        shell.execute(crash)
    assert (shell.get_metrics()["executions"], shell.get_metrics()["refused"]) == (3, 1)


@pytest.mark.parametrize("fn", [crash_later, lambda: crash_later()], ids=["function", "lambda"])
async def test_errors_pass_through_async_execute_and_open_the_breaker(shell, fn):
    for _ in range(3):
        with pytest.raises(BrowserLost, match="gone"):
            await shell.execute(fn)
    assert shell.state is OPEN


async def test_decorator_keeps_sync_sync_and_async_async(shell):
    @shell
    def add(a: int, b: int = 1) -> int:
        """Adds."""
        return a + b

    assert (add(1, b=2), add.__name__, add.__doc__) == (3, "add", "Adds.")
    assert await shell(answer_later)() == 42
    assert asyncio.iscoroutinefunction(shell(answer_later))
    assert shell.get_metrics()["successes"] == 2


async def test_guard_protects_a_block_sync_and_async(shell):
    with shell.guard():
        pass
    async with shell.guard():
        await asyncio.sleep(0)
    with pytest.raises(BrowserLost):
        async with shell.guard():
            crash()
    assert (shell.get_metrics()["successes"], shell.get_metrics()["failures"]) == (2, 1)


def test_manual_form_with_a_failure_that_a_retry_cured(shell):
    shell.success(shell.allow())
    mild = failure(TIMEOUT, severity=MILD)
    shell.failure(shell.allow(), mild, retried=True)
    metrics = shell.get_metrics()
    assert (metrics["failures"], metrics["recorded_failures"]) == (1, 0)


def test_failure_of_a_whole_node_affects_more_than_one_component(shell):
    wide = failure(TIMEOUT, severity=MODERATE, scope=Scope.NODE)
    shell.failure(shell.allow(), wide, retried=True)
    assert shell.breaker.failures == 1


@pytest.mark.parametrize(
    "error",
    [BadInput("yours"), PoolBusy("full"), asyncio.CancelledError(), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_are_not_its_fault_count_as_nothing_and_free_the_probe(shell, error):
    shell.trip()
    shell.clock.now += 10.0
    before = shell.get_metrics()["executions"]
    with pytest.raises(type(error)):
        shell.execute(crash, error)
    assert shell.state is HALF_OPEN
    assert shell.get_metrics()["executions"] == before
    assert shell.execute(int) == 0


def test_refusal_of_another_breaker_inside_is_no_failure_of_this_one(shell):
    inner = Shell()
    inner.trip()
    with pytest.raises(CircuitOpenError):
        shell.execute(inner.execute, int)
    assert shell.get_metrics()["executions"] == 0


def test_failed_operation_counts_as_the_failure_that_it_carries(shell):
    error = OperationFailed("no answer", failure=failure(TIMEOUT, severity=MODERATE))
    with pytest.raises(OperationFailed):
        shell.execute(crash, error)
    assert shell.breaker.category is TIMEOUT


def test_refusal_says_when_to_try_again_and_survives_pickling(shell):
    shell.trip()
    shell.clock.now += 4.0
    with pytest.raises(CircuitOpenError, match=r"of chrome-0 is open \(crash\).* in 6 s") as caught:
        shell.allow()
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, BrowserError)
    assert str(again) == str(caught.value)
    assert again.retry_after == 6.0
    assert again.fields == {"breaker": "chrome-0", "state": "open", "retry_after": 6.0}


def test_refusal_while_probed_and_while_forced_open(shell):
    shell.trip()
    shell.clock.now += 10.0
    shell.allow()
    shell.clock.now += 1.0
    with pytest.raises(CircuitOpenError, match=r"being probed.* in 29 s") as caught:
        shell.allow()
    assert caught.value.retry_after == 29.0
    shell.force_open()
    with pytest.raises(CircuitOpenError, match="forced open") as caught:
        shell.allow()
    assert caught.value.retry_after is None
    shell.disable()
    shell.success(shell.allow())
    shell.reset()
    assert shell.get_state() == "closed"


def test_changes_are_told_once_and_refusals_never(shell):
    shell.trip()
    for _ in range(5):
        with pytest.raises(CircuitOpenError):
            shell.allow()
    shell.clock.now += 10.0
    shell.execute(int)
    shell.execute(int)
    assert shell.told() == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]
    assert shell.changes[0] == Change("chrome-0", CLOSED, OPEN, 1, 1e9, 10.0, CRASH)
    assert shell.changes[2] == Change("chrome-0", HALF_OPEN, CLOSED, 3, 1e9)


def test_hanging_probe_is_told_as_one_change(shell):
    shell.trip()
    shell.clock.now += 10.0
    shell.allow()
    shell.clock.now += 30.0
    shell.tick()
    shell.tick()
    assert shell.told()[2:] == [(HALF_OPEN, OPEN)]


def test_breaker_that_may_not_open_asks_again_at_each_failure():
    answers = iter([False, False, True])
    shell = Shell(may_open=lambda: next(answers))
    for _ in range(4):
        shell.observe(failure())
    assert (shell.state, shell.breaker.ledger.held) == (CLOSED, 2)
    shell.observe(failure())
    assert shell.state is OPEN


def test_slow_success_that_may_not_open_it_is_held_too():
    shell = Shell(
        may_open=lambda: False,
        window_calls=2,
        minimum_calls=1,
        slow_call_rate_threshold=0.5,
        slow_call_seconds=1.0,
    )
    permit = shell.allow()
    shell.clock.now += 1.0
    shell.success(permit)
    assert (shell.state, shell.breaker.ledger.held) == (CLOSED, 1)


async def test_calls_that_overlap_hold_no_lock_and_each_reports_to_its_own_generation(shell):
    gate = asyncio.Event()

    async def wait_at_the_gate(fails: bool) -> None:
        await gate.wait()
        if fails:
            raise BrowserLost("gone")

    calls = [asyncio.ensure_future(shell.execute(wait_at_the_gate, n < 3)) for n in range(50)]
    await asyncio.sleep(0)
    assert shell.execute(int) == 0  # all 50 are inside, and nobody waits
    gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(result, BrowserLost) for result in results) == 3
    # The 47 answers after the third failure came too late to be counted.
    assert (shell.state, shell.breaker.calls.successes) == (OPEN, 1)


async def test_only_the_allowed_probes_of_many_tasks_go_through(shell):
    shell.trip()
    shell.clock.now += 10.0
    results = await asyncio.gather(
        *(shell.execute(answer_later) for _ in range(20)), return_exceptions=True
    )
    assert results.count(42) == 1
    assert sum(isinstance(result, CircuitOpenError) for result in results) == 19


async def test_cancelled_probe_frees_its_place(shell):
    shell.trip()
    shell.clock.now += 10.0
    probe = asyncio.ensure_future(shell.execute(asyncio.Event().wait))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert await shell.execute(answer_later) == 42


def test_threads_that_share_a_breaker_lose_no_count_with_a_lock():
    shell = Shell(lock=threading.Lock())

    def work() -> None:
        for _ in range(500):
            shell.execute(int)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shell.get_metrics()["successes"] == 4000


def test_repr_tells_state_and_counts(shell):
    shell.execute(int)
    assert repr(shell) == "<CircuitBreaker chrome-0 [closed | 1 succeeded, 0 failed, 0 refused]>"


# -- moving house ----------------------------------------------------------------------------------


def moved(shell: Shell, now: float, away: float = 0.0) -> Shell:
    """The breaker of the next epoch, in a process whose clock shows `now`."""
    snapshot = pickle.loads(pickle.dumps(shell.snapshot()))
    again = Shell()
    again.clock.now = now
    again.restore(replace(snapshot, at=snapshot.at - away))
    return again


def test_replaced_browsers_breaker_goes_on_where_it_was(shell):
    shell.execute(int)
    shell.trip()
    shell.clock.now += 4.0
    again = moved(shell, now=7.0, away=1.0)
    with pytest.raises(CircuitOpenError) as caught:
        again.allow()
    assert caught.value.retry_after == pytest.approx(5.0)
    again.clock.now += 5.001
    again.execute(int)
    again.execute(int)
    assert again.state is CLOSED
    assert again.get_metrics()["avg_downtime_seconds"] == pytest.approx(10.001)
    assert again.get_metrics()["executions"] == 6


def test_two_failures_before_the_move_and_one_after_open_it(shell):
    shell.observe(failure())
    shell.observe(failure())
    again = moved(shell, now=0.0)
    again.observe(failure())
    assert again.state is OPEN


def test_call_admitted_before_the_move_is_late_after_it(shell):
    permit = shell.allow()
    again = moved(shell, now=100.0)
    again.success(permit)
    assert again.get_metrics()["executions"] == 0
    assert again.changes == []


def test_probe_under_way_is_let_go_by_the_move(shell):
    shell.trip()
    shell.clock.now += 10.0
    probe = shell.allow()
    again = moved(shell, now=50.0)
    assert again.state is HALF_OPEN
    again.success(probe)
    again.success(again.allow())
    assert again.state is HALF_OPEN  # the old probe did not count
    again.success(again.allow())
    assert again.state is CLOSED


def test_wall_clock_that_was_set_back_does_not_lengthen_the_outage(shell):
    shell.trip()
    with pytest.raises(CircuitOpenError) as caught:
        moved(shell, now=3.0, away=-3600.0).allow()
    assert caught.value.retry_after == pytest.approx(10.0)


def test_window_by_time_moves_along():
    shell = Shell(window_seconds=10.0, failure_rate_threshold=0.5)
    for _ in range(5):
        shell.execute(int)
        shell.clock.now += 1.0
    snapshot = shell.snapshot()
    again = Shell(window_seconds=10.0, failure_rate_threshold=0.5)
    again.clock.now = 1e6
    again.restore(snapshot)
    again.execute(int)
    assert again.breaker.calls.window.calls == 6
    again.clock.now += 11.0
    again.execute(int)
    assert again.breaker.calls.window.calls == 1


def test_snapshot_crosses_json(shell):
    for _ in range(200):
        shell.execute(int)
        with pytest.raises(PageError):
            shell.execute(crash, PageError("no"))
    shell.trip()
    shell.clock.now += 10.0
    shell.execute(int)
    adapter = TypeAdapter(Snapshot)
    snapshot = shell.snapshot()
    assert adapter.validate_json(adapter.dump_json(snapshot)) == snapshot


def test_everything_that_crosses_processes_pickles(shell):
    shell.trip()
    things = [
        EVERYTHING,
        shell.breaker,
        shell.snapshot(),
        *shell.changes,
        Asked(1.0),
        Succeeded(1.0, Permit(0, 0, 0.0)),
        Failed(1.0, None, CRASH, SEVERE),
        Abandoned(1.0, Permit(0, 0, 0.0)),
        Ticked(1.0),
        Repaired(1.0, "restart"),
        Switched(1.0, DISABLED),
    ]
    assert pickle.loads(pickle.dumps(things)) == things
    assert pickle.loads(pickle.dumps(EVERYTHING)).window_mask == EVERYTHING.window_mask
