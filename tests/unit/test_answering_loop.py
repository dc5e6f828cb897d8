"""The answering loop of `pool.execution.answering`, over a real supervisor and routing, on fake
hosts.
"""

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from actors.messages import RunReply
from actors.supervisor.records import SupervisorConfig
from actors.supervisor.supervisor import Supervisor
from pool.execution.answering import Answering, Question, Rules
from pool.results import Result
from pool.routing import Routing
from recovery.errors import OperationFailed, PageError, PoolBusy, PoolClosed
from recovery.failures import Category
from recovery.kinds import Backend, BrowserType, Level
from recovery.plan import STRATEGIES
from recovery.records import HostRef
from recovery.supervision import RestartLimit
from tests.fakes import FakeHosts, eventually, host_status, order, until

X = {"x": np.arange(3, dtype=np.float32)}
LIMIT = RestartLimit(restarts_max=1000)
THREE = ("b-0", "b-1", "b-2")


class Pool:
    def __init__(self, hosts: FakeHosts, supervisor: Supervisor, routing: Routing) -> None:
        self.hosts = hosts
        self.supervisor = supervisor
        self.routing = routing
        self.wrong: list[HostRef] = []
        self.audits: list[asyncio.Task[None]] = []

    async def ask(
        self,
        op_id: str = "op",
        seconds: float = 30.0,
        level: Level = Level.MEDIUM,
        simulate: Any = None,
        **rules: Any,
    ) -> Result:
        answering = Answering(
            Question(op_id, "m", "inference", level),
            Rules(**rules),
            self.routing,
            random.Random(op_id),
            on_wrong=lambda ref, failure: self.wrong.append(ref),
            on_audit=self.audits.append,
            simulate=simulate,
        )
        result, reply = await answering.run(X, seconds)
        if result.success:
            assert reply is not None
            np.testing.assert_array_equal(reply.outputs["x"], X["x"] + 1)
        return result

    async def in_flight(self, browser_id: str, count: int) -> None:
        await eventually(lambda: len(self.hosts[browser_id].in_flight) == count)


@contextlib.asynccontextmanager
async def serving(*browsers: str, hosts: FakeHosts | None = None) -> AsyncIterator[Pool]:
    """A pool of these browsers, each ready and with model m loaded."""
    hosts = hosts or FakeHosts()
    config = SupervisorConfig(
        "p", Level.MEDIUM, STRATEGIES["progressive"], LIMIT, 60.0, True, creator="client"
    )
    supervisor = Supervisor(config, hosts, lambda: None)
    await supervisor.open(dict.fromkeys(browsers, BrowserType.CHROME))
    await supervisor.load(order())
    routing = Routing(supervisor, "client", 1.0, "node", 1 << 20)
    await routing.start()
    try:
        yield Pool(hosts, supervisor, routing)
    finally:
        await routing.stop()
        await supervisor.close()


async def test_answer_on_the_first_attempt_tells_where_it_is_from():
    async with serving("b-0") as pool:
        result = await pool.ask()
        assert result.success
        assert not result.recovered
        assert (result.browser_id, result.epoch, result.backend) == ("b-0", 0, Backend.WASM)
        assert result.recovery == ()
        assert result.metrics["attempts"] == 1


async def test_browser_that_crashes_mid_operation_is_answered_for_by_the_other():
    async with serving("b-0", "b-1") as pool:
        for host in pool.hosts.all:
            host.run_gate.clear()
        asked = asyncio.create_task(pool.ask())
        await eventually(lambda: any(host.in_flight for host in pool.hosts.all))
        (unlucky,) = [host for host in pool.hosts.all if host.in_flight]
        unlucky.launch_gate.clear()  # it takes its time to come back
        unlucky.crash()
        for host in pool.hosts.all:
            host.run_gate.set()
        result = await asked
        assert result.recovered
        assert result.browser_id != unlucky.ref.browser_id
        assert [step.what for step in result.recovery] == ["failed", "resubmitted"]
        assert result.recovery[0].failure == result.original_error
        assert result.original_error.category is Category.CRASH
        assert pool.hosts.answers() == {"op": 1}
        unlucky.launch_gate.set()


async def test_when_the_only_browser_dies_its_next_epoch_answers():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"crash_on_run": {0}}])) as pool:
        result = await pool.ask()
        assert result.recovered
        assert (result.browser_id, result.epoch) == ("b-0", 1)
        assert [step.what for step in result.recovery] == ["failed", "waited", "resubmitted"]
        assert all(step.seconds >= 0 for step in result.recovery)


