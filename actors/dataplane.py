"""The data plane: operations go to a browser's worker over a socket of their own.

Ray carries control; a Ray call with an array costs several times the hop to the page. On the
same node a client connects to the worker's loopback port instead (the token comes with the
routing table, through Ray) and exchanges frames, each preceded by its length. The close of the
socket is also the quickest news of the worker's death. This module must not decide anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from actors.messages import RunReply, RunRequest
from actors.relay import ROUTE, STEP, TO_CALLER, Relay
from recovery.errors import BadFrame, BrowserLost, PoolError
from sharding.models.frames import Frame, decode, encode

_LENGTH = struct.Struct("<Q")
_OVERHEAD_BYTES = 1 << 20  # what a frame's header may add to its tensors
_STREAM_BYTES = 1 << 20  # read-ahead of a connection
_GREETING_SECONDS = 5.0
_REQUEST = TypeAdapter(RunRequest)
_REPLY = TypeAdapter(RunReply)

RunHost = Callable[[RunRequest, Mapping[str, Any]], Awaitable[RunReply]]


async def _read(reader: asyncio.StreamReader, bytes_max: int) -> Frame:
    """The next frame. Raises `BadFrame`, `EOFError` or `OSError`."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > bytes_max + _OVERHEAD_BYTES:
        raise BadFrame(f"a frame of {length} bytes; the limit is {bytes_max}")
    return decode(await reader.readexactly(length), bytes_max=bytes_max + _OVERHEAD_BYTES)


def _write(writer: asyncio.StreamWriter, frame: Frame, bytes_max: int) -> None:
    data = encode(frame, bytes_max=bytes_max + _OVERHEAD_BYTES)
    writer.write(_LENGTH.pack(len(data)))
    writer.write(data)


def _set_limits(writer: asyncio.StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(high=_STREAM_BYTES)


class DataServer:
    """The worker's end. Each connection must begin with a greeting that holds the token."""

    def __init__(self, run: RunHost, bytes_max: int) -> None:
        self._run = run
        self._bytes_max = bytes_max
        self._relay = Relay(run, lambda address, token: DataLink(address, token, bytes_max))
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.token = secrets.token_urlsafe(32)
        self.address = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_STREAM_BYTES)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._relay.close()
        for writer in list(self._writers):
            writer.close()
        if self._connections:
            await asyncio.wait(list(self._connections), timeout=_GREETING_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        _set_limits(writer)

        def say(frame: Frame) -> None:
            if not writer.is_closing():
                _write(writer, frame, self._bytes_max)

        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                greeting = await _read(reader, _OVERHEAD_BYTES)
            if not hmac.compare_digest(greeting.op_id.encode(), self.token.encode()):
                return
            _write(writer, Frame("welcome"), _OVERHEAD_BYTES)
            while True:
                frame = await _read(reader, self._bytes_max)
                if frame.kind == ROUTE:
                    say(self._relay.lay(frame, say))
                    continue
                work = self._relay.step if frame.kind == STEP else partial(self._answer, writer)
                working = asyncio.create_task(work(frame))
                self._tasks.add(working)
                working.add_done_callback(self._tasks.discard)
        except (BadFrame, EOFError, OSError, TimeoutError, ValueError):
            pass  # a client that is gone, or that does not speak the protocol, is let go
        finally:
            self._relay.drop(say)
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, frame: Frame) -> None:
        told = False
        try:
            with contextlib.suppress(OSError):
                try:
                    request = _REQUEST.validate_python(dict(frame.body))
                    reply = await self._run(request, frame.tensors)
                    body = _REPLY.dump_python(reply, mode="json", exclude={"outputs"})
                    answer = Frame("reply", frame.op_id, body=body, tensors=reply.outputs or {})
                    _write(writer, answer, self._bytes_max)  # refuses what is too large
                except (PoolError, ValueError) as error:
                    body = {"refused": str(error)[:4096], "error_type": type(error).__name__}
                    _write(writer, Frame("refused", frame.op_id, body=body), self._bytes_max)
                told = True
                await writer.drain()
        finally:
            if not told:  # an error of ours: whoever waits must not wait for ever
                writer.close()


