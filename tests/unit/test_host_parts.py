"""The small parts of a browser's host: incarnation, events, lease, answers, models' files."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from actors.browser.answers import AnswerCache, fingerprint
from actors.browser.events import HostEvents
from actors.browser.facts import product, read_facts
from actors.browser.incarnation import Incarnation
from actors.browser.launch import Launcher
from actors.browser.lease import Lease
from actors.browser.models import check_unchanged, worth_trying
from actors.driver.binaries import Binaries
from actors.messages import LaunchOrder, LaunchReport, RunReply
from recovery.errors import BrowserLost, LaunchFailed, PageError, SetupError, StaleTerm
from recovery.kinds import Backend, BrowserType, Readiness
from recovery.records import BrowserFacts, HostRef, HostStatus
from sharding.models.signature import read_signature
from tests import models

CHROME = BrowserType.CHROME
REF, NEXT = HostRef("b", 0), HostRef("b", 1)
FACTS = read_facts(CHROME, None, {"browserName": "chrome", "browserVersion": "1"}, {})
STATUS = HostStatus(REF, CHROME, Readiness.READY)


def incarnation(ended: list) -> Incarnation:
    made = Incarnation("b", CHROME, lambda: 5.0, lambda: 9.0, on_end=ended.append, context=dict)
    made.begin(REF)
    return made


# -- incarnation ---------------------------------------------------------------------------------


def test_only_the_first_cause_of_an_end_counts():
    ended = []
    it = incarnation(ended)
    it.lost(NEXT, "driver_exited")  # another one's
    assert ended == []
    it.lost(REF, "browser_exited")
    it.lost(REF, "driver_exited")
    assert [failure.message for failure in ended] == ["browser exited"]
    assert it.over.is_set()
    assert it.cause is ended[0]
    assert ended[0].at == 9.0


def test_next_incarnation_is_newer_and_knows_what_ended_the_one_before():
    it = incarnation([])
    it.lost(REF, "browser_exited")
    with pytest.raises(StaleTerm):
        it.begin(REF)
    it.begin(NEXT)
    assert (it.ref, it.cause, it.ended_by) == (NEXT, None, "crash")
    assert not it.over.is_set()
    assert it.readiness is Readiness.STARTING


def test_what_is_over_is_not_present():
    it = incarnation([])
    it.require(REF)
    it.retire()
    with pytest.raises(BrowserLost, match="is not current"):
        it.require(REF)
    assert not it.is_present(REF)


# -- launches ------------------------------------------------------------------------------------

REPORT = LaunchReport(FACTS, 1, {}, {}, "")


class Launching:
    """Launches that the test lets succeed or fail."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.gates: list[asyncio.Future] = []
        self.begun: list[tuple[HostRef, bool]] = []
        self.incarnation = Incarnation(
            "b", CHROME, lambda: 0.0, lambda: 0.0, on_end=self.end, context=dict
        )
        self.it = Launcher(
            self.incarnation,
            seconds,
            work=self.work,
            retire=self.retire,
            on_begin=lambda order, first: self.begun.append((order.ref, first)),
            console=lambda: ("said",),
        )

    async def work(self, order: LaunchOrder) -> LaunchReport:
        self.gates.append(asyncio.get_running_loop().create_future())
        return await self.gates[-1]

    def end(self, failure) -> None:
        self.retire()

    def retire(self) -> None:
        self.incarnation.retire()
        self.it.cancel()

    async def order(self, ref: HostRef) -> asyncio.Task:
        task = asyncio.create_task(self.it.launch(LaunchOrder(ref, 1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task


async def test_the_same_order_joins_a_launch_and_is_told_what_it_came_to():
    it = Launching()
    first, again = await it.order(REF), await it.order(REF)
    it.gates[0].set_result(REPORT)
    assert await first == await again == REPORT
    assert it.begun == [(REF, True)]
    assert await it.it.launch(LaunchOrder(REF, 1)) == REPORT
    assert len(it.gates) == 1


async def test_launch_goes_on_when_the_call_is_abandoned():
    it = Launching()
    call = await it.order(REF)
    call.cancel()
    await asyncio.wait({call})
    it.gates[0].set_result(REPORT)
    assert await it.it.launch(LaunchOrder(REF, 1)) == REPORT


async def test_newer_order_ends_a_launch_and_an_older_one_is_refused():
    it = Launching()
    first = await it.order(REF)
    second = await it.order(NEXT)
    with pytest.raises(BrowserLost, match="stopped during its launch"):
        await first
    it.gates[1].set_result(REPORT)
    assert await second == REPORT
    assert it.begun == [(REF, True), (NEXT, False)]
    with pytest.raises(StaleTerm):
        await it.it.launch(LaunchOrder(REF, 1))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (BrowserLost("gone"), LaunchFailed, "gone"),
        (OSError("no space"), SetupError, "TABPOOL_CACHE"),
        (SetupError("not installed"), SetupError, "not installed"),
    ],
)
async def test_what_a_launch_fails_of_is_told_and_the_rest_is_retired(error, kind, said):
    it = Launching()
    call = await it.order(REF)
    it.gates[0].set_exception(error)
    with pytest.raises(kind, match=said):
        await call
    assert it.incarnation.readiness is Readiness.DEAD


async def test_launch_has_a_limit():
    it = Launching(seconds=0.01)
    with pytest.raises(LaunchFailed, match=r"not ready within 0\.01 s"):
        await (await it.order(REF))
    assert it.gates[0].cancelled()


async def test_order_for_an_incarnation_that_has_ended_says_why():
    it = Launching()
    call = await it.order(REF)
    it.gates[0].set_result(REPORT)
    await call
    it.incarnation.lost(REF, "browser_exited")
    with pytest.raises(BrowserLost, match="launched, and has ended: browser exited"):
        await it.it.launch(LaunchOrder(REF, 1))


# -- events and lease ----------------------------------------------------------------------------


async def test_events_are_kept_until_acknowledged():
    events = HostEvents()
    events.put(REF, breakers={})
    events.put(NEXT, breakers={})
    first = await events.next(0, 1.0)
    assert (first.seq, first.ref) == (1, REF)
    assert await events.next(0, 1.0) == first, "it was not acknowledged"
    assert (await events.next(1, 1.0)).seq == 2
    assert await events.next(2, 0.0) is None


async def test_number_of_another_worker_acknowledges_nothing():
    events = HostEvents()
    events.put(REF, breakers={})
    assert (await events.next(40, 1.0)).seq == 1


async def test_event_that_comes_while_it_is_waited_for_is_given_at_once():
    events = HostEvents()
    waiting = asyncio.create_task(events.next(0, 5.0))
    await asyncio.sleep(0)
    events.put(REF, breakers={})
    assert (await waiting).seq == 1


async def test_too_many_events_cost_the_oldest():
    events = HostEvents()
    for _ in range(300):
        events.put(REF, breakers={})
    assert (await events.next(0, 1.0)).seq == 300 - 256 + 1


async def test_lease_runs_out_unless_it_is_extended_and_older_terms_are_refused():
    now, over = [0.0], asyncio.Event()

    async def on_over() -> None:
        over.set()

    lease = Lease(0.02, lambda: now[0], on_over)
    lease.accept(2)
    with pytest.raises(StaleTerm):
        lease.accept(1)
    await asyncio.sleep(0.03)
    assert not over.is_set(), "by its own clock no time has passed"
    now[0] = 0.03
    await asyncio.wait_for(over.wait(), 5)


# -- answers -------------------------------------------------------------------------------------


def reply(size: int) -> RunReply:
    return RunReply(STATUS, outputs={"y": np.zeros(size, np.uint8)}, answered=True)


def test_answers_are_bounded_by_number_and_bytes_and_one_too_large_is_not_kept():
    cache = AnswerCache(answers_max=2, bytes_max=100)
    for name, size in (("a", 10), ("b", 10), ("c", 10)):
        cache.put(name, reply(size))
    assert [cache.get(name) is not None for name in "abc"] == [False, True, True]
    cache.put("d", reply(95))
    assert [cache.get(name) is not None for name in "bcd"] == [False, False, True]
    cache.put("e", reply(101))
    assert cache.get("e") is None
    assert cache.get("d") is not None


def test_two_questions_under_one_id_are_told_apart():
    ones = {"x": np.ones(4, np.float32)}
    assert fingerprint(ones) == fingerprint({"x": np.ones(4, np.float32)})
    others = [
        {"x": np.ones(4, np.int32)},
        {"x": np.ones((2, 2), np.float32)},
        {"z": np.ones(4, np.float32)},
        {"x": np.array([1, 1, 1, 2], np.float32)},
    ]
    assert len({fingerprint(ones), *map(fingerprint, others)}) == 5


# -- models --------------------------------------------------------------------------------------


def test_software_adapter_is_tried_only_when_forced():
    every = (Backend.WEBGPU, Backend.WEBNN, Backend.WASM)
    soft = replace(FACTS, webgpu=True, webgpu_software=True)
    hard = replace(soft, webgpu_software=False)
    assert worth_trying(every, soft) == (Backend.WASM,)
    assert worth_trying(every, hard) == (Backend.WEBGPU, Backend.WASM)
    assert worth_trying((Backend.WEBGPU,), soft) == (Backend.WEBGPU,)
    assert worth_trying(every, None) == every


def test_file_that_changed_is_refused_and_one_that_did_not_is_read_once(tmp_path, monkeypatch):
    path = models.add_model(tmp_path / "m.onnx")
    spec, checked = read_signature(path, name="m"), {}
    check_unchanged(spec, checked)
    assert len(checked) == 1

    def refuse(*_):
        raise AssertionError("it was read again")

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", refuse)
        check_unchanged(spec, checked)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(PageError, match="has changed since m was loaded"):
        check_unchanged(spec, checked)


def test_packed_copy_beside_a_model_is_refused(tmp_path):
    path = models.add_model(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.gz").write_bytes(b"")
    with pytest.raises(PageError, match="is beside the model"):
        check_unchanged(read_signature(path, name="m"), {})


# -- facts ---------------------------------------------------------------------------------------


def test_no_browser_is_passed_off_as_another():
    chromium = Binaries(CHROME, "/usr/bin/chromium", "driver")
    mini = Binaries(BrowserType.SAFARI, "/usr/lib/MiniBrowser", "driver")
    assert product(CHROME, chromium, {"browserName": "chrome"}) == "Chromium"
    assert product(BrowserType.SAFARI, mini, {}) == "WebKitGTK MiniBrowser"
    assert product(BrowserType.FIREFOX, None, {"browserName": "firefox"}) == "Firefox"


def test_facts_are_what_driver_and_page_say():
    found = read_facts(
        CHROME,
        None,
        {"browserVersion": "156.0", "chrome": {"chromedriverVersion": "156.0 (abc)"}},
        {"isolated": True, "wasmSimd": True, "threads": 2, "webgpuNote": "no adapter"},
    )
    assert isinstance(found, BrowserFacts)
    assert (found.version, found.driver) == ("156.0", "156.0")
    assert (found.isolated, found.wasm_simd, found.threads) == (True, True, 2)
    assert (found.webgpu, found.webgpu_adapter) == (False, "no adapter")
