"""Frames to the page, and its replies."""

import asyncio
import math

import numpy as np
import pytest

from actors.bridge import PROTOCOL
from actors.bridge.exchanges import Exchanges
from recovery.errors import BrowserLost, MessageTooLarge, PageError
from sharding.models.frames import Frame, encode
from tests import fakes
from tests.served import LIMIT, X, a_request_works, event, serving


async def test_page_answers_frames():
    async with serving() as served, served.page() as page:
        assert page.data.protocol == PROTOCOL
        await a_request_works(served, page)


async def test_answers_may_come_in_any_order():
    async with serving() as served, served.page() as page:
        asked = [
            asyncio.create_task(served.bridge.request(Frame("run", f"op{n}", body={"n": n})))
            for n in range(5)
        ]
        frames = [await page.receive() for _ in asked]
        for frame in reversed(frames):
            await page.send(Frame("result", frame.op_id, body=frame.body))
        assert [answer.body["n"] for answer in await asyncio.gather(*asked)] == list(range(5))


async def test_error_of_the_page_is_raised_with_its_facts():
    async with serving() as served, served.page() as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        await page.answer_once("error", body={"what": "run_failed", "message": "bad shape"})
        with pytest.raises(PageError, match="bad shape") as caught:
            await asked
        assert caught.value.fields == {"what": "run_failed"}


async def test_answer_of_another_epoch_is_ignored():
    async with serving() as served, served.page(epoch=4) as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op", 4)))
        await page.receive()
        await page.send(Frame("result", "op", 3, body={"stale": True}))
        await page.send(Frame("result", "op", 4, body={"stale": False}))
        assert (await asked).body == {"stale": False}
        assert any("epoch 3" in line for line in served.bridge.console)


async def test_answer_that_nobody_waits_for_any_more_is_dropped():
    async with serving() as served, served.page() as page:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await served.bridge.request(Frame("run", "late"))
        await page.answer_once()
        await a_request_works(served, page)


async def test_request_waits_for_a_data_socket_that_is_away():
    async with serving() as served, served.page() as page:
        await page.data.close()
        await event(served, "closed")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await served.bridge.request(Frame("run", "impatient"))
        assert served.bridge.outstanding == 0, "a page that is away works on nothing"
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        await asyncio.sleep(0.01)
        async with served.connect("data", page.cookie) as page.data:
            await page.answer_once(body={"n": 1})
            assert (await asked).body == {"n": 1}


async def test_request_that_waits_for_a_socket_ends_with_the_page():
    async with serving() as served, served.page() as page:
        await page.data.close()
        await event(served, "closed")
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        back = asyncio.create_task(served.bridge.reconnected())
        await asyncio.sleep(0.01)
        served.begin(epoch=1)
        for waiting in (asked, back):
            with pytest.raises(BrowserLost, match="not connected"):
                await waiting


async def test_request_over_the_limit_is_the_callers_fault():
    async with serving() as served, served.page() as page:
        with pytest.raises(MessageTooLarge):
            await served.bridge.request(Frame("run", "op", tensors={"x": np.zeros(LIMIT)}))
        await a_request_works(served, page)


# -- exchanges alone -------------------------------------------------------------------------------


class Line:
    """Both the register of sockets and the one socket in it; what is sent goes nowhere."""

    def __init__(self) -> None:
        self.sent = 0
        self.broken = False

    async def opened(self, name: str) -> "Line":
        assert name == "data"
        return self

    async def send_bytes(self, data: bytes) -> None:
        if self.broken:
            raise ConnectionResetError
        self.sent += 1