async def test_worker_that_is_killed_mid_operation_is_replaced_and_answers():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"die_on_run": {0}}])) as pool:
        result = await pool.ask()
        assert result.recovered
        assert result.epoch == 1
        assert result.original_error.evidence["what"] == "worker_exited"
        assert len(pool.hosts.made["b-0"]) == 2


async def test_browser_that_keeps_crashing_ends_the_operation_after_its_attempts():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"crash_on_run": range(10)}])) as pool:
        result = await pool.ask(attempts_max=2)
        assert not result.success
        assert not result.recovered
        assert result.metrics["attempts"] == 2
        assert "2 attempts failed" in result.error
        with pytest.raises(OperationFailed, match="inference on m failed") as caught:
            _ = result.outputs
        assert caught.value.failure == result.original_error


async def test_level_none_fails_at_the_first_crash():
    hosts = FakeHosts(b_0=[{"crash_on_run": {0}}], b_1=[{"crash_on_run": {0}}])
    async with serving("b-0", "b-1", hosts=hosts) as pool:
        result = await pool.ask(level=Level.NONE)
        assert not result.success
        assert result.metrics["attempts"] == 1
        assert result.level_effective is Level.NONE


async def test_error_that_both_browsers_report_is_not_tried_a_third_time():
    wrong = [{"error_on_run": range(10)}]
    names = ("b-0", "b-1", "b-2")
    async with serving(*names, hosts=FakeHosts(b_0=wrong, b_1=wrong, b_2=wrong)) as pool:
        result = await pool.ask()
        assert not result.success
        assert result.original_error.category is Category.API_ERROR
        assert sum(host.runs for host in pool.hosts.all) == 2
        assert all(host.ref.epoch == 0 for host in pool.hosts.all)  # no browser was harmed


async def test_error_of_the_only_browser_does_not_wait_for_the_deadline():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"error_on_run": range(10)}])) as pool:
        async with asyncio.timeout(5):
            result = await pool.ask(seconds=600)
        assert not result.success
        assert pool.hosts["b-0"].runs == 2


async def test_deadline_ends_the_operation_and_says_so():
    async with serving("b-0") as pool:
        pool.hosts["b-0"].run_gate.clear()
        result = await pool.ask(seconds=0.05)
        assert not result.success
        assert result.original_error.category is Category.TIMEOUT
        with pytest.raises(OperationFailed):
            _ = result.outputs


async def test_deadline_ends_the_wait_for_a_browser():
    async with serving("b-0") as pool:
        await pool.supervisor.unload("m")
        await pool.routing.until(lambda table: not table.models, 5.0)
        result = await pool.ask(seconds=0.05)
        assert not result.success
        assert "deadline" in result.error or "no browser" in result.error


async def test_deadline_holds_even_if_a_worker_never_answers():
    async with serving("b-0", "b-1") as pool:
        never = asyncio.Event()

        async def hang(*_):
            await never.wait()

        for host in pool.hosts.all:
            host.run = hang
        async with asyncio.timeout(1):
            result = await pool.ask(seconds=0.05)
        assert not result.success


async def test_full_queues_are_waited_for():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"queue_max": 2}])) as pool:
        host = pool.hosts["b-0"]
        host.run_gate.clear()
        asked = [asyncio.create_task(pool.ask(f"op{n}")) for n in range(10)]
        await eventually(lambda: bool(host.in_flight))
        for _ in range(50):
            assert len(host.in_flight) <= 2
            await asyncio.sleep(0)
        host.run_gate.set()
        results = await asyncio.gather(*asked)
        assert all(result.success and not result.recovered for result in results)
        assert pool.hosts.answers() == {f"op{n}": 1 for n in range(10)}


async def test_full_queues_are_refused_if_the_caller_wants_that():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"queue_max": 1}])) as pool:
        pool.hosts["b-0"].run_gate.clear()
        first = asyncio.create_task(pool.ask("first", wait_when_full=False))
        await pool.in_flight("b-0", 1)
        with pytest.raises(PoolBusy, match="queue limit"):
            await pool.ask("second", wait_when_full=False)
        pool.hosts["b-0"].run_gate.set()
        assert (await first).success
        assert (await pool.ask("third", wait_when_full=False)).success


