"""What the close of a socket and the end of a page's process mean, on a page that is scripted."""

import asyncio

import pytest

from actors.bridge import BridgeEvent
from actors.browser.incarnation import Incarnation
from actors.browser.outages import Outages, answers
from actors.browser.page_process import PageProcess
from recovery.errors import BrowserLost
from recovery.kinds import BrowserType, Readiness
from recovery.records import HostRef
from tests import fakes

REF = HostRef("b", 0)
PAGE, SPARE = 10, 11


class ScriptedBridge:
    """A page whose sockets come back when the test says so."""

    def __init__(self) -> None:
        self.back = asyncio.Event()
        self.pings: list[Exception] = []  # what the next pings come to

    async def reconnected(self) -> None:
        await self.back.wait()

    async def ping(self) -> None:
        if self.pings:
            raise self.pings.pop(0)


class Watched:
    def __init__(self) -> None:
        self.bridge = ScriptedBridge()
        self.ended: list[str] = []
        self.outages: list[str] = []
        self.incarnation = Incarnation(
            "b",
            BrowserType.CHROME,
            asyncio.get_running_loop().time,
            lambda: 0.0,
            on_end=lambda failure: self.ended.append(failure.message),
            context=lambda: {"console": ("said",)},
        )
        self.incarnation.begin(REF)
        self.incarnation.readiness = Readiness.READY
        self.process = PageProcess(lambda: 0.0)
        self.process.candidates = (PAGE, SPARE)
        self.it = Outages(
            self.incarnation,
            self,  # a page that has but a bridge
            self.process,
            asyncio.get_running_loop().time,
            lambda failure: self.outages.append(failure.message),
        )

    def closes(self) -> None:
        self.it.note(BridgeEvent("data_closed", 0, {"socket": "data"}))


@pytest.fixture
async def watched() -> Watched:
    return Watched()


async def test_page_that_comes_back_was_only_out_of_touch(watched):
    watched.closes()
    await fakes.until(lambda: watched.it.out_of_touch is not None)
    assert watched.outages == ["the page's data socket closed"]
    watched.bridge.back.set()
    await fakes.until(lambda: watched.it.out_of_touch is None)
    assert watched.ended == []


async def test_process_that_ends_in_an_outage_was_the_page_s(watched):
    watched.closes()
    await asyncio.sleep(0)  # the outage has begun, and is not judged
    watched.it.page_process_ended(REF, PAGE)
    await watched.it.judged(REF)
    assert watched.ended == ["the page ended (data_closed)"]
    assert watched.outages == []


async def test_end_of_the_page_is_told_and_that_of_a_spare_means_nothing(watched):
    watched.process.pid = PAGE
    watched.it.page_process_ended(REF, SPARE)
    await asyncio.sleep(0.02)
    assert watched.ended == []
    watched.it.page_process_ended(REF, PAGE)
    await fakes.until(lambda: watched.ended)
    assert watched.ended == ["the page ended (process_ended)"]


async def test_end_of_any_alone_is_no_news_while_nobody_knows_which_is_the_page(watched):
    watched.it.page_process_ended(REF, SPARE)
    await asyncio.sleep(0.02)
    assert watched.ended == []


async def test_but_it_explains_a_close_that_follows(watched):
    watched.it.page_process_ended(REF, SPARE)
    watched.closes()
    await fakes.until(lambda: watched.ended)
    assert watched.outages == []


async def test_news_of_another_epoch_and_of_a_dead_browser_change_nothing(watched):
    watched.it.note(BridgeEvent("device_lost", 7))
    watched.it.page_process_ended(HostRef("b", 7), PAGE)
    watched.incarnation.retire()
    watched.it.note(BridgeEvent("device_lost", 0))
    await asyncio.sleep(0.02)
    assert watched.ended == []


async def test_lost_device_ends_the_incarnation(watched):
    watched.it.note(BridgeEvent("device_lost", 0, {"reason": "unknown"}))
    assert watched.ended == ["the page lost its GPU device"]
    assert watched.incarnation.cause.evidence["console"] == ("said",)


async def test_close_while_the_browser_starts_ends_it(watched):
    watched.incarnation.readiness = Readiness.STARTING
    watched.closes()
    await fakes.until(lambda: watched.ended)
    assert watched.outages == []


async def test_answer_is_waited_for_while_sockets_close_again_and_no_longer(watched):
    watched.bridge.back.set()
    closed = BrowserLost("closed", what="socket_closed")
    watched.bridge.pings = [closed, closed]
    await answers(watched.bridge, again_seconds=0.0)
    assert watched.bridge.pings == []
    watched.bridge.pings = [BrowserLost("gone", what="page_closed")]
    with pytest.raises(BrowserLost, match="gone"):
        await answers(watched.bridge)
