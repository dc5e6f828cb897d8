"""The operations of one client, from their inputs to their results, on fake hosts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.supervisor.records import ModelOrder, SupervisorConfig
from actors.supervisor.supervisor import Supervisor
from pool.background import BackgroundTasks
from pool.config import PoolConfig
from pool.execution.placed import PlacedModel
from pool.execution.runner import OperationRunner
from pool.models.registry import ModelEntry
from pool.operations.base import Operation
from pool.operations.registry import OperationRegistry
from pool.results import Result
from pool.routing import Routing
from recovery.errors import BadInput, InternalError, MessageTooLarge, PoolBusy, UnknownOperation
from recovery.kinds import Backend, BrowserType, Level
from recovery.placement import Placing
from recovery.plan import STRATEGIES
from recovery.supervision import RestartLimit
from sharding.models.signature import TensorSpec
from sharding.sequences.stages import Stage, StagePipeline
from tests.fakes import FakeHosts, spec

X = {"x": np.arange(3, dtype=np.float32)}
TENSOR = TensorSpec("x", "float32", (None,))
PIPELINE = StagePipeline(  # a fake host answers with what it was given, and 1 added
    "cut",
    (
        Stage("cut@0", (), (TENSOR,), (TENSOR,), ()),
        Stage("cut@1", (TENSOR,), (), (), ()),
    ),
    (TENSOR,),
    (TENSOR,),
)
PARTS = tuple(spec(f"cut@{index}", f"digest {index}") for index in range(2))
COMPONENTS = tuple(spec(f"two@{name}", name) for name in ("a", "b"))
FLOATS = {name: TensorSpec(name, "float32", ("n",)) for name in ("boxes", "labels", "scores")}
DETECTOR = replace(  # whose outputs are declared in another order than they arrive in
    spec("m"),
    inputs=tuple(FLOATS.values()),
    outputs=tuple(FLOATS[name] for name in ("scores", "labels", "boxes")),
)
ENTRIES = {
    "m": ModelEntry(spec("m")),
    "detector": ModelEntry(DETECTOR),
    "cut": ModelEntry(spec("cut"), pipeline=PIPELINE),
    "two": ModelEntry(spec("two"), components=COMPONENTS),
}


class Connected:
    """A connection to a supervisor in this process."""

    native = None
    history = None
    client = "client"

    def __init__(self, routing: Routing, **options: Any) -> None:
        self.config = PoolConfig({"chrome": 2}, **options)
        self.level = Level.MEDIUM
        self.routing = self.known_routing = routing

    def require(self) -> tuple[None, Routing]:
        return None, self.routing


class Catalog:
    def entry(self, name: str) -> ModelEntry:
        return ENTRIES[name]

    def encoder(self, name: str) -> None:
        return None

    def part_specs(self, entry: ModelEntry) -> tuple:
        return PARTS


class Doubled(Operation):
    """What a model makes of its inputs, twice: an operation as a user writes one."""

    name = "doubled"

    def prepare(self, entry: ModelEntry, inputs: Mapping[str, Any], encoder: Any) -> Any:
        if list(inputs) != ["x"]:
            raise BadInput(f"doubled takes x, got {', '.join(inputs)}.")
        return inputs

    async def run(self, model: PlacedModel, prepared: Any) -> Result:
        return await model.answer(self._work(model, prepared))

    async def _work(self, model: PlacedModel, prepared: Any) -> dict[str, Any]:
        outputs = await model.outputs(prepared)
        return {"y": outputs["x"] * 2}


class BothComponents(Doubled):
    name = "both"

    async def _work(self, model: PlacedModel, prepared: Any) -> dict[str, Any]:
        first, second = await asyncio.gather(*(model.ask(c, prepared) for c in COMPONENTS))
        return {"y": first["x"] + second["x"]}


class AskedTwice(Doubled):
    name = "twice"

    async def _work(self, model: PlacedModel, prepared: Any) -> dict[str, Any]:
        return {**await model.outputs(prepared), **await model.outputs(prepared)}


class AskedNobody(Doubled):
    name = "nobody"

    async def _work(self, model: PlacedModel, prepared: Any) -> dict[str, Any]:
        return {"y": np.zeros(1)}


class Served:
    def __init__(
        self, hosts: FakeHosts, runner: OperationRunner, operations: OperationRegistry
    ) -> None:
        self.hosts = hosts
        self.runner = runner
        self.operations = operations
        self.run = runner.run


@contextlib.asynccontextmanager
async def serving(scripts: Mapping[str, Any] = {}, **options: Any) -> AsyncIterator[Served]:
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
    await supervisor.open(dict.fromkeys(("b-0", "b-1"), BrowserType.CHROME))
    await supervisor.load(ModelOrder(spec("m"), (Backend.WASM,), entry={}))
    for part in (*PARTS, *COMPONENTS):
        whole = part.name.partition("@")[0]
        await supervisor.load(
            ModelOrder(part, (Backend.WASM,), entry={}, placing=Placing(1, whole))
        )
    routing = Routing(supervisor, "client", 1.0, "node", 1 << 20)
    await routing.start()
    operations, tasks = OperationRegistry(), BackgroundTasks()
    for operation in (Doubled(), BothComponents(), AskedTwice(), AskedNobody()):
        operations.register(operation)
    connection = Connected(routing, **options)
    runner = OperationRunner(connection, Catalog(), operations, tasks)
    try:
        yield Served(hosts, runner, operations)
    finally:
        await tasks.cancel()
        await routing.stop()
        await supervisor.close()


@pytest.mark.parametrize(("model", "added"), [("m", 1), ("cut", 2)])
async def test_operation_over_one_graph_need_not_know_whether_it_is_cut(model, added):
    async with serving() as pool:
        plain = await pool.run(model, "inference", X)
        np.testing.assert_array_equal(plain.outputs["x"], X["x"] + added)
        mine = await pool.run(model, "doubled", X, op_id="mine")
        np.testing.assert_array_equal(mine.outputs["y"], (X["x"] + added) * 2)
        assert (mine.op_id, mine.model, mine.op) == ("mine", model, "doubled")
        assert pool.runner.counts["answered"] == 2


async def test_outputs_come_in_the_order_of_the_graph():
    async with serving() as pool:
        asked = {name: np.zeros(2, np.float32) for name in FLOATS}
        result = await pool.run("detector", "inference", asked)
        assert list(result.outputs) == ["scores", "labels", "boxes"]


async def test_failure_tells_of_dimensions_that_share_a_name_and_no_size():
    script = {"b_0": [{"error_on_run": set(range(99))}], "b_1": [{"error_on_run": set(range(99))}]}
    async with serving(script) as pool:
        asked = {name: np.zeros(2, np.float32) for name in FLOATS}
        result = await pool.run("detector", "inference", asked)
        assert not result.success
        assert "'n' is" not in result.error
        asked["labels"] = np.zeros(5, np.float32)
        result = await pool.run("detector", "inference", asked)
        assert result.error.endswith("(of these inputs, 'n' is 2 in 'boxes' and 5 in 'labels')")


async def test_text_in_an_answer_is_a_string_whoever_made_it():
    class Said(Doubled):
        name = "said"

        async def _work(self, model: PlacedModel, prepared: Any) -> dict[str, Any]:
            await model.outputs(prepared)
            return {"text": np.asarray("abc"), "lines": np.array([["a"], ["b"]]), "n": np.ones(1)}

    async with serving() as pool:
        pool.operations.register(Said())
        outputs = (await pool.run("m", "said", X)).outputs
        assert outputs["text"][:2] == "ab"
        assert (type(outputs["text"]), outputs["lines"]) == (str, [["a"], ["b"]])
        assert list(outputs) == ["text", "lines", "n"]
        assert outputs["n"].shape == (1,)


async def test_operation_over_components_asks_each_by_itself():
    async with serving() as pool:
        result = await pool.run("two", "both", X)
        np.testing.assert_array_equal(result.outputs["y"], 2 * (X["x"] + 1))
        assert len(result.stages) == 2


async def test_failure_below_an_operation_is_none_of_its_business():
    script = {"b_0": [{"crash_on_run": {0}}], "b_1": [{"crash_on_run": {0}}]}
    async with serving(script) as pool:
        for model in ("m", "cut"):
            result = await pool.run(model, "doubled", X)
            assert result.success, result.error
        assert pool.runner.counts["recovered"] >= 1


async def test_operation_that_no_browser_answers_is_a_failed_result():
    script = {"b_0": [{"error_on_run": set(range(99))}], "b_1": [{"error_on_run": set(range(99))}]}
    async with serving(script) as pool:
        result = await pool.run("m", "doubled", X)
        assert not result.success
        assert "run failed" in result.error
        assert pool.runner.counts["failed"] == 1


async def test_unknown_operation_is_answered_with_all_that_there_are():
    async with serving() as pool:
        with pytest.raises(UnknownOperation, match="known: inference, embed, generate, read, dou"):
            await pool.run("m", "translate", X)
        assert pool.runner.counts["requested"] == 0


@pytest.mark.parametrize(
    ("model", "op", "said"),
    [
        ("two", "inference", "works? together, so it takes only 'read'"),
        ("two", "embed", "ask one of two@a, two@b"),
        ("two", "doubled", "no one graph"),
        ("m", "both", "m has no components"),
        ("m", "generate", "no decoder with a cache"),
        ("two", "generate", "no decoder with a cache"),
        ("m", "read", "can't read"),
    ],
)
async def test_model_of_another_form_is_refused_before_any_browser_is_asked(model, op, said):
    async with serving() as pool:
        with pytest.raises(BadInput, match=said):
            await pool.run(model, op, X)
        assert pool.hosts.answers().total() == 0


async def test_only_an_operation_that_streams_can_be_streamed():
    async with serving() as pool:
        stream = pool.runner.stream("m", "inference", X)
        with pytest.raises(BadInput, match="gives its answer at once"):
            await anext(stream)


async def test_operation_that_breaks_the_rules_is_told_so():
    async with serving() as pool:
        with pytest.raises(InternalError, match="asked m twice"):
            await pool.run("m", "twice", X)
        with pytest.raises(InternalError, match="never asked m"):
            await pool.run("m", "nobody", X)


@pytest.mark.parametrize(
    "options",
    [
        {"deadline": 0},
        {"op_id": ""},
        {"op_id": "x" * 129},
        {"op_id": 5},
        {"level": "critical"},
        {"level": "some"},
        {"simulation": True},
    ],
)
async def test_value_that_no_call_can_have_is_refused(options):
    async with serving() as pool:
        with pytest.raises(BadInput, match=f"{next(iter(options))}: "):
            await pool.run("m", "inference", X, **options)
        assert pool.hosts.answers().total() == 0


async def test_one_operation_too_many_is_refused_and_counted():
    async with serving(waiting_max=1) as pool:
        for host in pool.hosts.all:
            host.run_gate.clear()
        first = asyncio.create_task(pool.run("m", "inference", X))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert pool.runner.in_flight == 1
        with pytest.raises(PoolBusy, match="waiting_max"):
            await pool.run("m", "inference", X)
        for host in pool.hosts.all:
            host.run_gate.set()
        assert (await first).success
        assert pool.runner.counts["refused"] == 1
        assert pool.runner.in_flight == 0


async def test_message_over_the_limit_is_refused_and_counted():
    async with serving(message_bytes_max=1024) as pool:
        with pytest.raises(MessageTooLarge):
            await pool.run("m", "inference", {"x": np.zeros(1000, np.float32)})
        assert pool.runner.counts["refused"] == 1
