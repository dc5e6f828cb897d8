"""A step that goes from browser to browser by itself: worker to worker, without its caller.

The caller lays a route once: each worker learns what stage of the sequence it has, who is next, and
what to tell the caller. Then a step is one frame to the first worker, and one from the last. Each
worker on the way may send the caller a copy of what it hands on, so that the caller can build any
stage again. Nothing is tried twice here: whoever can't go on tells the caller, which takes the step
over. This module must not decide what follows from a failure.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pydantic import TypeAdapter

from actors.links import Link, Links
from actors.messages import RunReply, RunRequest
from recovery.errors import BrowserLost, CallerError
from recovery.failures import Failure, categorize_browser_failure
from recovery.records import HostRef
from recovery.sequences import MISADDRESSED
from sharding.models.frames import Array, Frame
from sharding.sequences.caches import StepOrder

ROUTES_MAX = 1024  # of all sequences through one worker; the oldest goes
ROUTE, ROUTED, STEP, COPY, DONE, FAILED = "route", "routed", "step", "copy", "done", "failed"
TO_CALLER = frozenset({COPY, DONE, FAILED})

RunHost = Callable[[RunRequest, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Hop:
    """One stage of a route. `takes` are the names of its inputs, caches left out.

    `passes` are inputs of the uncut model that later stages need. `copies`: whether the caller is
    to have what is handed on. `address` and `token` are of the next worker's data plane, empty for
    the last.
    """

    stage: int
    ref: HostRef
    model: str
    digest: str
    fence: int
    takes: tuple[str, ...]
    passes: tuple[str, ...]
    choice: int | None
    deltas: bool
    copies: bool
    seconds: float
    address: str = ""
    token: str = ""


_HOP = TypeAdapter(Hop)


class NextLink(Link, Protocol):
    """A connection to another worker."""

    async def send(self, frame: Frame) -> None: ...


Say = Callable[[Frame], None]
MakeLink = Callable[[str, str], NextLink]


@dataclass(frozen=True)
class _Route:
    hop: Hop
    say: Say  # to the caller that laid it


class Relay:
    """The worker's end: the routes that lead through it."""

    def __init__(self, run: RunHost, make_link: MakeLink) -> None:
        self._run = run
        self._make_link = make_link
        self._routes: OrderedDict[tuple[str, int], _Route] = OrderedDict()
        self._links: Links[NextLink] = Links()

    def lay(self, frame: Frame, say: Say) -> Frame:
        """Take a route in; returns what to answer. Raises `ValueError` if it is none.

        It leads to workers of this machine only: a caller can't have one connect elsewhere.
        """
        hop = _HOP.validate_python(dict(frame.body))
        if hop.address and hop.address.rpartition(":")[0] != "127.0.0.1":
            raise ValueError(f"a route to {hop.address}, which is not on this machine")
        self._routes[frame.op_id.rpartition(":")[0], hop.stage] = _Route(hop, say)
        while len(self._routes) > ROUTES_MAX:
            self._routes.popitem(last=False)
        return Frame(ROUTED, frame.op_id)

    def drop(self, say: Say) -> None:
        """Forget the routes of a caller whose connection closed."""
        for key in [key for key, route in self._routes.items() if route.say == say]:
            del self._routes[key]

    async def step(self, frame: Frame) -> None:
        """Take a step and hand it on, or tell the caller why not."""
        sequence, stage = frame.op_id, int(frame.body.get("stage", -1))
        route = self._routes.get((sequence, stage))
        if route is None:
            return  # its caller is gone, or has another route by now
        self._routes.move_to_end((sequence, stage))  # the oldest goes first: by use
        try:
            await self._take(route, frame)
        except CallerError as error:  # also of what no message can carry
            self._failed(route, frame, str(error), "bad_call")

    async def _take(self, route: _Route, frame: Frame) -> None:
        hop, sequence, stage = route.hop, frame.op_id, route.hop.stage
        order = StepOrder(
            sequence, "step", hop.fence, frame.position, frame.step, hop.choice, hop.deltas
        )
        request = RunRequest(
            f"{sequence}:{hop.fence}:{frame.position}:{stage}",
            hop.ref,
            hop.model,
            hop.seconds,
            hop.digest,
            stage=order,
        )
        taken = {name: frame.tensors[name] for name in hop.takes if name in frame.tensors}
        reply: RunReply = await self._run(request, taken)
        if reply.outputs is None:
            failure = reply.failure
            what = str(failure.evidence.get("what", "")) if failure else ""
            self._failed(route, frame, failure.message if failure else "it is busy", what)
            return
        ms = reply.in_page_ms
        if not hop.address:
            route.say(_to_caller(DONE, frame, stage, ms, reply.outputs))
            return
        passed = {name: frame.tensors[name] for name in hop.passes}
        passed |= {n: a for n, a in reply.outputs.items() if not n.startswith("delta/")}
        onward = Frame(
            STEP,
            sequence,
            step=frame.step,
            position=frame.position,
            body={"stage": stage + 1},
            tensors=passed,
        )
        try:
            make = partial(self._make_link, hop.address, hop.token)
            await (await self._links.get(hop.address, make)).send(onward)
        except BrowserLost as error:
            self._failed(route, frame, f"stage {stage + 1} is out of reach: {error}", "")
            return
        copied = reply.outputs if hop.copies else {}
        route.say(_to_caller(COPY, frame, stage, ms, copied))

    def _failed(self, route: _Route, frame: Frame, why: str, what: str) -> None:
        body = {"stage": route.hop.stage, "why": why[:1000], "what": what}
        route.say(Frame(FAILED, frame.op_id, position=frame.position, body=body))

    async def close(self) -> None:
        """Let go of every route and connection."""
        self._routes.clear()
        await self._links.close()


