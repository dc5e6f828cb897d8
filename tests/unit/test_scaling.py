import math
import pickle
import random
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recovery.scaling import READINGS_MAX, Change, Reading, ScalingLimits, choose_leaver, scale

LIMITS = ScalingLimits(minimum=2, maximum=5)


def steady(
    seconds: float,
    queued: int,
    busy: int | None = None,
    ready: int = 3,
    coming: int = 0,
    *,
    start: float = 0.0,
) -> list[Reading]:
    """A reading each second from `start` on, all the same."""
    busy = min(queued, ready) if busy is None else busy
    return [Reading(start + at, ready, coming, queued, busy) for at in range(int(seconds) + 1)]


def delta(
    readings: list[Reading], limits: ScalingLimits = LIMITS, changed_at: float = -math.inf
) -> int:
    return scale(limits, readings, changed_at, readings[-1].at).delta


# -- up --------------------------------------------------------------------------------------------


def test_lasting_queue_brings_one_more_browser():
    change = scale(LIMITS, steady(2, queued=6), -math.inf, 2.0)
    assert change == Change(1, "6 operations on 3 browsers, crowded for 2 s")


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        (steady(2, queued=5), 0),  # fewer than two for each
        (steady(1, queued=60), 0),  # not for so long
        ([*steady(1, queued=60), Reading(3.0, 3, 0, 60, 3)], 1),  # since before the two seconds
        ([Reading(0.0, 3, 0, 5, 3), *steady(1, queued=60, start=1.0)], 0),  # not from the start
        ([Reading(0.0, 3, 0, 5, 3), *steady(2, queued=60, start=1.0)], 1),  # that is forgotten
        ([*steady(1, queued=60), Reading(2.0, 3, 0, 5, 3)], 0),  # not any more
        (steady(2, queued=60, coming=1), 1),
        (steady(2, queued=60, coming=2), 0),  # those on their way count
        (steady(2, queued=60, ready=5), 0),
        (steady(2, queued=2, ready=0, coming=2), 1),  # without a browser, as if there were one
        (steady(2, queued=1, ready=0, coming=2), 0),
    ],
)
def test_when_one_more_browser_is_wanted(readings, expected):
    assert delta(readings) == expected


# -- down ------------------------------------------------------------------------------------------


def test_idle_pool_loses_one_browser():
    change = scale(LIMITS, steady(30, queued=0), -math.inf, 30.0)
    assert change == Change(-1, "at most 30% of 3 browsers busy for 30 s")


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        (steady(29, queued=0), 0),  # not for so long
        (steady(30, queued=1, ready=4), -1),
        (steady(30, queued=1, ready=3), 0),  # a third is busy
        (steady(30, queued=0, ready=2), 0),  # the minimum
        (steady(30, queued=0, coming=1), 0),
        (steady(30, queued=3, busy=0), -1),
        (steady(30, queued=4, busy=0), 0),  # two for each of the two that would remain
        ([Reading(0.0, 3, 0, 4, 1), *steady(29, queued=0, start=1.0)], 0),  # a burst at the start
        ([Reading(0.0, 3, 0, 4, 1), *steady(30, queued=0, start=1.0)], -1),  # that is forgotten
        ([Reading(0.0, 5, 0, 5, 1), *steady(29, queued=0, start=1.0)], 0),  # too much for two
    ],
)
def test_when_one_browser_fewer_will_do(readings, expected):
    assert delta(readings) == expected


def test_share_of_busy_browsers_may_be_just_as_large_as_allowed():
    readings = steady(30, queued=2, ready=4)
    assert delta(readings, replace(LIMITS, down_busy=0.5)) == -1
    assert delta(readings, replace(LIMITS, down_busy=0.49)) == 0


def test_last_browser_stays_though_the_minimum_is_none():
    limits = replace(LIMITS, minimum=0)
    assert delta(steady(30, queued=0, ready=2), limits) == -1
    assert delta(steady(30, queued=0, ready=1), limits) == 0