async def test_host_that_another_client_filled_is_asked_again_when_it_is_free():
    """Nobody tells this client that the other's operations are done."""
    async with serving("b-0", hosts=FakeHosts(b_0=[{"queue_max": 1}])) as pool:
        host = pool.hosts["b-0"]
        host.in_flight.append("somebody else's")
        asked = asyncio.create_task(pool.ask(seconds=5.0))
        await eventually(lambda: bool(pool.routing.candidates()[0].full))
        for _ in range(20):
            await asyncio.sleep(0)
        host.in_flight.remove("somebody else's")
        assert (await asked).success


async def test_caller_who_gives_up_makes_room_for_who_waits():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"queue_max": 1}])) as pool:
        host = pool.hosts["b-0"]
        host.run_gate.clear()
        first = asyncio.create_task(pool.ask("first"))
        await pool.in_flight("b-0", 1)
        second = asyncio.create_task(pool.ask("second"))
        for _ in range(20):
            await asyncio.sleep(0)
        first.cancel()
        await eventually(lambda: host.in_flight == ["second"])
        host.run_gate.set()
        assert (await second).success


async def test_pool_that_closes_ends_what_waits():
    async with serving("b-0") as pool:
        await pool.supervisor.unload("m")
        await pool.routing.until(lambda table: not table.models, 5.0)
        asked = asyncio.create_task(pool.ask())
        await asyncio.sleep(0)
        pool.routing.gone = PoolClosed("the pool is closed")
        await pool.routing.announce()
        result = await asked
        assert not result.success
        assert "closed" in result.error


# What each level promises. "wrong": an answer, and nobody sees that it is wrong.
PROMISES = {
    "drop": ("fails", "survives", "survives", "survives", "survives"),
    "crash": ("fails", "fails", "survives", "survives", "survives"),
    "death": ("fails", "fails", "survives", "survives", "survives"),
    "hang": ("fails", "fails", "fails", "survives", "survives"),
    "lie": ("wrong", "wrong", "wrong", "wrong", "survives"),
}


@pytest.mark.parametrize("fault", PROMISES)
@pytest.mark.parametrize("level", list(Level))
async def test_level_keeps_its_promise_and_says_so_where_it_promises_nothing(level, fault):
    browsers = THREE[: {Level.HIGH: 2, Level.CRITICAL: 3}.get(level, 1)]
    promised = PROMISES[fault][list(Level).index(level)]
    script = {"crash": "crash_on_run", "death": "die_on_run", "lie": "lie_on_run"}.get(fault)
    hosts = FakeHosts(b_0=[{script: {0}} if script else {}])
    async with serving(*browsers, hosts=hosts) as pool:
        struck = pool.hosts["b-0"]
        if fault == "hang":
            struck.run_gate.clear()
        if fault == "drop":
            struck.in_touch.clear()
            answer = struck.run

            async def drop_once(*call: Any) -> Any:
                reply = await answer(*call)
                struck.in_touch.set()
                return reply

            struck.run = drop_once
        answering = Answering(
            Question("op", "m", "inference", level),
            Rules(late_seconds=0.02),
            pool.routing,
            random.Random(level == Level.HIGH),  # a draw that asks b-0 first
        )
        result, reply = await answering.run(X, 0.5)
        right = reply is not None and np.array_equal(reply.outputs["x"], X["x"] + 1)
        outcome = "fails" if not result.success else "survives" if right else "wrong"
        assert outcome == promised, result
        if outcome == "fails":
            assert result.error
            assert result.original_error is not None
            with pytest.raises(OperationFailed):
                _ = result.outputs
        struck.run_gate.set()


async def test_late_answer_at_high_is_not_waited_for():
    async with serving("b-0", "b-1") as pool:
        for host in pool.hosts.all:
            host.run_gate.clear()
        asked = asyncio.create_task(pool.ask(level=Level.HIGH, late_seconds=0.01))
        await eventually(lambda: any(host.in_flight for host in pool.hosts.all))
        (slow,) = [host for host in pool.hosts.all if host.in_flight]
        (other,) = [host for host in pool.hosts.all if host is not slow]
        other.run_gate.set()
        result = await asked
        assert result.success
        assert result.browser_id == other.ref.browser_id
        assert [step.what for step in result.recovery] == ["hedged", "resubmitted"]
        assert result.level_effective is Level.HIGH
        assert slow.in_flight  # until it ends it counts as busy, and others are asked first
        for number in range(5):
            result = await pool.ask(f"next{number}", level=Level.HIGH)
            assert result.browser_id == other.ref.browser_id
            assert result.level_effective is Level.HIGH
        slow.run_gate.set()
        await asyncio.gather(*pool.audits)


