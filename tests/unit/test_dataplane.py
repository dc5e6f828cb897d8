import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import pytest

from actors.dataplane import DataLink, DataServer, RunHost
from actors.messages import RunReply, RunRequest
from recovery.errors import BrowserLost, CallerError, MessageTooLarge
from recovery.kinds import Backend
from recovery.records import HostRef
from sharding.models.frames import Frame, decode, encode
from sharding.sequences.caches import StepOrder
from tests.fakes import failure, host_status

LIMIT = 1 << 20
X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.array([1, 2], np.int64)}


def request(op_id: str = "op") -> RunRequest:
    return RunRequest(
        op_id,
        HostRef("chrome-0", 2),
        "m",
        5.0,
        "digest",
        stage=StepOrder("s", fence=1, position=3, tokens=4, choice=0, deltas=True),
    )


async def double(request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
    outputs = {name: array * 2 for name, array in tensors.items()}
    return RunReply(host_status(), outputs, answered=True, backend=Backend.WASM, in_page_ms=1.5)


@contextlib.asynccontextmanager
async def serving(run: RunHost = double) -> AsyncIterator[DataServer]:
    server = DataServer(run, LIMIT)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def linked(server: DataServer, token: str | None = None) -> AsyncIterator[DataLink]:
    link = DataLink(server.address, server.token if token is None else token, LIMIT)
    await link.open()
    try:
        yield link
    finally:
        await link.close()


async def still_serves(server: DataServer) -> None:
    async with linked(server) as link:
        assert (await link.run(request(), X)).answered


async def raw(server: DataServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def welcomed(server: DataServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await raw(server)
    writer.write(message(Frame("greeting", server.token)))
    async with asyncio.timeout(5):
        assert b"welcome" in await next_message(reader)
    return reader, writer


async def next_message(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("<Q", await reader.readexactly(8))
    return await reader.readexactly(length)


async def is_let_go(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


def message(frame: Frame) -> bytes:
    data = encode(frame, bytes_max=1 << 24)
    return struct.pack("<Q", len(data)) + data


async def test_request_and_answer_arrive_as_they_were_sent():
    seen: list[tuple[RunRequest, Mapping[str, Any]]] = []

    async def run(request, tensors):
        seen.append((request, tensors))
        return await double(request, tensors)

    async with serving(run) as server, linked(server) as link:
        reply = await link.run(request(), X)
    ((got, tensors),) = seen
    assert got == request()
    for name, array in X.items():
        np.testing.assert_array_equal(tensors[name], array)
        np.testing.assert_array_equal(reply.outputs[name], array * 2)
        assert reply.outputs[name].dtype == array.dtype
    assert (reply.backend, reply.in_page_ms) == (Backend.WASM, 1.5)
    assert reply.status == host_status()


async def test_failure_crosses_whole():
    why = failure(ref=HostRef("chrome-0", 2), evidence={"what": "browser_exited", "status": -9})

    async def run(request, tensors):
        return RunReply(host_status(), failure=why)

    async with serving(run) as server, linked(server) as link:
        reply = await link.run(request(), X)
    assert reply.failure == why
    assert not reply.answered
    assert reply.outputs is None


async def test_operations_overlap_and_each_gets_its_own_answer():
    gates = {f"op{n}": asyncio.Event() for n in range(10)}

    async def run(request, tensors):
        await gates[request.op_id].wait()
        return await double(request, tensors)

    async with serving(run) as server, linked(server) as link:
        tasks = {
            op_id: asyncio.create_task(link.run(request(op_id), {"n": np.array([n])}))
            for n, op_id in enumerate(gates)
        }
        await asyncio.sleep(0)
        assert link.busy
        for n, op_id in reversed(list(enumerate(gates))):
            gates[op_id].set()
            assert (await tasks[op_id]).outputs["n"] == [2 * n]
        assert not link.busy


async def test_same_operation_may_be_under_way_twice():
    async with serving() as server, linked(server) as link:
        replies = await asyncio.gather(*(link.run(request("op"), X) for _ in range(3)))
        assert all(reply.answered for reply in replies)


@pytest.mark.parametrize("token", ["", "wrong", "wröng", "x" * 500])
async def test_wrong_token_is_refused(token):
    called = False

    async def run(request, tensors):
        nonlocal called
        called = True
        return await double(request, tensors)

    async with serving(run) as server:
        with pytest.raises(BrowserLost):
            async with linked(server, token) as link:
                await link.run(request(), X)
        assert not called
        await still_serves(server)


async def test_frame_over_the_limit_is_refused_before_it_is_read():
    async with serving() as server:
        reader, writer = await welcomed(server)
        writer.write(struct.pack("<Q", 1 << 60))
        await is_let_go(reader)
        writer.close()
        await still_serves(server)


async def test_request_over_the_limit_is_refused_at_the_caller():
    async with serving() as server, linked(server) as link:
        with pytest.raises(MessageTooLarge):
            await link.run(request(), {"x": np.zeros(1 << 20, np.float32)})
        assert not link.busy
        assert (await link.run(request(), X)).answered


async def test_answer_over_the_limit_is_reported_to_who_waits():
    async def run(request, tensors):
        return RunReply(host_status(), {"y": np.zeros(1 << 20, np.float32)}, answered=True)

    async with serving(run) as server, linked(server) as link, asyncio.timeout(5):
        with pytest.raises(BrowserLost, match="exceeds the limit"):
            await link.run(request(), X)


async def test_error_of_the_callers_making_is_reported_to_who_waits():
    async def run(request, tensors):
        raise CallerError("such a thing is not done")

    async with serving(run) as server, linked(server) as link:
        with pytest.raises(BrowserLost, match="not done") as caught:
            await link.run(request(), X)
        assert caught.value.fields["what"] == "refused"


async def test_request_that_is_none_is_reported_to_who_sent_it():
    async with serving() as server:
        reader, writer = await welcomed(server)
        writer.write(message(Frame("run", "x:1", body={"op_id": 7})))
        async with asyncio.timeout(5):
            assert b"refused" in await next_message(reader)
        writer.close()
        await still_serves(server)


async def test_death_of_the_server_fails_every_pending_call_at_once():
    started = asyncio.Semaphore(0)

    async def run(request, tensors):
        started.release()
        await asyncio.Event().wait()

    async with serving(run) as server, linked(server) as link:
        tasks = [asyncio.create_task(link.run(request(f"op{n}"), X)) for n in range(5)]
        for _ in tasks:
            await started.acquire()
        await server.stop()
        async with asyncio.timeout(5):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [BrowserLost] * 5
        # Whether it was the connection or the worker shows when it is opened again.
        assert all(end.fields["what"] == "socket_closed" for end in ends)
        assert link.closed
        with pytest.raises(BrowserLost) as gone:
            await DataLink(server.address, server.token, 1 << 20).open()
        assert gone.value.fields["what"] == "worker_exited"
        with pytest.raises(BrowserLost):
            await link.run(request(), X)
        for task in list(server._tasks):
            task.cancel()


async def test_worker_that_is_gone_cannot_be_connected_to():
    async with serving() as server:
        address, token = server.address, server.token
    with pytest.raises(BrowserLost):
        await DataLink(address, token, LIMIT).open()


async def test_caller_that_gives_up_leaves_the_link_in_order():
    gate = asyncio.Event()

    async def run(request, tensors):
        await gate.wait()
        return await double(request, tensors)

    async with serving(run) as server, linked(server) as link:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await link.run(request("late"), X)
        assert not link.busy
        gate.set()
        assert (await link.run(request(), X)).answered


@pytest.mark.parametrize("greeted", [False, True])
@pytest.mark.parametrize("seed", range(6))
async def test_garbage_does_not_crash_the_server(seed, greeted, caplog):
    rng = random.Random(seed)
    async with serving() as server:
        for _ in range(10):
            reader, writer = await raw(server)
            if greeted:
                writer.write(message(Frame("greeting", server.token)))
            body = rng.randbytes(rng.randrange(200))
            if rng.random() < 0.7:  # a length that fits, so that the frame itself is read
                body = struct.pack("<Q", len(body)) + body
            if rng.random() < 0.5:  # or a good frame with one byte changed
                good = bytearray(message(Frame("run", "x:1", body={"op_id": "x"}, tensors=X)))
                good[rng.randrange(8, len(good))] ^= 1 << rng.randrange(8)
                body = bytes(good)
            writer.write(body)
            writer.write_eof()
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.close()
        await still_serves(server)
    assert caplog.records == []


async def test_answer_that_is_no_reply_fails_its_request_at_once():
    over = asyncio.Event()

    async def serve(reader, writer):
        await next_message(reader)
        writer.write(message(Frame("welcome")))
        asked = decode(await next_message(reader), bytes_max=LIMIT)
        writer.write(message(Frame("reply", asked.op_id, body={"status": "fine"})))
        await reader.read()
        writer.close()
        await writer.wait_closed()
        over.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(10):
        host, port = server.sockets[0].getsockname()
        link = DataLink(f"{host}:{port}", "token", LIMIT)
        await link.open()
        with pytest.raises(BrowserLost, match="can't be read") as caught:
            await link.run(request(), X)
        assert caught.value.fields["what"] == "bad_frame"
        assert not link.closed, "the worker is well"
        await link.close()
        await over.wait()