# -- bounds and settling ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ready", "coming", "expected"),
    [(0, 0, 2), (1, 0, 1), (0, 1, 1), (1, 1, 0), (5, 0, 0), (6, 0, -1), (9, 0, -1), (5, 1, 0)],
)
@pytest.mark.parametrize("queued", [0, 100])
def test_pool_outside_its_bounds_changes_at_once(ready, coming, expected, queued):
    assert delta([Reading(0.0, ready, coming, queued, 0)]) == expected


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        (steady(2, queued=60, start=100.0), 1),
        (steady(30, queued=0, start=100.0), -1),
        (steady(0, queued=0, ready=6, start=100.0), -1),
    ],
)
def test_nothing_changes_until_the_last_change_has_settled(readings, expected):
    now = readings[-1].at
    assert delta(readings, changed_at=now - 4.9) == 0
    assert delta(readings, changed_at=now - 5.0) == expected


def test_minimum_is_reached_before_anything_has_settled():
    assert delta([Reading(100.0, 1, 0, 0, 0)], changed_at=100.0) == 1


def test_no_readings_change_nothing():
    assert scale(LIMITS, [], -math.inf, 0.0).delta == 0


def test_readings_may_be_a_bounded_deque():
    kept = deque(steady(1000, queued=0), maxlen=READINGS_MAX)
    assert scale(LIMITS, kept, 0.0, 1000.0).delta == -1


# -- who leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "leaver"),
    [
        ([("a", 0, 1.0), ("b", 0, 2.0), ("c", 1, 3.0)], "b"),  # idle, and came last
        ([("a", 2, 1.0), ("b", 1, 0.0)], "b"),
        ([("b", 0, 1.0), ("a", 0, 1.0)], "a"),
        ([("a", 7, 1.0)], "a"),
    ],
)
def test_idle_browser_that_came_last_leaves(candidates, leaver):
    assert choose_leaver(candidates) == leaver


def test_nobody_can_be_chosen_of_none():
    with pytest.raises(ValueError, match="empty"):
        choose_leaver([])


# -- properties ------------------------------------------------------------------------------------