class Asked:
    """Exchanges over a line, at a time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.line = Line()
        self.complaints: list[str] = []
        self.exchanges = Exchanges(LIMIT, self.line, self.complaints.append, lambda: self.now)

    async def ask(self, op_id: str, seconds: float = 10.0, **body: str) -> asyncio.Task[Frame]:
        sent = self.line.sent
        frame = Frame("run", op_id, body=body)
        asked = asyncio.create_task(self.exchanges.request(frame, seconds))
        await fakes.eventually(lambda: self.line.sent > sent)
        return asked

    def answer(self, op_id: str) -> None:
        self.exchanges.hear(encode(Frame("result", op_id), bytes_max=LIMIT), 0, 0)


async def test_only_what_the_page_works_on_can_be_overdue():
    ours = Asked()
    assert ours.exchanges.overdue() == (math.inf, "")
    first, second = await ours.ask("first"), await ours.ask("second")
    ours.now = 12.0
    assert ours.exchanges.overdue() == (-2.0, "first")
    ours.answer("first")
    assert ours.exchanges.overdue() == (10.0, "second")  # it has waited for its turn until now
    ours.answer("second")
    assert ours.exchanges.outstanding == 0
    await asyncio.gather(first, second)


async def test_death_is_of_the_model_that_the_page_worked_on():
    ours = Asked()
    assert ours.exchanges.working_on == ""
    abandoned = await ours.ask("first", model="slow")
    asked = [await ours.ask("second", model="quick"), await ours.ask("third")]
    abandoned.cancel()  # the page computes it all the same
    assert ours.exchanges.working_on == "slow"
    ours.answer("first")
    assert ours.exchanges.working_on == "quick"
    for _ in range(2):  # the socket closes, then the page is ended
        ours.exchanges.fail("it died")
    await asyncio.wait(asked)
    assert (ours.exchanges.outstanding, ours.exchanges.working_on) == (0, "quick")
    ours.exchanges.begin()
    assert ours.exchanges.working_on == ""


async def test_death_while_idle_is_of_no_model():
    ours = Asked()
    asked = [await ours.ask("first", model="m")]
    ours.answer("first")
    ours.exchanges.fail("it died")
    await asyncio.wait(asked)
    assert ours.exchanges.working_on == ""
    asked = [await ours.ask("second", model="m")]
    ours.exchanges.fail("the network broke")
    asked.append(await ours.ask("third"))  # of no model; the page may still be at the second
    assert ours.exchanges.working_on == "m"
    ours.answer("third")
    assert ours.exchanges.working_on == ""
    await asyncio.wait(asked)


async def test_abandoned_request_is_outstanding_until_the_page_has_finished_it():
    ours = Asked()
    asked = await ours.ask("op")
    asked.cancel()
    await asyncio.wait({asked})
    assert ours.exchanges.outstanding == 1
    ours.answer("op")
    assert ours.exchanges.outstanding == 0


async def test_requests_end_with_their_socket():
    ours = Asked()
    asked = await ours.ask("op")
    ours.exchanges.fail("it closed", "socket_closed")
    with pytest.raises(BrowserLost, match="it closed") as caught:
        await asked
    assert caught.value.fields == {"what": "socket_closed"}
    assert ours.exchanges.outstanding == 0


async def test_socket_that_breaks_while_it_is_written_to_is_closed():
    ours = Asked()
    ours.line.broken = True
    with pytest.raises(BrowserLost, match="closed"):
        await ours.exchanges.request(Frame("run", "op"))


async def test_headers_of_frames_are_kept_and_numbers_are_not():
    ours = Asked()
    asked = asyncio.create_task(ours.exchanges.request(Frame("run", "op", tensors=X)))
    await fakes.eventually(lambda: bool(ours.line.sent))
    ours.answer("op")
    await asked
    to, back = ours.exchanges.frames
    assert (to.way, to.op_id, to.tensors) == ("to", "op", (("x", "float32", (4,)),))
    assert (back.way, back.kind, back.tensors) == ("from", "result", ())


def spoilt(op_id: str) -> bytes:
    """A result for `op_id` whose header can be read, with a byte of data too many."""
    return encode(Frame("result", op_id, tensors=X), bytes_max=LIMIT) + b"!"


@pytest.mark.parametrize("data", [b"", b"nonsense", "text", b"\xff" * 100, spoilt("nobody's")])
async def test_reply_that_can_not_be_read_is_one_to_what_the_page_works_on(data):
    ours = Asked()
    first, second = await ours.ask("first", model="a"), await ours.ask("second", model="b")
    ours.exchanges.hear(data, 0, 0)
    with pytest.raises(PageError, match=r"answer can't be read: ") as caught:
        await first
    assert caught.value.fields == {"what": "bad_frame"}
    assert (ours.exchanges.outstanding, ours.exchanges.working_on) == (1, "b")
    assert ours.exchanges.overdue() == (10.0, "second")
    ours.answer("second")
    await second


async def test_reply_that_can_not_be_read_but_for_its_name_is_one_to_that_request():
    ours = Asked()
    first, second = await ours.ask("first"), await ours.ask("second")
    ours.exchanges.hear(spoilt("second"), 0, 0)
    with pytest.raises(PageError):
        await second
    ours.answer("first")
    await first


async def test_reply_that_can_not_be_read_of_an_earlier_page_is_nobodys():
    ours = Asked()
    asked = await ours.ask("op")
    ours.exchanges.hear(spoilt("op"), 0, 1)
    await asyncio.sleep(0)
    assert not asked.done()
    ours.answer("op")
    await asked


async def test_request_that_the_page_could_not_read_fails_at_once():
    async with serving() as served, served.page() as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        await page.receive()
        body = {"what": "bad_frame", "message": "RangeError: no such view"}
        await page.send(Frame("error", body=body))
        with pytest.raises(PageError, match="no such view"):
            await asked
        await a_request_works(served, page)


async def test_reply_that_can_not_be_read_leaves_the_page_as_it_is():
    async with serving() as served, served.page() as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        await page.receive()
        await page.data.send_bytes(spoilt("op"))
        with pytest.raises(PageError, match="can't be read"):
            await asked
        assert served.bridge.connected
        assert any("refused a frame" in line for line in served.bridge.console)
        await a_request_works(served, page)


async def test_what_is_no_frame_is_complained_of():
    ours = Asked()
    ours.exchanges.hear(b"nonsense", 0, 0)
    ours.exchanges.hear(encode(Frame("result", "op", 0), bytes_max=LIMIT), 0, 1)
    assert [line[:15] for line in ours.complaints] == ["refused a frame"] * 2
