"""Which of a browser's processes serves the page, and what the end of each means."""

import asyncio
import itertools

import pytest

import actors.browser.host
from actors.browser.host import BrowserHost
from actors.messages import HostConfig
from recovery.kinds import BrowserType


@pytest.fixture
def host(monkeypatch) -> BrowserHost:
    clock = itertools.count(0.0, 1.0)
    host = BrowserHost(
        "b", BrowserType.CHROME, HostConfig(), lambda: None, clock=lambda: next(clock)
    )
    host._page_pids = (10, 11)
    host.gone = []  # type: ignore[attr-defined]
    monkeypatch.setattr(host, "_page_is_gone", lambda ref, event: host.gone.append(event.what))
    return host


def used(monkeypatch, **seconds: float) -> None:
    now = {10: seconds["page"], 11: seconds["spare"]}
    monkeypatch.setattr(
        actors.browser.host, "cpu_seconds", lambda pids: {pid: now[pid] for pid in pids}
    )


def test_process_that_loads_the_model_is_the_page(host, monkeypatch):
    used(monkeypatch, page=1.5, spare=0.02)
    host._name_page({10: 1.0, 11: 0.0})
    assert host._page_pid == 10


def test_what_is_known_is_not_overruled_by_weaker_evidence(host, monkeypatch):
    used(monkeypatch, page=1.5, spare=0.02)
    host._name_page({10: 1.0, 11: 0.0})
    used(monkeypatch, page=1.51, spare=0.9)
    host._name_page({10: 1.5, 11: 0.02})
    assert host._page_pid == 10


def test_where_a_load_does_not_tell_the_operations_do(host, monkeypatch):
    used(monkeypatch, page=1.3, spare=1.2)
    host._name_page({10: 1.0, 11: 1.0})
    assert host._page_pid == 0
    used(monkeypatch, page=1.5, spare=1.2)
    host._in_flight["op"] = None  # type: ignore[assignment]
    host._run_ended("op", "m")
    assert host._page_pid == 10


async def test_end_of_the_page_is_told_and_that_of_a_spare_means_nothing(host):
    host._page_pid = 10
    host._page_process_ended(host._ref, 11)
    await asyncio.sleep(0.02)
    assert host.gone == []
    assert host._page_pids == (10,)  # its number may be another's soon
    host._page_process_ended(host._ref, 10)
    await asyncio.sleep(0.02)
    assert host.gone == ["process_ended"]


async def test_end_of_any_is_a_hint_while_nobody_knows_which_is_the_page(host):
    host._page_process_ended(host._ref, 11)
    assert host.gone == []
    assert host._page_ended.is_set()