async def test_first_browser_may_still_win_and_neither_is_held_against_it():
    async with serving("b-0", "b-1") as pool:
        for host in pool.hosts.all:
            host.run_gate.clear()
        asked = asyncio.create_task(pool.ask(level=Level.HIGH, late_seconds=0.01))
        await eventually(lambda: any(host.in_flight for host in pool.hosts.all))
        (first,) = [host for host in pool.hosts.all if host.in_flight]
        await until(lambda: all(host.in_flight for host in pool.hosts.all))
        first.run_gate.set()
        assert (await asked).browser_id == first.ref.browser_id
        for host in pool.hosts.all:
            host.run_gate.set()
        await asyncio.gather(*pool.audits)
        assert (await pool.ask("next", level=Level.HIGH)).level_effective is Level.HIGH


async def test_late_answer_at_medium_is_waited_for():
    async with serving("b-0", "b-1") as pool:
        for host in pool.hosts.all:
            host.run_gate.clear()
        asked = asyncio.create_task(pool.ask(level=Level.MEDIUM, late_seconds=0.01))
        await eventually(lambda: any(host.in_flight for host in pool.hosts.all))
        await asyncio.sleep(0.05)
        assert sum(len(host.in_flight) for host in pool.hosts.all) == 1
        for host in pool.hosts.all:
            host.run_gate.set()
        assert (await asked).recovery == ()


@pytest.mark.parametrize(
    ("level", "browsers", "effective"),
    [
        (Level.HIGH, 1, Level.MEDIUM),
        (Level.HIGH, 2, Level.HIGH),
        (Level.CRITICAL, 1, Level.MEDIUM),
        (Level.CRITICAL, 2, Level.HIGH),
        (Level.CRITICAL, 3, Level.CRITICAL),
    ],
)
async def test_result_says_which_level_was_held(level, browsers, effective):
    async with serving(*THREE[:browsers]) as pool:
        result = await pool.ask(level=level, strict=False)
        assert result.success
        assert result.level_effective is effective


async def test_critical_asks_three_and_believes_the_first_two():
    async with serving(*THREE) as pool:
        pool.hosts["b-2"].run_gate.clear()  # it hangs, and holds nobody up
        result = await pool.ask(level=Level.CRITICAL)
        assert result.success
        assert result.metrics["votes"] == 2
        assert result.level_effective is Level.CRITICAL
        (audit,) = pool.audits
        assert not audit.done()
        pool.hosts["b-2"].run_gate.set()
        await audit
        assert pool.wrong == []
        assert [host.runs for host in pool.hosts.all] == [1, 1, 1]


@pytest.mark.parametrize("fault", ["lie_on_run", "flip_on_run"])
@pytest.mark.parametrize("faulty", THREE)
async def test_wrong_answer_is_outvoted_and_only_its_browser_is_charged(faulty, fault):
    scripts = FakeHosts(**{faulty.replace("-", "_"): [{fault: range(100)}]})
    async with serving(*THREE, hosts=scripts) as pool:
        for number in range(10):
            result = await pool.ask(f"op{number}", level=Level.CRITICAL)
            assert result.success  # `ask` has compared the numbers
        await asyncio.gather(*pool.audits)
        assert {ref.browser_id for ref in pool.wrong} == {faulty}
        assert len(pool.wrong) == 10  # on time or late, it is always told


async def test_wrong_answer_at_high_is_not_seen():
    async with serving("b-0", hosts=FakeHosts(b_0=[{"lie_on_run": {0}}])) as pool:
        answering = Answering(
            Question("op", "m", "inference", Level.HIGH), Rules(), pool.routing, random.Random(0)
        )
        result, reply = await answering.run(X, 5.0)
        assert result.success
        assert reply.outputs["x"][0] > 999  # which docs/levels.md says


async def test_answers_of_which_no_two_agree_are_an_error_that_shows_the_spread():
    hosts = FakeHosts(b_0=[{"lie_on_run": {0}}], b_1=[{"flip_on_run": {0}}])
    async with serving(*THREE, hosts=hosts) as pool:
        result = await pool.ask(level=Level.CRITICAL, seconds=0.3)
        assert not result.success
        assert "no two of 3 answers agree" in result.error
        assert "differ by up to 1000" in result.error
        with pytest.raises(OperationFailed):
            _ = result.outputs