def _to_caller(
    kind: str, frame: Frame, stage: int, ms: float, tensors: Mapping[str, Array]
) -> Frame:
    body = {"stage": stage, "ms": ms}
    return Frame(kind, frame.op_id, position=frame.position, body=body, tensors=tensors)


class CallerLink(Protocol):
    """The caller's connection to a worker (`actors.dataplane.DataLink`)."""

    async def ask(self, frame: Frame) -> Frame: ...
    async def send(self, frame: Frame) -> None: ...
    def listen(self, sequence: str, stage: int, hear: Callable[[Frame | None], None]) -> None: ...
    def ignore(self, sequence: str, stage: int) -> None: ...


class Chain:
    """The caller's end of one sequence's route. One step is under way at a time."""

    def __init__(self, sequence: str, hops: Sequence[Hop], links: Sequence[CallerLink]) -> None:
        self._sequence = sequence
        self._hops = tuple(hops)
        self._links = tuple(links)
        self._position = -1
        self._answers: dict[int, Mapping[str, Array]] = {}
        self._ms: dict[int, float] = {}
        self._step: asyncio.Future[bool] | None = None
        self.trouble: tuple[str, Failure | None] = ("", None)

    async def lay(self) -> None:
        """Have every worker know the route. Raises `BrowserLost`."""
        for hop, link in zip(self._hops, self._links, strict=True):
            link.listen(self._sequence, hop.stage, self._hear)
        await asyncio.gather(
            *(
                link.ask(
                    Frame(
                        ROUTE,
                        f"{self._sequence}:{hop.stage}",
                        body=_HOP.dump_python(hop, mode="json"),
                    )
                )
                for hop, link in zip(self._hops, self._links, strict=True)
            )
        )

    def leave(self) -> None:
        """Hear no more of it."""
        for hop, link in zip(self._hops, self._links, strict=True):
            link.ignore(self._sequence, hop.stage)

    async def step(
        self, position: int, tokens: int, tensors: Mapping[str, Array], seconds: float
    ) -> tuple[list[Mapping[str, Array]], float] | None:
        """What each stage answered, and the milliseconds in all pages. None: it went wrong.

        Of all stages but the last the answers are empty if no copies were asked for.
        """
        self._position, self._answers, self._ms = position, {}, {}
        self._step = asyncio.get_running_loop().create_future()
        frame = Frame(
            STEP,
            self._sequence,
            step=tokens,
            position=position,
            body={"stage": 0},
            tensors=tensors,
        )
        try:
            async with asyncio.timeout(seconds):
                await self._links[0].send(frame)
                whole = await self._step
        except TimeoutError:
            self.trouble = (f"no answer within {seconds:.3f} s", None)
            return None
        except BrowserLost as error:
            self.trouble = (str(error), None)
            return None
        finally:
            self._step = None
        if not whole:
            return None
        return [self._answers[hop.stage] for hop in self._hops], sum(self._ms.values())

    def _hear(self, frame: Frame | None) -> None:
        waiting = self._step
        if waiting is None or waiting.done():
            return
        if frame is None:
            self.trouble = ("a connection to a worker closed", None)
            waiting.set_result(False)
            return
        if frame.kind == FAILED:
            if frame.position == self._position:
                self.trouble = self._told(frame)
                waiting.set_result(False)
            return
        if frame.position != self._position:
            return
        stage = int(frame.body["stage"])
        self._ms[stage] = float(frame.body["ms"])
        self._answers[stage] = frame.tensors
        if len(self._answers) == len(self._hops):
            waiting.set_result(True)

    def _told(self, frame: Frame) -> tuple[str, Failure | None]:
        why, what = str(frame.body.get("why", "")), str(frame.body.get("what", ""))
        if not what or what in MISADDRESSED:
            return why, None
        refs = {hop.stage: hop.ref for hop in self._hops}
        facts = {"what": what, "ref": refs.get(int(frame.body["stage"])), "at": time.time()}
        return why, categorize_browser_failure(why, facts)
