"""Operations of several parts, over a real supervisor and routing, on fake hosts."""

import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.messages import RunReply
from actors.supervisor.records import ModelOrder, SupervisorConfig
from actors.supervisor.supervisor import Supervisor
from pool.execution.answering import Rules
from pool.execution.composition import Composition
from pool.execution.latency import Latencies
from pool.execution.placed import run_stages
from pool.execution.requests import PartRequests
from pool.models.registry import ModelEntry
from pool.results import Result
from pool.routing import Routing
from recovery.errors import BadInput, MessageTooLarge, OperationFailed, PoolBusy
from recovery.failures import Category
from recovery.kinds import Backend, BrowserType, Level
from recovery.placement import Placing
from recovery.plan import STRATEGIES
from recovery.supervision import RestartLimit
from sharding.models.signature import TensorSpec
from sharding.sequences.stages import Stage, StagePipeline
from tests.fakes import FakeHosts, host_status, spec

X = {"x": np.arange(3, dtype=np.float32)}
SPECS = tuple(spec(f"m@{index}", f"digest {index}") for index in range(2))
TENSOR = TensorSpec("x", "float32", (None,))
PIPELINE = StagePipeline(  # a fake host answers with what it was given, and 1 added
    "m",
    (
        Stage("m@0", (), (TENSOR,), (TENSOR,), ()),
        Stage("m@1", (TENSOR,), (), (), ()),
    ),
    (TENSOR,),
    (TENSOR,),
)
ENTRY = ModelEntry(spec("m"), pipeline=PIPELINE)


class Pool:
    def __init__(self, hosts: FakeHosts, routing: Routing) -> None:
        self.hosts = hosts
        self.routing = routing

    def composition(
        self,
        op_id: str = "op",
        seconds: float = 30.0,
        level: Level = Level.MEDIUM,
        bytes_max: int = 1 << 20,
        **rules,
    ) -> Composition:
        requests = self.requests(op_id, level, bytes_max, **rules)
        return Composition(requests, op_id, ENTRY, "inference", seconds)

    def requests(
        self,
        op_id: str,
        level: Level,
        bytes_max: int = 1 << 20,
        simulate: Any = None,
        **rules,
    ) -> PartRequests:
        return PartRequests(
            self.routing,
            Latencies(0.95, 1.0),
            random.Random(op_id),
            "client",
            level,
            Rules(**rules),
            bytes_max,
            on_wrong=lambda ref, failure: None,
            on_audit=lambda task: None,
            on_stuck=lambda part: "",
            simulation=lambda spec: simulate,
        )

    async def stages(self, **options) -> Result:
        composition = self.composition(**options)
        return await composition.answer(run_stages(composition, PIPELINE, SPECS, X))


@contextlib.asynccontextmanager
async def serving(*browsers: str, copies: int = 1, **scripts) -> AsyncIterator[Pool]:
    """A pool of these browsers with the two parts of `m`, spread over them."""
    hosts = FakeHosts(**scripts)
    config = SupervisorConfig(
        "p",
        Level.MEDIUM,
        STRATEGIES["progressive"],
        RestartLimit(restarts_max=1000),
        60.0,
        True,
        creator="client",
    )
    supervisor = Supervisor(config, hosts, lambda: None)
    await supervisor.open(dict.fromkeys(browsers, BrowserType.CHROME))
    for part in SPECS:
        await supervisor.load(
            ModelOrder(part, (Backend.WASM,), entry={}, placing=Placing(copies, "m"))
        )
    routing = Routing(supervisor, "client", 1.0, "node", 1 << 20)
    await routing.start()
    try:
        yield Pool(hosts, routing)
    finally:
        await routing.stop()
        await supervisor.close()


async def test_answer_of_all_parts_is_one_result():
    async with serving("b-0", "b-1") as pool:
        result = await pool.stages()
        np.testing.assert_array_equal(result.outputs["x"], X["x"] + 2)
        assert (result.op_id, result.model, result.op) == ("op", "m", "inference")
        assert result.stages == ("b-0", "b-1")
        assert (result.browser_id, result.backend) == ("b-1", Backend.WASM)
        assert result.recovery == ()
        assert result.metrics["attempts"] == 2
        assert result.metrics["bytes_in"] > 2 * X["x"].nbytes
        assert pool.hosts.answers() == {"client/op:m@0:0": 1, "client/op:m@1:0": 1}


