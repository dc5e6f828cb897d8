"""The native runtime in the place of a browser."""

import asyncio
import dataclasses

import numpy as np

from actors.messages import RunRequest
from actors.native_host import NativeHost
from pool.models.bundled import silero_vad_path
from pool.models.registry import read_model
from recovery.failures import Category
from recovery.kinds import Backend
from recovery.records import HostRef
from sharding.models.native import NativeSession

FRAME = {
    "input": np.ones((1, 512), np.float32),
    "state": np.zeros((2, 1, 128), np.float32),
    "sr": np.array(16000, np.int64),
}


def request(seconds: float = 10.0) -> RunRequest:
    return RunRequest("op", HostRef("native"), "vad", seconds)


async def test_answer_is_native_and_says_so():
    spec = read_model("vad", silero_vad_path()).spec
    host = NativeHost("node")
    reply = await host.run(request(), spec, FRAME)
    assert reply.answered
    assert reply.backend is Backend.NATIVE
    assert reply.status.browser is None
    native = NativeSession(silero_vad_path())
    native.open()
    np.testing.assert_array_equal(reply.outputs["output"], native.run(FRAME)["output"])


async def test_failure_of_the_runtime_is_a_failure_and_no_exception():
    spec = read_model("vad", silero_vad_path()).spec
    reply = await NativeHost().run(request(), spec, {**FRAME, "sr": np.array(1, np.int64)})
    assert not reply.answered
    assert reply.failure is not None


async def test_deadline_holds_while_another_operation_runs():
    spec = read_model("vad", silero_vad_path()).spec
    host = NativeHost()
    async with host._turn:
        reply = await host.run(request(0.01), spec, FRAME)
    assert reply.failure is not None
    assert reply.failure.category is Category.TIMEOUT
    assert host.status().queue == 0


async def test_only_so_many_models_stay_open():
    spec = read_model("vad", silero_vad_path()).spec
    closed = []

    class Session:
        def __init__(self, path: str) -> None:
            self.path = path

        def open(self) -> None:
            pass

        def run(self, inputs):
            return dict(inputs)

        def close(self) -> None:
            closed.append(self)

    host = NativeHost(models_max=2, make=Session)

    specs = [dataclasses.replace(spec, digest=f"{n}") for n in range(3)]
    await asyncio.gather(*(host.run(request(), one, FRAME) for one in specs))
    assert len(closed) == 1
    assert host.status().served == 3
