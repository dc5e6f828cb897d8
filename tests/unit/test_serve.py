"""Operations on one browser, whose page is scripted: admitted, refused, run once, remembered."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.browser.breakers import HostBreakers
from actors.browser.incarnation import Incarnation
from actors.browser.models import LoadedModels
from actors.browser.page_process import PageProcess
from actors.browser.serve import OperationServer
from actors.injection.injector import BrowserFailureInjector
from actors.messages import HostConfig, RunRequest
from recovery.breaker import BreakerConfig
from recovery.errors import BrowserLost, MessageTooLarge, PageError
from recovery.kinds import Backend, BrowserType, ModelType, Readiness
from recovery.records import HostRef, HostStatus, NumericId
from recovery.voting import Tolerance
from sharding.models.frames import Frame
from sharding.models.signature import ModelSpec
from sharding.sequences.caches import StepOrder
from tests import fakes

REF = HostRef("b", 0)
ONES = {"x": np.ones(2, np.float32)}
SPEC = ModelSpec(
    name="m",
    digest="d" * 64,
    type=ModelType.TEXT,
    inputs=(),
    outputs=(),
    files=(),
    load_peak_bytes=0,
    tolerance=Tolerance(),
    opset=17,
)


class ScriptedPage:
    """Answers what it is asked when the test says so, or as `script` says, in order."""

    def __init__(self) -> None:
        self.asked: list[Frame] = []
        self.script: list[BaseException | None] = []
        self.gate: asyncio.Event | None = None
        self.connected = True
        self.outstanding = 0
        self._number = 0

    @property
    def bridge(self) -> "ScriptedPage":
        return self

    def register(self, spec: ModelSpec) -> None:
        pass

    unregister = register

    async def ask(self, kind: str, body: Mapping[str, Any], tensors: Any = None) -> Frame:
        return await self.request(Frame(kind, self.numbered(kind), body=body))

    def numbered(self, kind: str) -> str:
        self._number += 1
        return f"{kind}:{self._number}"

    async def request(self, frame: Frame) -> Frame:
        self.asked.append(frame)
        if self.gate is not None:
            await self.gate.wait()
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        return Frame("ran", frame.op_id, frame.epoch, body={"inPageMs": 3.0}, tensors=frame.tensors)


class Served:
    def __init__(self, **config: Any) -> None:
        self.ended: list[str] = []
        self.used = 0
        self.page = ScriptedPage()
        breaker = BreakerConfig(success_threshold=1)
        self.config = HostConfig(breaker=breaker, **config)
        clock = asyncio.get_running_loop().time
        self.incarnation = Incarnation(
            "b",
            BrowserType.CHROME,
            clock,
            lambda: 0.0,
            on_end=lambda failure: self.ended.append(failure.message),
            context=dict,
        )
        self.incarnation.begin(REF)
        self.incarnation.readiness = Readiness.READY
        breakers = HostBreakers("b", breaker, lambda moved: None, clock)
        self.models = LoadedModels(
            self.incarnation,
            self.page,
            PageProcess(clock),
            breakers,
            BrowserFailureInjector(False),
            self.config,
            clock,
        )
        self.models.specs["m"] = SPEC
        self.models.numeric["m"] = NumericId("1.30", Backend.WASM, 1)
        self.it = OperationServer(
            self.incarnation,
            self.page,
            self.models,
            breakers,
            self.config,
            clock,
            judged=self.judged,
            probe=self.probe,
            on_used=self.on_used,
            status=lambda: HostStatus(REF, BrowserType.CHROME, self.incarnation.readiness),
        )

    async def judged(self, ref: HostRef) -> None:
        self.incarnation.lost(ref, "browser_exited")

    async def probe(self, ref: HostRef, model: str) -> None:
        return None

    def on_used(self) -> None:
        self.used += 1

    async def run(self, op_id: str = "op", seconds: float = 5.0, **options: Any) -> Any:
        inputs = options.pop("inputs", ONES)
        return await self.it.run(RunRequest(op_id, REF, "m", seconds, **options), inputs)


@pytest.fixture
async def served() -> Served:
    return Served()


async def test_answer_tells_what_it_took_and_where_it_was_computed(served):
    reply = await served.run()
    assert reply.answered
    assert reply.backend is Backend.WASM
    assert reply.in_page_ms == 3.0
    np.testing.assert_array_equal(reply.outputs["x"], ONES["x"])
    assert (served.it.served, served.used) == (1, 1)


async def test_repeat_of_an_id_is_answered_from_memory_and_another_question_is_not(served):
    await served.run()
    again = await served.run()
    assert again.repeated
    assert len(served.page.asked) == 1
    other = await served.run(inputs={"x": np.zeros(2, np.float32)})
    assert not other.repeated
    assert len(served.page.asked) == 2


async def test_two_calls_with_one_id_share_one_run(served):
    served.page.gate = asyncio.Event()
    calls = [asyncio.create_task(served.run()) for _ in range(2)]
    await fakes.until(lambda: served.page.asked)
    served.page.gate.set()
    first, second = await asyncio.gather(*calls)
    assert first.answered
    assert second.answered
    assert len(served.page.asked) == 1


async def test_call_that_is_abandoned_leaves_its_run_to_the_next(served):
    served.page.gate = asyncio.Event()
    call = asyncio.create_task(served.run())
    await fakes.until(lambda: served.page.asked)
    call.cancel()
    await asyncio.wait({call})
    assert served.it.queued() == 1
    served.page.gate.set()
    assert (await served.run()).answered
    assert len(served.page.asked) == 1


async def test_steps_of_a_sequence_are_each_asked_and_none_is_remembered(served):
    step = StepOrder("s")
    for _ in range(2):
        assert (await served.run(stage=step)).answered
    assert len({frame.op_id for frame in served.page.asked}) == 2


async def test_full_queue_answers_busy_and_counts_what_the_page_still_computes():
    served = Served(queue_max=2)
    served.page.outstanding = 2
    assert (await served.run()).busy
    served.page.outstanding = 1
    assert (await served.run()).answered


@pytest.mark.parametrize(
    ("options", "what"), [({"digest": "e" * 64}, "not_loaded"), ({}, "not_loaded")]
)
async def test_model_that_is_not_here_is_no_fault_of_the_browser(served, options, what):
    if not options:
        served.models.specs.clear()
    reply = await served.run(**options)
    assert reply.failure.evidence["what"] == what
    assert served.page.asked == []


async def test_another_incarnation_is_not_answered_for(served):
    reply = await served.it.run(RunRequest("op", HostRef("b", 7), "m", 1.0), ONES)
    assert reply.failure.evidence["what"] == "replaced"


async def test_three_failures_in_a_row_block_the_model(served):
    served.page.script = [PageError("bad") for _ in range(3)]
    for number in range(3):
        reply = await served.run(f"op{number}", last=True)
        assert reply.failure.category == "api_error"
    assert (await served.run("more")).busy
    assert len(served.page.asked) == 3


async def test_failures_while_the_page_is_away_are_not_counted_against_the_model(served):
    served.page.connected, served.page.gate = False, asyncio.Event()
    for number in range(5):
        reply = await served.run(f"op{number}", seconds=0.01, last=True)
        assert reply.failure.category == "timeout"
    served.page.gate.set()
    assert (await served.run("more")).answered


async def test_operation_that_a_death_takes_along_tells_what_the_browser_died_of(served):
    served.page.script = [BrowserLost("the socket closed")]
    reply = await served.run()
    assert reply.failure.message == "browser exited"
    assert reply.failure.op_id == "op"
    assert served.ended == ["browser exited"]


async def test_page_that_is_out_of_memory_is_over(served):
    served.page.script = [PageError("no memory", what="out_of_memory")]
    reply = await served.run()
    assert reply.failure.scope == "page"
    assert served.ended == ["no memory"]


async def test_error_of_the_caller_is_raised_and_blames_nobody(served):
    served.page.script = [MessageTooLarge("too large")] * 4
    for number in range(4):
        with pytest.raises(MessageTooLarge):
            await served.run(f"op{number}", last=True)
    assert (await served.run("more")).answered


async def test_end_of_service_waits_for_what_is_in_flight(served):
    served.page.gate = asyncio.Event()
    call = asyncio.create_task(served.run())
    await fakes.until(lambda: served.page.asked)
    finished = asyncio.create_task(served.it.finished())
    await asyncio.sleep(0)
    assert not finished.done()
    assert not served.it.idle(0.0)
    served.page.gate.set()
    await asyncio.gather(call, finished)
    assert served.it.idle(0.0)
    assert not served.it.idle(60.0)


async def test_model_whose_load_or_release_ended_the_page_is_still_known_by_its_type(served):
    served.page.script = [BrowserLost("it died"), BrowserLost("it died")]
    with pytest.raises(BrowserLost):
        await served.models.load(REF, replace(SPEC, name="other"), (Backend.WASM,), None)
    assert served.models.facts_of("other") == {"model": "other", "model_type": "text"}
    with pytest.raises(BrowserLost):
        await served.models.unload(REF, "m")
    assert served.models.facts_of("m") == {"model": "m", "model_type": "text"}
    assert served.models.facts_of("third") == {"model": "third"}
    served.models.begin(warm=False)
    assert served.models.facts_of("m") == {"model": "m"}