@pytest.mark.parametrize("browsers", [3, 5])
async def test_answers_that_never_agree_end_the_operation_long_before_its_deadline(browsers):
    names = [f"b-{n}" for n in range(browsers)]
    async with serving(*names) as pool:
        for number, host in enumerate(pool.hosts.all):
            answer = host.run

            async def other(*call: Any, answer: Any = answer, number: int = number) -> Any:
                reply = await answer(*call)
                outputs = {name: array + number for name, array in reply.outputs.items()}
                return dataclasses.replace(reply, outputs=outputs)

            host.run = other
        async with asyncio.timeout(2):
            result = await pool.ask(level=Level.CRITICAL, seconds=600)
        assert not result.success
        assert f"no two of {browsers} answers agree" in result.error


async def test_what_is_in_vain_is_not_waited_for():
    async with serving("b-0") as pool:
        await pool.supervisor.unload("m")
        await pool.routing.until(lambda table: not table.models, 5.0)
        answering = Answering(
            Question("op", "m", "inference", Level.MEDIUM),
            Rules(),
            pool.routing,
            random.Random(0),
            on_stuck=lambda: "memory is short",
        )
        async with asyncio.timeout(2):
            result, _ = await answering.run(X, 600)
        assert not result.success
        assert "memory is short" in result.error


async def test_native_answer_that_fails_leaves_time_for_a_browser():
    async def simulate(tensors, seconds):
        raise PageError("the native runtime failed")

    async with serving("b-0") as pool:
        pool.hosts["b-0"].launch_gate.clear()
        pool.hosts["b-0"].crash()
        asked = asyncio.create_task(pool.ask(simulate=simulate, seconds=1.0))
        await asyncio.sleep(0.6)
        pool.hosts["b-0"].launch_gate.set()
        result = await asked
        assert result.success
        assert not result.simulated


async def test_fourth_browser_decides_where_three_do_not_agree():
    hosts = FakeHosts(b_0=[{"lie_on_run": {0}}], b_1=[{"flip_on_run": {0}}])
    async with serving(*THREE, "b-3", hosts=hosts) as pool:
        results = [await pool.ask(f"op{n}", level=Level.CRITICAL) for n in range(4)]
        assert all(result.success for result in results)


async def test_death_at_critical_is_outlived_without_a_wait():
    hosts = FakeHosts(b_1=[{"crash_on_run": {0}}])
    async with serving(*THREE, hosts=hosts) as pool:
        pool.hosts["b-1"].launch_gate.clear()
        result = await pool.ask(level=Level.CRITICAL)
        assert result.success
        assert result.metrics["votes"] == 2
        pool.hosts["b-1"].launch_gate.set()


async def test_critical_with_too_few_browsers_waits_for_a_second_opinion_or_says_so():
    async with serving("b-0") as pool:
        result = await pool.ask(level=Level.CRITICAL, seconds=0.2)
        assert not result.success
        assert "only one browser answered" in result.error
        assert (await pool.ask("next", level=Level.CRITICAL, strict=False)).success


async def test_native_answer_is_the_last_resort_and_says_so():
    async def simulate(tensors, seconds):
        outputs = {name: array + 1 for name, array in tensors.items()}
        status = host_status("native", models=())
        return RunReply(status, outputs=outputs, answered=True, backend=Backend.NATIVE)

    async with serving("b-0", hosts=FakeHosts(b_0=[{"crash_on_run": range(9)}])) as pool:
        result = await pool.ask(simulate=simulate, attempts_max=2)
        assert result.success
        assert result.simulated
        assert result.backend is Backend.NATIVE
        assert result.level_effective is Level.NONE
        assert [step.what for step in result.recovery][-1] == "simulated"


@pytest.mark.parametrize("seed", range(3))
async def test_none_lost_and_none_answered_twice_while_browsers_crash(seed):
    rng = random.Random(seed)
    names = [f"b-{n}" for n in range(4)]
    scripts = {
        name.replace("-", "_"): [
            {
                "crash_on_run": {rng.randrange(40) for _ in range(4)},
                "die_on_run": {rng.randrange(20, 60)},
            }
            for _ in range(3)
        ]
        for name in names
    }
    async with serving(*names, hosts=FakeHosts(**scripts)) as pool:
        ids = [f"op{n}" for n in range(200)]
        async with asyncio.timeout(20):
            results = await asyncio.gather(*(pool.ask(op_id, attempts_max=50) for op_id in ids))
        assert [result.op_id for result in results] == ids
        assert all(result.success for result in results)
        assert pool.hosts.answers() == dict.fromkeys(ids, 1)
        assert any(result.recovered for result in results)
        assert len(pool.supervisor.state.repairs) >= 4