class DataLink:
    """A client's connection to one worker, shared by all its operations there."""

    def __init__(self, address: str, token: str, bytes_max: int) -> None:
        self._address = address
        self._token = token
        self._bytes_max = bytes_max
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._pending: dict[str, asyncio.Future[Frame]] = {}
        self._listening: dict[tuple[str, int], Callable[[Frame | None], None]] = {}
        self._number = 0

    async def open(self) -> None:
        """Connect, greet and be welcomed. Raises `BrowserLost`."""
        host, _, port = self._address.rpartition(":")
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                reader, writer = await asyncio.open_connection(host, int(port), limit=_STREAM_BYTES)
                _set_limits(writer)
                _write(writer, Frame("greeting", self._token), _OVERHEAD_BYTES)
                # The port of a process that dies accepts for a moment; only an answer counts.
                await _read(reader, _OVERHEAD_BYTES)
        except (BadFrame, EOFError, OSError, TimeoutError) as error:
            if writer is not None:
                writer.close()
            raise BrowserLost("the worker is gone", what="worker_exited") from error
        self._writer = writer
        self._reader_task = asyncio.create_task(self._receive(reader), name="data-link")

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                frame = await _read(reader, self._bytes_max)
                if frame.kind in TO_CALLER:
                    key = (frame.op_id, int(frame.body.get("stage", -1)))
                    hear = self._listening.get(key)
                    if hear is not None:
                        hear(frame)
                    continue
                waiting = self._pending.pop(frame.op_id, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(frame)
        except (BadFrame, EOFError, OSError):
            pass  # told below, to everyone who waits
        finally:
            self._fail()

    def _fail(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        pending, self._pending = self._pending, {}
        for waiting in pending.values():
            if not waiting.done():
                waiting.set_exception(
                    BrowserLost("the connection to the worker is lost", what="socket_closed")
                )
                waiting.exception()  # whoever waited may have gone; that is no unseen error
        for hear in list(self._listening.values()):
            hear(None)

    @property
    def busy(self) -> bool:
        return bool(self._pending or self._listening)

    @property
    def closed(self) -> bool:
        return self._writer is None

    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
        """As `BrowserHost.run`. Raises `BrowserLost` when the worker dies meanwhile."""
        # The same operation may be under way twice (a caller gave up and asks again): the
        # number tells the two exchanges apart, the request holds the operation's own id.
        self._number += 1
        exchange = f"{request.op_id}:{self._number}"
        body = _REQUEST.dump_python(request, mode="json")
        frame = await self.ask(Frame("run", exchange, body=body, tensors=tensors))
        if frame.kind != "reply":
            raise BrowserLost(str(frame.body.get("refused", "refused")), what="refused")
        try:
            reply = _REPLY.validate_python(dict(frame.body))
        except ValueError as error:
            raise BrowserLost(
                f"the worker's answer can't be read: {error}", what="bad_frame"
            ) from error
        return replace(reply, outputs=frame.tensors) if reply.answered else reply

    async def ask(self, frame: Frame) -> Frame:
        """The worker's answer to a frame. Raises `BrowserLost`."""
        waiting: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._pending[frame.op_id] = waiting
        try:
            await self.send(frame)
            return await waiting
        finally:
            self._pending.pop(frame.op_id, None)

    async def send(self, frame: Frame) -> None:
        """Send a frame that nobody answers. Raises `BrowserLost`."""
        if self._writer is None:
            raise BrowserLost("the connection to the worker is lost", what="socket_closed")
        try:
            _write(self._writer, frame, self._bytes_max)
            await self._writer.drain()
        except OSError as error:
            raise BrowserLost(
                "the connection to the worker is lost", what="socket_closed"
            ) from error

    def listen(self, sequence: str, stage: int, hear: Callable[[Frame | None], None]) -> None:
        """Have `hear` called with what the worker says of a sequence's stage; None: no more."""
        self._listening[sequence, stage] = hear

    def ignore(self, sequence: str, stage: int) -> None:
        self._listening.pop((sequence, stage), None)

    async def close(self) -> None:
        if self._reader_task is not None:
            self._reader_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader_task
        self._fail()
