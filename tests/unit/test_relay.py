"""Steps that go from worker to worker: real sockets, stages in the native runtime."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from actors.dataplane import DataLink, DataServer
from actors.messages import RunReply
from actors.relay import ROUTES_MAX, Chain, Hop, Relay
from recovery.errors import BrowserLost, PageError
from recovery.failures import categorize_browser_failure
from recovery.kinds import BrowserType, Readiness
from recovery.records import HostRef, HostStatus
from sharding.cutting.cut import cut
from sharding.models.frames import Frame
from sharding.sequences.caches import CHOICE_SCORES, StepOrder
from sharding.sequences.native_stages import NativeStage
from sharding.sequences.stages import pipeline_of_manifest, stage_specs
from tests.unit.test_pipeline import DECODERS, PROMPT, reference

LIMIT = 1 << 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = DECODERS / "builder-llama.onnx"
    folder = tmp_path_factory.mktemp("cut")
    manifest = cut(path, [(0, 1), (1, 2), (2, 3)], folder)
    line, specs = pipeline_of_manifest("m", manifest), stage_specs("m", folder, manifest)
    stages = [NativeStage(s, spec) for s, spec in zip(line.stages, specs, strict=True)]
    for stage in stages:
        stage.open()
    return line, stages, reference(path)


class Worker:
    """A worker with one stage, on a socket of its own."""

    def __init__(self, number: int, stage: NativeStage) -> None:
        self.ref = HostRef(f"browser-{number}", 0)
        self.stage = stage
        self.fault = ""
        self.requests = []
        self.server = DataServer(self.run, LIMIT)

    async def run(self, request, tensors) -> RunReply:
        self.requests.append(request)
        status = HostStatus(self.ref, BrowserType.CHROME, Readiness.READY)
        if self.fault == "busy":
            return RunReply(status, busy=True)
        if self.fault == "silent":
            await asyncio.Event().wait()
        if self.fault == "unsendable":
            return RunReply(status, outputs={"x": np.zeros(1, complex)}, answered=True)
        try:
            answer = self.stage.take(request.stage, tensors)
        except PageError as error:
            failure = categorize_browser_failure(error, {**error.fields, "ref": self.ref})
            return RunReply(status, failure=failure)
        if self.fault:
            failure = categorize_browser_failure(self.fault, {"what": self.fault, "ref": self.ref})
            return RunReply(status, failure=failure)
        return RunReply(status, outputs=answer, answered=True, in_page_ms=1.5)


@asynccontextmanager
async def chained(model, *, copies: bool = True, deltas: bool = False, sequence: str = "s"):
    line, stages, _ = model
    workers = [Worker(n, stage) for n, stage in enumerate(stages)]
    for worker in workers:
        await worker.server.start()
    links = [DataLink(w.server.address, w.server.token, LIMIT) for w in workers]
    for link in links:
        await link.open()
    hops = []
    for n, stage in enumerate(line.stages):
        later = {spec.name for other in line.stages[n + 1 :] for spec in other.shared}
        hop = Hop(
            n,
            workers[n].ref,
            stage.model,
            "",
            1,
            tuple(spec.name for spec in (*stage.shared, *stage.receives)),
            tuple(later),
            0 if stage.last else None,
            deltas,
            copies,
            5.0,
        )
        if n + 1 < len(workers):
            after = workers[n + 1].server
            hop = replace(hop, address=after.address, token=after.token)
        hops.append(hop)
    chain = Chain(sequence, hops, links)
    await chain.lay()
    try:
        yield chain, workers, links
    finally:
        for stage in stages:
            stage.caches.forget(StepOrder(sequence, "forget", 9))
        for link in links:
            await link.close()
        for worker in workers:
            await worker.server.stop()


async def write(chain, line, count: int = 6) -> tuple[list[int], np.ndarray]:
    ids, position, tokens, rows = PROMPT, 0, [], []
    for _ in range(count):
        found = await chain.step(position, len(ids), line.inputs_of_step(ids, position), 5.0)
        assert found is not None, chain.trouble
        answers, ms = found
        assert ms == 4.5
        scores = answers[-1]["choice/scores"]
        row = np.empty_like(scores)
        row[answers[-1]["choice/ids"]] = scores
        position += len(ids)
        rows.append(row)
        tokens.append(int(row.argmax()))
        ids = [tokens[-1]]
    return tokens, np.stack(rows)


async def test_steps_come_out_as_the_uncut_model_has_them(model):
    line, _, right = model
    async with chained(model) as (chain, workers, _):
        tokens, rows = await write(chain, line)
        assert tokens == right[0]
        assert rows.tobytes() == right[1].tobytes()
        assert [len(worker.requests) for worker in workers] == [6, 6, 6]


async def test_caller_gets_copies_of_what_is_handed_on_if_it_wants_them(model):
    line, _, _ = model
    inputs = line.inputs_of_step(PROMPT, 0)
    for copies in (True, False):
        async with chained(model, copies=copies, deltas=copies) as (chain, _, _):
            answers, _ = await chain.step(0, len(PROMPT), inputs, 5.0)
            for stage, answer in zip(line.stages[:-1], answers, strict=False):
                names = {spec.name for spec in stage.sends}
                names |= {f"delta/{cache.past}" for cache in stage.caches}
                assert answer.keys() == (names if copies else set())
            assert CHOICE_SCORES in answers[-1]


@pytest.mark.parametrize("fault", ["browser_exited", "socket_closed"])
@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_failure_of_any_stage_reaches_the_caller(model, stage, fault):
    line, _, _ = model
    async with chained(model) as (chain, workers, _):
        workers[stage].fault = fault
        assert await chain.step(0, len(PROMPT), line.inputs_of_step(PROMPT, 0), 5.0) is None
        why, failure = chain.trouble
        assert (why, failure.ref) == (fault, workers[stage].ref)


async def test_busy_worker_and_one_that_does_not_fit_are_no_failures(model):
    line, _, _ = model
    async with chained(model) as (chain, workers, _):
        workers[1].fault = "busy"
        assert await chain.step(0, len(PROMPT), line.inputs_of_step(PROMPT, 0), 5.0) is None
        assert chain.trouble == ("it is busy", None)
        workers[1].fault = ""
        assert await chain.step(9, 1, line.inputs_of_step([5], 9), 5.0) is None
        why, failure = chain.trouble
        assert "hold 5 positions, not 9" in why
        assert failure is None


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_worker_that_is_gone_ends_the_step_at_once(model, stage):
    line, _, _ = model
    async with chained(model) as (chain, workers, _):
        await workers[stage].server.stop()
        assert await chain.step(0, len(PROMPT), line.inputs_of_step(PROMPT, 0), 60.0) is None


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_answer_that_no_message_carries_ends_the_step_at_once(model, stage):
    line, _, _ = model
    async with chained(model) as (chain, workers, _), asyncio.timeout(10):
        workers[stage].fault = "unsendable"
        assert await chain.step(0, len(PROMPT), line.inputs_of_step(PROMPT, 0), 60.0) is None
        why, failure = chain.trouble
        assert "complex128" in why
        assert failure.ref == workers[stage].ref


async def test_silent_worker_ends_the_step_in_time(model):
    line, _, _ = model
    async with chained(model) as (chain, workers, _):
        workers[2].fault = "silent"
        assert await chain.step(0, len(PROMPT), line.inputs_of_step(PROMPT, 0), 0.05) is None
        assert "no answer within 0.050 s" in chain.trouble[0]


async def test_nobody_without_the_token_lays_a_route_or_takes_a_step(model):
    _, stages, _ = model
    worker = Worker(0, stages[0])
    await worker.server.start()
    link = DataLink(worker.server.address, "wrong", LIMIT)
    with pytest.raises(BrowserLost):
        await link.open()
    assert worker.requests == []
    await worker.server.stop()


async def test_step_without_a_route_is_let_go(model):
    async with chained(model) as (_, workers, links):
        await links[0].send(Frame("step", "unknown", body={"stage": 0}))
        await links[0].send(Frame("step", "s", body={"stage": 7}))
        await asyncio.sleep(0.05)
        assert workers[0].requests == []


async def test_routes_are_bounded_and_end_with_their_callers_connection():
    relay = Relay(lambda request, tensors: None, lambda address, token: None)

    def say(frame: Frame) -> None: ...

    body = {
        "stage": 0,
        "ref": {"browser_id": "b"},
        "model": "m",
        "digest": "",
        "fence": 1,
        "takes": [],
        "passes": [],
        "choice": None,
        "deltas": False,
        "copies": False,
        "seconds": 1.0,
    }
    for number in range(ROUTES_MAX + 10):
        relay.lay(Frame("route", f"{number}:0", body=body), say)
    assert len(relay._routes) == ROUTES_MAX
    relay.drop(say)
    assert not relay._routes
    with pytest.raises(ValueError, match="stage"):
        relay.lay(Frame("route", "x:0", body={}), say)
    for elsewhere in ("10.0.0.1:80", "localhost.example:80", "127.0.0.1.example:80"):
        with pytest.raises(ValueError, match="not on this machine"):
            relay.lay(Frame("route", "x:0", body={**body, "address": elsewhere}), say)
