"""Requests to the page's worker and their replies: frames over the data socket.

Tracks unanswered requests, and since when the page works on the first of them. This module must
not act on a slow page: it reports how slow it is.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from actors.bridge.records import FrameSeen
from actors.bridge.sockets import Sockets, fail_waiting
from recovery.errors import BadFrame, BrowserLost, PageError
from sharding.models.frames import Frame, claimed_op_id, decode, encode

WORK_SECONDS = 300.0  # default limit of one request
_FRAMES_MAX = 64
_FRAME_OVERHEAD_BYTES = 1 << 20  # for a reply's header, on top of the limit on its tensors


class _Asked(NamedTuple):
    """A request that the page has not answered: its time limit, and its model if it has one."""

    seconds_max: float
    model: str


class Exchanges:
    """The requests in flight to a page. `complain` is called with notes on invalid messages."""

    def __init__(
        self,
        message_bytes_max: int,
        sockets: Sockets,
        complain: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._message_bytes_max = message_bytes_max
        self._sockets = sockets
        self._complain = complain
        self._clock = clock
        self._pending: dict[str, asyncio.Future[Frame]] = {}
        # Unanswered requests in the order of execution; abandoned ones too, since the page still
        # computes them.
        self._exchanges: OrderedDict[str, _Asked] = OrderedDict()
        self._interrupted = ""  # model of the request that the end of the last socket cut off
        self._head_since = 0.0
        self.frames: deque[FrameSeen] = deque(
            maxlen=_FRAMES_MAX
        )  # the last ones, in both directions

    @property
    def reply_bytes_max(self) -> int:
        """Size limit of a message from the page."""
        return self._message_bytes_max + _FRAME_OVERHEAD_BYTES

    def hear(self, data: Any, epoch: int, epoch_now: int) -> None:
        """Handle a message from a page of `epoch`, while that of `epoch_now` is expected."""
        try:
            frame = decode(data, bytes_max=self.reply_bytes_max)
        except BadFrame as error:
            self._complain(f"refused a frame: {error}")
            if epoch == epoch_now:
                self._unreadable(data, error)
            return
        if frame.epoch != epoch_now or epoch != epoch_now:
            self._complain(f"refused a frame of epoch {frame.epoch}")
            return
        self._note("from", frame)
        waiting = self._waiting_for(frame.op_id)
        if waiting is not None:
            waiting.set_result(frame)

    def _unreadable(self, data: Any, error: BadFrame) -> None:
        """A reply that can't be decoded is one all the same: the page has done its work."""
        claimed = claimed_op_id(data)
        waiting = self._waiting_for(claimed if claimed in self._exchanges else "")
        if waiting is not None:
            waiting.set_exception(
                PageError(f"the page's answer can't be read: {error}", what="bad_frame")
            )

    def _waiting_for(self, op_id: str) -> asyncio.Future[Frame] | None:
        """Who waits for this reply; None if its deadline has passed.

        A reply that does not say to what is one to the oldest request: they come in order.
        """
        op_id = op_id or next(iter(self._exchanges), "")
        self._answered(op_id)
        waiting = self._pending.pop(op_id, None)
        return None if waiting is None or waiting.done() else waiting

    def _note(self, way: str, frame: Frame) -> None:
        tensors = tuple((name, a.dtype.name, a.shape) for name, a in frame.tensors.items())
        self.frames.append(
            FrameSeen(
                time.time(),
                way,
                frame.kind,
                frame.op_id,
                frame.epoch,
                frame.step,
                frame.position,
                tensors,
            )
        )

    def _answered(self, op_id: str) -> None:
        self._interrupted = ""  # replies come in order
        if self._exchanges.pop(op_id, None) is not None:
            self._head_since = self._clock()

    @property
    def outstanding(self) -> int:
        """Requests that the page has not finished, abandoned ones included."""
        return len(self._exchanges)

    def overdue(self) -> tuple[float, str]:
        """Seconds until the page's current request is overdue, and its operation id.

        0 or less: it is overdue. Infinity and an empty name when the page is idle.
        """
        for op_id, asked in self._exchanges.items():  # the head is what it works on
            return asked.seconds_max - (self._clock() - self._head_since), op_id
        return math.inf, ""

    @property
    def working_on(self) -> str:
        """The model of the page's current request; "" if that has none.

        A page whose socket was cut off goes on with what it had begun, so that counts until a
        reply shows that it is over.
        """
        head = next(iter(self._exchanges.values()), None)
        return self._interrupted or (head.model if head else "")

    def begin(self) -> None:
        """A new page, which has worked on nothing yet."""
        self._interrupted = ""

    async def request(self, frame: Frame, seconds_max: float = WORK_SECONDS) -> Frame:
        """Send a frame and wait for the reply to its operation id.

        `seconds_max` is how long the page may work on it before `overdue` names it; time in the
        queue does not count, nor does the time until a closed data socket is open again.
        Raises `BrowserLost` when the socket closes (`what` is `socket_closed`) or the page is
        ended, and `PageError` when it reports an error.
        """
        data = encode(frame, bytes_max=self._message_bytes_max)
        self._note("to", frame)
        socket = await self._sockets.opened("data")
        reply: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._pending[frame.op_id] = reply
        if not self._exchanges:
            self._head_since = self._clock()
        self._exchanges[frame.op_id] = _Asked(seconds_max, str(frame.body.get("model", "")))
        try:
            await socket.send_bytes(data)
            answer = await reply
        except ConnectionError as error:
            raise BrowserLost("the page's data socket is closed", what="socket_closed") from error
        finally:
            if self._pending.get(frame.op_id) is reply:
                del self._pending[frame.op_id]
        if answer.kind == "error":
            facts = {name: fact for name, fact in answer.body.items() if name != "message"}
            raise PageError(str(answer.body.get("message", "no reason given")), **facts)
        return answer

    def fail(self, why: str, what: str = "") -> None:
        """The socket is closed: fail all pending requests."""
        waiting, self._pending = self._pending, {}
        self._interrupted = self.working_on
        self._exchanges.clear()  # the page drops requests that it has not started
        fail_waiting(waiting.values(), why, what)