some_limits = st.builds(
    lambda least, more, up_queue, up, busy, down, settle: ScalingLimits(
        least, least + more, up_queue, up, busy, down, settle
    ),
    least=st.integers(0, 4),
    more=st.integers(0, 4),
    up_queue=st.floats(0.5, 4),
    up=st.floats(0, 5),
    busy=st.floats(0, 1),
    down=st.floats(0, 20),
    settle=st.floats(0, 10),
)
some_readings = st.lists(
    st.tuples(
        st.integers(1, 40),  # eighths of a second, so that sums are exact
        st.integers(0, 8),
        st.integers(0, 2),
        st.integers(0, 30),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=30,
)


def told(steps) -> list[Reading]:
    readings, at = [], 0.0
    for after, ready, coming, queued, share in steps:
        at += after / 8
        readings.append(Reading(at, ready, coming, queued, round(share * min(ready, queued))))
    return readings


@given(some_limits, some_readings, st.integers(0, 60))
def test_no_change_leads_out_of_the_bounds(limits, steps, ago):
    readings = told(steps)
    now = readings[-1].at
    change = scale(limits, readings, now - ago, now)
    browsers = readings[-1].ready + readings[-1].coming
    after = browsers + change.delta
    if browsers < limits.minimum:
        assert after == limits.minimum
    elif browsers <= limits.maximum:
        assert limits.minimum <= after <= limits.maximum
    else:
        assert after in (browsers, browsers - 1)
    assert change.why


@given(some_limits, some_readings, st.integers(0, 60))
def test_one_step_at_a_time_once_settled_and_none_down_while_anything_is_coming(limits, steps, ago):
    readings = told(steps)
    now, latest = readings[-1].at, readings[-1]
    change = scale(limits, readings, now - ago, now).delta
    if latest.ready + latest.coming >= limits.minimum:
        assert change in (-1, 0, 1)
        assert change == 0 or ago >= limits.settle_seconds
    assert not (change < 0 and latest.coming)


@given(some_limits, some_readings)
def test_pool_that_wants_one_more_could_not_do_with_one_fewer(limits, steps):
    readings = told(steps)
    latest = readings[-1]
    browsers = latest.ready + latest.coming
    assume(browsers >= limits.minimum)
    if delta(readings, limits) > 0:
        # The same pool, if no more were allowed: it would still not shrink.
        assert delta(readings, replace(limits, maximum=browsers)) == 0


@given(some_limits, some_readings, st.integers(-10, 10))
def test_only_the_time_between_readings_counts(limits, steps, days):
    readings = told(steps)
    moved = [replace(one, at=one.at + days * 86_400.0) for one in readings]
    limits = replace(limits, up_seconds=2.0, down_seconds=9.5)  # so that nothing rounds
    assert delta(moved, limits) == delta(readings, limits)


@given(some_limits, st.integers(0, 40), st.integers(1, 8))
def test_under_a_steady_load_the_pool_goes_one_way_and_stops(limits, queued, ready):
    assume(limits.maximum >= 1)
    changes, at = [], 0.0
    for _ in range(30):
        at += 1000.0
        busy = min(queued, ready)
        readings = [Reading(at + n, ready, 0, queued, busy) for n in range(22)]
        change = delta(readings, limits)
        changes.append(change)
        ready += change
    assert changes[-1] == 0
    within = [change for change in changes if change]
    assert len({change > 0 for change in within}) <= 1


# -- a day -----------------------------------------------------------------------------------------


class Day:
    """A pool under a load that comes and goes, judged once a second, with a slow launch."""

    LAUNCH_SECONDS = 8
    SERVED_PER_SECOND = 2.0  # by one browser

    def __init__(self, limits: ScalingLimits, seed: int) -> None:
        self.limits = limits
        self.random = random.Random(seed)
        self.ready, self.coming = limits.minimum, []
        self.backlog = 0.0
        self.burst_until = 0.0
        self.changed_at = -math.inf
        self.readings: deque[Reading] = deque(maxlen=READINGS_MAX)
        self.changes: list[tuple[float, int]] = []

    def arrivals(self, at: float) -> float:
        """Operations in this second: most at noon, few by night, with bursts in between."""
        if at >= self.burst_until and self.random.random() < 1 / 900:
            self.burst_until = at + self.random.uniform(1, 120)
        usual = 4 - 4 * math.cos(2 * math.pi * at / 86_400)
        return (usual + (8 if at < self.burst_until else 0)) * self.random.uniform(0, 2)

    def live(self, seconds: int) -> "Day":
        for at in map(float, range(seconds)):
            self.ready += sum(due <= at for due in self.coming)
            self.coming = [due for due in self.coming if due > at]
            if self.ready and self.random.random() < 1 / 7200:
                self.ready -= 1  # a browser is lost for good
            offered = self.backlog + self.arrivals(at)
            power = self.ready * self.SERVED_PER_SECOND
            self.backlog = min(max(offered - power, 0.0), 100.0)  # a full queue refuses
            busy = min(self.ready, round(offered / self.SERVED_PER_SECOND))
            queued = busy + int(self.backlog)
            self.readings.append(Reading(at, self.ready, len(self.coming), queued, busy))
            self.obey(at)
        return self

    def obey(self, at: float) -> None:
        change = scale(self.limits, self.readings, self.changed_at, at).delta
        if not change:
            return
        self.changes.append((at, change))
        self.changed_at = at
        self.coming += [at + self.LAUNCH_SECONDS] * max(change, 0)
        self.ready -= max(-change, 0)
        browsers = self.ready + len(self.coming)
        assert self.limits.minimum <= browsers <= self.limits.maximum

    def reversals(self, *, up_first: bool) -> list[float]:
        """How long after a change the opposite one came, in seconds."""
        pairs = zip(self.changes, self.changes[1:], strict=False)
        return [
            then - at
            for (at, first), (then, second) in pairs
            if first * second < 0 and (first > 0) is up_first
        ]


@pytest.mark.parametrize("seed", [0, 1])
def test_simulated_day_follows_the_load_and_never_oscillates(seed):
    limits = ScalingLimits(minimum=2, maximum=8)
    day = Day(limits, seed).live(86_400)
    ups = sum(max(change, 0) for _, change in day.changes)
    downs = sum(max(-change, 0) for _, change in day.changes)
    assert ups > 4  # it does follow
    assert downs > 4
    assert all(after >= limits.settle_seconds for after in day.reversals(up_first=False))
    # A browser that a queue brought stays until that queue is out of sight.
    assert all(after >= limits.down_seconds for after in day.reversals(up_first=True))


@given(some_limits, st.integers(0, 1000))
def test_no_reversal_before_a_change_has_settled_whatever_the_limits(limits, seed):
    day = Day(replace(limits, maximum=max(limits.maximum, 1)), seed).live(300)
    assert all(after >= limits.settle_seconds for after in day.reversals(up_first=True))


def test_everything_that_crosses_processes_pickles():
    things = [LIMITS, Reading(1.0, 2, 0, 3, 1), Change(1, "crowded")]
    assert pickle.loads(pickle.dumps(things)) == things