async def test_death_of_each_part_is_survived_and_told_in_one_account():
    scripts = {"b_0": [{"crash_on_run": {0}}], "b_1": [{"crash_on_run": {0}}]}
    async with serving("b-0", "b-1", **scripts) as pool:
        result = await pool.stages()
        np.testing.assert_array_equal(result.outputs["x"], X["x"] + 2)
        assert result.recovered
        assert result.original_error.category is Category.CRASH
        failed = [step for step in result.recovery if step.what == "failed"]
        assert [step.where.split()[-1] for step in failed] == ["(m@0)", "(m@1)"]
        assert [step.at for step in result.recovery] == sorted(s.at for s in result.recovery)
        assert result.metrics["attempts"] == 4


DECLARED = [TensorSpec(name, "float32", (None,)) for name in ("scores", "labels", "boxes")]
ARRIVED = dict.fromkeys(("boxes", "labels", "scores", "more"), X["x"])


@pytest.mark.parametrize("level", [Level.LOW, Level.MEDIUM, Level.HIGH, Level.CRITICAL])
async def test_outputs_of_a_part_come_as_its_graph_declares_them(level):
    async with serving("b-0", "b-1", "b-2", copies=3) as pool:
        part = replace(SPECS[0], outputs=tuple(DECLARED))
        requests = pool.requests("op", level)
        result = await requests.request("op", "inference", part, ARRIVED, 30.0)
        assert list(result.outputs) == ["scores", "labels", "boxes", "more"]


async def test_outputs_of_the_native_runtime_come_as_the_graph_declares_them():
    async def simulate(tensors, left):
        return RunReply(host_status(), outputs=ARRIVED, answered=True, backend=Backend.NATIVE)

    async with serving("b-0", b_0=[{"error_on_run": set(range(9))}]) as pool:
        part = replace(SPECS[0], outputs=tuple(DECLARED))
        requests = pool.requests("op", Level.MEDIUM, simulate=simulate)
        result = await requests.request("op", "inference", part, ARRIVED, 30.0)
        assert result.simulated
        assert list(result.outputs)[:3] == ["scores", "labels", "boxes"]


async def test_part_that_nobody_answers_fails_the_whole_and_says_which():
    scripts = {"b_1": [{"error_on_run": set(range(9))}]}
    async with serving("b-0", "b-1", **scripts) as pool:
        result = await pool.stages(attempts_max=2)
        assert not result.success
        assert result.error.startswith("m@1: ")
        assert result.stages == ("b-0",)
        assert result.metrics["attempts"] >= 2
        with pytest.raises(OperationFailed, match="inference on m failed: m@1"):
            _ = result.outputs


async def test_critical_outvotes_a_liar_in_a_part():
    scripts = {"b_1": [{"lie_on_run": {0}}]}
    async with serving("b-0", "b-1", "b-2", copies=3, **scripts) as pool:
        result = await pool.stages(level=Level.CRITICAL)
        np.testing.assert_array_equal(result.outputs["x"], X["x"] + 2)
        assert result.level_effective is Level.CRITICAL


async def test_part_that_was_asked_again_and_again_is_named_once_for_each_browser():
    async with serving("b-0") as pool:
        composition = pool.composition()

        async def work():
            for _ in range(3):
                answer = await composition.ask(SPECS[1], X)
            return answer

        result = await composition.answer(work())
        assert result.stages == ("b-0",)
        assert result.metrics["attempts"] == 3
        assert len(pool.hosts.answers()) == 3, "each is a question of its own"


async def test_bad_input_is_the_callers_fault_only_until_a_part_was_asked():
    async with serving("b-0") as pool:
        with pytest.raises(MessageTooLarge):
            await pool.stages(bytes_max=16)
        assert pool.hosts.answers().total() == 0
        composition = pool.composition()

        async def work():
            await composition.ask(SPECS[0], X)
            raise BadInput("no probabilities")

        result = await composition.answer(work())
        assert not result.success
        assert "no probabilities" in result.error


async def test_time_is_that_of_the_operation_and_not_of_each_part():
    async with serving("b-0") as pool:
        composition = pool.composition(seconds=0.05)

        async def work():
            for _ in range(100_000):
                answer = await composition.ask(SPECS[0], X)
            return answer

        result = await composition.answer(work())
        assert not result.success
        assert 50 <= result.metrics["duration_ms"] < 5000


async def test_full_pool_refuses_what_has_not_begun():
    async with serving("b-0", b_0=[{"queue_max": 0}]) as pool:
        with pytest.raises(PoolBusy):
            await pool.stages(wait_when_full=False)
