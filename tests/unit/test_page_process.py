"""Which of a browser's processes serves the page."""

import itertools

import pytest

from actors.browser.page_process import PageProcess

PAGE, SPARE = 10, 11


class Measured:
    """CPU seconds of two processes, set by hand, and a clock that goes on at every look."""

    def __init__(self) -> None:
        self.seconds = {PAGE: 1.0, SPARE: 1.0}
        clock = itertools.count(0.0, 1.0)
        self.process = PageProcess(
            lambda: next(clock), lambda pids: {pid: self.seconds[pid] for pid in pids}
        )
        self.process.candidates = (PAGE, SPARE)

    def used(self, page: float, spare: float) -> None:
        self.seconds = {PAGE: page, SPARE: spare}


@pytest.fixture
def it() -> Measured:
    return Measured()


def test_process_that_loads_the_model_is_the_page(it):
    it.used(page=1.5, spare=0.02)
    it.process.name({PAGE: 1.0, SPARE: 0.0})
    assert it.process.pid == PAGE


def test_what_is_known_is_not_overruled_by_weaker_evidence(it):
    it.used(page=1.5, spare=0.02)
    it.process.name({PAGE: 1.0, SPARE: 0.0})
    it.used(page=1.51, spare=0.9)
    assert it.process.measure() == {}
    it.process.name({PAGE: 1.5, SPARE: 0.02})
    assert it.process.pid == PAGE


def test_where_a_load_does_not_tell_the_operations_do(it):
    it.used(page=1.3, spare=1.2)
    it.process.name({PAGE: 1.0, SPARE: 1.0})
    assert it.process.pid == 0
    it.used(page=1.5, spare=1.2)
    it.process.worked()
    assert it.process.pid == PAGE


def test_a_process_that_has_ended_is_no_candidate_any_more(it):
    it.process.forget(SPARE)
    assert it.process.candidates == (PAGE,)  # its number may be another's soon
    it.used(page=1.5, spare=9.0)
    it.process.name({PAGE: 1.0})
    assert it.process.pid == PAGE


def test_another_browser_begins_without_knowledge(it):
    it.used(page=1.5, spare=0.02)
    it.process.name({PAGE: 1.0, SPARE: 0.0})
    it.process.reset()
    assert (it.process.pid, it.process.candidates, it.process.measure()) == (0, (), {})
